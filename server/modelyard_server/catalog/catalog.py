"""The registered models, by id and by key: the table that requests look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from modelyard_server.catalog.model import Model
from modelyard_server.errors import Reason, Refusal, Resource

__all__ = ["Catalog"]


class Catalog:
    """Models by id and by key.

    Only what is in memory; the store keeps what is to last. Every change is one step between two
    requests.

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

    def check_free(
        self, model_id: str, keys: Iterable[str], *, but_for: Model | None = None
    ) -> None:
        """Raises Refusal ALREADY_EXISTS if the id or a key is taken by another model.

        Args:
            model_id: the id.
            keys: the keys.
            but_for: a model whose id and keys count as free.
        """
        if self._models.get(model_id, but_for) is not but_for:
            raise _taken("model", model_id)
        for key in (model_id, *keys):
            if self._keys.get(key, but_for) is not but_for:
                raise _taken("key", key)

    def add(self, model: Model) -> None:
        """Adds a model whose id and keys are free."""
        self.check_free(model.id, model.draft.keys)
        self._models[model.id] = model
        for key in (model.id, *model.draft.keys):
            self._keys[key] = model

    def replace(self, old: Model, new: Model) -> None:
        """Puts a model of the same id in another's place, in one step."""
        self.check_free(new.id, new.draft.keys, but_for=old)
        self.remove(old)
        self.add(new)

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
