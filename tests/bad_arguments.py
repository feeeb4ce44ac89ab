"""Good arguments of every operator, and tables of bad ones: argument by argument what is refused and in which
words."""

from __future__ import annotations

import torch

import flatten_ext

nan, inf = float("nan"), float("inf")


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def positive(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape).add(0.5).to(dtype)


NESTED = (torch.strided, torch.jagged)


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([randn(16, 8), randn(12, 8)], layout=layout)


def quantized(*shape: int) -> torch.Tensor:
    return torch.quantize_per_tensor(randn(*shape), 0.1, 0, torch.quint8)


def quantized_by_channel(*shape: int) -> torch.Tensor:
    ones = torch.ones(shape[-1])
    return torch.quantize_per_channel(randn(*shape), ones, 0 * ones, len(shape) - 1, torch.qint8)


def with_entry(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A divisor whose entry 3 is `value`."""
    scale = positive(8, dtype=dtype)
    scale[3] = value
    return scale


def attention_arguments() -> dict:
    """Two images of 4 x 4 tokens, two heads of four channels, shifted windows: every argument given."""
    return {
        **{name: randn(2, 16, 8) for name in "qkv"},
        "num_heads": 2,
        "scale": positive(8),
        "key_bias": randn(4, 8),
        "dwc_weight": randn(4, 1, 3, 3),
        "dwc_bias": randn(4),
        "size": [4, 4],
        "window": [2, 2],
        "shift": [1, 1],
        "focusing_factor": 3.0,
        "eps": 1e-6,
    }


def linear_arguments() -> dict:
    arguments = attention_arguments()
    return {n: v for n, v in arguments.items() if n not in ("scale", "key_bias", "focusing_factor")}


def conv_arguments() -> dict:
    return {
        "x": randn(2, 16, 8),
        "weight": randn(4, 1, 3, 3),
        "bias": randn(4),
        "size": [4, 4],
        "window": [2, 2],
        "shift": [1, 1],
    }


OPERATORS = {
    "attention": (flatten_ext.attention, attention_arguments),
    "linear_attention": (flatten_ext.linear_attention, linear_arguments),
    "depthwise_conv": (flatten_ext.depthwise_conv, conv_arguments),
}


def unwindowed(**changes) -> dict:
    return {"window": None, "shift": None, **changes}


# What each table entry is: the arguments changed, and what the message must say after the operator's name.
Case = tuple[dict, str]


def token_cases(name: str) -> list[Case]:
    """What no token tensor may be."""
    return [
        ({name: randn(16, 8)}, f"{name} has shape (16, 8), expected 3 dimensions (batch, tokens, channels)"),
        ({name: randn(2, 4, 4, 8)}, f"{name} has shape (2, 4, 4, 8), expected 3 dimensions"),
        ({name: torch.tensor(1.0)}, f"{name} has shape (), expected 3 dimensions"),
        ({name: randn(0)}, f"{name} has shape (0,), expected 3 dimensions"),
        *[
            ({name: torch.zeros(2, 16, 8, dtype=dtype)}, f"{name} has dtype")
            for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
        ],
        ({name: randn(2, 16, 8).to_sparse()}, f"{name} is not a dense strided tensor"),
        ({name: randn(2, 16, 8).to_mkldnn()}, f"{name} is not a dense strided tensor"),
        ({name: quantized(2, 16, 8)}, f"{name} has dtype QUInt8, expected "),
        ({name: quantized_by_channel(2, 16, 8)}, f"{name} has dtype QInt8, expected "),
        *[({name: nested(layout)}, f"{name} is a nested tensor, expected a dense") for layout in NESTED],
        ({name: None}, f"{name} is None, expected a tensor of (batch, tokens, channels)"),
    ]


def map_cases() -> list[Case]:
    """What size, window and shift may not be, of 16 tokens on a 4 x 4 map with 2 x 2 windows."""
    huge = 2**62
    return [
        ({"size": []}, "size has 0 numbers (), expected 2 (height, width)"),
        ({"size": [16]}, "size has 1 numbers (16,), expected 2"),
        ({"size": [4, 4, 1]}, "size has 3 numbers (4, 4, 1), expected 2"),
        *[
            ({"size": size}, f"size is ({size[0]}, {size[1]}), expected numbers of at least 1")
            for size in ([0, 4], [4, 0], [-4, -4], [-4, 4], [4, -1], [-(2**63), 4])
        ],
        *[
            ({"size": size}, f"size ({size[0]}, {size[1]}) has more positions than there are tokens (16)")
            for size in (
                [5, 4],
                [17, 1],
                [1, 17],
                [huge, huge],
                [huge, 4],
                [4, huge],
                [2**63 - 1, 2],
                [2**32, 2**32],
            )
        ],
        ({"window": [2]}, "window has 1 numbers (2,), expected 2"),
        ({"window": []}, "window has 0 numbers"),
        ({"window": [2, 2, 2]}, "window has 3 numbers"),
        *[
            ({"window": window}, f"window ({window[0]}, {window[1]}) does not divide size (4, 4)")
            for window in ([3, 2], [2, 3], [8, 8], [4, 5], [huge, 2], [huge, huge])
        ],
        *[
            ({"window": window}, f"window is ({window[0]}, {window[1]}), expected numbers of at least 1")
            for window in ([0, 2], [2, 0], [-2, 2], [-2, -2], [-(2**63), -1])
        ],
        (
            {"size": [4, 3], "window": [2, 3]},
            "window (2, 3) allows no prefix tokens, but size (4, 3) leaves 4 of 16",
        ),
        ({"shift": [1]}, "shift has 1 numbers (1,), expected 2"),
        ({"shift": []}, "shift has 0 numbers"),
        *[
            ({"shift": shift}, f"shift is ({shift[0]}, {shift[1]}), expected numbers of at least 0")
            for shift in ([-1, 0], [0, -1], [-(2**63), 0])
        ],
        *[
            ({"shift": shift}, f"shift ({shift[0]}, {shift[1]}) is not smaller than window (2, 2)")
            for shift in ([2, 0], [0, 2], [2, 2], [huge, huge])
        ],
        ({"window": None}, "shift (1, 1) was given without window"),
    ]


def taps_cases(weight: str, bias: str) -> list[Case]:
    """What a depthwise kernel of four channels in two heads, and its bias, may not be."""
    shapes = [(4, 3, 3), (4, 2, 3, 3), (4, 0, 3, 3), (4, 1, 3, 3, 1), (36,)]
    even = [(4, 1, 2, 3), (4, 1, 3, 4), (8, 1, 2, 2), (4, 1, 0, 0), (4, 1, 0, 3)]
    return [
        *[({weight: randn(*shape)}, f"{weight} has shape ({', '.join(map(str, shape))}") for shape in shapes],
        *[
            (
                {weight: randn(*shape), bias: None},
                f"{weight} has shape {shape}, expected an odd kernel height and width",
            )
            for shape in even
        ],
        *[
            ({weight: randn(4, 1, 3, 3).to(dtype)}, f"{weight} has dtype")
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32)
        ],
        ({weight: randn(4, 1, 3, 3).to_sparse()}, f"{weight} is not a dense strided tensor"),
        ({weight: quantized(4, 1, 3, 3)}, f"{weight} has dtype QUInt8, expected float32"),
        *[({weight: nested(layout)}, f"{weight} is a nested tensor, expected a dense") for layout in NESTED],
        ({bias: quantized(4)}, f"{bias} has dtype QUInt8, expected float32"),
        *[({bias: nested(layout)}, f"{bias} is a nested tensor, expected a dense") for layout in NESTED],
        ({bias: randn(3)}, f"{bias} has shape (3,), expected (4,)"),
        ({bias: randn(8)}, f"{bias} has shape (8,), expected (4,)"),
        ({bias: randn(4, 1)}, f"{bias} has shape (4, 1), expected (4,)"),
        ({bias: torch.tensor(1.0)}, f"{bias} has shape (), expected (4,)"),
        ({bias: randn(4).double()}, f"{bias} has dtype float64, expected float32"),
        ({bias: randn(4).to_sparse()}, f"{bias} is not a dense strided tensor"),
    ]


def attend_cases() -> list[Case]:
    """What both kinds of attention refuse."""
    tokens = {name: randn(2, 16, 8) for name in "qkv"}
    return [
        *token_cases("q"),
        *token_cases("k"),
        *token_cases("v"),
        *[
            ({name: tokens[name].to(dtype)}, f"{name} has dtype {str(dtype)[6:]}, expected q's float32")
            for name in "kv"
            for dtype in (torch.float64, torch.float16, torch.bfloat16)
        ],
        ({name: randn(2, 16, 0) for name in "qkv"}, "q has shape (2, 16, 0), expected at least one channel"),
        ({"k": randn(2, 0, 8), "v": randn(2, 0, 8)}, "k has shape (2, 0, 8), expected at least one key"),
        ({"k": randn(3, 16, 8)}, "k has shape (3, 16, 8), expected (2, M, 8) to go with q (2, 16, 8)"),
        ({"k": randn(1, 16, 8)}, "k has shape (1, 16, 8), expected (2, M, 8)"),
        ({"k": randn(2, 16, 4)}, "k has shape (2, 16, 4), expected (2, M, 8)"),
        ({"v": randn(2, 15, 8)}, "v has shape (2, 15, 8), expected k's (2, 16, 8)"),
        *[
            ({"num_heads": heads}, f"num_heads is {heads}, expected a positive divisor of the 8 channels")
            for heads in (0, -1, -2, 3, 9, 16, 2**62, 2**63 - 1, -(2**63))
        ],
        *map_cases(),
        *taps_cases("dwc_weight", "dwc_bias"),
        (
            {"dwc_weight": randn(3, 1, 3, 3)},
            "dwc_weight has shape (3, 1, 3, 3), expected (4, 1, kh, kw) shared",
        ),
        ({"dwc_weight": randn(0, 1, 3, 3)}, "dwc_weight has shape (0, 1, 3, 3), expected (4, 1, kh, kw)"),
        ({"dwc_weight": None}, "dwc_bias was given without dwc_weight"),
        (unwindowed(size=None), "dwc_weight was given without size"),
        ({"size": None, "dwc_weight": None, "dwc_bias": None}, "window (2, 2) was given without size"),
        (unwindowed(q=randn(2, 9, 8)), "dwc_weight needs as many queries as keys, got 9 and 16"),
        ({"q": randn(2, 9, 8)}, "window (2, 2) needs as many queries as keys, got 9 and 16"),
        *[({"eps": eps}, "eps is ") for eps in (-1e-6, -inf, inf, nan)],
        *[
            ({"eps": eps}, f"eps is {eps}, expected a number of float32, in which the call is computed: 0 or")
            for eps in (1e-50, 1e-38, 1e39, 1e300)
        ],
    ]


def focus_cases() -> list[Case]:
    """What only the focused attention refuses."""
    return [
        ({"v": randn(2, 16, 16)}, "v has shape (2, 16, 16), expected k's (2, 16, 8)"),
        ({"scale": positive(4)}, "scale has shape (4,), expected (8,)"),
        ({"scale": positive(1, 8)}, "scale has shape (1, 8), expected (8,)"),
        ({"scale": positive(1, 1, 8)}, "scale has shape (1, 1, 8), expected (8,)"),
        ({"scale": torch.tensor(2.0)}, "scale has shape (), expected (8,)"),
        *[
            ({"scale": positive(8, dtype=dtype)}, f"scale has dtype {str(dtype)[6:]}, expected float32")
            for dtype in (torch.float64, torch.float16, torch.bfloat16)
        ],
        ({"scale": torch.ones(8, dtype=torch.int64)}, "scale has dtype"),
        ({"scale": positive(8).to_sparse()}, "scale is not a dense strided tensor"),
        *[
            ({"scale": with_entry(bad)}, "scale[3] is zero, negative, infinite or NaN")
            for bad in (0.0, -0.0, -1.0, nan, inf, -inf, -1e-45)
        ],
        *[
            ({"scale": with_entry(bad)}, "scale[3] is below 2^-126 or above 2^126")
            for bad in (1e-45, 1e-39, 1.1754942e-38, 1e38, 3.4e38)
        ],
        ({"scale": quantized(8)}, "scale has dtype QUInt8, expected float32"),
        *[({"scale": nested(layout)}, "scale is a nested tensor, expected a dense") for layout in NESTED],
        *[({"key_bias": nested(layout)}, "key_bias is a nested tensor, expected") for layout in NESTED],
        ({"key_bias": quantized(4, 8)}, "key_bias has dtype QUInt8, expected float32"),
        ({"key_bias": randn(16, 8)}, "key_bias has shape (16, 8), expected (4, 8)"),
        ({"key_bias": randn(1, 4, 8)}, "key_bias has shape (1, 4, 8), expected (4, 8)"),
        ({"key_bias": randn(4, 4)}, "key_bias has shape (4, 4), expected (4, 8)"),
        (unwindowed(key_bias=randn(4, 8)), "key_bias has shape (4, 8), expected (16, 8)"),
        ({"key_bias": randn(4, 8).double()}, "key_bias has dtype float64, expected float32"),
        ({"key_bias": randn(4, 8).to_sparse()}, "key_bias is not a dense strided tensor"),
        *[
            ({"focusing_factor": p}, "focusing_factor is ")
            for p in (0.5, 0.999, 0.0, -1.0, -3.0, nan, inf, -inf)
        ],
        *[
            ({"focusing_factor": p}, f"focusing_factor is {p:g}, expected a number of float32")
            for p in (1e39, 1e300)
        ],
    ]


def linear_cases() -> list[Case]:
    """What only the attention of given features refuses: values may have other channels, by head."""
    return [
        ({"v": randn(2, 16, 9)}, "v has shape (2, 16, 9), expected channels for each of the 2 heads"),
        ({"v": randn(2, 16, 0)}, "v has shape (2, 16, 0), expected k's (2, 16, 8), or other channels"),
        ({"v": randn(3, 16, 4)}, "v has shape (3, 16, 4), expected k's (2, 16, 8), or other channels"),
    ]


def conv_cases() -> list[Case]:
    return [
        *token_cases("x"),
        ({"x": randn(2, 16, 0)}, "x has shape (2, 16, 0), expected at least one token and one channel"),
        ({"x": randn(2, 0, 8)}, "x has shape (2, 0, 8), expected at least one token"),
        (
            {"weight": randn(3, 1, 3, 3)},
            "weight has shape (3, 1, 3, 3), expected (D, 1, kh, kw) with D dividing",
        ),
        ({"weight": None}, "weight is None, expected (D, 1, kh, kw) with D dividing the 8 channels of x"),
        ({"weight": randn(16, 1, 3, 3)}, "weight has shape (16, 1, 3, 3), expected"),
        ({"weight": randn(0, 1, 3, 3)}, "weight has shape (0, 1, 3, 3), expected"),
        *taps_cases("weight", "bias"),
        *map_cases(),
    ]


CASES = [
    *[("attention", *case) for case in [*attend_cases(), *focus_cases()]],
    *[("linear_attention", *case) for case in [*attend_cases(), *linear_cases()]],
    *[("depthwise_conv", *case) for case in conv_cases()],
]
