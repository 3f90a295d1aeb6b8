"""The registered models, by id and by key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from modelyard_server.catalog.model import Model
from modelyard_server.errors import Reason, Refusal, Resource

__all__ = ["Catalog"]


class Catalog:
    """Models by id and by key. In memory: what the configuration file says comes back with it.

    Invariant: a key means one model; a model's id is one of its keys. On the event loop's thread
        only.
    """

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._keys: dict[str, Model] = {}

    @property
    def keys(self) -> Mapping[str, Model]:
        """What each key means. A live view."""
        return MappingProxyType(self._keys)

    def check_free(self, model_id: str, keys: Iterable[str]) -> None:
        """Raises Refusal ALREADY_EXISTS if the id or a key is taken."""
        if model_id in self._models:
            raise _taken("model", model_id)
        for key in (model_id, *keys):
            if key in self._keys:
                raise _taken("key", key)

    def add(self, model: Model) -> None:
        """Adds a model whose id and keys are free."""
        self.check_free(model.id, model.draft.keys)
        self._models[model.id] = model
        for key in (model.id, *model.draft.keys):
            self._keys[key] = model

    def remove(self, model: Model) -> None:
        """Takes a model and its keys out."""
        del self._models[model.id]
        for key in (model.id, *model.draft.keys):
            self._keys.pop(key, None)

    def get(self, model_id: str) -> Model:
        """The model of an id. Raises Refusal MODEL_NOT_FOUND."""
        try:
            return self._models[model_id]
        except KeyError:
            raise Refusal(
                Reason.MODEL_NOT_FOUND,
                f"there is no model {model_id!r}",
                resource=Resource("model", f"models/{model_id}"),
            ) from None

    def models(self) -> list[Model]:
        """All models, in the order of their ids."""
        return [self._models[model_id] for model_id in sorted(self._models)]


def _taken(kind: str, name: str) -> Refusal:
    return Refusal(
        Reason.ALREADY_EXISTS,
        f"{kind} {name!r} exists already",
        resource=Resource(kind, f"models/{name}" if kind == "model" else name),
    )
