"""modelyard.v1.ModelService."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic_ns
from typing import Any

from modelyard.v1 import model_pb2
from modelyard.v1 import model_service_pb2 as pb
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, ModelDraft, Registration
from modelyard_server.catalog.records import Owner
from modelyard_server.catalog.registry import Registry
from modelyard_server.catalog.writes import Writes
from modelyard_server.errors import Violation
from modelyard_server.residency.shell import Residency
from modelyard_server.services.handler import invalid
from modelyard_server.services.once import Answered, checked_once, once
from modelyard_server.services.paging import page
from modelyard_server.services.placements import put_placement, read_placement_of, way_message
from modelyard_server.services.resources import check_etag, id_in, unknown_fields
from modelyard_server.services.structs import plain_values
from modelyard_server.transport.api import Call

__all__ = ["ModelService", "deadline_ns_of", "model_id_of"]

_OWNERS = {
    Owner.CONFIG: model_pb2.MODEL_OWNER_CONFIG,
    Owner.API: model_pb2.MODEL_OWNER_API,
}
_PLACEMENTS = frozenset({"placement", "automatic_placement"})
_UPDATABLE = ("keys", "source", "runtime", "task", "options", "placement", "automatic_placement")
_ANSWER_MARGIN = 0.05


def model_id_of(name: str, field: str) -> str:
    """The id in a resource name "models/{model}". Raises Refusal INVALID_FIELD."""
    return id_in(name, "model", field)


def deadline_ns_of(call: Call, most_s: float) -> int:
    """When work for a call has to be done, on the residency's clock.

    A little before the caller stops waiting, so that it learns how it ended.
    """
    left_s = most_s if call.remaining_s is None else min(most_s, call.remaining_s)
    return monotonic_ns() + int(left_s * (1 - _ANSWER_MARGIN) * 1e9)


class ModelService:
    """Registers models and tells which there are.

    Args:
        catalog: the models.
        registry: changes them.
        residency: tells which are pinned.
        writes: makes changes durable, one at a time.
        device_names: resource names of the devices, by position.
        max_deadline_s: for calls that load something.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        registry: Registry,
        residency: Residency,
        writes: Writes,
        device_names: Sequence[str],
        max_deadline_s: float,
    ) -> None:
        self._catalog = catalog
        self._registry = registry
        self._residency = residency
        self._writes = writes
        self._device_names = tuple(device_names)
        self._max_deadline_s = max_deadline_s

    async def create_model(
        self, request: pb.CreateModelRequest, call: Call
    ) -> pb.CreateModelResponse:
        """See ModelService.CreateModel."""
        draft = _draft_of(request.model_id, request.model)

        def answer(created: Registration) -> pb.CreateModelResponse:
            return pb.CreateModelResponse(model=self._message(created, pinned=False))

        async def create(*, validate_only: bool, answered: Answered) -> pb.CreateModelResponse:
            return answer(
                await self._registry.create(
                    draft,
                    validate_only=validate_only,
                    remember=lambda found: answered(answer(found)),
                )
            )

        return await checked_once(self._writes, request, pb.CreateModelResponse, create)

    async def get_model(self, request: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:
        """See ModelService.GetModel."""
        model = self._catalog.get(model_id_of(request.name, "name"))
        return pb.GetModelResponse(model=self._message(model, pinned=self._is_pinned(model)))

    async def list_models(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """See ModelService.ListModels."""
        chosen, token = page(
            self._catalog.models(),
            size=request.page_size,
            token=request.page_token,
            name=lambda model: model.id,
        )
        return pb.ListModelsResponse(
            models=[self._message(model, pinned=self._is_pinned(model)) for model in chosen],
            next_page_token=token,
        )

    async def update_model(
        self, request: pb.UpdateModelRequest, call: Call
    ) -> pb.UpdateModelResponse:
        """See ModelService.UpdateModel."""
        model_id = model_id_of(request.model.name, "model.name")
        fields = _fields_of(request)
        deadline_ns = deadline_ns_of(call, self._max_deadline_s)

        async def update(*, validate_only: bool, answered: Answered) -> pb.UpdateModelResponse:
            old = self._catalog.get(model_id)
            check_etag("model", request.model.name, given=request.model.etag, current=old.etag)
            pinned = self._is_pinned(old)

            def answer(updated: Registration) -> pb.UpdateModelResponse:
                return pb.UpdateModelResponse(model=self._message(updated, pinned=pinned))

            return answer(
                await self._registry.update(
                    old,
                    _with_fields(old.draft, request.model, fields),
                    keep_given=not fields & _PLACEMENTS,
                    reload=fields != {"keys"},
                    deadline_ns=deadline_ns,
                    validate_only=validate_only,
                    remember=lambda found: answered(answer(found)),
                )
            )

        return await checked_once(self._writes, request, pb.UpdateModelResponse, update)

    async def delete_model(
        self, request: pb.DeleteModelRequest, call: Call
    ) -> pb.DeleteModelResponse:
        """See ModelService.DeleteModel."""
        model_id = model_id_of(request.name, "name")

        async def change(answered: Answered) -> pb.DeleteModelResponse:
            model = self._catalog.get(model_id)
            check_etag("model", request.name, given=request.etag, current=model.etag)
            response = pb.DeleteModelResponse()
            await self._registry.delete(model, request=answered(response))
            return response

        return await once(self._writes, request, pb.DeleteModelResponse, change)

    def _is_pinned(self, model: Model) -> bool:
        return self._residency.use(model.handle).pinned

    def _message(self, model: Registration, *, pinned: bool) -> model_pb2.Model:
        draft = model.draft
        message = model_pb2.Model(
            name=f"models/{model.id}",
            keys=draft.keys,
            runtime=draft.runtime,
            task=draft.task,
            estimated_bytes=model.estimated_bytes,
            estimated_activation_bytes=model.activation_bytes,
            etag=model.etag,
            owner=_OWNERS[model.owner],
            placed_by_plan=model.given is not None,
            alternatives=[way_message(way, self._device_names) for way in model.ways],
            warnings=model.warnings,
            pinned=pinned,
        )
        if isinstance(model, Model) and model.handle.barred_text:
            message.warnings.append(f"barred: {model.handle.barred_text}")
        if draft.folder:
            message.source.root = draft.root
            message.source.folder = draft.folder
        if draft.options:
            message.options.update(dict(draft.options))
        put_placement(message, model.placement)
        message.create_time.FromDatetime(model.created)
        return message


def _draft_of(model_id: str, model: model_pb2.Model) -> ModelDraft:
    return ModelDraft(
        id=model_id,
        keys=tuple(model.keys),
        root=model.source.root,
        folder=model.source.folder,
        runtime=model.runtime,
        task=model.task,
        options=plain_values(model.options, "model.options"),
        placement=read_placement_of(model, model.WhichOneof("where"), "model."),
    )


def _fields_of(request: pb.UpdateModelRequest) -> frozenset[str]:
    paths = tuple(request.update_mask.paths)
    if paths == ("*",):
        return frozenset(_UPDATABLE)
    if not paths:
        raise invalid(Violation("update_mask", "must name at least one field"))
    if unknown := unknown_fields(paths, _UPDATABLE):
        raise invalid(*unknown)
    return frozenset(paths)


def _with_fields(old: ModelDraft, new: model_pb2.Model, fields: frozenset[str]) -> ModelDraft:
    """A draft with those fields of a message that the mask names; the others are not looked at."""
    values: dict[str, Any] = {}
    if "keys" in fields:
        values["keys"] = tuple(new.keys)
    if "source" in fields:
        values |= {"root": new.source.root, "folder": new.source.folder}
    if "runtime" in fields:
        values["runtime"] = new.runtime
    if "task" in fields:
        values["task"] = new.task
    if "options" in fields:
        values["options"] = plain_values(new.options, "model.options")
    if fields & _PLACEMENTS:
        which = new.WhichOneof("where")
        named = which if which in fields else None
        values["placement"] = read_placement_of(new, named, "model.")
    return replace(old, **values)
