"""Reading a checkpoint: parameter names and tensors, or an error that names the file and what is in it."""

from __future__ import annotations

import argparse
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor

from ._positions import metadata_of

__all__ = ["read_state_dict"]

# Under these keys training programs put a state_dict beside their options and counters.
_WRAPPERS = ("model", "state_dict")
_AVERAGED = ("state_dict_ema", "model_ema")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict in a .pth or .safetensors file, bare or under "model" or "state_dict"; averaged (EMA)
    weights are taken where there are some.

    Files of torch.save are unpickled with weights_only, so that they cannot run code.

    Raises:
        FileNotFoundError, IsADirectoryError: no file of that name.
        ValueError: the file is empty, damaged, or holds something else; naming file and what was found.
    """
    file, name = Path(path), os.fspath(path)
    if file.is_dir():
        raise IsADirectoryError(f"checkpoint {name} is a folder, expected a file")
    if not file.exists():
        raise FileNotFoundError(f"checkpoint {name} does not exist")
    if file.stat().st_size == 0:
        raise ValueError(f"checkpoint {name} is empty")
    try:
        content = _load(name)
    except (OSError, MemoryError):
        raise
    # Whatever a damaged or hostile file makes unpickling raise, it says the same of the file.
    except Exception as error:
        raise ValueError(f"checkpoint {name} cannot be read: {_reason(error)}") from error
    _expect_state_dict(name, content)
    return content


def _load(name: str) -> Any:
    """What the file holds, taken out of its wrappers, with the names of the bare model's parameters."""
    if name.endswith(".safetensors"):
        return load_state_dict(name)
    # timm's programs keep their arguments in a Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content: Any = torch.load(name, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        averaged = [key for key in _AVERAGED if content.get(key) is not None]
        content = content[averaged[0]] if averaged else content
    for key in _WRAPPERS:
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return content
    # timm drops the metadata, which says what maps the positional encodings were learned on.
    state_dict = OrderedDict(_unwrapped(content))
    modules = {f"{key}.": facts for key, facts in metadata_of(content).items()}
    metadata = {key.strip("."): facts for key, facts in _unwrapped(modules).items()}
    state_dict._metadata = metadata  # type: ignore[attr-defined]
    return state_dict


def _unwrapped(named: dict[str, Any]) -> dict[str, Any]:
    """Without the prefixes of torch.compile and DistributedDataParallel. Older releases of timm take them off
    in one order only, so they are asked twice."""
    return clean_state_dict(clean_state_dict(named))


def _reason(error: Exception) -> str:
    """Why unpickling failed, in terms of the file."""
    causes = [str(error), str(error.__cause__ or "")]
    for text in causes:
        if blocked := re.search(r"GLOBAL ([\w.]+)", text):
            return f"it holds an object of {blocked[1]}, expected tensors, numbers, text and their containers"
    if isinstance(error, AttributeError):  # timm looks for .items()
        return "it holds no mapping of parameter names to tensors"
    return "it is damaged, or no file of torch.save or safetensors"


def _expect_state_dict(name: str, content: Any) -> None:
    if not isinstance(content, dict):
        found = type(content).__name__
        raise ValueError(f"checkpoint {name} holds a {found}, expected parameter names and tensors")
    if not content:
        raise ValueError(f"checkpoint {name} holds no parameters")
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"checkpoint {name} has {key!r} for a parameter's name, expected text")
        if not isinstance(value, Tensor):
            raise ValueError(
                f"checkpoint {name} holds a {type(value).__name__} under {key!r}, expected a tensor"
            )
