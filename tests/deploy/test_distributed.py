"""flatten_ext.distributed.attention: the processes' strips are together what one process computes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import process, run_processes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import flatten_ext
from flatten_ext import FocusedLinearAttention, distributed

WIDTH, CHANNELS, HEADS = 5, 12, 3
# Rows of each process's strip; many are lower than the taps' halo.
STRIPS = {2: ([4, 3], [1, 6], [2, 1]), 3: ([3, 1, 4], [1, 1, 1]), 4: ([2, 1, 1, 3], [5, 1, 2, 4])}
TAPS = ((1, 1), (3, 3), (5, 5), (7, 3), (9, 1))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes(count: int, tmp_path: Path) -> None:
    outputs = run_processes(__file__, count, tmp_path)
    assert all("done" in output for output in outputs)


def test_one_process_refuses_cut_windows_and_foreign_groups(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        x = torch.rand(1, 12, 8)
        with pytest.raises(
            ValueError, match=r"window \(2, 2\) would be cut by this process's strip of 3 rows"
        ):
            distributed.attention(x, x, x, 2, size=(3, 4), window=(2, 2))
        with pytest.raises(ValueError, match=r"shift \(1, 0\) would put windows across the strips"):
            distributed.attention(x, x, x, 2, size=(3, 4), window=(3, 2), shift=(1, 0))
        with pytest.raises(ValueError, match="size was left out"):
            distributed.attention(x, x, x, 2, dwc_weight=torch.rand(4, 1, 3, 3))
        block = FocusedLinearAttention(8, 2, process_group=dist.group.WORLD)
        block.dwc.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="dwc is no plain"):
            block(x, (3, 4))
        with pytest.raises(ValueError, match="num_prefix_tokens is 1, expected 0 with a process_group"):
            FocusedLinearAttention(8, 2, num_prefix_tokens=1, process_group=dist.group.WORLD)
        with pytest.raises(ValueError, match="strip is"):
            FocusedLinearAttention(8, 2)(x, (3, 4), strip=(0, 3))
        with pytest.raises(ValueError, match="group is 7, expected a process group"):
            distributed.attention(x, x, x, 2, group=7)
    finally:
        dist.destroy_process_group()


def test_parts_of_tokens_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients a strip goes by parts, so that temporary memory is bounded."""
    monkeypatch.setattr(distributed, "_PART", 7)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for taps in (None, (3, 3)):
            given = {name: x.detach() for name, x in inputs(6, taps, 0).items()}
            general = {"gate": given["q"], "normalizer": "subtract", "key_weight": torch.rand(2, 30).double()}
            general["rotary"] = flatten_ext.rotary_table((6, WIDTH), CHANNELS, HEADS, dtype=torch.float64)
            for more in ({}, general):
                found = distributed.attention(num_heads=HEADS, size=(6, WIDTH), **given, **more)
                expected = flatten_ext.attention(num_heads=HEADS, size=(6, WIDTH), **given, **more)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    finally:
        dist.destroy_process_group()


def inputs(rows: int, taps: tuple[int, int] | None, prefix: int, images: int = 2) -> dict[str, Tensor]:
    tokens = prefix + rows * WIDTH
    made = {name: torch.randn(images, tokens, CHANNELS) for name in ("q", "k", "v")}
    made |= {"scale": torch.rand(CHANNELS) + 0.5, "key_bias": torch.randn(tokens, CHANNELS)}
    if taps is not None:
        made |= {
            "dwc_weight": torch.randn(CHANNELS // HEADS, 1, *taps),
            "dwc_bias": torch.randn(CHANNELS // HEADS),
        }
    return {name: x.double().requires_grad_() for name, x in made.items()}


def strip(x: Tensor, dim: int, strips: list[int], rank: int, prefix: int) -> Tensor:
    """The tokens of a process; the prefix tokens are the first one's."""
    ends = [0]
    for i, rows in enumerate(strips):
        ends.append(ends[-1] + rows * WIDTH + (prefix if i == 0 else 0))
    return x.narrow(dim, ends[rank], ends[rank + 1] - ends[rank])


def compare(
    rank: int, strips: list[int], taps: tuple[int, int] | None, prefix: int, call=distributed.attention
):
    torch.manual_seed(0)
    whole = inputs(sum(strips), taps, prefix)
    expected = flatten_ext.attention(num_heads=HEADS, size=(sum(strips), WIDTH), **whole)
    cotangent = torch.randn_like(expected)
    gradients = dict(zip(whole, torch.autograd.grad(expected, list(whole.values()), cotangent), strict=True))

    def own(name: str, x: Tensor) -> Tensor:
        return strip(x, 0 if name == "key_bias" else 1, strips, rank, prefix) if name in OF_TOKENS else x

    local = {name: own(name, x).detach().clone().requires_grad_() for name, x in whole.items()}
    out = call(num_heads=HEADS, size=(strips[rank], WIDTH), **local)
    torch.testing.assert_close(out, own("q", expected), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, list(local.values()), own("q", cotangent))
    for (name, gradient), part in zip(gradients.items(), found, strict=True):
        if name not in OF_TOKENS:
            dist.all_reduce(part)
        torch.testing.assert_close(
            part, own(name, gradient), rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


OF_TOKENS = ("q", "k", "v", "key_bias")


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """The bytes that this process hands to torch's functional collectives, by their names."""
    sent: dict[str, int] = {}

    def counted(name: str, collective):
        def call(x: Tensor, *arguments):
            sent[name] = sent.get(name, 0) + x.nbytes
            return collective(x, *arguments)

        return call

    with contextlib.ExitStack() as patches:
        for name in ("all_reduce", "all_to_all_single"):
            wrapped = counted(name, getattr(distributed.collectives, name))
            patches.enter_context(mock.patch.object(distributed.collectives, name, wrapped))
        yield sent


def count_bytes(rank: int, count: int) -> None:
    """Of two maps, one five times as high: the state and the rows of the halo, forward and backward."""
    for taps in (1, 3, 5):
        sent = []
        for rows in (4, 20):
            local = inputs(rows, (taps, taps), 0, images=3)
            with counting() as forward:
                out = distributed.attention(num_heads=HEADS, size=(rows, WIDTH), **local)
            with counting() as backward:
                out.sum().backward()
            assert forward == backward
            sent.append(forward)
        assert sent[0] == sent[1]
        # Of 5 x 5 taps two rows for the next process and one for that behind it.
        halo = taps // 2
        rows_sent = sum(max(halo - abs(other - rank) + 1, 0) for other in range(count) if other != rank)
        messages = sum(1 for other in range(count) if 0 < abs(other - rank) <= halo)
        state = 3 * HEADS * (CHANNELS // HEADS + 1) ** 2 * 8
        exchanged = (rows_sent * 3 * WIDTH * CHANNELS + messages) * 8
        assert sent[0]["all_reduce"] == state
        assert sent[0].get("all_to_all_single", 0) == exchanged


def windows(rank: int, count: int) -> None:
    """In whole windows nothing is sent."""
    torch.manual_seed(1)
    tokens = torch.randn(3, 2, 6 * count * WIDTH, CHANNELS)
    taps = torch.randn(CHANNELS // HEADS, 1, 3, 3)
    options = {"window": (3, WIDTH), "shift": (0, 2)}
    expected = flatten_ext.attention(*tokens, HEADS, dwc_weight=taps, size=(6 * count, WIDTH), **options)
    local = tokens.chunk(count, 2)[rank].unbind()
    with counting() as sent:
        out = distributed.attention(*local, HEADS, dwc_weight=taps, size=(6, WIDTH), **options)
    assert not sent
    torch.testing.assert_close(out, expected.chunk(count, 1)[rank])


def compiled(rank: int, strips: list[int]) -> None:
    """One graph, with the collectives in it."""
    torch._dynamo.reset()
    whole_graph = torch.compile(distributed.attention, fullgraph=True, backend="aot_eager", dynamic=False)
    compare(rank, strips, (5, 5), 0, whole_graph)


def general_form(rank: int, count: int) -> None:
    """The arguments that later linear attentions brought; the module's too, with padding."""
    torch.manual_seed(6)
    strips = STRIPS[count][0]
    rows = sum(strips)
    whole = {name: torch.randn(2, rows * WIDTH, CHANNELS).double() for name in ("q", "k", "v", "gate")}
    whole["key_weight"] = torch.rand(2, rows * WIDTH).double()
    table = flatten_ext.rotary_table((rows, WIDTH), CHANNELS, HEADS, dtype=torch.float64)
    taps = torch.randn(CHANNELS // HEADS, 1, 5, 3).double()
    options = {
        "feature_map": "elu",
        "normalizer": "magnitude",
        "similarity_scale": 0.5,
        "gate_activation": "silu",
    }
    for more in ({}, {"dwc_weight": taps}):
        expected = flatten_ext.attention(
            **whole, num_heads=HEADS, rotary=table, size=(rows, WIDTH), **options, **more
        )
        local = {name: strip(x, 1, strips, rank, 0) for name, x in whole.items()}
        found = distributed.attention(
            **local, num_heads=HEADS, rotary=strip(table, 0, strips, rank, 0), size=(strips[rank], WIDTH),
            **options, **more,
        )  # fmt: skip
        torch.testing.assert_close(found, strip(expected, 1, strips, rank, 0), rtol=1e-12, atol=1e-12)
    form = {
        "feature_map": "elu",
        "rotary": "channels",
        "gate": "silu",
        "kernel_size": 3,
        "dtype": torch.float64,
    }
    alone = FocusedLinearAttention(CHANNELS, HEADS, **form)
    together = FocusedLinearAttention(CHANNELS, HEADS, process_group=dist.group.WORLD, **form)
    together.load_state_dict(alone.state_dict())
    padding = torch.arange(rows * WIDTH)[None] >= torch.tensor([[rows * WIDTH - 4], [rows * WIDTH]])
    expected = alone(whole["q"], (rows, WIDTH), padding)
    found = together(
        strip(whole["q"], 1, strips, rank, 0), (strips[rank], WIDTH), strip(padding, 1, strips, rank, 0),
        strip=(sum(strips[:rank]), rows),
    )  # fmt: skip
    torch.testing.assert_close(found, strip(expected, 1, strips, rank, 0), rtol=1e-12, atol=1e-12)


def half_precision(rank: int, count: int) -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 4 * count * WIDTH, CHANNELS).bfloat16().unbind()
    taps = torch.randn(CHANNELS // HEADS, 1, 5, 5)
    expected = flatten_ext.attention(q, k, v, HEADS, dwc_weight=taps, size=(4 * count, WIDTH))
    local = (x.chunk(count, 1)[rank] for x in (q, k, v))
    out = distributed.attention(*local, HEADS, dwc_weight=taps, size=(4, WIDTH))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.chunk(count, 1)[rank], rtol=2e-2, atol=2e-2)


def second_derivatives(rank: int, count: int) -> None:
    """Of the sum of all processes' losses, as those of one process."""
    torch.manual_seed(3)
    whole = torch.randn(3, 1, 2 * count * WIDTH, CHANNELS, dtype=torch.float64)
    taps = torch.randn(CHANNELS // HEADS, 1, 5, 5, dtype=torch.float64)

    def twice(x: Tensor, attention, rows: int) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = attention(*x, HEADS, dwc_weight=taps, size=(rows, WIDTH))
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return first, second

    expected = twice(whole, flatten_ext.attention, 2 * count)
    found = twice(whole.chunk(count, 2)[rank], distributed.attention, 2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.chunk(count, 2)[rank], rtol=1e-10, atol=1e-10)


def of_groups(rank: int, count: int) -> None:
    """A part of the processes, named in each way."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(4)
    q, k, v = torch.randn(3, 1, 4 * WIDTH, CHANNELS, dtype=torch.float64)
    alone = flatten_ext.attention(q, k, v, HEADS)
    groups = [dist.new_group([r]) for r in range(count)]
    for group in (groups[rank], groups[rank].group_name):
        torch.testing.assert_close(distributed.attention(q, k, v, HEADS, group=group), alone)
    mesh = init_device_mesh("cpu", (count,))
    torch.testing.assert_close(
        distributed.attention(q, k, v, HEADS, group=mesh), alone
    )  # the same keys again


def module(rank: int, count: int) -> None:
    """FocusedLinearAttention with an encoding of the whole map, copied and compiled; then a step under DDP,
    which averages the gradients of the processes: losses are multiplied by their number."""
    torch.manual_seed(5)
    strips = STRIPS[count][0]
    grid = (sum(strips), WIDTH)  # no other: resampling computes in float32
    options = {"num_heads": HEADS, "kernel_size": 3, "positional_encoding": grid, "dtype": torch.float64}
    alone = FocusedLinearAttention(CHANNELS, **options)
    together = FocusedLinearAttention(CHANNELS, process_group=dist.group.WORLD, **options)
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.copy_(torch.randn_like(parameter))
    together.load_state_dict(alone.state_dict())
    together = copy.deepcopy(together)
    size, first = (strips[rank], WIDTH), sum(strips[:rank])
    tokens = torch.randn(2, sum(strips) * WIDTH, CHANNELS, dtype=torch.float64)
    local = strip(tokens, 1, strips, rank, 0)
    expected = alone(tokens, (sum(strips), WIDTH))
    forms = [together]
    if count == 2:
        forms.append(torch.compile(together, fullgraph=True, backend="aot_eager"))
    for called in forms:
        found = called(local, size, strip=(first, sum(strips)))
        torch.testing.assert_close(found, strip(expected, 1, strips, rank, 0), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="strip is None, expected"):
        together(local, size)

    def step(model, tokens: Tensor, size, **place) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = model(tokens, size, **place).square().sum() / expected.numel()
        (loss * (count if isinstance(model, DistributedDataParallel) else 1)).backward()
        optimizer.step()

    step(alone, tokens, (sum(strips), WIDTH))
    step(DistributedDataParallel(together), local, size, strip=(first, sum(strips)))
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def main(rank: int, count: int) -> None:
    for strips in STRIPS[count]:
        for taps in (None, *TAPS):
            compare(rank, strips, taps, 0)
        compare(rank, strips, (5, 5), 2)
    count_bytes(rank, count)
    windows(rank, count)
    general_form(rank, count)
    half_precision(rank, count)
    second_derivatives(rank, count)
    of_groups(rank, count)
    module(rank, count)
    if count == 2:
        compiled(rank, STRIPS[count][0])
    print("done")


if __name__ == "__main__":
    process(main)
