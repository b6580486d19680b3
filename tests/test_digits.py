"""examples/digits.py: runs as a script would, and the circuits that it finds are real."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import ResNetForImageClassification, ViTForImageClassification

from csmask import CircuitModel

pytest.importorskip("sklearn", reason="the example needs scikit-learn")
pytest.importorskip("matplotlib", reason="the example needs matplotlib")


@pytest.fixture(scope="module")
def digits():
    """The example as a module, its one thread given back afterwards."""
    path = Path(__file__).parents[1] / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", path)
    sys.modules["digits"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    del sys.modules["digits"]


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """One run of the whole, with so few steps that only the ResNet can be good."""
    output = tmp_path_factory.mktemp("digits") / "out"
    arguments = ["--seed", "1", "--output", str(output), "--model-steps", "120", "--mask-steps", "100"]
    return output, digits.main(arguments)


def test_the_circuit_of_the_resnet_is_real(run):
    result = run[1]["resnet"]
    assert result.full.mean > 0.95
    assert result.circuit.mean > result.full.mean - 0.05
    assert result.circuit.kept < 0.2
    assert result.ablated.mean < 0.35  # guessing: 0.1
    assert result.random.mean > 0.75
    assert result.selectivity > 0.5
    assert len(set(result.random.scores)) > 1


def test_the_circuit_of_the_vit_is_on_its_way(run):
    result = run[1]["vit"]
    assert result.circuit.kept < 0.5
    assert result.circuit.mean > result.ablated.mean
    assert result.selectivity > 0.1


def test_what_it_leaves_behind_gives_the_printed_numbers(run, digits):
    output, evaluations = run
    found = sorted(str(path.relative_to(output)) for path in output.glob("*"))
    assert found == ["accuracy.png", "resnet", "results.json", "vit"]
    content = json.loads((output / "results.json").read_text())
    pixels, labels = digits.load().test
    for name, cls in (("vit", ViTForImageClassification), ("resnet", ResNetForImageClassification)):
        assert content[name] == json.loads(json.dumps(evaluations[name].to_dict()))
        model = cls.from_pretrained(output / name / "model")
        circuit = CircuitModel.from_pretrained(model, output / name / "masks")
        with torch.no_grad():
            for mode, row in (("none", "circuit"), ("zero_ablate", "ablated")):
                circuit.set_ablate_mode(mode)
                accuracy = (circuit(pixel_values=pixels).logits.argmax(-1) == labels).float().mean().item()
                assert accuracy == content[name][row]["mean"]


def test_the_figure_shows_the_accuracies(run):
    import matplotlib.image

    picture = matplotlib.image.imread(run[0] / "accuracy.png")[..., :3]
    assert picture.shape[0] > 400
    assert picture.shape[1] > 1000
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    for panel in (left, right):  # each has bars in four colours
        colours, counts = torch.tensor(panel).mul(255).round().int().flatten(0, 1).unique(dim=0, return_counts=True)
        saturated = colours.amax(1) - colours.amin(1) > 100
        assert (counts[saturated] > 300).sum() >= 4


def test_masks_are_over_the_layers_that_it_says(digits):
    for name, (build, _, target_layers) in digits.MODELS.items():
        circuit = CircuitModel(digits.CircuitConfig(target_layers=target_layers), build())
        kinds = {type(layer).__name__ for layer in circuit.masked_layers.values()}
        assert kinds == {{"vit": "MaskedLinear", "resnet": "MaskedConv2d"}[name]}
        assert len(circuit.masked_layers) == {"vit": 18, "resnet": 4}[name]


def test_split(digits):
    data = digits.load()
    assert [t.shape[0] for t in (*data.train, *data.test)] == [1297, 1297, 500, 500]
    assert data.train[0].min() == -1
    assert data.train[0].max() == 1
    both = torch.cat([data.train[0], data.test[0]]).flatten(1)
    assert both.unique(dim=0).shape[0] == 1797  # no picture is in both
    assert torch.equal(digits.load().test[1], data.test[1])


def test_help_and_bad_arguments(digits, capsys):
    with pytest.raises(SystemExit, match="0"):
        digits.main(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--seed", "--output", "--model-steps", "--mask-steps"))
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--seed", "one"])
