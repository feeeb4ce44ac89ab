"""What the short trainings share: the schedule of the learning rate, and one step of the optimizer."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["descend", "learning_rate"]


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up to `peak` over the share `warmup` of all steps, then half a cosine down to 0.

    Args:
        step: the step about to be made, from 0.
        steps: how many there are in all.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def descend(model: nn.Module, loss: Tensor, optimizer: Optimizer, rate: float, clip_norm: float) -> None:
    """One step of `optimizer` down the gradient of `loss`, at most `clip_norm` long in all."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
