"""Measures what a served model's runs take, by following the first run of each bucket of batches.

A server is never alone with its memory: while a run goes on, the next model is loaded onto the same
device, and an allocator's statistics hold both. So the operations of the run's own thread are
followed, on accelerators as on host memory. What kernels take for themselves within one operation,
and what a library keeps for all of its calls, is not in it.

A measurement is worth less than the answer. Whatever it cannot follow it lets pass, and then it
says nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import _pop_mode, _push_mode

from modelyard_server.weights.activation_model import ActivationPoint
from modelyard_server.weights.first_runs import FirstRuns
from modelyard_server.weights.storage_tracker import StorageTracker

__all__ = ["MAX_FOLLOWED", "RunMeter"]

MAX_FOLLOWED: Final = 20_000
"""Most operations of a pass that are followed: half a second. Longer are networks that loop over
tokens; they go on unfollowed and are not measured."""


class RunMeter:
    """Measures the passes of one model's runs. One run at a time; `take` from any thread.

    Args:
        first_runs: picks what is measured; of all models whose runs take the same.
        torch_device: torch's name of the model's home device, whose memory is measured.
    """

    def __init__(self, first_runs: FirstRuns, torch_device: str) -> None:
        self._first_runs = first_runs
        self._device = torch_device
        self._of_run: list[ActivationPoint] = []
        self._measured: deque[ActivationPoint] = deque()

    def take(self) -> tuple[ActivationPoint, ...]:
        """What runs that came to their end took; each is told once."""
        measured = self._measured
        return tuple([measured.popleft() for _ in range(len(measured))]) if measured else ()

    @contextmanager
    def run(self) -> Iterator[None]:
        """A run. If it fails, nothing of it is told, and its buckets are measured another time."""
        try:
            yield
        except BaseException:
            for point in self._of_run:
                self._first_runs.give_back(point.batch, point.length)
            raise
        else:
            self._measured.extend(self._of_run)
        finally:
            self._of_run.clear()

    @contextmanager
    def run_of_one_pass(self, batch: int, length: int) -> Iterator[None]:
        """A run that is one pass.

        Args:
            batch: as for forward_pass.
            length: as for forward_pass.
        """
        with self.run(), self.forward_pass(batch, length):
            yield

    @contextmanager
    def forward_pass(self, batch: int, length: int) -> Iterator[None]:
        """A pass of a run, from its inputs to its outcome; measured if it is a first one.

        Args:
            batch: its rows, at least 1.
            length: its tokens a row, at least 1; 1 for what has no length.
        """
        if not self._first_runs.take(batch, length):
            yield
            return
        follower = _Follower(self._device)
        try:
            with follower:
                yield
        except BaseException:
            self._first_runs.give_back(batch, length)
            raise
        if follower.follows:
            self._of_run.append(ActivationPoint(batch, length, follower.peak_bytes))


class _Follower(StorageTracker):  # type: ignore[no-untyped-call]
    """Counts the storages of one device, and gives up rather than raise.

    Attributes:
        follows: what it counted is all there was.
    """

    supports_higher_order_operators = True

    def __init__(self, torch_device: str) -> None:
        super().__init__()
        self.follows = True
        self._device_type, _, self._device_number = torch_device.partition(":")
        self._may_follow = MAX_FOLLOWED

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: code may be compiled meanwhile, and compiled code runs as such. Asked by torch."""
        return True

    def __enter__(self) -> Self:
        """Begins to follow this thread.

        Without what torch does beside that: it notes for the whole process that somebody follows,
        and what two threads note that overlap would stay for good.
        """
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what __enter__ began."""
        _pop_mode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts what it returns as long as it can. Called by torch."""
        self._may_follow -= 1
        if self._may_follow < 0 or not isinstance(func, OpOverload):
            # Also operations that are made of Python functions, whose insides are not seen.
            self.follows = False
        if not self.follows:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _decompose(self, func: Any, args: Any, kwargs: Any) -> Any:
        # Torch's own kernel, which would have run without us. Of some there is one in Python too,
        # for tracing: it need not give the same last bits, and imports seconds' worth of modules.
        return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    def know(self, tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> None:
        """See StorageTracker."""
        if self.follows:
            super().know(tensors)

    def _enter(self, tensor: torch.Tensor, *, counts: bool) -> None:
        if not self.follows:
            return
        try:
            super()._enter(tensor, counts=counts and self._is_of_device(tensor.device))
        except Exception:  # a tensor of a kind of its own, which has no storage to be counted
            self.follows = False

    def _is_of_device(self, device: torch.device) -> bool:
        if device.type != self._device_type:
            return False
        # A name without a number means the device that is current, and tensors have its number.
        return not self._device_number or str(device.index) == self._device_number
