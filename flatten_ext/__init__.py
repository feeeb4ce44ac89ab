"""Focused linear attention for vision transformers: C++ and CUDA kernels behind torch.ops.flatten.

`attention`, `linear_attention` and `depthwise_conv` are the operators, `FocusedLinearAttention` the module to
put in a transformer block, `flatten_ext.models` the published models (needs timm).
"""

import importlib
from typing import Any

from . import _autograd as _autograd
from . import _load  # first: registers torch.ops.flatten
from . import _moved as _moved
from . import _registrations as _registrations
from .nn import FocusedLinearAttention
from .ops import attention, depthwise_conv, linear_attention

__version__: str = _load.build_info()["version"]

# Names whose modules need more than torch; imported when first asked for.
_LAZY = {
    "attention_map": "analysis",
    "convert": "models.convert",
    "load_official": "models",
    "rotary_table": "rotary",
    "self_check": "check",
}

__all__ = [
    "FocusedLinearAttention",
    "__version__",
    "attention",
    "attention_map",
    "convert",
    "depthwise_conv",
    "linear_attention",
    "load_official",
    "rotary_table",
    "self_check",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
