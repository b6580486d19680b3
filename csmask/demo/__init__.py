"""The main job of csmask on a CPU: a circuit for "noun or verb" in MiniLM, trained on WordNet's example sentences.

``wordnet`` finds and reads the database, ``task`` makes the items and the frozen classifier, ``train`` trains the
masks, ``report`` draws and writes the results, and ``noun_verb`` puts them together. Nothing is imported here:
``wordnet`` itself needs only the standard library.
"""
