"""torch.jit.trace of the families: the same numbers, in a new process, at the size of the trace only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, small
from torch import nn

TRACED = [*SMALL, "inline_swin", "pola_pvt", "mila", "ravlt"]  # of the newer families one of each kind
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in TRACED},
    "deit, registers": ("deit", {"reg_tokens": 2}),
    "swin, windows": ("swin", {"window_size": (14, 7, 7, 7), "depths": (2, 1, 2, 1)}),
    "pvt, reduced keys": ("pvt", {"la_sr_ratios": (8, 4, 2, 1), "attn_type": "LLSS"}),
    "pvt_v2, pooled keys": ("pvt_v2", {"linear": True}),
    "cswin, stripes": ("cswin", {"la_split_sizes": (8, 4, None, None)}),
}


def traced(model: nn.Module, x: torch.Tensor) -> torch.jit.ScriptModule:
    with torch.no_grad():
        return torch.jit.trace(model, x)  # which compares the graph with the model


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_numbers(variant: str) -> None:
    torch.manual_seed(0)
    family, config = VARIANTS[variant]
    model = small(family, **config).eval()
    for size in ((224, 224), (160, 96)):  # the models' own, and one that encodings are resampled to
        x = torch.randn(2, 3, *size)
        graph = traced(model, x)
        with torch.no_grad():
            for image in (x, torch.randn(2, 3, *size)):
                torch.testing.assert_close(graph(image), model(image), rtol=0, atol=0)


@pytest.mark.parametrize("family", TRACED)
def test_gradients(family: str) -> None:
    torch.manual_seed(0)
    model = small(family, drop_path_rate=0.0).eval()
    x = torch.randn(1, 3, 96, 64)
    graph = torch.jit.trace(model, x)
    gradients = []
    for run in (model, graph):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


LOADED = """
import sys, torch, flatten_ext
saved = torch.load(sys.argv[2])
for family, (x, expected) in saved.items():
    graph = torch.jit.load(f"{sys.argv[1]}/{family}.pt")
    with torch.no_grad():
        torch.testing.assert_close(graph(x), expected, rtol=0, atol=0, msg=family)
        for size in ((64, 64), (96, 128), (128, 48), (64, 96)):
            try:
                graph(torch.randn(2, 3, *size))
            except RuntimeError as error:
                print(family, size, str(error).strip().splitlines()[-1])
            else:
                sys.exit(f"{family} gave numbers at {size}")
"""


def test_in_a_new_process(tmp_path: Path) -> None:
    """A saved graph needs the operators alone, and refuses another size than its own."""
    saved = {}
    for family in TRACED:
        torch.manual_seed(0)
        model, x = small(family).eval(), torch.randn(2, 3, 96, 64)
        traced(model, x).save(str(tmp_path / f"{family}.pt"))
        with torch.no_grad():
            saved[family] = (x, model(x))
    torch.save(saved, tmp_path / "saved.pth")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path), str(tmp_path / "saved.pth")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 4 * len(TRACED)
