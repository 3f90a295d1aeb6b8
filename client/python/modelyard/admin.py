"""The blocking client for operators: models, devices, memory, and the server itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self, TypeVar

import grpc

from modelyard import _admin_messages
from modelyard._connection import (
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    Connection,
    ConnectionSettings,
)
from modelyard._device_messages import (
    component_device_message,
    device_name,
    managed_device_from,
)
from modelyard._status import reading_answer
from modelyard._struct_messages import struct_from
from modelyard.devices import Device, DeviceLike
from modelyard.resources import ManagedDevice, Model, Residency, ServerInfo, ServerStats
from modelyard.v1 import (
    admin_service_pb2,
    device_pb2,
    device_service_pb2,
    model_pb2,
    model_service_pb2,
    residency_pb2,
    residency_service_pb2,
)
from modelyard.v1.admin_service_pb2_grpc import AdminServiceStub
from modelyard.v1.device_service_pb2_grpc import DeviceServiceStub
from modelyard.v1.model_service_pb2_grpc import ModelServiceStub
from modelyard.v1.residency_service_pb2_grpc import ResidencyServiceStub

__all__ = ["Admin"]

# The most the contract allows.
_PAGE_SIZE: Final = 1000

_MessageT = TypeVar("_MessageT")
_ValueT = TypeVar("_ValueT")


class Admin:
    """Registers models, changes budgets, and tells what a modelyard server holds.

    Models are named by their id (``sentiment``) or resource name (``models/sentiment``); devices
    by a ``Device``, its text (``cuda:1``), its id (``cuda-1``) or its resource name. Nothing is
    retried. May be shared between threads. Use it as a context manager or call ``close``.

    Every method takes ``timeout_s``, the seconds it may take (None takes the client's), and raises
    ``TypeError`` or ``ValueError`` for arguments that cannot be sent, ``ModelyardError`` for what
    the server refused or could not do, and ``RuntimeError`` once the client is closed.

    Args: as those of ``Client``.

    Raises: as ``Client``.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        channel_credentials: grpc.ChannelCredentials | None = None,
        identity: str | None = None,
    ) -> None:
        self._connection = Connection(
            ConnectionSettings(
                target=target,
                timeout_s=timeout_s,
                max_message_bytes=max_message_bytes,
                channel_credentials=channel_credentials,
                identity=identity,
            )
        )
        channel = self._connection.channel
        self._admin = AdminServiceStub(channel)
        self._devices = DeviceServiceStub(channel)
        self._models = ModelServiceStub(channel)
        self._residencies = ResidencyServiceStub(channel)

    # Models

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
        placement: DeviceLike = None,
        validate_only: bool = False,
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
            placement: where it shall live; None lets the server choose at every load.
            validate_only: check everything and change nothing.
            timeout_s: see the class.

        Raises:
            InvalidRequest, AlreadyExists, PlacementInvalid, ModelNeverFits, LoadFailed: as named.
            ModelyardError: any other failure.
            TypeError, ValueError: an argument that cannot be sent.
        """
        # A str is a sequence of str too, and would become one key per letter.
        if isinstance(keys, str):
            raise TypeError("keys must be a list of str, got a str: write [key]")
        if (root is None) != (folder is None):
            raise ValueError("root and folder go together: give both or neither")
        message = model_pb2.Model(
            keys=keys,
            runtime=runtime,
            task=task,
            options=None if options is None else struct_from(options, "options"),
            placement=component_device_message(placement),
        )
        if root is not None and folder is not None:
            message.source.CopyFrom(model_pb2.ModelSource(root=root, folder=folder))
        request = model_service_pb2.CreateModelRequest(
            model_id=_model_id(model), model=message, validate_only=validate_only
        )
        response = self._connection.call(self._models.CreateModel, request, timeout_s)
        return self._read(_admin_messages.model_from, response.model)

    def get_model(self, model: str, *, timeout_s: float | None = None) -> Model:
        """Return one model. Raises ``ModelNotFound`` and as the class says."""
        request = model_service_pb2.GetModelRequest(name=_model_name(model))
        response = self._connection.call(self._models.GetModel, request, timeout_s)
        return self._read(_admin_messages.model_from, response.model)

    def list_models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """Return every model, in the order of their names. ``timeout_s`` is for all of it."""

        def page(token: str, left_s: float) -> tuple[Sequence[model_pb2.Model], str]:
            request = model_service_pb2.ListModelsRequest(page_size=_PAGE_SIZE, page_token=token)
            response = self._connection.call(self._models.ListModels, request, left_s)
            return response.models, response.next_page_token

        return self._list(page, _admin_messages.model_from, timeout_s)

    def delete_model(
        self, model: str, *, etag: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Remove a model. Requests that run are answered, requests that wait are refused.

        Args:
            model: which one.
            etag: remove it only if this is its etag.
            timeout_s: see the class.

        Raises:
            ModelNotFound, EtagMismatch: as named.
            ModelyardError: any other failure.
        """
        request = model_service_pb2.DeleteModelRequest(name=_model_name(model), etag=etag or "")
        self._connection.call(self._models.DeleteModel, request, timeout_s)

    # Devices

    def get_device(self, device: Device | str, *, timeout_s: float | None = None) -> ManagedDevice:
        """Return one device. Raises ``DeviceNotFound`` and as the class says."""
        request = device_service_pb2.GetDeviceRequest(name=device_name(device))
        response = self._connection.call(self._devices.GetDevice, request, timeout_s)
        return self._read(managed_device_from, response.device)

    def list_devices(self, *, timeout_s: float | None = None) -> tuple[ManagedDevice, ...]:
        """Return every device, in the order of the configuration. ``timeout_s`` is for all."""

        def page(token: str, left_s: float) -> tuple[Sequence[device_pb2.ManagedDevice], str]:
            request = device_service_pb2.ListDevicesRequest(page_size=_PAGE_SIZE, page_token=token)
            response = self._connection.call(self._devices.ListDevices, request, left_s)
            return response.devices, response.next_page_token

        return self._list(page, managed_device_from, timeout_s)

    def update_budget(
        self,
        device: Device | str,
        budget_bytes: int,
        *,
        etag: str | None = None,
        timeout_s: float | None = None,
    ) -> ManagedDevice:
        """Change a device's budget while requests flow; return the device right after it.

        A lower budget drains what no longer fits: idle models first, then models in use when
        their requests end. ``deficit_bytes`` of the answer says how much is left to do.

        Args:
            device: which one.
            budget_bytes: the new budget, 0 or more.
            etag: change it only if this is the device's etag.
            timeout_s: see the class.

        Raises:
            DeviceNotFound, EtagMismatch, InvalidRequest: as named.
            ModelyardError: any other failure.
        """
        # Exactly int: True is no budget, and protobuf would take it.
        if type(budget_bytes) is not int:
            raise TypeError(f"budget_bytes must be an int, got {type(budget_bytes).__name__}")
        request = device_service_pb2.UpdateBudgetRequest(
            name=device_name(device), budget_bytes=budget_bytes, etag=etag or ""
        )
        response = self._connection.call(self._devices.UpdateBudget, request, timeout_s)
        return self._read(managed_device_from, response.device)

    # What is in memory

    def load(self, model: str, *, timeout_s: float | None = None) -> Residency:
        """Ask for a model to be resident and return at once with where it stands.

        Nothing keeps it resident afterwards; see ``pin``.

        Raises:
            ModelNotFound, ModelNeverFits, BudgetExhausted, LoadFailed, QueueFull: as named.
            ModelyardError: any other failure.
        """
        request = residency_service_pb2.LoadModelRequest(model=_model_name(model))
        response = self._connection.call(self._residencies.LoadModel, request, timeout_s)
        return self._read_residency(response.residency)

    def unload(self, model: str, *, timeout_s: float | None = None) -> Residency:
        """Take a model out of memory; return when its memory is back.

        Requests that run are answered first, so give it the time they may take. The unload goes
        on when the time runs out.

        Raises:
            ModelNotFound, ModelInUse: as named.
            DeadlineExceeded: its memory is not back yet.
            ModelyardError: any other failure.
        """
        request = residency_service_pb2.UnloadModelRequest(model=_model_name(model))
        response = self._connection.call(self._residencies.UnloadModel, request, timeout_s)
        return self._read_residency(response.residency)

    def pin(self, model: str, *, timeout_s: float | None = None) -> Residency:
        """Load a model and never evict it. Returns at once. Raises as ``load``."""
        request = residency_service_pb2.PinModelRequest(model=_model_name(model))
        response = self._connection.call(self._residencies.PinModel, request, timeout_s)
        return self._read_residency(response.residency)

    def unpin(self, model: str, *, timeout_s: float | None = None) -> Residency:
        """Let a pinned model be evicted again, once its room is needed.

        Raises:
            ModelNotFound: as named.
            ModelyardError: any other failure.
        """
        request = residency_service_pb2.UnpinModelRequest(model=_model_name(model))
        response = self._connection.call(self._residencies.UnpinModel, request, timeout_s)
        return self._read_residency(response.residency)

    def list_residencies(self, *, timeout_s: float | None = None) -> tuple[Residency, ...]:
        """Return where every model stands, in the order of their names.

        ``timeout_s`` is for all of it.
        """

        def page(token: str, left_s: float) -> tuple[Sequence[residency_pb2.Residency], str]:
            request = residency_service_pb2.ListResidenciesRequest(
                page_size=_PAGE_SIZE, page_token=token
            )
            response = self._connection.call(self._residencies.ListResidencies, request, left_s)
            return response.residencies, response.next_page_token

        return self._list(page, _admin_messages.residency_from, timeout_s)

    # The server

    def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Return what the server is."""
        request = admin_service_pb2.GetServerInfoRequest()
        response = self._connection.call(self._admin.GetServerInfo, request, timeout_s)
        return self._read(_admin_messages.server_info_from, response)

    def stats(self, *, timeout_s: float | None = None) -> ServerStats:
        """Return what the server has done since it started."""
        request = admin_service_pb2.GetStatsRequest()
        response = self._connection.call(self._admin.GetStats, request, timeout_s)
        return self._read(_admin_messages.server_stats_from, response)

    def close(self) -> None:
        """Close the connection; calls that other threads have under way end with an error."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, reader: Callable[[_MessageT], _ValueT], message: _MessageT) -> _ValueT:
        with reading_answer(self._connection.settings.target):
            return reader(message)

    def _read_residency(self, message: residency_pb2.Residency) -> Residency:
        return self._read(_admin_messages.residency_from, message)

    def _list(
        self,
        page: Callable[[str, float], tuple[Sequence[_MessageT], str]],
        reader: Callable[[_MessageT], _ValueT],
        timeout_s: float | None,
    ) -> tuple[_ValueT, ...]:
        """Collect the pages of a list, all within one deadline."""
        left_s = self._connection.settings.call_timeout(timeout_s)
        end_s = time.monotonic() + left_s
        values: list[_ValueT] = []
        seen = {""}
        token = ""
        while True:
            messages, token = page(token, left_s)
            values += [self._read(reader, message) for message in messages]
            if not token:
                return tuple(values)
            with reading_answer(self._connection.settings.target):
                if token in seen:
                    raise ValueError("a page token came twice, so the pages would never end")
            seen.add(token)
            # A call with next to no time left ends with DeadlineExceeded, like any that is late.
            left_s = max(end_s - time.monotonic(), 0.001)


def _model_id(model: str) -> str:
    if not isinstance(model, str):
        raise TypeError(f"model must be a str, got {type(model).__name__}")
    return model.removeprefix("models/")


def _model_name(model: str) -> str:
    return f"models/{_model_id(model)}"
