"""What is measured on the devices, put together from what the workers say."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard_server.execution.engine import DeviceMemory
from modelyard_server.execution.workers.worker_process import WorkerProcess

__all__ = ["WorkersMemory"]

_NOTHING = DeviceMemory(measured_bytes=0, peak_measured_bytes=0)


class WorkersMemory:
    """Measured bytes of each device, and of all copies.

    What a worker held is gone with it; peaks stay.

    Args:
        devices: how many there are.
    """

    def __init__(self, devices: int) -> None:
        self._workers: list[WorkerProcess] = []
        # Copies are measured like one more device.
        self._copies = devices
        self._peaks = [0] * (devices + 1)

    def add(self, worker: WorkerProcess) -> None:
        """A worker is there."""
        self._workers = [*self._living(), worker]

    def note(self, worker: WorkerProcess) -> None:
        """A worker has said what it measures."""
        for device, memory in worker.memory.items():
            others = sum(
                other.memory.get(device, _NOTHING).measured_bytes
                for other in self._workers
                if other is not worker
            )
            self._peaks[device] = max(self._peaks[device], others + memory.peak_measured_bytes)

    def read(self, device: int) -> DeviceMemory:
        """What is measured on a device."""
        now = sum(worker.memory.get(device, _NOTHING).measured_bytes for worker in self._workers)
        return DeviceMemory(measured_bytes=now, peak_measured_bytes=max(now, self._peaks[device]))

    def read_copies(self) -> DeviceMemory:
        """What is measured in the copies of all workers together."""
        return self.read(self._copies)

    def _living(self) -> Sequence[WorkerProcess]:
        return [worker for worker in self._workers if not worker.exited.done()]
