"""Models that components bring: which folder of the server, for what, where it shall live.

Registering is idempotent. A source names a key; the first component to come registers a model for
it, and whoever comes later, in this process or in another one, finds that key and makes sure that
it means the same. What differs is told and never changed: another component relies on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc

from modelyard.admin import Admin
from modelyard.client import Client
from modelyard.devices import ComponentDevice, DeviceMap
from modelyard.errors import AlreadyExists, KeyNotFound, LoadFailed, ModelNotFound
from modelyard.placements import Placement, placement_text
from modelyard.resources import Model, Residency, ResidencyState

__all__ = ["Source", "load_model", "model_id_for"]

RUNTIME: Final = "transformers"
"""What executes models that components bring."""

_ATTEMPTS: Final = 3
"""To find or make a model while others do the same."""

_MODEL_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_PLACING_OPTIONS: Final = frozenset({"device", "device_map"})
"""Options by which the server places a model whatever its placement says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that a component brings.

    Args:
        key: what it shall be asked for.
        root: name of the server's folder that holds its folder.
        folder: below that, relative and "/"-separated.
        task: what it is for, such as ``feature-extraction``.
        options: options of the runtime; None takes what is there, or the defaults.
        placement: where it shall live; None takes what is there, or leaves it to the server.
    """

    key: str
    root: str
    folder: str
    task: str
    options: Mapping[str, Any] | None
    placement: ComponentDevice | None

    def register(self, client: Client, admin: Admin, *, timeout_s: float) -> str:
        """Make sure that the key means this model, and return the model's resource name.

        Args:
            client: of the server.
            admin: of the same.
            timeout_s: for each call.

        Raises:
            AlreadyExists: the key means something else; the text says what differs.
            ModelyardError: the server refused or failed.
        """
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._find_or_create(client, admin, timeout_s)
            except (AlreadyExists, ModelNotFound) as error:
                if error.reason is None:
                    # Ours: there is a model, and it is another one.
                    raise
                # Somebody made or removed it between our question and our call.
        return self._find_or_create(client, admin, timeout_s)

    def _find_or_create(self, client: Client, admin: Admin, timeout_s: float) -> str:
        try:
            resolution = client.resolve(self.key, timeout_s=timeout_s)
        except KeyNotFound:
            resolution = None
        if resolution is None:
            model_id = model_id_for(self.key)
            return admin.create_model(
                model_id,
                runtime=RUNTIME,
                root=self.root,
                folder=self.folder,
                task=self.task,
                keys=() if model_id == self.key else (self.key,),
                options=self.options,
                placement=self.placement,
                timeout_s=timeout_s,
            ).name
        if len(resolution.steps) != 1 or not resolution.steps[0].model:
            raise _taken(self.key, f"it means {resolution.explanation}")
        model = admin.get_model(resolution.steps[0].model, timeout_s=timeout_s)
        if differences := self._differences(model):
            raise _taken(self.key, f"it means {model.name}, with {'; '.join(differences)}")
        return model.name

    def _differences(self, model: Model) -> list[str]:
        """What a model has that is not as this source says, for people."""
        pairs: list[tuple[str, object, object]] = [
            ("runtime", model.runtime, RUNTIME),
            ("task", model.task, self.task),
            ("root", model.root, self.root),
            ("folder", model.folder, self.folder),
        ]
        found = [
            f"{name} {has!r} and not {wanted!r}" for name, has, wanted in pairs if has != wanted
        ]
        if self.options is not None and dict(model.options) != _plain(self.options):
            found.append(f"options {dict(model.options)!r} and not {dict(self.options)!r}")
        # An operator's plan may have moved it, and an option may place it: those count.
        by_option = _PLACING_OPTIONS & {*model.options, *(self.options or ())}
        if self.placement is not None and not model.placed_by_plan and not by_option:
            has, wanted = model.placement, self.placement
            if _canonical(has) != _canonical(wanted):
                found.append(
                    f"placement {placement_text(has)!r} and not {placement_text(wanted)!r}"
                )
        return found


def model_id_for(key: str) -> str:
    """Return the id that a model for a key gets: the key itself where it can be one.

    Other keys differ in what an id cannot hold, so theirs ends with a digest of the key.
    """
    if _MODEL_ID.fullmatch(key) and ".." not in key:
        return key
    words = "-".join(re.findall("[a-z0-9]+", key.lower()))[:100]
    digest = hashlib.blake2b(key.encode(), digest_size=4).hexdigest()
    return f"{words}-{digest}" if words else f"model-{digest}"


def load_model(admin: Admin, model: str, *, timeout_s: float) -> None:
    """Load a model and wait until it has been there.

    Args:
        admin: of the server.
        model: its resource name.
        timeout_s: for all of it.

    Raises:
        LoadFailed: its load failed.
        DeadlineExceeded: the time is over; the load goes on.
        ModelNotFound, ModelNeverFits, BudgetExhausted, QueueFull: as named.
        ModelyardError: any other failure.
    """
    if _has_been_loaded(admin.load(model, timeout_s=timeout_s)):
        return
    with admin.watch_residencies(timeout_s=timeout_s) as watch:
        for change in watch:
            for residency in change.residencies:
                if residency.model == model and _has_been_loaded(residency):
                    return
            if f"residencies/{model.removeprefix('models/')}" in change.removed:
                raise ModelNotFound(
                    f"{model} was removed while it was being loaded",
                    code=grpc.StatusCode.NOT_FOUND,
                    reason="MODEL_NOT_FOUND",
                )


def _has_been_loaded(residency: Residency) -> bool:
    match residency.state:
        case ResidencyState.QUEUED | ResidencyState.LOADING | ResidencyState.UNKNOWN:
            return False
        case ResidencyState.FAILED:
            failure = residency.failure
            transient = failure is not None and failure.transient
            raise LoadFailed(
                f"{residency.model} cannot be loaded"
                + ("" if failure is None else f": {failure.message}"),
                code=(
                    grpc.StatusCode.UNAVAILABLE
                    if transient
                    else grpc.StatusCode.FAILED_PRECONDITION
                ),
                reason="LOAD_FAILED",
            )
        case _:
            # Resident, or already on its way out again for somebody else.
            return True


def _taken(key: str, why: str) -> AlreadyExists:
    return AlreadyExists(
        f"key {key!r} is taken: {why}. Give the component another key, or what the model has",
        code=grpc.StatusCode.ALREADY_EXISTS,
    )


def _plain(options: Mapping[str, Any]) -> Any:
    """Options as they come back from the server: a tuple as a list."""
    return json.loads(json.dumps(dict(options)))


def _canonical(placement: Placement | None) -> object:
    match placement:
        case ComponentDevice(multiple=DeviceMap() as parts):
            return {key: device.canonical() for key, device in parts}
        case ComponentDevice(single=device) if device is not None:
            return device.canonical()
        case _:
            return placement
