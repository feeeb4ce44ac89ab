"""The processes that torchrun started for one run, and this one's place among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Processes"]


class Processes:
    """Joins the others, by a group that is there already or as torchrun's environment says; else it is alone.

    Attributes:
        rank, count: this process's place, and how many they are.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._ours = False
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo" if torch.device(device).type == "cpu" else None)
            self._ours = True
        together = dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def own_device(self, name: str) -> str:
        """The device of this process: of several on one machine each has its own GPU."""
        if self.count == 1:
            return name
        device = torch.device(name)
        if device.type == "cpu" or device.index is not None:
            return name
        return f"{device.type}:{os.environ.get('LOCAL_RANK', self.rank)}"

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model, with the gradients of all processes averaged."""
        if self.count == 1:
            return model
        return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])

    @staticmethod
    def apart(model: nn.Module, apart: bool) -> AbstractContextManager:
        """Inside, gradients are only summed up on this process, if `apart`."""
        return model.no_sync() if apart and isinstance(model, DistributedDataParallel) else nullcontext()

    def sums(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The sums over all processes."""
        if self.count == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return summed.tolist()

    def all_of(self, value: Any) -> list[Any]:
        """Every process's value. Each waits here for the others."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Ends the group, if it was made here."""
        if self._ours and dist.is_initialized():
            dist.destroy_process_group()
        self._ours = False
