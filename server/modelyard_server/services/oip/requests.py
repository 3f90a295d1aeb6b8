"""A ModelInferRequest, read and checked in itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError

from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.runtimes.api import JsonValue
from modelyard_server.runtimes.tensors import TensorError, TensorValue
from modelyard_server.services.handler import invalid
from modelyard_server.services.oip.contents import from_raw, from_typed
from modelyard_server.services.oip.messages import message

__all__ = ["AFFINITY", "TYPED_CONTENTS", "InferRequest", "parse", "read_request"]

AFFINITY: Final = "modelyard_affinity"
"""The parameter for what a route that has a choice goes by."""

TYPED_CONTENTS: Final = "modelyard_typed_contents"
"""The parameter that asks for an answer whose elements are in the fields of their types."""

_SEQUENCE: Final = frozenset({"sequence_id", "sequence_start", "sequence_end"})
_PREFIXES: Final = ("triton_", "modelyard_")
_MOST_NAME: Final = 64
_MOST_OUTPUTS: Final = 1_024
_US: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """What is asked, beside the name.

    Attributes:
        inputs: its tensors; where a model takes TEXT they are still BYTES.
        parameters: of the run.
        affinity: what a route's choices go by; empty for none.
        outputs: names of those that are wanted, each once; empty for all.
        is_typed: the answer is to have typed contents, where it can.
        timeout_s: how long it may take by its own parameter; None for as long as its call.
    """

    inputs: tuple[TensorValue, ...]
    parameters: Mapping[str, JsonValue]
    affinity: str
    outputs: tuple[str, ...]
    is_typed: bool
    timeout_s: float | None


def parse(body: bytes) -> Any:
    """The ModelInferRequest that bytes are. Raises Refusal INVALID_FIELD."""
    request = message("ModelInferRequest")()
    try:
        request.ParseFromString(body)
    except DecodeError:
        raise invalid(Violation("", "the message is no ModelInferRequest")) from None
    return request


def read_request(request: Any) -> InferRequest:
    """Reads a ModelInferRequest.

    Raises:
        Refusal: INVALID_FIELD for what is wrong with its parameters and outputs, all of it;
            INVALID_TENSOR for its inputs.
    """
    parameters = _Parameters()
    parameters.read(request.parameters)
    violations = parameters.violations
    outputs = _outputs_of(request, violations)
    for i, tensor in enumerate(request.inputs):
        violations += _refused(f"inputs[{i}].parameters", tensor.parameters)
    if violations:
        raise invalid(*violations)
    return InferRequest(
        inputs=_inputs_of(request),
        parameters=parameters.run,
        affinity=parameters.affinity,
        outputs=outputs,
        is_typed=parameters.is_typed,
        timeout_s=parameters.timeout_s,
    )


# --- Parameters -----------------------------------------------------------------------------------


class _Parameters:
    """Parameters of a request, sorted into the protocol's, ours and those of the run."""

    def __init__(self) -> None:
        self.run: dict[str, JsonValue] = {}
        self.affinity = ""
        self.is_typed = False
        self.timeout_s: float | None = None
        self.violations: list[Violation] = []

    def read(self, parameters: Mapping[str, Any]) -> None:
        for name, parameter in parameters.items():
            choice = parameter.WhichOneof("parameter_choice")
            if choice is None:
                self._refuse(name, "has no value")
            else:
                self._sort(name, getattr(parameter, choice))

    def _sort(self, name: str, value: bool | int | float | str) -> None:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if name == "timeout":
            if not is_whole or value < 0:  # type: ignore[operator]  # it is an int
                self._refuse(name, "must be a number of microseconds, 0 for none")
            elif value:
                self.timeout_s = value / _US  # type: ignore[operator]
        elif name == "priority":
            # No model here has levels of priority, so there is nothing for it to choose.
            if not is_whole:
                self._refuse(name, "must be an integer")
        elif name in _SEQUENCE:
            if value not in (0, "", False):
                self._refuse(name, "sequences of requests are not served: each is for itself")
        elif name == "triton_enable_empty_final_response":
            # There is never an empty one: every request has one answer, which is its last.
            if not isinstance(value, bool):
                self._refuse(name, "must be true or false")
        elif name == AFFINITY:
            if isinstance(value, str):
                self.affinity = value
            else:
                self._refuse(name, "must be a text")
        elif name == TYPED_CONTENTS:
            if isinstance(value, bool):
                self.is_typed = value
            else:
                self._refuse(name, "must be true or false")
        elif name.startswith(_PREFIXES):
            self._refuse(name, "is reserved, and not known here")
        elif isinstance(value, float) and not math.isfinite(value):
            self._refuse(name, "must be a finite number")
        else:
            self.run[name] = value

    def _refuse(self, name: str, text: str) -> None:
        self.violations.append(Violation(f"parameters.{name[:_MOST_NAME]}", text))


def _refused(path: str, parameters: Mapping[str, Any]) -> list[Violation]:
    """What is wrong with parameters of a tensor: there are some."""
    found = []
    for name in parameters:
        text = "is not known here"
        if name.startswith("shared_memory_"):
            text = "shared memory is not served; send the elements in the request"
        elif name == "classification":
            text = "is not served; a classifier's outputs have labels and scores"
        found.append(Violation(f"{path}.{name[:_MOST_NAME]}", text))
    return found


def _outputs_of(request: Any, violations: list[Violation]) -> tuple[str, ...]:
    if len(request.outputs) > _MOST_OUTPUTS:
        text = f"there are {len(request.outputs)}; {_MOST_OUTPUTS} may be"
        violations.append(Violation("outputs", text))
        return ()
    for i, output in enumerate(request.outputs):
        violations += _refused(f"outputs[{i}].parameters", output.parameters)
    return tuple(dict.fromkeys(output.name for output in request.outputs))


# --- Inputs ---------------------------------------------------------------------------------------


def _inputs_of(request: Any) -> tuple[TensorValue, ...]:
    violations = _wrong_contents(request)
    values: list[TensorValue] = []
    if not violations:
        raws = request.raw_input_contents
        for i, tensor in enumerate(request.inputs):
            try:
                if raws:
                    value = from_raw(tensor.name, tensor.datatype, tensor.shape, raws[i])
                else:
                    value = from_typed(tensor.name, tensor.datatype, tensor.shape, tensor.contents)
            except TensorError as error:
                violations.append(Violation(f"inputs[{i}]", error.text))
            else:
                values.append(value)
        if len({value.name for value in values}) != len(values):
            violations.append(Violation("inputs", "two inputs have the same name"))
    if violations:
        text = "; ".join(f"{each.field}: {each.description}" for each in violations)
        raise Refusal(Reason.INVALID_TENSOR, text, violations=tuple(violations))
    return tuple(values)


def _wrong_contents(request: Any) -> list[Violation]:
    """What is wrong with where a request has its elements."""
    if not request.inputs:
        return [Violation("inputs", "at least one tensor is needed")]
    raws = request.raw_input_contents
    if not raws:
        return []
    typed = [i for i, tensor in enumerate(request.inputs) if tensor.HasField("contents")]
    if typed:
        text = "must not be set beside raw_input_contents: all elements come raw, or none"
        return [Violation(f"inputs[{i}].contents", text) for i in typed]
    if len(raws) != len(request.inputs):
        text = f"there are {len(raws)} for {len(request.inputs)} inputs; each has one"
        return [Violation("raw_input_contents", text)]
    return []
