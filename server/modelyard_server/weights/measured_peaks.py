"""What a pass really took beside the weights, by whoever knows.

On an accelerator the allocator keeps the figure anyway, and asking it costs microseconds. But it is
the process's: what others load there meanwhile counts as well, so it is for those who are alone.
Of host memory torch keeps none. Its profiler does, but it is the process's too, writes to standard
error and makes a record of every block; so the operations are followed instead, which costs some
tens of microseconds each (measured: 8 ms for 300 of them). How it is done while a server serves is
in run_meter.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from modelyard_server.weights.storage_tracker import StorageTracker

__all__ = ["MeasuredPeak", "measured_peak"]

_HOST = frozenset({"cpu", "disk"})


@dataclass(slots=True)
class MeasuredPeak:
    """The outcome of a measurement.

    Attributes:
        size_bytes: most that was held at one time beyond what was held at the beginning. None until
            the end, after a failure, and where the device's allocator does not tell.
    """

    size_bytes: int | None = None


@contextmanager
def measured_peak(torch_device: str) -> Iterator[MeasuredPeak]:
    """Measures what the operations inside allocate on a device.

    On host memory: what this thread's operations return, without what kernels take for themselves.
    The results are the same as without it. Modules that were compiled (TorchScript, torch.compile)
    are followed no further than to the operations they call through torch's dispatcher.

    On an accelerator: what the process allocates on that device meanwhile, so nothing may be loaded
    onto it then, or that counts too. Starts the allocator's peak anew.

    Args:
        torch_device: torch's name of it.
    """
    peak = MeasuredPeak()
    device_type = torch_device.partition(":")[0]
    if device_type in _HOST:
        tracker = StorageTracker()
        with tracker:
            yield peak
        peak.size_bytes = tracker.peak_bytes
        return
    statistics = _statistics_of(torch.device(torch_device))
    if statistics is None:
        yield peak
        return
    statistics.reset(torch_device)
    before = statistics.allocated(torch_device)
    yield peak
    peak.size_bytes = max(0, statistics.peak(torch_device) - before)


@dataclass(frozen=True, slots=True)
class _Statistics:
    """What an allocator tells of a device."""

    allocated: Callable[[str], int]
    peak: Callable[[str], int]
    reset: Callable[[str], object]


def _statistics_of(device: torch.device) -> _Statistics | None:
    """The statistics of a device's allocator, by its backend's own functions or the common ones.

    A backend from outside may have only the former: the common ones need an allocator of a kind
    that not all have.
    """
    own = getattr(torch, device.type, None)
    if (found := _statistics_in(own)) is not None:
        return found
    current = torch.accelerator.current_accelerator()
    if current is None or current.type != device.type:
        return None
    # Where the allocator keeps none, the common ones say 0 of everything.
    return _statistics_in(torch.accelerator) if torch.accelerator.memory_stats(device) else None


def _statistics_in(module: ModuleType | None) -> _Statistics | None:
    names = ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats")
    functions = [getattr(module, name, None) for name in names]
    allocated, peak, reset = functions
    if allocated is None or peak is None or reset is None:
        return None
    return _Statistics(allocated, peak, reset)
