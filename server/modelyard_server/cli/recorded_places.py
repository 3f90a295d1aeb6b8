"""Where a server's models may be, as `modelyard record` writes it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from modelyard.placements import AutomaticPlacement, PlacementStrategy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelyard import Admin, Model

__all__ = ["RecordedPlaces", "places_of_model"]

_PLACING_OPTIONS: Final = ("device", "device_map")
"""Options that beat a model's placement."""


def places_of_model(model: Model) -> tuple[tuple[str, ...], ...]:
    """Return where alone a model may be, each as the names of the devices that it is on at once.

    Empty if it may be on any: nobody said where, so on a server with other devices it may be on
    those. The disk is left out, because what is there is in no memory.
    """
    anywhere = model.placement is None or model.placement == AutomaticPlacement(
        strategy=PlacementStrategy.AUTO
    )
    if anywhere and not any(option in model.options for option in _PLACING_OPTIONS):
        return ()
    ways = (
        tuple(_device_text(part.device) for part in way.parts if part.device != "devices/disk")
        for way in model.alternatives
    )
    return tuple(dict.fromkeys(way for way in ways if way))


class RecordedPlaces:
    """Asks a server where its models may be, each model once.

    Args:
        admin: the connection.
    """

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._known: dict[str, tuple[tuple[str, ...], ...]] = {}

    def look(self) -> None:
        """Ask for all models that there are now.

        Raises:
            ModelyardError: it cannot be asked.
        """
        self._learn(self._admin.list_models())

    def look_again(self) -> None:
        """The same after a break, in which models may have moved; what cannot be asked stays."""
        from modelyard import ModelyardError

        with suppress(ModelyardError):
            self.look()

    def of(self, model: str) -> tuple[tuple[str, ...], ...]:
        """Return where a model may be; empty if that is anywhere, or cannot be learned now.

        Args:
            model: resource name.
        """
        from modelyard import ModelyardError

        if model not in self._known:
            try:
                self._learn([self._admin.get_model(model)])
            except ModelyardError:
                # It is deleted by now, or the connection is broken, as the watch's is. Not asked
                # for again until the next look: each question may take as long as a call may.
                self._known[model] = ()
        return self._known[model]

    def _learn(self, models: Iterable[Model]) -> None:
        for model in models:
            self._known[model.name] = places_of_model(model)


def _device_text(name: str) -> str:
    """How a server's file calls a device: ``cuda:1`` for ``devices/cuda-1``."""
    return name.removeprefix("devices/").replace("-", ":")
