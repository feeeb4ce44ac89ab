"""Calls from several host threads at once give, bit by bit, what each gives alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

import flatten_ext

THREADS = 8
Operator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> Tensor:
    return flatten_ext.attention(q, k, v, 2, dwc_weight=taps, size=[12, 10], focusing_factor=3.0)


def windows(q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> Tensor:
    return flatten_ext.attention(q, k, v, 2, dwc_weight=taps, size=[12, 10], window=[6, 5], shift=[3, 2])


def general(q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> Tensor:
    return flatten_ext.attention(
        *(q, k, v, 2), dwc_weight=taps, size=[12, 10], feature_map="elu", normalizer="magnitude", gate=q
    )


def state(q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> Tensor:
    return flatten_ext.attention_from_state(q, flatten_ext.attention_state(k, v, 2), 2)


def results(call: Operator, seed: int) -> list[Tensor]:
    """The output and all gradients of a call on tensors of a seed's own size."""
    random = torch.Generator().manual_seed(seed)
    dim = 4 * (seed % 5 + 1)
    shape = (seed % 3 + 1, 120, 2 * dim)
    q, k, v = (torch.randn(shape, generator=random, requires_grad=True) for _ in range(3))
    taps = torch.randn(dim, 1, 3, 3, generator=random, requires_grad=True)
    out = call(q, k, v, taps)
    grads = torch.autograd.grad(out, (q, k, v, taps), torch.ones_like(out), allow_unused=True)
    return [out.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("call", [plain, windows, general, state])
def test_threads_do_not_disturb_each_other(call: Operator) -> None:
    alone = [results(call, seed) for seed in range(THREADS)]
    start = Barrier(THREADS)

    def repeat(seed: int) -> list[list[Tensor]]:
        start.wait()
        return [results(call, seed) for _ in range(10)]

    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(repeat, range(THREADS)))
    for expected, runs in zip(alone, together, strict=True):
        for found in runs:
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
