"""modelyard.v1.ModelService."""

from __future__ import annotations

from modelyard.v1 import model_pb2
from modelyard.v1 import model_service_pb2 as pb
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import ModelDraft, Registration, is_model_id
from modelyard_server.catalog.registry import Registry
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.services.devices import placement_of, to_component_message
from modelyard_server.services.handler import invalid
from modelyard_server.services.paging import page
from modelyard_server.services.structs import plain_values
from modelyard_server.transport.api import Call

__all__ = ["ModelService", "model_id_of"]


def model_id_of(name: str, field: str) -> str:
    """The id in a resource name "models/{model}". Raises Refusal INVALID_FIELD."""
    model_id = name.removeprefix("models/")
    if model_id == name or not is_model_id(model_id):
        raise invalid(Violation(field, 'must be "models/{model}"'))
    return model_id


class ModelService:
    """Registers models and tells which there are."""

    def __init__(self, *, catalog: Catalog, registry: Registry) -> None:
        self._catalog = catalog
        self._registry = registry

    async def create_model(
        self, request: pb.CreateModelRequest, call: Call
    ) -> pb.CreateModelResponse:
        """See ModelService.CreateModel."""
        model = request.model
        draft = ModelDraft(
            id=request.model_id,
            keys=tuple(model.keys),
            root=model.source.root,
            folder=model.source.folder,
            runtime=model.runtime,
            task=model.task,
            options=plain_values(model.options, "model.options"),
            placement=placement_of(model.placement, "model.placement"),
        )
        created = await self._registry.create(draft, validate_only=request.validate_only)
        return pb.CreateModelResponse(model=_message(created))

    async def get_model(self, request: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:
        """See ModelService.GetModel."""
        model = self._catalog.get(model_id_of(request.name, "name"))
        return pb.GetModelResponse(model=_message(model))

    async def list_models(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """See ModelService.ListModels."""
        chosen, token = page(
            self._catalog.models(),
            size=request.page_size,
            token=request.page_token,
            name=lambda model: model.id,
        )
        return pb.ListModelsResponse(
            models=[_message(model) for model in chosen], next_page_token=token
        )

    async def delete_model(
        self, request: pb.DeleteModelRequest, call: Call
    ) -> pb.DeleteModelResponse:
        """See ModelService.DeleteModel."""
        model = self._catalog.get(model_id_of(request.name, "name"))
        if request.etag and request.etag != model.etag:
            raise Refusal(
                Reason.ETAG_MISMATCH,
                f"{request.name} has changed since its etag was read",
                resource=Resource("model", request.name),
            )
        self._registry.delete(model)
        return pb.DeleteModelResponse()


def _message(model: Registration) -> model_pb2.Model:
    draft = model.draft
    message = model_pb2.Model(
        name=f"models/{model.id}",
        keys=draft.keys,
        runtime=draft.runtime,
        task=draft.task,
        estimated_bytes=model.estimated_bytes,
        etag=model.etag,
    )
    if draft.folder:
        message.source.root = draft.root
        message.source.folder = draft.folder
    if draft.options:
        message.options.update(dict(draft.options))
    if draft.placement is not None:
        message.placement.CopyFrom(to_component_message(draft.placement))
    message.create_time.FromDatetime(model.created)
    return message
