"""A registered model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from modelyard.devices import ComponentDevice
from modelyard_server.residency.values import ModelHandle
from modelyard_server.runtimes.api import JsonValue

__all__ = [
    "KEY_PATTERN",
    "MODEL_ID_PATTERN",
    "Model",
    "ModelDraft",
    "Registration",
    "is_key",
    "is_model_id",
]

MODEL_ID_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
"""What a model's id looks like; it also holds no "..", since ids appear in names of resources."""

KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,255}")
"""What a key looks like; it also holds no ".."."""


def is_model_id(text: str) -> bool:
    """True if the text can be a model's id."""
    return MODEL_ID_PATTERN.fullmatch(text) is not None and ".." not in text


def is_key(text: str) -> bool:
    """True if the text can be a key."""
    return KEY_PATTERN.fullmatch(text) is not None and ".." not in text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDraft:
    """A model as somebody wants to register it; see modelyard.v1.Model."""

    id: str
    keys: tuple[str, ...] = ()
    root: str = ""
    folder: str = ""
    runtime: str
    task: str = ""
    options: Mapping[str, JsonValue]
    placement: ComponentDevice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What registering a model makes of a draft, whether or not it was then put into the catalog.

    Attributes:
        draft: as it was registered.
        estimated_bytes: what a load reserves.
        created: when it was registered, in UTC.
        etag: changes whenever the model changes.
    """

    draft: ModelDraft
    estimated_bytes: int
    created: datetime
    etag: str

    @property
    def id(self) -> str:
        """The model's id."""
        return self.draft.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Registration):
    """A registered model.

    Attributes:
        handle: what the residency knows it by.
    """

    handle: ModelHandle
