"""A model of runtime "torch" on its devices. Imports torch only when it is run."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from modelyard_server.runtimes.api import (
    JsonValue,
    KeptWeights,
    LoadedModel,
    LoadSource,
    OptionError,
    Prepared,
    Witness,
)
from modelyard_server.runtimes.batches import RowsLost, split_rows
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.tensors import TensorError, TensorValue

if TYPE_CHECKING:
    import torch

    from modelyard_server.runtimes.model_weights import HeldWeights
    from modelyard_server.weights.activation_model import ActivationPoint
    from modelyard_server.weights.first_runs import FirstRuns
    from modelyard_server.weights.run_meter import RunMeter
    from modelyard_server.weights.storages import Spread

__all__ = ["TorchModel", "check_parameters", "input_names"]


logger = logging.getLogger(__name__)


def check_parameters(parameters: Mapping[str, JsonValue]) -> None:
    """Checks that there are none.

    Raises:
        OptionError: there are.
    """
    for name in parameters:
        raise OptionError(name[:64], "is not known here; a torch model has no parameters")


def input_names(inputs: Sequence[TensorValue], names: tuple[str, ...] | None) -> list[str]:
    """What each input is for: a name, or "" for the only one if it goes by its place.

    Args:
        inputs: of a request.
        names: of all inputs, if the options say them.

    Raises:
        TensorError: one of several has no name, or the names are not those of the options.
    """
    found = []
    for value in inputs:
        if not value.name and len(inputs) > 1:
            raise TensorError("", "has no name; only a single input may go without")
        found.append(value.name or (names[0] if names else ""))
    if names is not None:
        for name in found:
            if name not in names:
                raise TensorError(name, f"is no input; the model takes {', '.join(names)}")
        for name in names:
            if name not in found:
                raise TensorError(name, "is missing")
    return found


def _joined(requests: Sequence[Sequence[TensorValue]]) -> tuple[TensorValue, ...]:
    """Inputs whose rows are those of all requests, in order. All are of the same kind."""
    joined = []
    for values in zip(*requests, strict=True):
        first = values[0]
        joined.append(
            TensorValue(
                name=first.name,
                dtype=first.dtype,
                shape=(sum(value.shape[0] for value in values), *first.shape[1:]),
                data=b"".join(value.data for value in values),
            )
        )
    return tuple(joined)


class TorchModel(LoadedModel):
    """A module of a factory.

    Args:
        module: takes its inputs and gives its outputs on its home device.
        spread: where its tensors live.
        inputs: names of the inputs; None: what forward takes.
        outputs: names of the outputs; None: what they are called in the answer, or by number.
        weights: what it holds together with others; close releases it.
        most_rows: of a run that requests share; None: each has its own.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        spread: Spread,
        inputs: tuple[str, ...] | None,
        outputs: tuple[str, ...] | None,
        weights: HeldWeights | None,
        *,
        most_rows: int | None = None,
    ) -> None:
        self._module: torch.nn.Module | None = module
        self._spread = spread
        self._weights = weights
        self._inputs = inputs
        self._outputs = outputs
        self._signature = inspect.signature(module.forward)
        self._meter: RunMeter | None = None
        self._most_rows = most_rows

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        """Answers one request with what the module answers."""
        import torch

        try:
            check_parameters(parameters)
            with torch.inference_mode(), self._measuring(inputs):
                return self._answer(inputs)
        except BaseException as error:
            forget_frames(error)
            raise

    def prepare(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> Prepared | None:
        """Checks names and types, if requests may share a run and this one has rows to share it."""
        if self._most_rows is None:
            return None
        check_parameters(parameters)
        names = input_names(inputs, self._inputs)
        counts = {value.shape[0] if value.shape else 0 for value in inputs}
        if len(counts) != 1 or 0 in counts:
            return None
        for value in inputs:
            if not value.dtype.item_size:
                raise TensorError(value.name, f"is {value.dtype.value}; the model takes numbers")
        (rows,) = counts
        return Prepared(
            key=tuple(
                (name, value.dtype, value.shape[1:])
                for name, value in zip(names, inputs, strict=True)
            ),
            rows=rows,
            row_bytes=sum(len(value.data) for value in inputs) // rows,
            most_rows=self._most_rows,
            content=tuple(inputs),
        )

    def run_batch(self, requests: Sequence[Prepared]) -> Sequence[tuple[TensorValue, ...]]:
        """Answers requests together: with the module's answer to all of their rows."""
        if len(requests) == 1:
            return (self.run(requests[0].content, {}),)
        try:
            outputs = self.run(_joined([request.content for request in requests]), {})
            return split_rows(outputs, [request.rows for request in requests])
        except RowsLost as error:
            # It will not do better another time; from now on each request has its own run.
            self._most_rows = None
            logger.warning("a torch model cannot share runs although batch = true: %s", error)
            raise

    def measure(self, first_runs: FirstRuns) -> None:
        """Has the first run of each bucket measured; before the first run of all.

        A bucket is one of rows, by the first input's first dimension, and of elements a row.
        """
        from modelyard_server.weights.run_meter import RunMeter

        self._meter = RunMeter(first_runs, self._spread.home_name)

    def take_measured(self) -> Sequence[ActivationPoint]:
        """What runs took beside the weights, as far as they were measured; each is told once."""
        return () if self._meter is None else self._meter.take()

    def _measuring(self, inputs: Sequence[TensorValue]) -> AbstractContextManager[None]:
        if self._meter is None:
            return nullcontext()
        rows = max(1, inputs[0].shape[0]) if inputs[0].shape else 1
        elements = sum(math.prod(value.shape) for value in inputs)
        return self._meter.run_of_one_pass(rows, max(1, -(-elements // rows)))

    def _answer(self, inputs: Sequence[TensorValue]) -> tuple[TensorValue, ...]:
        from modelyard_server.runtimes.conversion import to_torch, to_value

        if self._module is None:
            raise RuntimeError("the model was closed")
        positional: list[torch.Tensor] = []
        named: dict[str, torch.Tensor] = {}
        for name, value in zip(input_names(inputs, self._inputs), inputs, strict=True):
            tensor = to_torch(value, device=self._spread.home_name, writable=True)
            if name:
                named[name] = tensor
            else:
                positional.append(tensor)
        if self._inputs is None:
            self._check_signature(inputs, positional, named)
        made = self._module(*positional, **named)
        return tuple(to_value(name, tensor) for name, tensor in self._named(made))

    def _check_signature(
        self,
        inputs: Sequence[TensorValue],
        positional: list[torch.Tensor],
        named: dict[str, torch.Tensor],
    ) -> None:
        try:
            self._signature.bind(*positional, **named)
        except TypeError:
            takes = [
                parameter.name
                for parameter in self._signature.parameters.values()
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            ]
            raise TensorError(
                inputs[0].name, f"and the others do not fit; the model takes {', '.join(takes)}"
            ) from None

    def _named(self, made: Any) -> list[tuple[str, torch.Tensor]]:
        import torch

        if isinstance(made, Mapping):
            names = tuple(made) if self._outputs is None else self._outputs
            missing = [name for name in names if name not in made]
            if missing:
                raise TypeError(f"the model made no output {missing[0]!r}")
            values = [made[name] for name in names]
        else:
            values = list(made) if isinstance(made, tuple | list) else [made]
            names = self._outputs or tuple(f"output_{index}" for index in range(len(values)))
            if len(names) != len(values):
                raise TypeError(f"the model made {len(values)} outputs instead of {len(names)}")
        if not values or not all(isinstance(value, torch.Tensor) for value in values):
            raise TypeError("the model made something that is no tensor, tuple or dict of tensors")
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError("the model made a dict whose keys are no names")
        return list(zip(names, values, strict=True))

    def measured_bytes(self) -> Mapping[int, int]:
        """Bytes of what the model holds now, by device; none once it is closed."""
        if self._module is None:
            return {}
        if self._weights is not None:
            return self._weights.measured_bytes(self._module, self._spread)
        return self._spread.measured_bytes(self._module)

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
        if self._module is None:
            return ()
        weights = () if self._weights is None else self._weights.witnesses()
        return (*self._spread.witnesses(self._module), *weights)

    def close(self) -> None:
        """Drops the module, and lets go of the tensors that others may have as well."""
        self._module = None
        if self._weights is not None:
            self._weights.release()
            self._weights = None
        # The signature was taken from the bound method and does not hold it.
