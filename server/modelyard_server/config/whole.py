"""A whole configuration: its sections, and how devices, roots and models fit together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modelyard.devices import Device
from modelyard.placements import AutomaticPlacement, Placement
from modelyard_server.config.devices import MAX_DEVICES, DeviceConfig
from modelyard_server.config.engine import EngineConfig
from modelyard_server.config.host_tier import HostTierConfig, tier_conflicts
from modelyard_server.config.models import ModelConfig
from modelyard_server.config.problems import KeyPath, key_text, quoted
from modelyard_server.config.routes import RouteConfig, route_conflicts
from modelyard_server.config.rules import Finding
from modelyard_server.config.sections import fields_of, raise_if_any
from modelyard_server.config.server import HttpConfig, ServerConfig
from modelyard_server.config.storage import CatalogConfig, WeightsConfig
from modelyard_server.config.yard import YardConfig

__all__ = ["Config", "plan_conflicts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration.

    Raises:
        ValueError: its parts contradict each other, as ``plan_conflicts``, ``route_conflicts`` and
            ``tier_conflicts`` say.
    """

    server: ServerConfig = field(default_factory=ServerConfig)
    """How the server is reached."""
    http: HttpConfig = field(default_factory=HttpConfig)
    """How it is reached without gRPC."""
    yard: YardConfig = field(default_factory=YardConfig)
    """How it decides."""
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    """Where it keeps what must survive it."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Where it keeps weights."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where models run."""
    host_tier: HostTierConfig = field(default_factory=HostTierConfig)
    """Where copies of evicted models are kept."""
    devices: tuple[DeviceConfig, ...]
    """1 to ``MAX_DEVICES`` devices, all different, in the order of the file."""
    roots: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    """Absolute folders, by name, below which model folders may be."""
    models: tuple[ModelConfig, ...] = ()
    """The models, in the order of the file."""
    routes: tuple[RouteConfig, ...] = ()
    """The routes, in the order of the file."""
    allowed_factories: frozenset[str] = frozenset()
    """``module:function`` names that the torch runtime may call."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "roots", MappingProxyType(dict(self.roots)))
        devices = [fields_of(device) for device in self.devices]
        models = {model.id: fields_of(model) for model in self.models}
        if len(models) != len(self.models):
            raise ValueError("two models have the same id")
        raise_if_any(
            [
                *plan_conflicts(devices, frozenset(self.roots), models),
                *route_conflicts([fields_of(route) for route in self.routes], models),
                *tier_conflicts(self.host_tier.budget, devices),
            ]
        )


def plan_conflicts(
    devices: Sequence[Mapping[str, Any]],
    roots: frozenset[str],
    models: Mapping[str, Mapping[str, Any]],
) -> Iterator[Finding]:
    """Yield what is wrong between devices, roots and models that are each right.

    Args:
        devices: for each device the fields that passed their rules, by name.
        roots: names of the roots.
        models: for each model id the fields that passed their rules, by name. None stands in
            ``keys`` for one that did not.
    """
    if not devices:
        yield ("devices",), 'is missing: declare at least one, for example device = "cpu"'
    if len(devices) > MAX_DEVICES:
        yield ("devices",), f"at most {MAX_DEVICES} devices, got {len(devices)}"
    declared: dict[Device, int] = {}
    for index, given in enumerate(devices):
        if "device" not in given:
            continue
        first = declared.setdefault(given["device"], index)
        if first != index:
            yield (
                ("devices", index, "device"),
                f"{given['device']} is declared already, by {key_text(('devices', first))}",
            )
    # With a device that cannot be read, nobody knows what is undeclared.
    readable = all("device" in given for given in devices) and bool(devices)
    disk = declared.get(Device.disk())
    if readable and set(declared) == {Device.disk()}:
        yield ("devices",), 'need one that can run models: add for example device = "cpu"'
    if disk is not None and not roots:
        yield ("devices", disk, "device"), "the disk is where the roots are: add [roots]"
    for model_id, given in models.items():
        root = given.get("root")
        if root is not None and root not in roots:
            # A name that is none has been reported; here it may be anything.
            known = (name if name.isprintable() else quoted(name) for name in sorted(roots))
            names = ", ".join(known) or "none"
            yield ("models", model_id, "root"), f"{quoted(root)} is not in [roots] (there: {names})"
        component = given.get("device")
        if readable and component is not None:
            for path, device in _placed(component):
                if device not in declared:
                    yield (
                        ("models", model_id, "device", *path),
                        f"{device} is not declared: use one of "
                        f"{', '.join(map(str, declared))} or add it to [[devices]]",
                    )
    yield from _key_conflicts(models)


def _key_conflicts(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    owners: dict[str, str] = {}
    for model_id, given in models.items():
        for index, key in enumerate(given.get("keys", ())):
            path: KeyPath = ("models", model_id, "keys", index)
            if key is None:
                continue
            if key != model_id and key in models:
                yield path, f"{quoted(key)} is the id of another model, which it always means"
            elif owners.setdefault(key, model_id) != model_id:
                yield path, f"{quoted(key)} means {key_text(('models', owners[key]))} already"


def _placed(component: Placement) -> Iterator[tuple[KeyPath, Device]]:
    """Yield the devices that a placement names, and where in it."""
    if isinstance(component, AutomaticPlacement):
        for index, device in enumerate(component.devices):
            yield ("devices", index), device
    elif component.single is not None:
        yield (), component.single
    elif component.multiple is not None:
        for part, device in component.multiple:
            yield (part,), device
