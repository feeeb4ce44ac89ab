"""The restoration suite: its photographs, its measure, its networks of one size, and what it writes."""

from __future__ import annotations

import importlib
import importlib.util
import json

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("timm")
pytest.importorskip("skimage")

from flatten_ext.extras import MissingExtra
from flatten_ext.output import write_json
from flatten_ext.tools.bench import report, restoration, trainings
from flatten_ext.tools.micro import photographs, restorer


def test_photographs_are_read_and_their_packages_named(monkeypatch):
    assert not set(photographs.TRAIN) & set(photographs.HELD_OUT)
    for name in (*photographs.TRAIN, *photographs.HELD_OUT):
        image = photographs.read_photograph(name)
        assert min(image.shape) >= 300
        assert 0 <= image.min() < image.max() <= 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"scikit-image is not installed.*flatten-ext\[bench\]"):
        photographs.read_photograph("grass.png")


def test_psnr_is_that_of_the_parts():
    clean = torch.rand(2, 1, 8, 8)
    pictures = restorer.HeldOut({"a": clean}, {"a": clean + 0.1})
    for parts in (1, 2):
        expected = -10 * (clean + 0.1).clamp(0, 1).sub(clean).double().square().mean().log10()
        assert pictures.psnr(lambda x: x, parts)["a"] == pytest.approx(float(expected), abs=1e-4)
    tiles = restorer._parts(clean, 2)
    torch.testing.assert_close(tiles[1], clean[0, :, :4, 4:])
    torch.testing.assert_close(tiles[6], clean[1, :, 4:, :4])


@pytest.mark.parametrize("problem", restorer.PROBLEMS)
def test_restorers_are_of_one_size_and_begin_with_their_input(problem):
    sizes = []
    for variant in restoration.VARIANTS:
        net = restoration.build(problem, variant)
        sizes.append(sum(p.numel() for p in net.parameters()))
        x = torch.rand(1, 1, 12, 8)
        torch.testing.assert_close(net(x), restoration._unrestored(problem)(x))
    assert max(sizes) - min(sizes) < 0.01 * restoration.PARAMETERS


def test_restoration_is_trained_resumed_and_shown(tmp_path, monkeypatch):
    chosen = {name: restoration.VARIANTS[name] for name in ("DWC alone", "FLatten")}
    monkeypatch.setattr(restoration, "VARIANTS", chosen)
    todo = restoration.tasks(2)
    assert len(todo) == 8
    results = []
    for task in todo[:4] + todo[4:6]:
        results.append(restoration.run_task(task, restoration.QUICK))
        write_json(task.path(tmp_path), results[-1])
    assert trainings.pending(todo, tmp_path, restoration.QUICK) == todo[6:]
    assert restoration.run_task(todo[0], restoration.QUICK) == results[0]
    summary = restoration.summarise(trainings.collect(todo, tmp_path, restoration.QUICK), restoration.QUICK)
    denoising, enlarging = report.tables_of("restoration", json.loads(json.dumps(summary)))
    assert denoising.rows[0][0] == "the noisy input"
    assert 20 < float(denoising.rows[0][1]) < 21  # 25 of 255: 20.2 dB, and a little more by clamping
    conv, flatten = denoising.rows[1:]
    assert (conv[2], flatten[3]) == ("-", "-")
    assert flatten[2].startswith(("+", "-"))
    assert "±" in flatten[2]
    assert "±" not in enlarging.rows[1][1]  # one seed
    report.draw("restoration", summary, tmp_path)
    for name in ("restoration", "restoration-examples"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
