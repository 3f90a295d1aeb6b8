"""An operator's calls about models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final, Literal, TypeAlias

from google.protobuf.field_mask_pb2 import FieldMask

from modelyard import _admin_messages
from modelyard._admin_calls import PAGE_SIZE, AdminCalls, checked_etag, checked_request_id
from modelyard._device_messages import set_placement
from modelyard._names import model_id, model_name
from modelyard._struct_messages import struct_from
from modelyard.placements import AutomaticPlacement, PlacementLike, read_placement
from modelyard.resources import Model
from modelyard.v1 import model_pb2, model_service_pb2
from modelyard.v1.model_service_pb2_grpc import ModelServiceStub

__all__ = ["UNSET", "ModelCalls", "Unset"]


class Unset(Enum):
    """The type of ``UNSET``, which stands for an argument that was not given.

    None cannot: it is a value, such as a placement that leaves the choice to the server.
    """

    UNSET = "unset"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
"""Stands for an argument that was not given."""

_Unset: TypeAlias = Literal[Unset.UNSET]


class ModelCalls(AdminCalls):
    """Registers, changes and removes models."""

    _models: ModelServiceStub

    def create_model(
        self,
        model: str,
        *,
        runtime: str,
        root: str | None = None,
        folder: str | None = None,
        task: str = "",
        keys: Sequence[str] = (),
        options: Mapping[str, object] | None = None,
        placement: PlacementLike = None,
        validate_only: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Model:
        """Register a model and return it as registered. Its weights are not read yet.

        Args:
            model: the id it shall have.
            runtime: what executes it: ``transformers``, ``torch`` or ``identity``.
            root: name of the server's folder that holds the weights; goes with ``folder``.
            folder: folder below it, relative and "/"-separated.
            task: what the runtime does with it, for instance ``text-classification``.
            keys: keys that shall mean it, besides its id.
            options: options of the runtime.
            placement: where it shall live, in any form of ``read_placement``: a device, a map of
                its parts, ``"balanced"``. None lets the server choose at every load.
            validate_only: check everything and change nothing.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            InvalidRequest, AlreadyExists, PlacementInvalid, ModelNeverFits, LoadFailed: as named.
            CatalogUnavailable: it could not be kept; try again.
            ModelyardError: any other failure.
            TypeError, ValueError: an argument that cannot be sent.
        """
        message = model_pb2.Model(
            keys=_checked_keys(keys),
            source=_source(root, folder),
            runtime=runtime,
            task=task,
            options=None if options is None else struct_from(options, "options"),
        )
        set_placement(message, read_placement(placement))
        request = model_service_pb2.CreateModelRequest(
            model_id=model_id(model),
            model=message,
            validate_only=validate_only,
            request_id=checked_request_id(request_id, validate_only=validate_only),
        )
        response = self._change(self._models.CreateModel, request, timeout_s)
        return self._read(_admin_messages.model_from, response.model)

    def get_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Return one model. Raises ``ModelNotFound`` and as the class says."""
        request = model_service_pb2.GetModelRequest(name=model_name(model))
        response = self._connection.call(self._models.GetModel, request, timeout_s)
        return self._read(_admin_messages.model_from, response.model)

    def list_models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """Return every model, in the order of their names. ``timeout_s`` is for all of it."""

        def page(token: str, left_s: float) -> tuple[Sequence[model_pb2.Model], str]:
            request = model_service_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=token)
            response = self._connection.call(self._models.ListModels, request, left_s)
            return response.models, response.next_page_token

        return self._list(page, _admin_messages.model_from, timeout_s)

    def update_model(
        self,
        model: str,
        *,
        runtime: str | _Unset = UNSET,
        root: str | _Unset | None = UNSET,
        folder: str | _Unset | None = UNSET,
        task: str | _Unset = UNSET,
        keys: Sequence[str] | _Unset = UNSET,
        options: Mapping[str, object] | _Unset | None = UNSET,
        placement: PlacementLike | _Unset = UNSET,
        etag: str | None = None,
        validate_only: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Model:
        """Change a model and return it as registered. What is not given stays as it is.

        A resident model is loaded anew before the old one leaves, so that requests do not wait,
        where both fit at once. If that fails, everything is as before.

        Args:
            model: which one.
            runtime: what executes it.
            root: name of the server's folder that holds the weights; goes with ``folder``.
            folder: folder below it. None for both: it has no weights.
            task: what the runtime does with it.
            keys: all the keys that shall mean it, besides its id.
            options: all the options of the runtime; None for no options.
            placement: where it shall live; None lets the server choose at every load.
            etag: change it only if this is its etag.
            validate_only: check everything and change nothing.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            ModelNotFound, AlreadyExists, EtagMismatch, ConfigOwned: as named.
            PlacementInvalid, ModelNeverFits, LoadFailed, InvalidRequest: as named.
            CatalogUnavailable: it could not be kept; try again.
            ModelyardError: any other failure.
            TypeError, ValueError: an argument that cannot be sent, or nothing to change.
        """
        message = model_pb2.Model(name=model_name(model), etag=checked_etag(etag))
        paths: list[str] = []
        if keys is not UNSET:
            paths.append("keys")
            message.keys.extend(_checked_keys(keys))
        if root is not UNSET or folder is not UNSET:
            if root is UNSET or folder is UNSET:
                raise ValueError("root and folder go together: give both or neither")
            paths.append("source")
            source = _source(root, folder)
            if source is not None:
                message.source.CopyFrom(source)
        if runtime is not UNSET:
            paths.append("runtime")
            message.runtime = runtime
        if task is not UNSET:
            paths.append("task")
            message.task = task
        if options is not UNSET:
            paths.append("options")
            if options is not None:
                message.options.CopyFrom(struct_from(options, "options"))
        if placement is not UNSET:
            value = read_placement(placement)
            automatic = isinstance(value, AutomaticPlacement)
            paths.append("automatic_placement" if automatic else "placement")
            set_placement(message, value)
        if not paths:
            raise ValueError("nothing to change: give at least one of the model's fields")
        request = model_service_pb2.UpdateModelRequest(
            model=message,
            update_mask=FieldMask(paths=paths),
            validate_only=validate_only,
            request_id=checked_request_id(request_id, validate_only=validate_only),
        )
        response = self._change(self._models.UpdateModel, request, timeout_s)
        return self._read(_admin_messages.model_from, response.model)

    def delete_model(
        self,
        model: str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Remove a model. Requests that run are answered, requests that wait are refused.

        Args:
            model: which one.
            etag: remove it only if this is its etag.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            ModelNotFound, EtagMismatch, ConfigOwned: as named.
            CatalogUnavailable: it could not be removed; try again.
            ModelyardError: any other failure.
        """
        request = model_service_pb2.DeleteModelRequest(
            name=model_name(model),
            etag=checked_etag(etag),
            request_id=checked_request_id(request_id),
        )
        self._change(self._models.DeleteModel, request, timeout_s)


def _checked_keys(keys: Any) -> Sequence[str]:
    # A str is a sequence of str too, and would become one key per letter.
    if isinstance(keys, str):
        raise TypeError("keys must be a list of str, got a str: write [key]")
    checked: Sequence[str] = keys
    return checked


def _source(root: str | None, folder: str | None) -> model_pb2.ModelSource | None:
    if (root is None) != (folder is None):
        raise ValueError("root and folder go together: give both or neither")
    if root is None or folder is None:
        return None
    return model_pb2.ModelSource(root=root, folder=folder)
