"""What all loaded models of the runtime share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from modelyard_server.runtimes.api import (
    JsonValue,
    KeptWeights,
    LoadedModel,
    LoadSource,
    Prepared,
    Witness,
)
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.model_weights import HeldWeights
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.tensors import TensorValue
from modelyard_server.weights.activation_model import ActivationPoint
from modelyard_server.weights.first_runs import FirstRuns
from modelyard_server.weights.run_meter import RunMeter
from modelyard_server.weights.storages import Spread

__all__ = ["BatchedModel", "HfModel", "chunks", "labels_of"]


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
        self._meter = RunMeter(FirstRuns.none(), self._device)

    def own(self, weights: HeldWeights) -> None:
        """Makes the model the owner of what its module hangs over; close releases it."""
        self._weights = weights

    def measure(self, first_runs: FirstRuns) -> None:
        """Has the first run of each bucket measured; before the first run of all."""
        self._meter = RunMeter(first_runs, self._device)

    def take_measured(self) -> tuple[ActivationPoint, ...]:
        """What runs took beside the weights, as far as they were measured; each is told once."""
        return self._meter.take()

    def _forward_pass(self, batch: int, length: int) -> AbstractContextManager[None]:
        """To be entered for what one batch takes, from its inputs to what is left of it.

        Args:
            batch: its rows.
            length: its tokens a row; 1 for pictures of the model's size.
        """
        return self._meter.forward_pass(batch, length)

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
            with torch.inference_mode(), self._meter.run():
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

    @property
    def source(self) -> LoadSource:
        """Where its weights came from; known until it is closed."""
        return LoadSource.STORAGE if self._weights is None else self._weights.source

    def keep(self) -> KeptWeights | None:
        """Copies to host memory what it holds together with others, for loads to come."""
        return None if self._weights is None else self._weights.keep()

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


class BatchedModel(HfModel):
    """A model whose requests can share a run: what it answers for a row depends on no other row.

    A task is a subclass with `_prepare` and `_answer_batch`.
    """

    def prepare(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> Prepared:
        """Reads inputs and parameters; see the subclass for them."""
        try:
            return self._prepare(inputs, OptionReader(parameters))
        except BaseException as error:
            forget_frames(error)
            raise

    def run_batch(self, requests: Sequence[Prepared]) -> Sequence[tuple[TensorValue, ...]]:
        """Answers requests together."""
        try:
            with torch.inference_mode(), self._meter.run():
                return self._answer_batch(requests)
        except BaseException as error:
            forget_frames(error)
            raise

    def _answer(
        self, inputs: Sequence[TensorValue], parameters: OptionReader
    ) -> tuple[TensorValue, ...]:
        (answer,) = self._answer_batch((self._prepare(inputs, parameters),))
        return answer

    @abstractmethod
    def _prepare(self, inputs: Sequence[TensorValue], parameters: OptionReader) -> Prepared: ...

    @abstractmethod
    def _answer_batch(self, requests: Sequence[Prepared]) -> Sequence[tuple[TensorValue, ...]]: ...


def chunks(count: int, size: int) -> Iterator[slice]:
    """Yields the slices that cut `count` rows into pieces of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def labels_of(config: Any, count: int) -> tuple[str, ...]:
    """Returns the names of a classifier's classes."""
    names = getattr(config, "id2label", None) or {}
    return tuple(str(names.get(index, f"LABEL_{index}")) for index in range(count))
