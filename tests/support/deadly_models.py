"""Modules for runtime "torch" that end their process, or take all of its memory.

Like those of faulty_models each has one parameter `weight` FLOAT32 [rows].
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

__all__ = ["FACTORIES", "Crashing", "Hoarding"]

FACTORIES = frozenset(f"tests.support.deadly_models:{name}" for name in ("Crashing", "Hoarding"))


class _Adding(torch.nn.Module):
    def __init__(self, rows: int = 1024) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows))


class Crashing(_Adding):
    """Reads from address 0."""

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: never."""
        return ctypes.string_at(0)


class Hoarding(_Adding):
    """Asks for more and more memory, and touches it."""

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: never."""
        kept = []
        while True:
            kept.append(torch.ones(2**24))
