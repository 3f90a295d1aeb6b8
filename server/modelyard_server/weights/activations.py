"""How much memory a model's forward pass takes beside its weights, found out without weights.

The pass is run on fake tensors, which have shapes and storages but no memory, and the storages are
counted as they come and go. That takes as long as torch's own overhead, a fraction of a second for
hundreds of operations, whatever the sizes are; so the largest batch costs no more than the
smallest. What it says is what torch's allocator of host memory would be asked for. Memory that
kernels take for themselves within one operation is not in it. Of 32-bit numbers that is next to
nothing; of 16-bit ones kernels of some processors rearrange the weights of a layer (measured: 25 %
more for a small network); recurrent layers pack all their weights anew in every run (1.0 MB for an
LSTM with 0.9 MB of them). Whoever reserves memory takes twice what is predicted.

Threads: the modes that torch enters are the thread's own, and other threads compute undisturbed.
Two things are the process's. One is a switch of fake tensors for how torch.tensor() makes them,
which only ever changes the way and not the result; so that it is put back, predictions take turns
by a lock in this module. The other is torch's default type, which libraries set while they build a
model: a caller who builds models in other threads meanwhile holds the lock that building takes, or
accepts that a tensor whose type is left open is counted with the wrong one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.weights.storage_tracker import StorageTracker, TooManyOperations

__all__ = ["MAX_OPERATIONS", "Forward", "InputShapes", "Prediction", "predict_peak_bytes"]

MAX_OPERATIONS: Final = 10_000
"""Most operations of a pass that is predicted: a second or two (BERT-base has 1,000, a language
model of 32 layers that reads and writes 9,000). Beyond it are networks that are
written as a loop over tokens; ask for fewer tokens."""

InputShapes: TypeAlias = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each input, by its name among the arguments of forward."""

Forward: TypeAlias = Callable[[Any, Mapping[str, torch.Tensor]], object]
"""What to do with the model and the inputs; what it returns is held at the end."""

# The process's, as is what it protects.
_turn: Final = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is known of a pass.

    Attributes:
        peak_bytes: most that tensors hold at one time beside parameters, buffers and inputs; None
            if that cannot be known without running the model.
        reason: why not; for the log.
    """

    peak_bytes: int | None
    reason: str = ""


def _call(module: Any, inputs: Mapping[str, torch.Tensor]) -> object:
    return module(**inputs)


def predict_peak_bytes(
    model: torch.nn.Module | Callable[[], torch.nn.Module],
    inputs: InputShapes,
    *,
    forward: Forward = _call,
    max_operations: int = MAX_OPERATIONS,
) -> Prediction:
    """Predicts the peak of a forward pass on host memory.

    Args:
        model: the module, on the meta device or elsewhere, in the mode it is to run in (eval());
            or what builds it, which is called with meta as the default device. For the length of
            the call its parameters and buffers are exchanged for fake ones, so nobody else may
            use it; they are put back. What its forward leaves in other attributes stays.
        inputs: of the pass.
        forward: what to run instead of one call of the module with the inputs.
        max_operations: give up after as many.

    Returns:
        The peak; or the reason why it is not known: what happens depends on the values of tensors,
        the pass is too long, or the module fails with these inputs.

    Raises:
        Exception: what building the model raises.
    """
    if not isinstance(model, torch.nn.Module):
        with torch.device("meta"):
            model = model()
    tracker = StorageTracker(most_operations=max_operations)
    try:
        with _turn:
            _run(model, inputs, forward, tracker)
    except TooManyOperations:
        return Prediction(
            peak_bytes=None, reason=f"its forward takes more than {max_operations} operations"
        )
    except Exception as error:  # a model's own code, and whatever torch has no fake version of
        # The frames hold the module and the tensors.
        forget_frames(error)
        return Prediction(peak_bytes=None, reason=_reason(error))
    return Prediction(peak_bytes=tracker.peak_bytes)


def _run(
    module: torch.nn.Module, inputs: InputShapes, forward: Forward, tracker: StorageTracker
) -> None:
    with ExitStack() as stack:
        # Constants that a module holds as plain attributes are real tensors.
        stack.enter_context(_quiet())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.inference_mode())
        faked = stack.enter_context(_faked(module))
        given = {
            name: torch.empty(shape, dtype=dtype, device="cpu")
            for name, (shape, dtype) in inputs.items()
        }
        tracker.know([*faked, *given.values()])
        stack.enter_context(tracker)
        result = forward(module, MappingProxyType(given))
        del result


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library from logging a traceback of what is a fine reason not to predict."""
    of_fakes = logging.getLogger(FakeTensorMode.__module__)

    def drop(record: logging.LogRecord) -> bool:
        return False

    of_fakes.addFilter(drop)
    try:
        yield
    finally:
        of_fakes.removeFilter(drop)


@contextmanager
def _faked(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Exchanges parameters and buffers for fake ones on host memory, and back at the end.

    Set as attributes and not in the module's tables, since some modules note what is set.
    """
    fakes: dict[int, torch.Tensor] = {}
    taken: list[tuple[torch.nn.Module, str, torch.Tensor]] = []
    try:
        for part in module.modules():
            for slots in (part._parameters, part._buffers):
                for name, tensor in [*slots.items()]:
                    if tensor is None:
                        continue
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = _fake_of(tensor)
                    taken.append((part, name, tensor))
                    setattr(part, name, fakes[id(tensor)])
        yield list(fakes.values())
    finally:
        for part, name, tensor in taken:
            setattr(part, name, tensor)


def _fake_of(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(
        tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="cpu"
    )
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=False)
    return made


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
