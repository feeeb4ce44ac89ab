"""What the families tell timm alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.fx import Proxy

try:
    from timm.models._input import update_model_input_size
except ImportError:  # older releases keep no such record
    update_model_input_size = None

__all__ = [
    "attention_types",
    "check_attention_dropout",
    "default_cfg",
    "is_empty",
    "of_none",
    "of_this_size",
    "record_input_size",
    "reset_modules",
    "stem_grid",
    "undecayed",
]


def attention_types(attn_type: str, stages: int, letters: str = "LS") -> str:
    """Checks one letter for each stage: "L" for linear attention, "S" for softmax, in some families "M" for
    some blocks of each."""
    if len(attn_type) != stages or set(attn_type) - set(letters):
        expected = f"{', '.join(letters[:-1])} or {letters[-1]}"
        raise ValueError(f"attn_type must be {stages} letters, each {expected}, got {attn_type!r}")
    return attn_type


def check_attention_dropout(types: str, rate: float) -> None:
    """Says what dropout of attention weights does where `types`, one letter for each stage (or block), are
    linear: linear attention forms no weights to drop.

    Raises:
        ValueError: no stage is softmax.
    """
    linear = [index for index, kind in enumerate(types) if kind == "L"]
    if not rate or not linear:
        return
    if len(linear) == len(types):
        raise ValueError(
            f"attn_drop_rate is {rate}, expected 0: attn_type {types!r} has no softmax attention, whose "
            "weights it would drop; linear attention forms none"
        )
    warnings.warn(
        f"attn_drop_rate={rate} has no effect in {', '.join(map(str, linear))} of attn_type {types!r} "
        "(counted from 0): linear attention forms no weights to drop; those of type S use it",
        stacklevel=4,
    )


def record_input_size(model: nn.Module, img_size: tuple[int, int], **arguments: Any) -> None:
    """Notes the arguments by which timm builds `model` again at its new size."""
    if update_model_input_size is not None:
        update_model_input_size(model, img_size, **arguments)


def reset_modules(model: nn.Module) -> None:
    """Gives every parameter and buffer its initial value, by the `reset_parameters` of its module."""
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def is_empty(image: Any) -> bool:
    """Whether a batch has no images, on which timm's reshapes to (B, -1, C) fail. Not asked while a graph is
    traced, which would be tied to the answer."""
    traced = isinstance(image, Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and image.shape[0] == 0


def of_none(forward: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """The result of `forward` for an empty batch: no row of that for one blank image. Its gradients are 0."""
    return forward(image.new_zeros(1, *image.shape[1:]))[:0]


def of_this_size(features: Tensor, image: Tensor) -> Tensor:
    """`features`, in a graph of torch.jit.trace with an error where the image has not the size of the trace.

    The map's height and width are numbers in such a graph. Where an image of another size has as many
    patches, as one of 128 x 48 has for 96 x 64, the operators cannot know that it is another map.
    """
    if not torch.jit.is_tracing():
        return features
    for dim in (2, 3):
        (image,) = image.split([int(image.shape[dim])], dim)  # raises where the size is another
    return features + image[..., :0].sum()  # zero: what no result needs is left out of the graph


def stem_grid(model: Any, img_size: tuple[int, int]) -> tuple[int, int]:
    """The map of the patches of an image."""
    ratio: Any = getattr(model.patch_embed, "feat_ratio", None)  # the pyramids' stems have none, and stride 4
    height, width = (4, 4) if ratio is None else ratio(as_scalar=False)
    return -(-img_size[0] // height), -(-img_size[1] // width)


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters of focused attention, and of PolaFormer's, that are not to be decayed.

    They are additive offsets (of keys, inside a softplus or a sigmoid) that start at zero; the public code
    decays them, since they have three axes or four.
    """
    endings = (".scale", ".positional_encoding", ".power")
    return {name for name, _ in model.named_parameters() if name.endswith(endings)}


def default_cfg(size: int = 224, published: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained_cfg: the public evaluation squashes to 256/224 of the input and crops the centre.

    `published` is the identifier in the authors' link to a checkpoint. It becomes `origin_url`: as `url` timm
    would download it.
    """
    return {
        "origin_url": f"https://cloud.tsinghua.edu.cn/f/{published}/?dl=1" if published else None,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        **kwargs,
    }
