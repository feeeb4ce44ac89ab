"""The operators as ONNX nodes: what torch's exporter calls for each of them (see onnx.py).

A function here gets the operator's arguments: tensors as ONNX values, numbers as Python's, and lists of
numbers whose entries are ONNX values where they are dynamic. Every call of `op` adds a node to the graph.
The formulas are those of reference.py, written with as few nodes as they need: windows are folded into the
batch by one Gather, whose index holds partition and shift at once; reshapes name no size they can copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import reference

__all__ = ["table"]

op: Any = opset18

Value = Any  # of the ONNX graph (onnx_ir.Value)
Size = Sequence[Any]  # height and width, numbers or values

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LEAST = {
    ir.DataType.FLOAT: torch.finfo(torch.float32).tiny,
    ir.DataType.DOUBLE: torch.finfo(torch.float64).tiny,
}
_TO_THE_END = torch.iinfo(torch.int64).max


def table() -> dict[Any, Callable]:
    """From the operators to the functions that write their nodes."""
    ops = torch.ops.flatten
    return {
        ops.attention.default: attention,
        ops.linear_attention.default: linear_attention,
        ops.depthwise_conv.default: depthwise_conv,
    }


def attention(
    q, k, v, num_heads, scale=None, key_bias=None, dwc_weight=None, dwc_bias=None,
    size=None, window=None, shift=None, focusing_factor=3.0, eps=1e-6, **general,
):  # fmt: skip
    """torch.ops.flatten.attention."""
    _refuse_general(general, q, v, dwc_weight)
    call = _Call(q, size, window, shift)
    q, k, v = (call.fold(x) for x in (q, k, v))
    if key_bias is not None:
        k = op.Add(k, call.widen(key_bias))
    scale = None if scale is None else call.widen(scale)
    q, k = (_focus(x, scale, focusing_factor, eps, call) for x in (q, k))
    return call.unfold(_attend_and_convolve(q, k, v, num_heads, dwc_weight, dwc_bias, eps, call))


def linear_attention(
    q, k, v, num_heads, dwc_weight=None, dwc_bias=None, size=None, window=None, shift=None, eps=1e-6,
    **general,
):  # fmt: skip
    """torch.ops.flatten.linear_attention."""
    _refuse_general(general, q, v, dwc_weight)
    call = _Call(q, size, window, shift)
    q, k, v = (call.fold(x) for x in (q, k, v))
    return call.unfold(_attend_and_convolve(q, k, v, num_heads, dwc_weight, dwc_bias, eps, call))


def depthwise_conv(x, weight, bias, size, window=None, shift=None):
    """torch.ops.flatten.depthwise_conv."""
    _refuse_general({}, x, x, weight)
    call = _Call(x, size, window, shift)
    return call.unfold(_convolve(call.fold(x), weight, bias, call))


def _refuse_general(general: dict[str, Any], q: Value, v: Value, weight: Value | None) -> None:
    """The general form has no nodes of its own: `flatten_ext.onnx.export` writes it as its formula."""
    of_images = weight is not None and len(weight.shape) == 5
    if general or of_images or q.shape[-1] != v.shape[-1]:
        what = ", ".join(general) or ("taps of each image's own" if of_images else "v with other channels")
        raise NotImplementedError(
            f"flatten_ext.onnx: {what} has no nodes here: call run_decompositions("
            "flatten_ext.decompositions()) of the exported program first, as flatten_ext.onnx.export does"
        )


class _Call:
    """What the parts of one call share: its dtypes, and where its tokens lie.

    Args:
        x: (B, N, C), the tokens that the result is for.
        size, window, shift: the operator's arguments.
    """

    def __init__(self, x: Value, size: Size | None, window: Size | None, shift: Size | None) -> None:
        self.dtype = x.dtype
        self.compute = ir.DataType.FLOAT if x.dtype in _HALF else x.dtype
        self.channels = x.shape[-1]
        self._x, self._order = x, None
        self._size: Any = size
        self.image: Any = size  # the map that the tokens of a folded image tile
        if window is None or size is None:
            return
        shift = (0, 0) if shift is None else shift
        if not _are_fixed((*window, *shift)):
            raise NotImplementedError("flatten_ext.onnx: window and shift are dynamic, expected numbers")
        self.image = window
        self._order = (_fixed_order if _are_fixed(size) else _dynamic_order)(size, window, shift)

    def widen(self, x: Value) -> Value:
        """x in the dtype that is computed in."""
        return x if x.dtype == self.compute else op.Cast(x, to=self.compute)

    def number(self, value: float) -> Value:
        return op.Constant(value=ir.tensor(value, dtype=self.compute))

    def fold(self, x: Value) -> Value:
        """(B, N, C) -> (B * windows, tokens of a window, C), in the dtype that is computed in."""
        x = self.widen(x)
        if self._order is None:
            return x
        tokens = self.image[0] * self.image[1]
        return op.Reshape(op.Gather(x, self._order[0], axis=1), _integers(-1, tokens, self.channels))

    def unfold(self, x: Value) -> Value:
        """The inverse, to the dtype of the tokens."""
        if self._order is not None:
            x = op.Reshape(x, _vector([-1, *_product(self._size), self.channels]))
            x = op.Gather(x, self._order[1], axis=1)
        return x if self.dtype == self.compute else op.Cast(x, to=self.dtype)

    def prefix(self) -> Any:
        """How many tokens lie before the map: a number, or a vector of one where it is dynamic."""
        if self._order is not None:
            return 0
        tokens, size = self._x.shape[1], self._size
        if isinstance(tokens, int) and _are_fixed(size):
            return tokens - size[0] * size[1]
        if _fills(self._x, size):
            return 0
        return op.Sub(op.Shape(self._x, start=1, end=2), _vector(_product(size)))


def _focus(x: Value, scale: Value | None, focusing_factor: float, eps: float, call: _Call) -> Value:
    """reference.focus: phi_p. A row is divided by its largest entry before the power, as there; the least
    normal number stands in for a divisor of 0, in rows that are all 0."""
    last, least = _integers(-1), call.number(_LEAST[call.compute])
    y = op.Add(op.Relu(x), call.number(eps))
    if scale is not None:
        y = op.Div(y, scale)
    if focusing_factor == 1:
        return y
    largest = op.Max(op.ReduceMax(y, last, keepdims=1), least)
    y = op.Div(y, largest)
    power = op.Pow(y, call.number(focusing_factor))
    norm, power_norm = op.ReduceL2(y, last, keepdims=1), op.ReduceL2(power, last, keepdims=1)
    return op.Mul(power, op.Div(op.Mul(norm, largest), op.Max(power_norm, least)))


def _attend_and_convolve(
    q: Value, k: Value, v: Value, num_heads: int, dwc_weight: Value | None, dwc_bias: Value | None,
    eps: float, call: _Call,
) -> Value:  # fmt: skip
    """reference.linear_attention of folded features."""
    heads = _integers(0, 0, num_heads, call.channels // num_heads)
    q_heads, v_heads = (op.Transpose(op.Reshape(x, heads), perm=[0, 2, 1, 3]) for x in (q, v))
    k_heads = op.Transpose(op.Reshape(k, heads), perm=[0, 2, 3, 1])
    tokens = op.Cast(op.Shape(k, start=1, end=2), to=call.compute)
    s = op.Div(op.MatMul(k_heads, v_heads), tokens)
    m = op.ReduceMean(k_heads, _integers(-1), keepdims=1)
    out = op.Div(op.MatMul(q_heads, s), op.Add(op.MatMul(q_heads, m), call.number(eps)))
    out = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), _integers(0, 0, call.channels))
    return out if dwc_weight is None else op.Add(out, _convolve(v, dwc_weight, dwc_bias, call))


def _convolve(x: Value, weight: Value, bias: Value | None, call: _Call) -> Value:
    """reference.depthwise_conv of folded tokens."""
    kernels = [_for_each_head(parameter, call) for parameter in (weight, bias) if parameter is not None]
    prefix = call.prefix()
    if prefix != 0:
        x = op.Slice(x, _vector([prefix]), _integers(_TO_THE_END), _integers(1))
    image = op.Reshape(op.Transpose(x, perm=[0, 2, 1]), _vector([0, 0, *call.image]))
    height, width = weight.shape[2] // 2, weight.shape[3] // 2
    image = op.Conv(image, *kernels, group=call.channels, pads=[height, width, height, width])
    out = op.Transpose(op.Reshape(image, _integers(0, 0, -1)), perm=[0, 2, 1])
    return out if prefix == 0 else op.Pad(out, _vector([0, prefix, 0, 0, 0, 0]))


def _for_each_head(parameter: Value, call: _Call) -> Value:
    """The kernels (D, 1, kh, kw) or biases (D,) that the heads share, for all C channels."""
    heads = call.channels // parameter.shape[0]
    parameter_of_one, rank = call.widen(parameter), len(parameter.shape)
    return parameter_of_one if heads == 1 else op.Tile(parameter_of_one, _integers(heads, *[1] * (rank - 1)))


def _fixed_order(size: Size, window: Size, shift: Size) -> tuple[Value, Value]:
    """Which token of the map comes where, window after window, and the inverse; as constants."""
    tokens = torch.arange(size[0] * size[1]).view(1, -1, 1)
    order = reference.to_windows(tokens, size, window, shift).flatten()
    return _integers(*order.tolist()), _integers(*order.argsort().tolist())


def _dynamic_order(size: Size, window: Size, shift: Size) -> tuple[Value, Value]:
    """The same, computed by the graph."""
    zero, one = (op.Constant(value=ir.tensor(value)) for value in (0, 1))
    sides = [op.Reshape(_vector([side]), _integers()) for side in size]
    rows, columns = (
        op.Mod(op.Add(op.Range(zero, side, one), _integers(offset)), side)
        for side, offset in zip(sides, shift, strict=True)
    )
    grid = op.Add(op.Mul(op.Reshape(rows, _integers(-1, 1)), sides[1]), columns)
    counts = [op.Div(_vector([side]), _integers(w)) for side, w in zip(size, window, strict=True)]
    grid = op.Reshape(
        grid, op.Concat(counts[0], _integers(window[0]), counts[1], _integers(window[1]), axis=0)
    )
    order = op.Reshape(op.Transpose(grid, perm=[0, 2, 1, 3]), _integers(-1))
    places = op.Range(zero, op.Mul(*sides), one)
    return order, op.ScatterElements(order, order, places, axis=0)


def _fills(x: Value, size: Size) -> bool:
    """Whether torch.export knows that the dynamic map `size` has as many tokens as x: no prefix then.

    It reads what the exporter notes on each node. Were a note missing, the general nodes would be written.
    """
    known = []
    for value in (x, *size):
        producer = None if isinstance(value, int) else value.producer()
        node = None if producer is None else producer.meta.get("node")
        note = value if node is None else node.meta.get("val")
        known.append(note[value.index()] if isinstance(note, (list, tuple)) else note)
    tokens, height, width = known
    if not isinstance(tokens, torch.Tensor) or not all(isinstance(s, (int, torch.SymInt)) for s in known[1:]):
        return False
    return statically_known_true(tokens.shape[1] == height * width)


def _are_fixed(numbers: Sequence[Any]) -> bool:
    return all(isinstance(number, int) for number in numbers)


def _integers(*values: int) -> Value:
    return op.Constant(value=ir.tensor(list(values), dtype=ir.DataType.INT64))


def _vector(numbers: Sequence[Any]) -> Value:
    """Numbers, or dynamic values of one element, as one vector."""
    if _are_fixed(numbers):
        return _integers(*numbers)
    parts = [
        _integers(number) if isinstance(number, int) else op.Reshape(number, _integers(-1))
        for number in numbers
    ]
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=0)


def _product(size: Size) -> list[Any]:
    """[height * width], a number or a value."""
    if _are_fixed(size):
        return [size[0] * size[1]]
    return [op.Mul(_vector(size[:1]), _vector(size[1:]))]
