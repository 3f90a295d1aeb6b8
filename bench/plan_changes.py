"""The changes of a running server's device plan that are made under load, in pairs: there and back.

Each finds out what is where when it is made, and works on that: a drain empties the device that
holds most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from modelyard import Admin, DevicePlan, DeviceSetting, ModelPlacement
from modelyard.placements import PlacementLike, read_placement

__all__ = ["DEVICES", "ChangePair", "change_pairs"]

DEVICES: Final = ("cuda:0", "cuda:1")
"""The devices that run models. They have one budget."""

_OVER_BOTH: Final = {
    "": "cuda:0",
    "encoder.layer.3": "cuda:1",
    "encoder.layer.4": "cuda:1",
    "encoder.layer.5": "cuda:1",
}
_ALSO_DISK: Final = {"": "cuda:1", "encoder.layer.4": "cuda:0", "encoder.layer.5": "disk"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePair:
    """Two changes, of which the second takes the first back.

    Attributes:
        name: of both.
        steps: makes the changes, one each time it is asked for the next.
    """

    name: str
    steps: Callable[[Admin], Iterator[None]]


def change_pairs(budget_bytes: int) -> tuple[ChangePair, ...]:
    """Ten pairs.

    Args:
        budget_bytes: of each of DEVICES when nothing is changed.
    """

    def halved(admin: Admin) -> Iterator[None]:
        device = _fullest(admin)
        admin.update_budget(device, budget_bytes // 2)
        yield
        admin.update_budget(device, budget_bytes)
        yield

    def drained(admin: Admin) -> Iterator[None]:
        device = _fullest(admin)
        admin.drain_device(device)
        yield
        admin.undrain_device(device)
        yield

    def halved_and_moved(admin: Admin) -> Iterator[None]:
        device = _fullest(admin)
        _apply(admin, {"minilm-b": _other(device)}, budgets={device: budget_bytes // 2})
        yield
        _apply(admin, {"minilm-b": None}, budgets={device: budget_bytes})
        yield

    def drained_by_plan(admin: Admin) -> Iterator[None]:
        device = _fullest(admin)
        _apply(admin, {"minilm-c": _other(device)}, drained={device: True})
        yield
        _apply(admin, {"minilm-c": None}, drained={device: False})
        yield

    def moved(admin: Admin) -> Iterator[None]:
        there = _device_of(admin, "minilm")
        _apply(admin, {"minilm": _other(there)})
        yield
        _apply(admin, {"minilm": there})
        yield

    def placed(model: str, placement: PlacementLike) -> Callable[[Admin], Iterator[None]]:
        def steps(admin: Admin) -> Iterator[None]:
            _apply(admin, {model: placement})
            yield
            _apply(admin, {model: None})
            yield

        return steps

    balanced = {"strategy": "balanced", "devices": list(DEVICES)}
    sequential = {"strategy": "sequential", "devices": [*DEVICES, "disk"]}
    return (
        ChangePair(name="budget halved", steps=halved),
        ChangePair(name="device drained", steps=drained),
        ChangePair(name="moved to the other device", steps=moved),
        ChangePair(name="split over two devices", steps=placed("minilm", _OVER_BOTH)),
        ChangePair(name="balanced", steps=placed("minilm-b", balanced)),
        ChangePair(name="split, partly on the disk", steps=placed("minilm-c", _ALSO_DISK)),
        ChangePair(name="budget halved and moved, one plan", steps=halved_and_moved),
        ChangePair(name="drained and moved, one plan", steps=drained_by_plan),
        ChangePair(name="sequential", steps=placed("minilm", sequential)),
        ChangePair(name="budget halved again", steps=halved),
    )


def _apply(
    admin: Admin,
    placements: dict[str, PlacementLike],
    *,
    budgets: dict[str, int] | None = None,
    drained: dict[str, bool] | None = None,
) -> None:
    settings = [
        DeviceSetting(device=device, budget_bytes=budget)
        for device, budget in (budgets or {}).items()
    ]
    settings += [
        DeviceSetting(device=device, drained=value) for device, value in (drained or {}).items()
    ]
    models = [
        ModelPlacement(model=model, placement=read_placement(placement))
        for model, placement in placements.items()
    ]
    admin.apply_plan(DevicePlan(devices=tuple(settings), models=tuple(models)))


def _fullest(admin: Admin) -> str:
    held = {device: admin.get_device(device).accounted_bytes for device in DEVICES}
    return max(held, key=lambda device: held[device])


def _other(device: str) -> str:
    return DEVICES[1 - DEVICES.index(device)]


def _device_of(admin: Admin, model: str) -> str:
    """Where a model is that is whole."""
    for residency in admin.list_residencies():
        if residency.model == f"models/{model}" and residency.charges:
            return residency.charges[0].device.removeprefix("devices/").replace("-", ":")
    return DEVICES[0]
