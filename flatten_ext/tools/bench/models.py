"""End to end: images per second of our models beside timm's softmax originals, against their FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flatten_ext.extras import require
from flatten_ext.tools.bench import alternatives, timing

__all__ = ["PAIRS", "time_models"]

# Ours, and the softmax original where timm has it (None: PVT v1 and CSWin are not in timm).
PAIRS: tuple[tuple[str, str | None], ...] = (
    ("flatten_deit_tiny", "deit_tiny_patch16_224"),
    ("flatten_pvt_tiny", None),
    ("flatten_pvt_v2_b0", "pvt_v2_b0"),
    ("flatten_swin_tiny", "swin_tiny_patch4_window7_224"),
    ("flatten_cswin_tiny", None),
)


def _flops(model: nn.Module, image: torch.Tensor) -> int:
    """Of one image, a multiplication and an addition counted as two."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def time_models(
    device: torch.device,
    seconds: float,
    batch: int = 4,
    image_size: int = 224,
    pairs: tuple[tuple[str, str | None], ...] = PAIRS,
) -> Iterator[list[dict[str, Any]]]:
    """Times the inference of each pair in turn, with random weights; yields rows of a pair, JSON-ready.

    Raises:
        MissingExtra: timm is not installed.
        CheckFailed: the op is wrong.
    """
    timm = require("timm", "models", "the models")
    require("flatten_ext.models", "models", "the models")  # registers ours with timm
    alternatives.runnable(device, ["flatten"])
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    for pair in pairs:
        nets = {name: timm.create_model(name).to(device).eval() for name in pair if name is not None}
        flops = {name: _flops(net, images[:1]) for name, net in nets.items()}

        def call(net: nn.Module) -> torch.Tensor:
            with torch.no_grad():
                return net(images)

        calls = {name: (lambda net=net: call(net)) for name, net in nets.items()}
        times = timing.in_turn(calls, device, seconds, at_least=3, give_up_ms=60_000)
        yield [
            {
                "model": name,
                "softmax_original": name == pair[1],
                "compared_with": pair[1] if name == pair[0] else pair[0],
                "parameters": sum(p.numel() for p in net.parameters()),
                "flops": flops[name],
                "batch": batch,
                "threads": torch.get_num_threads(),
                "images_per_second": 1e3 * batch / times[name].median,
                "ms": times[name].as_dict(),
            }
            for name, net in nets.items()
        ]
