"""Runtime "identity": answers with what it was asked. For measuring the server itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
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

_PIECE_BYTES = 1 << 20


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
        if place.home == "cpu":
            return _IdentityModel(_in_host_memory(size_bytes, stop), home=place.target.home)
        return _IdentityModel(_on_device(size_bytes, place.home), home=place.target.home)


def _in_host_memory(size_bytes: int, stop: StopCheck) -> mmap:
    # Without torch: importing it takes seconds and 200 MB, and a server of these models alone has
    # no other use for it. In pieces: the interpreter is held while one is written.
    try:
        ballast = mmap(-1, size_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {size_bytes} bytes: {error.strerror}") from None
    piece = bytes(_PIECE_BYTES)
    for begin in range(0, size_bytes, _PIECE_BYTES):
        if stop():
            ballast.close()
            raise LoadCancelled
        end = min(begin + _PIECE_BYTES, size_bytes)
        ballast[begin:end] = piece[: end - begin]
    return ballast


def _on_device(size_bytes: int, torch_device: str) -> torch.Tensor:
    import torch

    # fill_ and not torch.zeros: the system hands out zeroed pages that take no memory yet.
    return torch.empty(size_bytes, dtype=torch.uint8, device=torch_device).fill_(0)


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

    def __init__(self, ballast: mmap | torch.Tensor | None, *, home: int) -> None:
        self._ballast = ballast
        self._home = home

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        _check_parameters(parameters)
        return tuple(inputs)

    def measured_bytes(self) -> Mapping[int, int]:
        match self._ballast:
            case None:
                held = 0
            case mmap():
                held = len(self._ballast)
            case tensor:
                held = tensor.untyped_storage().nbytes()
        return {self._home: held}

    def witnesses(self) -> tuple[Witness, ...]:
        if self._ballast is None:
            return ()
        return (Witness(device=self._home, reference=ref(self._ballast)),)

    def close(self) -> None:
        self._ballast = None
