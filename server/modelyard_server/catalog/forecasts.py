"""What a device plan would do; see PlanReport in proto/modelyard/v1/plan.proto."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelyard_server.devices.placed import PlacedAs
from modelyard_server.errors import Refusal

__all__ = ["DeviceForecast", "Displacement", "ModelForecast", "Obstacle", "PlanReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForecast:
    """What happens to one model.

    Attributes:
        model: its id.
        ways: how it may be loaded afterwards.
        placement_changed: it gets another placement, or another cut.
        current: bytes it holds now, by position of the device.
        planned: bytes it will hold.
        staged: it is loaded in its new place before it leaves the old one, or is there already: its
            requests do not wait.
    """

    model: str
    ways: tuple[PlacedAs, ...]
    placement_changed: bool
    current: Mapping[int, int]
    planned: Mapping[int, int]
    staged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Displacement:
    """A model that has to leave.

    Attributes:
        model: resource name.
        charges: bytes it gives back, by position of the device.
        cause: resource name of the model or device it leaves for.
        in_use: requests use it now.
    """

    model: str
    charges: Mapping[int, int]
    cause: str
    in_use: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Why a plan cannot be applied.

    Attributes:
        subject: resource name of the model or device in the way.
        refusal: what applying it is refused with; its text says what is wrong, with the numbers.
        needed_bytes: where it is about room.
        available_bytes: where it is about room.
    """

    subject: str
    refusal: Refusal
    needed_bytes: int = 0
    available_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceForecast:
    """A device once the plan has settled."""

    device: str
    budget_bytes: int
    used_bytes: int
    drained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What a plan does."""

    models: tuple[ModelForecast, ...]
    displaced: tuple[Displacement, ...]
    obstacles: tuple[Obstacle, ...]
    devices: tuple[DeviceForecast, ...]
