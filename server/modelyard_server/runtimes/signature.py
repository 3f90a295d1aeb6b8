"""What a model takes and gives, as far as it is known before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from modelyard_server.runtimes.tensors import DType

__all__ = ["ANY", "Signature", "TensorKind"]

ANY = -1
"""Any size of a dimension."""


@dataclass(frozen=True, slots=True)
class TensorKind:
    """An input or output.

    Attributes:
        name: what the model calls it.
        dtype: type of its elements.
        shape: its dimensions, outermost first; ANY where the size is not known or not fixed.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        inputs: all of them.
        outputs: all of them, in the model's order.
        is_exact: names, types and numbers of dimensions are these and no others. False for an
            example of what the model may take, and of what it then gives.
        shares_runs: requests of several callers may share a run.
    """

    inputs: tuple[TensorKind, ...]
    outputs: tuple[TensorKind, ...]
    is_exact: bool
    shares_runs: bool = False

    @property
    def takes_text(self) -> bool:
        """True if an input is TEXT."""
        return any(kind.dtype is DType.TEXT for kind in self.inputs)
