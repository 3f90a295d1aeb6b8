"""What unloads of one model have left on devices, and how much of it is certainly back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Losses"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loss:
    """What an unload has left on a device.

    Attributes:
        left_bytes: all that the engine could not get back: it knows nothing of what others hold.
        missing_bytes: what of that nobody else held, and is quarantined; not more than left_bytes.
    """

    left_bytes: int
    missing_bytes: int


class Losses:
    """What is quarantined of a model, unload by unload.

    A model that is loaded again while something of it is missing may leave something once more. The
    engine then says how many bytes are back, but not of which unload. So what is quarantined goes
    down to the most that the bytes which are not back can be of it, and never below what is there.
    Unloads of a model leave the same number of bytes as a rule; then those of which the most is
    quarantined are taken to be the ones that are not back.
    """

    def __init__(self) -> None:
        self._by_device: dict[int, list[_Loss]] = {}

    def add(self, device: int, *, left_bytes: int, missing_bytes: int) -> None:
        """An unload did not get back so much, and so much of it is quarantined now.

        To be told also if nothing is quarantined: those bytes come back as well.
        """
        loss = _Loss(left_bytes=left_bytes, missing_bytes=missing_bytes)
        self._by_device.setdefault(device, []).append(loss)

    def take_off(self, back: Mapping[int, int]) -> dict[int, int]:
        """Bytes are back, by position of the device, of what the engine could not get back.

        Returns:
            What of them is quarantined no more, by position of the device.
        """
        found = {}
        for device, size_bytes in back.items():
            losses = self._by_device.pop(device, [])
            kept = _most(losses, sum(loss.left_bytes for loss in losses) - size_bytes)
            if kept:
                self._by_device[device] = kept
            freed = _missing(losses) - _missing(kept)
            if freed:
                found[device] = freed
        return found


def _most(losses: list[_Loss], left_bytes: int) -> list[_Loss]:
    """The losses if so much is left of them: at the worst, with the most that is missing in it."""
    kept = []
    # A loss that is cut through keeps what fits. So nothing is missed by the greedy way.
    for loss in sorted(losses, key=lambda loss: loss.missing_bytes / loss.left_bytes, reverse=True):
        left = min(loss.left_bytes, left_bytes)
        if left <= 0:
            break
        kept.append(_Loss(left_bytes=left, missing_bytes=min(loss.missing_bytes, left)))
        left_bytes -= left
    return kept


def _missing(losses: list[_Loss]) -> int:
    return sum(loss.missing_bytes for loss in losses)
