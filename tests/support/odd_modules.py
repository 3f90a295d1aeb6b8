"""Modules for runtime "torch" that change while the server runs: files say what they do.

Like those of faulty_models each has one parameter `weight` FLOAT32 [rows].
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from tests.support.faulty_models import ROWS, Adding

__all__ = ["EXITING", "FACTORIES", "HANGING", "LYING", "Exiting", "Hanging", "Lying"]

_MODULE = "tests.support.odd_modules"
EXITING, HANGING, LYING = (f"{_MODULE}:{name}" for name in ("Exiting", "Hanging", "Lying"))
FACTORIES = (EXITING, HANGING, LYING)


class Lying(Adding):
    """Has a buffer that is not saved, of one size while a file is there, and else of another.

    Args:
        flag: path of the file.
        there: elements of the buffer while it is there.
        gone: elements while it is not.
    """

    def __init__(self, flag: str, there: int, gone: int) -> None:
        super().__init__(ROWS)
        size = there if Path(flag).exists() else gone
        # Its values are computed, so that it cannot be made without memory.
        self.register_buffer("extra", torch.tensor([0.0]).repeat(int(size)), persistent=False)


class Exiting(Adding):
    """Ends its process while a file is there.

    Args:
        flag: path of the file.
    """

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag = flag

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: the same shape."""
        if Path(self.flag).exists():
            os._exit(3)
        return super().forward(x)


class Hanging(Exiting):
    """Never comes back while a file is there."""

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: the same shape."""
        while Path(self.flag).exists():
            time.sleep(0.01)
        return Adding.forward(self, x)
