"""What copying between the host and an accelerator needs to know of it."""

from __future__ import annotations

import torch

__all__ = ["is_accelerator", "pinned_memory", "synchronize"]


def is_accelerator(device: torch.device) -> bool:
    """True if a device is one of those that torch calls this process's accelerators."""
    current = torch.accelerator.current_accelerator()
    return current is not None and current.type == device.type


def pinned_memory(size_bytes: int, device: torch.device) -> torch.Tensor | None:
    """Host memory that is pinned for a device; None if there is none.

    Not every backend can do that, and not every system lets a process lock so much.
    """
    if not is_accelerator(device):
        return None
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None


def synchronize(device: torch.device) -> None:
    """Waits until all that was given to a device has been done; the host has always done it."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)
