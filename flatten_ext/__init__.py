"""Focused linear attention for vision transformers: C++ and CUDA kernels behind torch.ops.flatten.

`attention`, `linear_attention`, `attention_state`, `attention_from_state` and `depthwise_conv` are the
operators, `FocusedLinearAttention` is the module to put in a transformer block, `flatten_ext.models` has the
published models (needs timm).
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from . import (
    _load,  # first: registers torch.ops.flatten
    _sharding,
)
from . import _moved as _moved
from . import _torch as _torch  # torch's hooks
from ._cuda_kernels import cuda_kernels
from .nn import FocusedLinearAttention
from .ops import attention, attention_from_state, attention_state, depthwise_conv, linear_attention

if TYPE_CHECKING:
    from ._decompositions import decompositions as decompositions
    from .analysis import attention_map as attention_map
    from .check import self_check as self_check
    from .models import load_official as load_official
    from .models.accelerate import accelerate as accelerate
    from .models.convert import convert as convert
    from .rotary import rotary_table as rotary_table

_sharding.register_on_import()

__version__: str = _load.build_info()["version"]

# Names whose modules need more than torch; imported when first asked for.
_LAZY = {
    "accelerate": "models.accelerate",
    "attention_map": "analysis",
    "convert": "models.convert",
    "decompositions": "_decompositions",
    "load_official": "models",
    "rotary_table": "rotary",
    "self_check": "check",
}

__all__ = [
    "FocusedLinearAttention",
    "__version__",
    "attention",
    "attention_from_state",
    "attention_map",
    "attention_state",
    "cuda_kernels",
    "decompositions",
    "depthwise_conv",
    "linear_attention",
    "rotary_table",
    "self_check",
]
# `from flatten_ext import *` asks for every name: it must work where there is torch alone.
if importlib.util.find_spec("timm") is not None:
    __all__ += ["accelerate", "convert", "load_official"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
