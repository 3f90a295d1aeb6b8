"""The device plan: budgets, drained devices and placements, as an operator sees and changes them.

A ``DevicePlan`` given to the server is a change: what it does not name stays as it is. The server
answers with complete ones. It has a written form, for files in JSON or TOML::

    {
        "devices": {"cuda:0": {"budget": "12GiB"}, "cuda:1": {"budget": "80%", "drained": true}},
        "models": {"sentiment": "cuda:1", "chat": {"": "cuda:0", "lm_head": "cpu"}, "tiny": null}
    }

A model's placement has the forms of ``read_placement``; null, which TOML lacks, says the same as
``"auto"``. Unknown fields are refused by name: a misspelt one would silently change nothing.

Values only; sizes are bytes, ``device`` and ``model`` fields are resource names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from modelyard._names import device_name, device_text, model_id, model_name
from modelyard.devices import ComponentDevice
from modelyard.placements import (
    AutomaticPlacement,
    Placement,
    placement_to_json,
    read_placement,
)
from modelyard.resources import DeviceCharge, ManagedDevice, PlacedModel
from modelyard.sizes import format_size, parse_size

__all__ = [
    "MAX_BUDGET_BYTES",
    "DeviceForecast",
    "DevicePlan",
    "DeviceSetting",
    "Displacement",
    "DrainedDevice",
    "ModelForecast",
    "ModelPlacement",
    "Move",
    "Obstacle",
    "PlanApplied",
    "PlanReport",
    "Rebalanced",
]

MAX_BUDGET_BYTES: Final = 2**46 - 1
"""Largest budget a plan can give a device."""

_PERCENT: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSetting:
    """What a plan says of one device. What is None stays as it is.

    Args:
        device: the device's text (``cuda:1``), id or resource name; kept as resource name.
        budget_bytes: most bytes that models may hold on it, 0 to ``MAX_BUDGET_BYTES``.
        budget_percent: the same as a share of what the device has, above 0 and at most 100; not
            together with ``budget_bytes``. The server answers in bytes.
        drained: True: nothing is loaded onto it, and what is there leaves when its requests end.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range, or both budgets.
    """

    device: str
    budget_bytes: int | None = None
    budget_percent: float | None = None
    drained: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", device_name(self.device))
        if self.budget_bytes is not None:
            # Exactly int: True is no budget.
            if type(self.budget_bytes) is not int:
                raise TypeError(
                    f"budget_bytes must be an int, got {type(self.budget_bytes).__name__}"
                )
            if not 0 <= self.budget_bytes <= MAX_BUDGET_BYTES:
                raise ValueError(
                    f"budget_bytes is {self.budget_bytes}: 0 to {MAX_BUDGET_BYTES} may be"
                )
        if self.budget_percent is not None:
            if type(self.budget_percent) not in (int, float):
                raise TypeError(
                    f"budget_percent must be a number, got {type(self.budget_percent).__name__}"
                )
            if not (math.isfinite(self.budget_percent) and 0 < self.budget_percent <= 100):
                raise ValueError(
                    f"budget_percent is {self.budget_percent}: above 0 and at most 100 may be"
                )
            if self.budget_bytes is not None:
                raise ValueError("give budget_bytes or budget_percent, not both")
        if not isinstance(self.drained, bool | None):
            raise TypeError(f"drained must be a bool or None, got {type(self.drained).__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlacement:
    """What a plan says of one model: where it lives.

    Args:
        model: the model's id or resource name; kept as resource name.
        placement: where it lives; None leaves the choice to the server, at every load.
            ``read_placement`` makes one of text.

    Raises:
        TypeError: a field of another type.
        ValueError: ``model`` is empty.
    """

    model: str
    placement: Placement | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", model_name(self.model))
        if self.model == "models/":
            raise ValueError("model is empty: give the id of a model")
        if not isinstance(self.placement, ComponentDevice | AutomaticPlacement | None):
            raise TypeError(
                "placement must be a ComponentDevice, AutomaticPlacement or None, got "
                f"{type(self.placement).__name__}: read_placement makes one of text"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """Budgets, drained devices and placements together.

    Args:
        devices: what is said of devices, each at most once.
        models: what is said of models, each at most once.
        etag: in a change: apply it only if this is still the plan's etag; empty for whatever the
            plan is. In an answer: the plan's etag.
        revision: counts the plans that were applied. Not sent.
        updated_at: when it was last changed; None if it is that of the configuration. Not sent.

    Raises:
        TypeError: a field of another type.
        ValueError: a device or model twice.
    """

    devices: tuple[DeviceSetting, ...] = ()
    models: tuple[ModelPlacement, ...] = ()
    etag: str = ""
    revision: int = 0
    updated_at: datetime | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        object.__setattr__(self, "models", tuple(self.models))
        for setting in self.devices:
            if not isinstance(setting, DeviceSetting):
                raise TypeError(
                    f"devices must hold DeviceSetting values, got {type(setting).__name__}"
                )
        for entry in self.models:
            if not isinstance(entry, ModelPlacement):
                raise TypeError(
                    f"models must hold ModelPlacement values, got {type(entry).__name__}"
                )
        _refuse_twice(setting.device for setting in self.devices)
        _refuse_twice(entry.model for entry in self.models)
        if not isinstance(self.etag, str):
            raise TypeError(f"etag must be a str, got {type(self.etag).__name__}")
        if type(self.revision) is not int:
            raise TypeError(f"revision must be an int, got {type(self.revision).__name__}")
        if not isinstance(self.updated_at, datetime | None):
            raise TypeError(
                f"updated_at must be a datetime or None, got {type(self.updated_at).__name__}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the written form, for ``from_dict`` to read as the same plan.

        ``etag``, ``revision`` and ``updated_at`` are there where they say something, so that a
        plan that was read, edited and applied cannot undo somebody else's change unnoticed.
        """
        data: dict[str, Any] = {
            "devices": {
                device_text(setting.device): _setting_to_dict(setting) for setting in self.devices
            },
            "models": {
                model_id(entry.model): _placement_to_written(entry.placement)
                for entry in self.models
            },
        }
        if self.etag:
            data["etag"] = self.etag
        if self.revision:
            data["revision"] = self.revision
        if self.updated_at is not None:
            data["updated_at"] = self.updated_at.isoformat()
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> DevicePlan:
        """Read the written form; see the module.

        Raises:
            TypeError: a value of another type.
            ValueError: an unknown field, or a value that says nothing. Both name where it is.
        """
        fields = _table(data, "the plan", ("devices", "models", "etag", "revision", "updated_at"))
        updated_at = fields.get("updated_at")
        if isinstance(updated_at, str):
            with _naming("updated_at"):
                updated_at = datetime.fromisoformat(updated_at)
        return DevicePlan(
            devices=tuple(
                _setting_from(device, value)
                for device, value in _items(fields.get("devices", {}), "devices")
            ),
            models=tuple(
                _placement_entry(model, value)
                for model, value in _items(fields.get("models", {}), "models")
            ),
            etag=fields.get("etag", ""),
            revision=fields.get("revision", 0),
            updated_at=updated_at,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForecast:
    """What a plan does to one model.

    Args:
        model: which one.
        alternatives: the ways to load it under the plan, the preferred one first.
        placement_changed: True if the plan gives it another placement.
        current: what it holds now.
        planned: what it will hold when the plan has settled; empty if it will not be resident.
        staged: True if it is loaded in its new place before it leaves the old one, so that its
            requests do not wait.
    """

    model: str
    alternatives: tuple[PlacedModel, ...]
    placement_changed: bool
    current: tuple[DeviceCharge, ...]
    planned: tuple[DeviceCharge, ...]
    staged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Displacement:
    """A model that has to leave.

    Args:
        model: which one.
        charges: what it gives back.
        cause: the device or model for which it leaves.
        in_use: True if requests use it now: it leaves when they have ended.
    """

    model: str
    charges: tuple[DeviceCharge, ...]
    cause: str
    in_use: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Why a plan cannot be applied.

    Args:
        subject: the device or model that stands in the way.
        reason: name of the contract's reason, for instance ``MODEL_NEVER_FITS``.
        description: what is wrong, with the numbers.
        needed_bytes: bytes that are needed; 0 where it is not about room.
        available_bytes: bytes that there are; likewise.
    """

    subject: str
    reason: str
    description: str
    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceForecast:
    """A device under a plan that has settled.

    Args:
        device: which one.
        budget_bytes: its budget.
        used_bytes: what models will hold on it.
        drained: True if it is drained.
    """

    device: str
    budget_bytes: int
    used_bytes: int
    drained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What a plan does. A forecast: requests can change who leaves, but never what fits.

    Args:
        models: those whose placement or residency changes, in the order of their names.
        displaced: those that leave memory, in the order in which they are asked to.
        obstacles: why the plan cannot be applied; empty if it can.
        devices: every device, in the order of the configuration.
    """

    models: tuple[ModelForecast, ...]
    displaced: tuple[Displacement, ...]
    obstacles: tuple[Obstacle, ...]
    devices: tuple[DeviceForecast, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanApplied:
    """A plan that was applied: the plan in force now, complete, and what it did."""

    plan: DevicePlan
    report: PlanReport


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainedDevice:
    """A drained device, right after the call, and the pinned models that stay on it."""

    device: ManagedDevice
    pinned_models: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A model that moved, or would: ``source`` is what it held, ``destination`` what it holds."""

    model: str
    source: tuple[DeviceCharge, ...]
    destination: tuple[DeviceCharge, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalanced:
    """What evening out moved, in the order in which it did, and every device afterwards."""

    moves: tuple[Move, ...]
    devices: tuple[DeviceForecast, ...]


def _refuse_twice(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name} is named twice")
        seen.add(name)


def _setting_to_dict(setting: DeviceSetting) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if setting.budget_bytes is not None:
        data["budget"] = format_size(setting.budget_bytes, exact=True)
    if setting.budget_percent is not None:
        data["budget"] = f"{setting.budget_percent:.9f}".rstrip("0").rstrip(".") + "%"
    if setting.drained is not None:
        data["drained"] = setting.drained
    return data


def _setting_from(device: str, value: object) -> DeviceSetting:
    where = f"devices[{device!r}]"
    fields = _table(value, where, ("budget", "drained"))
    budget_bytes: int | None = None
    budget_percent: float | None = None
    with _naming(where):
        budget = fields.get("budget")
        if isinstance(budget, str) and (match := _PERCENT.fullmatch(budget)):
            budget_percent = float(match[1])
        elif isinstance(budget, str):
            budget_bytes = parse_size(budget)
        elif budget is not None:
            raise TypeError(
                f"budget must be text such as '12GiB' or '80%', got {type(budget).__name__}"
            )
        return DeviceSetting(
            device=device,
            budget_bytes=budget_bytes,
            budget_percent=budget_percent,
            drained=fields.get("drained"),
        )


def _placement_to_written(placement: Placement | None) -> Any:
    match placement:
        case None:
            return None
        case ComponentDevice(single=device) if device is not None:
            return str(device)
        case ComponentDevice(multiple=device_map) if device_map:
            return device_map.to_dict()
        case AutomaticPlacement(strategy=strategy, devices=()):
            return str(strategy)
        case _:
            return placement_to_json(placement)


def _placement_entry(model: str, value: Any) -> ModelPlacement:
    with _naming(f"models[{model!r}]"):
        return ModelPlacement(model=model, placement=read_placement(value))


def _items(value: object, where: str) -> Iterator[tuple[str, Any]]:
    return iter(_table(value, where, None).items())


def _table(value: object, where: str, known: tuple[str, ...] | None) -> Mapping[str, Any]:
    """Return a table with text for keys, and none but the known ones."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a table, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"the keys of {where} must be text, got {type(key).__name__}")
        if known is not None and key not in known:
            raise ValueError(
                f"unknown field {key[:60]!r} in {where}: there may be {', '.join(known)}"
            )
    return value


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Add where it was to the text of what is refused inside."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error
