"""Configuration files of tests, piece by piece."""

from __future__ import annotations

from pathlib import Path

from tests.support.faulty_models import FACTORIES
from tests.support.tiny_models import MLP_FACTORY

__all__ = ["ALLOWED", "CPU", "DISK", "ROOTS", "device_table", "model_table", "toml"]


def toml(value: object) -> str:
    """A value as TOML writes it inline."""
    match value:
        case bool():
            return str(value).lower()
        case dict():
            # In quotes, because a part of a model has dots in its name, and the rest has none.
            return "{" + ", ".join(f'"{key}" = {toml(item)}' for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(toml(item) for item in value) + "]"
        case str() | Path():
            return f'"{value}"'
        case _:
            return repr(value)


def device_table(device: str, budget: object, **settings: object) -> str:
    """One device."""
    return _table("[[devices]]", {"device": device, "budget": budget} | settings)


def model_table(name: str, runtime: str, **settings: object) -> str:
    """One model; unless it is an identity model, in the folder of its name below root "store"."""
    given: dict[str, object] = {"runtime": runtime}
    if runtime != "identity":
        given |= {"root": "store", "folder": name}
    return _table(f"[models.{name}]", given | settings)


def _table(head: str, settings: dict[str, object]) -> str:
    return "\n".join(["", head, *(f"{key} = {toml(item)}" for key, item in settings.items()), ""])


CPU = device_table("cpu", "64MB")
DISK = device_table("disk", "64MB")
"""Needs ROOTS."""
ROOTS = _table("[roots]", {"store": "store"})
ALLOWED = _table("[runtimes.torch]", {"allowed_factories": [MLP_FACTORY, *FACTORIES]})
"""Every factory of tests.support."""
