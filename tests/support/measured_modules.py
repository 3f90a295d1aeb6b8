"""Modules for runtime "torch" whose runs take much memory beside the weights."""

from __future__ import annotations

import torch

__all__ = ["FACTORIES", "Spending"]

FACTORIES = ("tests.support.measured_modules:Spending",)
"""To be put among the allowed factories."""


class Spending(torch.nn.Module):
    """Answers y = x + weight[0], and holds `width` numbers a row meanwhile.

    Its weights are those of tests.support.faulty_models.make_weights. Fails for inputs that hold a
    number below zero, when it has already spent what it spends.

    Args:
        width: numbers a row, 4 bytes each.
        rows: elements of `weight`.
    """

    def __init__(self, width: int = 1 << 18, rows: int = 1024) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows))
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, anything]. Returns: the same shape."""
        spent = x.new_ones(len(x), self.width)
        if bool((x < 0).any()):
            raise ArithmeticError("asked to fail")
        result: torch.Tensor = x + self.weight[0] * spent[0, 0]
        return result
