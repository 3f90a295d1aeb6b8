"""A registered model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime

from modelyard.placements import Placement, placement_to_json
from modelyard_server.catalog.records import ModelRecord, Owner
from modelyard_server.catalog.run_figures import RunFigure
from modelyard_server.devices.placed import PlacedAs
from modelyard_server.residency.values import ModelHandle
from modelyard_server.routing.names import KEY_PATTERN, MODEL_ID_PATTERN, is_key, is_model_id
from modelyard_server.runtimes.api import JsonValue, Price

__all__ = [
    "KEY_PATTERN",
    "MODEL_ID_PATTERN",
    "GivenPlacement",
    "Model",
    "ModelDraft",
    "Registration",
    "is_key",
    "is_model_id",
]


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
    placement: Placement | None = None

    def digest(self) -> str:
        """A text that is the same exactly for drafts that say the same."""
        content = json.dumps(
            [
                self.id,
                self.keys,
                self.root,
                self.folder,
                self.runtime,
                self.task,
                self.options,
                placement_to_json(self.placement),
            ],
            sort_keys=True,
        )
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class GivenPlacement:
    """A placement that a device plan gave to a model, over its own.

    Attributes:
        placement: None leaves the choice to the server.
    """

    placement: Placement | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What registering a model makes of a draft, whether or not it was then put into the catalog.

    Attributes:
        draft: as its owner gave it.
        owner: who may change it.
        given: what a device plan said of its placement; None if none did.
        ways: how it may be loaded, the preferred way first.
        replan: works the ways out anew for another price. Raises Refusal if there is none.
        warnings: what an operator should know and is no error.
        runs: what its runs take; one for all models whose runs take the same.
        input_names: what its price says of them; see Price.
        created: when it was registered, in UTC.
        etag: changes whenever the model changes.
        origin: for models of the configuration file, a digest of what the file said.
    """

    draft: ModelDraft
    owner: Owner
    given: GivenPlacement | None = None
    ways: tuple[PlacedAs, ...]
    replan: Callable[[Price], tuple[PlacedAs, ...]]
    warnings: tuple[str, ...] = ()
    runs: RunFigure = field(default_factory=RunFigure, compare=False)
    input_names: tuple[str, ...] = ()
    created: datetime
    etag: str
    origin: str = ""

    @property
    def id(self) -> str:
        """The model's id."""
        return self.draft.id

    @property
    def placement(self) -> Placement | None:
        """The placement in force, but for options that beat it."""
        return self.draft.placement if self.given is None else self.given.placement

    @property
    def activation_bytes(self) -> int:
        """What a run of the largest batch takes beside the weights; 0 if nobody knows."""
        return self.runs.size_bytes

    @property
    def estimated_bytes(self) -> int:
        """What a load reserves over all devices, in the largest of the ways."""
        return max(sum(way.charges.values()) for way in self.ways)

    def record(self, *, pinned: bool) -> ModelRecord:
        """As the store keeps it."""
        draft = self.draft
        return ModelRecord(
            id=draft.id,
            owner=self.owner,
            keys=draft.keys,
            root=draft.root,
            folder=draft.folder,
            runtime=draft.runtime,
            task=draft.task,
            options=draft.options,
            placement=placement_to_json(draft.placement),
            pinned=pinned,
            created=self.created,
            etag=self.etag,
            origin=self.origin,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Registration):
    """A registered model.

    Attributes:
        handle: what the residency knows it by.
    """

    handle: ModelHandle

    @staticmethod
    def of(registration: Registration, handle: ModelHandle) -> Model:
        """A registration that has got its handle."""
        values = {each.name: getattr(registration, each.name) for each in fields(Registration)}
        return Model(**values, handle=handle)
