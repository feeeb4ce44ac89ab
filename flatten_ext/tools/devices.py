"""Devices by name."""

from __future__ import annotations

import torch

from flatten_ext.errors import InputError, blamed_on

__all__ = ["find_device"]


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1".

    Raises:
        InputError: torch knows no such device, or this machine has none.
    """
    # Lazy initialisation of a device that is not there raises AssertionError, RuntimeError or worse.
    with blamed_on(f"device {str(name)!r}"):
        device = torch.device(name)
        if device.type == "meta":
            raise InputError("device 'meta' computes nothing")
        torch.zeros(1, device=device)
        return device
