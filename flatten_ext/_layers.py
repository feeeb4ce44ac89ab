"""Whether a layer may be replaced by the operation that its class and settings name.

A parent that knows a faster way to compute what its child layers compute reads their weights and does not
call them. That is right only where nothing else hangs on the call: adapters (LoRA), sharding (FSDP2),
offloading, pruning, spectral normalisation, observers and activation probes work by hooks, by another class,
by another `forward` or by tensors of their own. Where `is_plain` says no, the parent calls the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module
from torch.utils.module_tracker import ModuleTracker

__all__ = ["is_plain", "is_plain_conv"]

# The tensors that a kernel reads. The last two stand for plain ones while torch.compile and torch.export
# trace.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)


def is_plain(layer: nn.Module, device: torch.device | None) -> bool:
    """Whether calling `layer` does no more than its class and settings say, with plain weights on `device`
    (None: on any).

    The caller compares the class itself: a subclass, parametrised layers included, may do anything.
    """
    if (
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or "forward" in layer.__dict__
    ):
        return False
    pre, post = _module._global_forward_pre_hooks, _module._global_forward_hooks
    back_pre, back = _module._global_backward_pre_hooks, _module._global_backward_hooks
    if (pre or post or back_pre or back) and _watch_every_call(pre, post, back_pre, back):
        return False
    for tensor in layer._parameters.values():
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TENSORS or (device is not None and tensor.device != device):
            return False
    # Pruning and the older weight and spectral normalisation keep a computed weight as an attribute.
    return "weight" in layer._parameters or "weight" not in layer.__dict__


def is_plain_conv(layer: nn.Module | None, channels: int, device: torch.device | None) -> bool:
    """Whether `layer` is a plain depthwise convolution of `channels` channels that keeps the map's size."""
    return (
        type(layer) is nn.Conv2d
        and layer.groups == layer.in_channels == layer.out_channels == channels
        and layer.stride == (1, 1)
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and layer.padding == (layer.kernel_size[0] // 2, layer.kernel_size[1] // 2)
        and is_plain(layer, device)
    )


def _watch_every_call(*registries: Any) -> bool:
    """Whether hooks on all modules do something. Those of a ModuleTracker only keep the names of the modules
    that run, for FLOP counters, which are to count what runs without them."""
    hooks = (hook for registry in registries for hook in registry.values())
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)
