"""What models hold on devices: measured, dropped, and told from what somebody still holds.

A model may hold memory on several devices, and each device is accounted for alone: a leak on one
does not keep the others' bytes from being given to the next model.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from modelyard_server.execution.engine import DeviceMemory
from modelyard_server.runtimes.api import LoadedModel, LoadSource, Witness
from modelyard_server.runtimes.frames import forget_frames

__all__ = ["HeldModel", "Leak", "MeasuredMemory", "drop"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class MeasuredMemory:
    """Measured bytes of a device; written from loader threads and from the loop.

    What models hold together counts once, for as long as one of them holds it.

    Attributes:
        now: bytes now.
        peak: highest value of it.
    """

    now: int = 0
    peak: int = 0
    _holders: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, own_bytes: int, shared: Mapping[str, int] = MappingProxyType({})) -> None:
        """Adds what a model holds: alone, and together with others, bytes by identity."""
        with self._lock:
            self.now += own_bytes
            for identity, size_bytes in shared.items():
                self._holders[identity] += 1
                if self._holders[identity] == 1:
                    self.now += size_bytes
            self.peak = max(self.peak, self.now)

    def take_off(self, own_bytes: int, shared: Mapping[str, int] = MappingProxyType({})) -> None:
        """Takes off what `add` has added."""
        with self._lock:
            self.now -= own_bytes
            for identity, size_bytes in shared.items():
                self._holders[identity] -= 1
                if not self._holders[identity]:
                    del self._holders[identity]
                    self.now -= size_bytes

    def read(self) -> DeviceMemory:
        """Both values, of one moment."""
        with self._lock:
            return DeviceMemory(measured_bytes=self.now, peak_measured_bytes=self.peak)


@dataclass(slots=True, kw_only=True)
class HeldModel:
    """A model that is in memory.

    Attributes:
        name: for people.
        home: position of the device whose lane runs it.
        source: where its weights came from.
        sizes: bytes it holds, by position of the device.
        shared: what of them it holds together with others: by position, then by identity.
        loaded: the model; deleted by drop.
    """

    name: str
    home: int
    source: LoadSource = LoadSource.STORAGE
    sizes: Mapping[int, int]
    shared: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    loaded: LoadedModel

    @property
    def own_sizes(self) -> dict[int, int]:
        """Bytes it holds alone, by position of the device."""
        return {
            device: size_bytes - sum(self.shared.get(device, {}).values())
            for device, size_bytes in self.sizes.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What an unload could not get back on one device.

    Attributes:
        device: position of the device.
        size_bytes: all the model held there; which part of it is still held nobody can tell.
        shared: what of that it held together with others; bytes by identity.
        witnesses: to that memory.
    """

    device: int
    size_bytes: int
    shared: Mapping[str, int] = field(default_factory=dict)
    witnesses: tuple[Witness, ...]

    @property
    def own_bytes(self) -> int:
        """What of size_bytes it held alone."""
        return self.size_bytes - sum(self.shared.values())

    @property
    def is_held(self) -> bool:
        """False once the memory is back."""
        return _is_held(self.witnesses)


def drop(held: HeldModel) -> tuple[Leak, ...]:
    """Drops a model and looks on which devices its memory is back.

    Args:
        held: the model. Whoever calls holds no other reference to what is loaded.

    Returns:
        A leak for each device where it is not.
    """
    witnesses = held.loaded.witnesses()
    try:
        held.loaded.close()
    except Exception as error:
        # Whether its memory is back is what the witnesses say, not how it took its leave.
        logger.exception("a model failed while it was closed")
        forget_frames(error)
    del held.loaded
    if _is_held(witnesses):
        # Models go by reference count alone; only a cycle through user code needs this.
        gc.collect()
    leaks = (
        Leak(
            device=device,
            size_bytes=size_bytes,
            shared=held.shared.get(device, {}),
            witnesses=tuple(witness for witness in witnesses if witness.device == device),
        )
        for device, size_bytes in held.sizes.items()
    )
    return tuple(leak for leak in leaks if leak.is_held)


def _is_held(witnesses: Iterable[Witness]) -> bool:
    return any(witness.reference() is not None for witness in witnesses)
