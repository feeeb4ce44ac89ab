"""Context parallelism: attention over one map whose rows are shared out to the processes of a group.

All that attention knows of its keys is a state that is additive over them (`attention_state`), so each
process sums up its own keys and the states are all-reduced: heads * (D_k + 1) * (D_v + 1) floats an image,
however large the image is. The depthwise branch reads kernel_h // 2 rows beyond a strip, which neighbours
send. Backward, the gradients of both take the same ways in reverse. Collectives are torch's functional ones,
so that torch.compile keeps a graph whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from . import ops, reference

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    dwc_weight: Tensor | None = None,
    dwc_bias: Tensor | None = None,
    *,
    size: Sequence[int] | None = None,
    group: Any = None,
    window: Sequence[int] | None = None,
    shift: Sequence[int] | None = None,
    focusing_factor: float = 3.0,
    eps: float = 1e-6,
    feature_map: str = "focused",
    rotary: Tensor | None = None,
    key_weight: Tensor | None = None,
    normalizer: str = "divide",
    similarity_scale: float = 1.0,
    gate: Tensor | None = None,
    gate_activation: str = "none",
) -> Tensor:
    """`flatten_ext.attention` over a map whose rows are shared out to the processes of `group`.

    Process r of the group holds a strip, the rows of the map behind those of process r - 1: of any height of
    at least 1, also lower than the depthwise kernel. What is of tokens (`q`, `k`, `v`, `key_bias`, `rotary`,
    `key_weight`, `gate`) has the strip's tokens, in raster order; parameters are whole on every process.
    Every process of the group has to make the call, with the same number of images, and the result is its
    strip of what one process would compute.

    Per image the processes all-reduce heads * (D_k + 1) * (D_v + 1) numbers (float32; float64 with float64
    tokens). With taps of height kh each also sends h = kh // 2 rows of v to the next process and to the one
    before, and h - 1, ..., 1 rows to those beyond, which need them where strips are lower than h. The
    backward sends the same again.

    Gradients of parameters are each process's part: their **sum** over the group is the gradient of the sum
    of all processes' losses. DistributedDataParallel averages, so multiply the loss by the number of
    processes.

    Args:
        q: (B, N, C), the strip's queries; `k`, `v` (B, M, C). M - rows * W leading tokens of a process (class
            token, registers) attend and are not convolved: one process has them, as a rule the first.
        key_bias: (M, C), the strip's part of the encoding.
        size: (rows, W) of this process's strip; needed with `dwc_weight` and `window`.
        group: a ProcessGroup, a name of one, or a DeviceMesh of one dimension; None for all processes.
        window: (wh, ww). Windows lie whole in strips, so that nothing is sent: `rows` must be a multiple of
            wh.
        shift: (0, sw): one down the rows would put windows across strips.
        scale, dwc_weight, dwc_bias, focusing_factor, eps: as of one process.
        feature_map, normalizer, similarity_scale, gate_activation: likewise.

    Raises:
        ValueError: a strip would cut windows, or `group` is none.
        RuntimeError: of the operators, on the process whose arguments are bad. The others wait for it: end
            them together, as torchrun does.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from flatten_ext.distributed import attention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> q, k, v = torch.randn(3, 1, 8 * 16, 64)  # this process's 8 rows of 16 tokens
        >>> attention(q, k, v, 2, dwc_weight=torch.randn(32, 1, 5, 5), size=(8, 16)).shape
        torch.Size([1, 128, 64])
        >>> dist.destroy_process_group()
    """
    group = _group(group)
    mapped: dict[str, Any] = {"focusing_factor": focusing_factor, "eps": eps, "feature_map": feature_map}
    normalized: dict[str, Any] = {"normalizer": normalizer, "similarity_scale": similarity_scale}
    gated: dict[str, Any] = {"gate": gate, "gate_activation": gate_activation}
    if window is not None or shift is not None:
        _refuse_cut_windows(size, window, shift)
        return ops.attention(
            q, k, v, num_heads, scale, key_bias, dwc_weight, dwc_bias, size, window, shift,
            rotary=rotary, key_weight=key_weight, **mapped, **normalized, **gated,
        )  # fmt: skip
    if dwc_weight is not None and size is None:
        raise ValueError("size was left out, expected (rows, W) of this process's strip beside dwc_weight")
    state: Any = 0
    for part in _parts(k, v):
        of_keys = {"rotary": _rows(rotary, 0, part), "key_weight": _rows(key_weight, 1, part)}
        keys, values, bias = _rows(k, 1, part), _rows(v, 1, part), _rows(key_bias, 0, part)
        state = state + ops.attention_state(keys, values, num_heads, scale, bias, **of_keys, **mapped)
    state = _Sum.apply(state, group.handle)
    out = None if dwc_weight is None else _depthwise(v, dwc_weight, dwc_bias, size, group)  # type: ignore[arg-type]
    parts = _parts(q, v)
    for part in parts:
        queries = {**mapped, **normalized, "rotary": _rows(rotary, 0, part)}
        attended = ops.attention_from_state(_rows(q, 1, part), state, num_heads, scale, **queries)
        if len(parts) == 1:
            out = attended if out is None else out.add_(attended)
            break
        if out is None:
            out = attended.new_zeros(*q.shape[:2], attended.shape[2])
        out[:, part].add_(attended)
    return reference._gated(out, gate, gate_activation).to(q.dtype)  # type: ignore[arg-type]


# Without gradients tokens go by parts of so many, which bounds what the operators allocate. Not measured; a
# part of 32 channels in float32 is 8 MiB.
_PART = 1 << 16


def _parts(*tokens: Tensor) -> list[slice]:
    count = tokens[0].shape[1]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tokens)
    if torch.compiler.is_compiling() or recorded or count <= _PART:
        return [slice(None)]
    return [slice(start, start + _PART) for start in range(0, count, _PART)]


def _rows(x: Any, dim: int, part: slice) -> Any:
    """The part's rows of what is of tokens; all of them, as they are, where there is one part."""
    if x is None or part == slice(None):
        return x
    return x[part] if dim == 0 else x[:, part]


class _Group(NamedTuple):
    handle: Any  # a ProcessGroup, or the name of one: what the collectives take
    rank: int
    processes: int


def _group(group: Any) -> _Group:
    if isinstance(group, str):
        return _Group(group, *_place(group))
    if group is None:
        group = dist.group.WORLD
    elif hasattr(group, "get_group"):  # a DeviceMesh, whose module is not imported for this
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group is {group!r}, expected a process group that this process belongs to")
    return _Group(group, group.rank(), group.size())


@torch.compiler.assume_constant_result
def _place(name: str) -> tuple[int, int]:
    """Rank and size of the group of a name, which torch.compile cannot look up."""
    group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    return group.rank(), group.size()


def _refuse_cut_windows(
    size: Sequence[int] | None, window: Sequence[int] | None, shift: Sequence[int] | None
) -> None:
    if size is not None and window is not None and size[0] % window[0]:
        raise ValueError(
            f"window {tuple(window)} would be cut by this process's strip of {size[0]} rows: expected a "
            f"multiple of {window[0]}"
        )
    if shift is not None and shift[0]:
        raise ValueError(
            f"shift {tuple(shift)} would put windows across the strips of the processes: expected "
            f"(0, {shift[1]})"
        )


class _Sum(torch.autograd.Function):
    """The sum over the group. Its adjoint is the same sum: every process's loss depends on the result."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Sum.apply(gradient, ctx.group), None


class _Exchange(torch.autograd.Function):
    """Sends parts of x, given[r] numbers to process r, and returns what came, taken[r] from each. Its adjoint
    sends the gradients back."""

    @staticmethod
    def forward(ctx, x: Tensor, given: list[int], taken: list[int], group: Any) -> Tensor:
        ctx.given, ctx.taken, ctx.group = given, taken, group
        return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), taken, given, group))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Exchange.apply(gradient, ctx.taken, ctx.given, ctx.group), None, None, None


def _depthwise(v: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], group: _Group) -> Tensor:
    """The depthwise branch on the strip. Taps are linear in v: the strip is convolved by itself, and what the
    rows beyond its edges add to its outermost rows is added, so that v is not copied."""
    (rows, width), halo = size, weight.shape[-2] // 2
    out = ops.depthwise_conv(v, weight, bias, (rows, width))
    if halo == 0:
        return out
    prefix, near = v.shape[1] - rows * width, min(rows, halo)
    above, below = _rows_beyond(v[:, prefix:].unflatten(1, (rows, width)), halo, group)
    nothing = v.new_zeros(v.shape[0], near, width, v.shape[2])
    for strip, read_from, write_to in (
        ((above, nothing), halo, prefix),
        ((nothing, below), 0, prefix + (rows - near) * width),
    ):
        tokens = torch.cat(strip, 1).flatten(1, 2)
        added = ops.depthwise_conv(tokens, weight, None, (halo + near, width))
        out.narrow(1, write_to, near * width).add_(added.narrow(1, read_from * width, near * width))
    return out


def _rows_beyond(v: Tensor, halo: int, group: _Group) -> tuple[Tensor, Tensor]:
    """The `halo` rows of the map above and below this strip (B, rows, W, C), zeros outside of the map.

    Nobody knows how high the others' strips are, which would have to be asked for first. So process r sends
    its outermost halo - j + 1 rows to process r +- j, as many as that one can need with at least one row in
    each strip between, and how many of them are real.
    """
    rank, processes = group.rank, group.processes
    batch, rows, width, channels = v.shape
    row = batch * width * channels

    def slots(other: int) -> int:
        """How many rows are sent to and taken from a process."""
        distance = abs(other - rank)
        return 0 if distance == 0 else max(halo - distance + 1, 0)

    messages = []
    for other in range(processes):
        if slots(other) == 0:
            continue
        real = min(rows, slots(other))
        # The rows that are nearest to the other first.
        nearest = v[:, :real] if other < rank else v[:, rows - real :].flip(1)
        padding = v.new_zeros(slots(other) - real, batch, width, channels)
        messages += [nearest.transpose(0, 1).flatten(), padding.flatten(), v.new_full((1,), real)]
    sizes = [slots(other) * row + 1 if slots(other) else 0 for other in range(processes)]
    message = torch.cat(messages) if messages else v.new_zeros(0)
    parts = _Exchange.apply(message, sizes, sizes, group.handle).split(sizes)

    def gathered(others: Sequence[int]) -> Tensor:
        """What came from the processes on one side, from the nearest on, as rows from the nearest on."""
        taken, places, filled = [], [], torch.zeros(1, dtype=torch.long, device=v.device)
        for other in others:
            part, count = slots(other), parts[other][-1:].detach().long()
            slot = torch.arange(part, device=v.device)
            # Rows that are not there go behind the others, as do those further away than the halo.
            places.append(torch.where(slot < count, (filled + slot).clamp(max=halo), halo))
            taken.append(parts[other][:-1].unflatten(0, (part, batch, width, channels)))
            filled = filled + count
        found = v.new_zeros(halo + 1, batch, width, channels)
        if taken:
            found = found.index_add(0, torch.cat(places), torch.cat(taken))
        return found[:halo].transpose(0, 1)

    above = gathered([r for r in range(rank - 1, -1, -1) if slots(r)])
    below = gathered([r for r in range(rank + 1, processes) if slots(r)])
    return above.flip(1), below
