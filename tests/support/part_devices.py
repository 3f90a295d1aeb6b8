"""Two accelerators for tests of placement: devices that fail like real ones, or real ones.

Tests that are written for Accelerators run on either; see part_runs.py and part_servers.py.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from modelyard.devices import Device, DeviceType
from modelyard_server.devices.probes import Probe, Probed, probes
from modelyard_server.runtimes.targets import DISK
from tests.support.fakegpu import NAME, FakeGpu

__all__ = [
    "FIRST",
    "HOST",
    "ON_DISK",
    "SECOND",
    "Accelerators",
    "CudaDevices",
    "FakeDevices",
    "no_collector",
    "nothing_is_left",
    "one_thread",
]

HOST, FIRST, SECOND, ON_DISK = 0, 1, 2, 3
"""Positions of the devices in these tests: host memory, both accelerators, the disk."""

_MOST_TENSORS = 256
"""More than any model of these tests has on one device."""


class Accelerators(ABC):
    """Two devices beside host memory and the disk.

    Args:
        first: torch's name of the accelerator.
        second: of the other; "cpu" where there is one only, and a pool of host memory stands for
            the other.
        large_bytes: size of a tensor for which `starved` leaves no room for sure.
        tolerance: by how much their answers may differ from each other's and the host's.
    """

    def __init__(self, first: str, second: str, *, large_bytes: int, tolerance: float) -> None:
        self.torch_devices: Mapping[int, str] = {
            HOST: "cpu", FIRST: first, SECOND: second, ON_DISK: DISK
        }  # fmt: skip
        self.large_bytes = large_bytes
        self.tolerance = tolerance

    @property
    def counted(self) -> tuple[int, ...]:
        """Positions of those whose memory somebody else than the server counts."""
        return tuple(i for i in (FIRST, SECOND) if self.torch_devices[i] != "cpu")

    def probes(self, root: Path) -> Mapping[DeviceType, Probe]:
        """Probes of a machine that has them as cuda:0 and cuda:1.

        Args:
            root: a folder whose file system is the disk.
        """
        found = tuple(
            Probed(
                device=Device.gpu(position - FIRST),
                torch_device=self.torch_devices[position],
                total_bytes=2**30,
            )
            for position in self.counted
        )
        return {**probes([root]), DeviceType.GPU: lambda: found}

    def assert_holds(self, expected: Mapping[int, int]) -> None:
        """Checks that the devices hold so many bytes of tensors, by position; others none."""
        used = {position: self.used_bytes(position) for position in self.counted}
        for position, size_bytes in used.items():
            wanted = expected.get(position, 0)
            most = wanted + (self._rounding_bytes * _MOST_TENSORS if wanted else 0)
            assert wanted <= size_bytes <= most, f"{used} bytes are held, not {dict(expected)}"

    @property
    def _rounding_bytes(self) -> int:
        """Most by which a tensor takes more than its bytes."""
        return 0

    @abstractmethod
    def used_bytes(self, position: int) -> int:
        """Bytes that are allocated on one of those that are counted."""

    @abstractmethod
    def starved(self, position: int, *, left_bytes: int = 0) -> AbstractContextManager[None]:
        """Lets a counted device run out of memory: it has only so many bytes left.

        What is large (large_bytes) finds no room for sure; what is smaller may.
        """


class FakeDevices(Accelerators):
    """fakegpu:0 and fakegpu:1, counted to the byte.

    Args:
        gpu: the devices.
        second: what there is instead of fakegpu:1.
    """

    def __init__(self, gpu: FakeGpu, *, second: str = f"{NAME}:1") -> None:
        super().__init__(f"{NAME}:0", second, large_bytes=2**16, tolerance=1e-5)
        self._gpu = gpu

    @property
    def _rounding_bytes(self) -> int:
        # What a whole model shares is one allocation, in which each tensor begins at such a place.
        return 256

    def used_bytes(self, position: int) -> int:
        """See Accelerators."""
        return self._gpu.used_bytes(position - FIRST)

    @contextmanager
    def starved(self, position: int, *, left_bytes: int = 0) -> Iterator[None]:
        """See Accelerators."""
        ordinal = position - FIRST
        before = self._gpu.budget_bytes(ordinal)
        self._gpu.set_budget(ordinal, self._gpu.used_bytes(ordinal) + left_bytes)
        try:
            yield
        finally:
            self._gpu.set_budget(ordinal, before)


class CudaDevices(Accelerators):
    """Real ones, of which nobody else may use the memory through this process meanwhile."""

    def __init__(self) -> None:
        second = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
        # More than the largest piece (20 MiB) that the allocator keeps to cut smaller ones from.
        # And its kernels sum in another order than the host's.
        super().__init__("cuda:0", second, large_bytes=24 * 2**20, tolerance=1e-4)
        self._before = {position: self._allocated(position) for position in self.counted}

    @property
    def _rounding_bytes(self) -> int:
        return 512

    def used_bytes(self, position: int) -> int:
        """See Accelerators. What there was before the test does not count."""
        return self._allocated(position) - self._before[position]

    def _allocated(self, position: int) -> int:
        # Matrix products keep memory of their own from the first one on.
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated(self.torch_devices[position])

    @contextmanager
    def starved(self, position: int, *, left_bytes: int = 0) -> Iterator[None]:
        """See Accelerators."""
        name = self.torch_devices[position]
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(name).total_memory
        limit = torch.cuda.memory_reserved(name) + left_bytes
        torch.cuda.set_per_process_memory_fraction(limit / total, name)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, name)


@contextmanager
def nothing_is_left(accelerators: Accelerators) -> Iterator[None]:
    """Checks at the end that the accelerators hold nothing."""
    if any(accelerators.used_bytes(position) for position in accelerators.counted):
        gc.collect()
    accelerators.assert_holds({})
    yield
    if any(accelerators.used_bytes(position) for position in accelerators.counted):
        gc.collect()
    accelerators.assert_holds({})


@contextmanager
def no_collector() -> Iterator[None]:
    """Lets memory come back by reference counts alone: cycles keep it."""
    # What is there already is not looked at again: collections in here are quick.
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one thread: for models so small, waiting for others takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
