"""Models by name, their weights and sizes, each with an error that names what was asked for."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from flatten_ext import models
from flatten_ext.errors import InputError, blamed_on, one_line
from flatten_ext.models._checkpoint import load_weights

__all__ = ["build", "checkpoint_classes", "load", "try_forward"]


def build(name: str, what: str = "model", **options: Any) -> nn.Module:
    """timm.create_model.

    Args:
        name: ours or timm's.
        what: the option that gave the name.
        options: of create_model; pretrained weights are taken from timm's place for them.

    Raises:
        InputError: no such model, or it cannot be built with these options.
    """
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"; there are {', '.join(near)}" if near else ""
        raise InputError(f"{what} {name!r} is none of timm's models or ours{hint}")
    shown = ", ".join(f"{key}={value}" for key, value in options.items() if value is not None)
    with blamed_on(f"{what} {name} cannot be built with {shown or 'its defaults'}"):
        return timm.create_model(name, **options)


def load(model: nn.Module, path: str | Path, new_classifier: bool = False, grid: str | None = None) -> None:
    """Loads a checkpoint into a model, ours or timm's, whole.

    Args:
        model: what to load into.
        path: a file that load_official takes.
        new_classifier: keep the model's classifier where the file's has other classes.
        grid: "ROWS" or "ROWS,COLUMNS" of the map that one of our checkpoints was trained for, where it does
            not say it itself (see load_official).

    Raises:
        InputError: naming the file, and what is wrong with it.
    """
    try:
        if isinstance(model, models.FAMILIES):
            models.load_official(model, path, new_classifier, _pair(grid))
        else:
            load_weights(model, path, lambda state_dict, _model: state_dict, new_classifier)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        message = one_line(error)
        raise InputError(message if str(path) in message else f"checkpoint {path}: {message}") from error


def _pair(grid: str | None) -> tuple[int, int] | None:
    """ "56" -> (56, 56), "32,128" -> (32, 128)."""
    if grid is None:
        return None
    try:
        rows, columns = (int(side) for side in (grid.split(",") * 2 if "," not in grid else grid.split(",")))
    except ValueError:
        raise InputError(f"grid is {grid!r}, expected ROWS or ROWS,COLUMNS") from None
    return rows, columns


def checkpoint_classes(path: str | Path) -> list[str] | None:
    """The names of the classes that `train` wrote into a checkpoint; None in another's."""
    if str(path).endswith(".safetensors"):
        return None
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # a file that loads with timm's exceptions alone is none of ours
        return None
    classes = content.get("classes") if isinstance(content, dict) else None
    return [str(name) for name in classes] if isinstance(classes, list | tuple) else None


@torch.inference_mode()
def try_forward(model: nn.Module, size: tuple[int, int, int], what: str) -> None:
    """Runs one black picture of (channels, height, width), so that a wrong size is found before the work.

    Raises:
        InputError: the model does not take it; beginning with `what`.
    """
    training = model.training
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with blamed_on(f"{what} does not take pictures of {size[1]} x {size[2]}"):
        model(torch.zeros(1, *size, device=device))
    model.train(training)
