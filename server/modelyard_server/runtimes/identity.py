"""Runtime "identity": answers with what it was asked. For measuring the server itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import ref

from modelyard_server.runtimes.api import (
    JsonValue,
    LoadCancelled,
    LoadedModel,
    ModelSpec,
    OptionError,
    Price,
    Runtime,
    StopCheck,
    Witness,
)
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.signature import ANY, Signature, TensorKind
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorValue

if TYPE_CHECKING:
    import torch

__all__ = ["IdentityRuntime"]

_MAX_SIZE_BYTES = 2**46 - 1
"""The largest budget there is: a larger model could never be loaded."""


class IdentityRuntime(Runtime):
    """Loads models whose outputs are their inputs.

    Options:
        size_bytes: bytes of zeros that a loaded model holds, default 0, so that it takes room and
            can be evicted like any other.
    """

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        return "identity"

    def check(self, spec: ModelSpec) -> None:
        """Checks that there is no task, no folder and no unknown option."""
        if spec.task:
            raise OptionError("task", "must be left out: an identity model has none")
        if spec.folder is not None:
            raise OptionError("folder", "must be left out: an identity model has no files")
        _size_bytes(spec)

    def price(self, spec: ModelSpec) -> Price:
        """Returns size_bytes."""
        size_bytes = _size_bytes(spec)
        return Price(resting_bytes=size_bytes, peak_bytes=size_bytes)

    def signature(self, spec: ModelSpec, input_names: Sequence[str] = ()) -> Signature:
        """An example: it takes whatever comes, and gives that back."""
        kinds = (TensorKind("input", DType.FLOAT32, (ANY,)),)
        return Signature(inputs=kinds, outputs=kinds, is_exact=False)

    def check_request(
        self,
        spec: ModelSpec,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        """Checks that there are no parameters."""
        _check_parameters(parameters)

    def load(self, spec: ModelSpec, *, place: Place, stop: StopCheck) -> LoadedModel:
        """Allocates the ballast on the home device and touches every page of it."""
        if stop():
            raise LoadCancelled
        size_bytes = _size_bytes(spec)
        if size_bytes == 0:
            return _IdentityModel(None, home=place.target.home)
        import torch

        # fill_ and not torch.zeros: the system hands out zeroed pages that take no memory yet.
        ballast = torch.empty(size_bytes, dtype=torch.uint8, device=place.home).fill_(0)
        return _IdentityModel(ballast, home=place.target.home)


def _size_bytes(spec: ModelSpec) -> int:
    reader = OptionReader(spec.options)
    size_bytes = reader.integer("size_bytes", 0, low=0, high=_MAX_SIZE_BYTES)
    reader.finish()
    return size_bytes or 0


def _check_parameters(parameters: Mapping[str, JsonValue]) -> None:
    for name in parameters:
        raise OptionError(name[:64], "is not known here; an identity model has no parameters")


class _IdentityModel(LoadedModel):
    brief = True

    def __init__(self, ballast: torch.Tensor | None, *, home: int) -> None:
        self._ballast = ballast
        self._home = home

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        _check_parameters(parameters)
        return tuple(inputs)

    def measured_bytes(self) -> Mapping[int, int]:
        held = 0 if self._ballast is None else self._ballast.untyped_storage().nbytes()
        return {self._home: held}

    def witnesses(self) -> tuple[Witness, ...]:
        if self._ballast is None:
            return ()
        return (Witness(device=self._home, reference=ref(self._ballast)),)

    def close(self) -> None:
        self._ballast = None
