"""A model of runtime "torch" on its devices. Imports torch only when it is run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelyard_server.runtimes.api import JsonValue, LoadedModel, OptionError, Witness
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.tensors import TensorError, TensorValue

if TYPE_CHECKING:
    import torch

    from modelyard_server.runtimes.model_weights import HeldWeights
    from modelyard_server.weights.storages import Spread

__all__ = ["TorchModel", "check_parameters", "input_names"]


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


class TorchModel(LoadedModel):
    """A module of a factory.

    Args:
        module: takes its inputs and gives its outputs on its home device.
        spread: where its tensors live.
        inputs: names of the inputs; None: what forward takes.
        outputs: names of the outputs; None: what they are called in the answer, or by number.
        weights: what it holds together with others; close releases it.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        spread: Spread,
        inputs: tuple[str, ...] | None,
        outputs: tuple[str, ...] | None,
        weights: HeldWeights | None,
    ) -> None:
        self._module: torch.nn.Module | None = module
        self._spread = spread
        self._weights = weights
        self._inputs = inputs
        self._outputs = outputs
        self._signature = inspect.signature(module.forward)

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        """Answers one request with what the module answers."""
        import torch

        try:
            check_parameters(parameters)
            with torch.inference_mode():
                return self._answer(inputs)
        except BaseException as error:
            forget_frames(error)
            raise

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
