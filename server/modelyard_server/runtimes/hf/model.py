"""What all loaded models of the runtime share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from modelyard_server.runtimes.api import JsonValue, LoadedModel, Witness
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.model_weights import HeldWeights
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.tensors import TensorValue
from modelyard_server.weights.storages import Spread

__all__ = ["HfModel", "chunks", "labels_of"]


class HfModel(LoadedModel):
    """A model of the library on its devices. A task is a subclass with `_answer`.

    Args:
        module: the model; takes its inputs and gives its outputs on its home device.
        spread: where its tensors live.
    """

    def __init__(self, module: torch.nn.Module, spread: Spread) -> None:
        self._held: torch.nn.Module | None = module
        self._weights: HeldWeights | None = None
        self._spread = spread
        self._device = spread.home_name

    def own(self, weights: HeldWeights) -> None:
        """Makes the model the owner of what its module hangs over; close releases it."""
        self._weights = weights

    @property
    def _module(self) -> Any:
        """The model. Callers must not keep it in a frame that outlives `_answer`."""
        if self._held is None:
            raise RuntimeError("the model was closed")
        return self._held

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        """Answers one request; see the subclass for inputs, parameters and outputs."""
        try:
            with torch.inference_mode():
                return self._answer(inputs, OptionReader(parameters))
        except BaseException as error:
            forget_frames(error)
            raise

    @abstractmethod
    def _answer(
        self, inputs: Sequence[TensorValue], parameters: OptionReader
    ) -> tuple[TensorValue, ...]: ...

    def measured_bytes(self) -> Mapping[int, int]:
        """Bytes of the unique storages the model holds now, by device; none once it is closed."""
        if self._held is None:
            return {}
        if self._weights is not None:
            return self._weights.measured_bytes(self._held, self._spread)
        return self._spread.measured_bytes(self._held)

    def shared_bytes(self) -> Mapping[int, Mapping[str, int]]:
        """What it holds together with others, by device and identity."""
        return {} if self._weights is None else self._weights.shared_bytes()

    def witnesses(self) -> tuple[Witness, ...]:
        """Weak references to the module, its parameters and its buffers."""
        if self._held is None:
            return ()
        weights = () if self._weights is None else self._weights.witnesses()
        return (*self._spread.witnesses(self._held), *weights)

    def close(self) -> None:
        """Drops the module, and lets go of the tensors that others may have as well."""
        self._held = None
        if self._weights is not None:
            self._weights.release()
            self._weights = None


def chunks(count: int, size: int) -> Iterator[slice]:
    """Yields the slices that cut `count` rows into pieces of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def labels_of(config: Any, count: int) -> tuple[str, ...]:
    """Returns the names of a classifier's classes."""
    names = getattr(config, "id2label", None) or {}
    return tuple(str(names.get(index, f"LABEL_{index}")) for index in range(count))
