"""What unloads in workers could not get back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelyard_server.execution.workers.worker_process import WorkerProcess

__all__ = ["Shortage", "add_sizes", "take_off"]


@dataclass(frozen=True, slots=True)
class Shortage:
    """Bytes that an unload could not get back.

    Attributes:
        worker: that holds them.
        sizes: by position of the device; empty once all are back.
    """

    worker: WorkerProcess
    sizes: dict[int, int]


def add_sizes(sizes: dict[int, int], more: Mapping[int, int]) -> None:
    """Adds bytes to bytes, by position of the device."""
    for device, size_bytes in more.items():
        sizes[device] = sizes.get(device, 0) + size_bytes


def take_off(shortages: Sequence[Shortage], said: Mapping[int, int]) -> dict[int, int]:
    """Takes what is said to be back off what is missing. Returns what was really taken off."""
    back: dict[int, int] = {}
    for device, size_bytes in said.items():
        for shortage in shortages:
            taken = min(size_bytes, shortage.sizes.get(device, 0))
            if taken:
                shortage.sizes[device] -= taken
                size_bytes -= taken
                add_sizes(back, {device: taken})
    for shortage in shortages:
        for device in [device for device, left in shortage.sizes.items() if not left]:
            del shortage.sizes[device]
    return back
