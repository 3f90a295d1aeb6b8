"""What all components are: a key, a connection, and perhaps a model to register.

A component is made without touching the network, so that pipelines can be built, saved and loaded
anywhere. ``warm_up`` connects, registers the model if the component brings one, and loads what its
key means; a pipeline calls it before each run, and only the first time does anything. ``run`` warms
up by itself. If the server forgets the model (its catalog is in memory and it was restarted), the
next run registers it again.

Everything here may be used from several threads. A copy of a component, or one that was pickled,
connects for itself.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Self, TypeVar

from haystack import default_from_dict, default_to_dict
from haystack.utils import device as theirs

from modelyard._connection import DEFAULT_TARGET, checked_timeout
from modelyard.admin import Admin
from modelyard.aio import AsyncClient
from modelyard.client import Client
from modelyard.devices import ComponentDevice, DeviceLike, resolve_device
from modelyard.errors import KeyNotFound, ModelyardError
from modelyard.integrations.haystack.devices import from_haystack, to_haystack
from modelyard.integrations.haystack.sources import Source, load_model
from modelyard.prediction import Prediction

__all__ = ["SERVER_VARIABLE", "AnyDevice", "KeyedComponent", "chunks_of"]

SERVER_VARIABLE: Final = "MODELYARD_SERVER"
"""Environment variable with the server's address, for components that are not given one."""

AnyDevice = theirs.ComponentDevice | DeviceLike
"""What a component takes as its device: Haystack's value, one of ours, or text."""

_ItemT = TypeVar("_ItemT")
_AnswerT = TypeVar("_AnswerT")


class _Link:
    """How one component is connected. The lock is held while it warms up."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.warm = False
        self.client: Client | None = None
        self.async_client: AsyncClient | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def __reduce__(self) -> tuple[type[_Link], tuple[()]]:
        return _Link, ()


class KeyedComponent:
    """A component that asks a server for one key.

    Attributes:
        key: as given.
        model: as given.
        root: as given.
        device: Haystack's value of what was given; None to leave it to the server.
        options: as given.
        server: as given.
        timeout_s: as given.
        load_timeout_s: as given.
    """

    _task: ClassVar[str]
    """What a model is for that the component registers."""

    def _set_up(
        self,
        *,
        key: str | None,
        model: str | None,
        root: str,
        device: AnyDevice,
        options: Mapping[str, Any] | None,
        server: str | None,
        timeout_s: float,
        load_timeout_s: float,
        registered_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Check and keep what all components are given.

        Not ``__init__``: Haystack makes each component's class anew, and ``super()`` without
        arguments would find the one before.

        Args:
            key: what to ask for; None for the same text as ``model``.
            model: folder of a model to register; None if the server knows the key.
            root: name of the server's folder that holds it.
            device: where it shall live; None leaves it to the server.
            options: options of its runtime.
            server: address; None takes the environment's, or the default.
            timeout_s: seconds for each call.
            load_timeout_s: seconds for the load of a warm-up.
            registered_options: to register it with instead of ``options``.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: neither key nor model, or something about a model without one.
        """
        name = type(self).__name__
        for what, text in (("key", key), ("model", model), ("server", server)):
            if not isinstance(text, str | None):
                raise TypeError(f"{what} must be a str or None, got {type(text).__name__}")
        if not isinstance(root, str):
            raise TypeError(f"root must be a str, got {type(root).__name__}")
        if not isinstance(options, Mapping | None):
            raise TypeError(f"options must be a dict or None, got {type(options).__name__}")
        own_key = key if key is not None else model
        if not own_key or model == "":
            raise ValueError(
                f"{name} needs a key that the server knows, or a model: a folder on the server"
            )
        placement = _placement_of(device)
        registered = options if registered_options is None else registered_options
        if model is None and (placement is not None or registered is not None):
            raise ValueError(
                f"{name} of key {own_key!r} names no model, so there is nothing to place or set: "
                "device and options go with model; those of a model that the server has already "
                "are changed there"
            )
        self.key = key
        self.model = model
        self.root = root
        self.device = None if placement is None else to_haystack(placement)
        self.options = None if options is None else dict(options)
        self.server = server
        self.timeout_s = checked_timeout(timeout_s)
        self.load_timeout_s = checked_timeout(load_timeout_s)
        self._key = own_key
        self._source = (
            None
            if model is None
            else Source(
                key=own_key,
                root=root,
                folder=model,
                task=self._task,
                options=registered,
                placement=placement,
            )
        )
        self._link = _Link()

    def to_dict(self) -> dict[str, Any]:
        """Return the component as Haystack's default serialisation has it."""
        names = inspect.signature(type(self).__init__).parameters
        return default_to_dict(
            self, **{name: getattr(self, name) for name in names if name != "self"}
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the component that ``to_dict`` wrote. Raises as the class, and as Haystack does."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Register the model, if the component brings one, and load what its key means.

        Does nothing once it has succeeded. Returns when the model has been loaded.

        Raises:
            AlreadyExists: the key means another model than the component brings.
            KeyNotFound: the server knows no such key.
            PlacementInvalid: the device is none of the server's, or a map does not fit the model.
            LoadFailed: the model cannot be loaded.
            ModelyardError: any other failure. All of them name the component and its key.
        """
        with self._link.lock:
            if self._link.warm:
                return
            client = self._client()
            try:
                with Admin(self._target(), timeout_s=self.timeout_s) as admin:
                    for model in self._models(client, admin):
                        load_model(admin, model, timeout_s=self.load_timeout_s)
            except ModelyardError as error:
                raise self._named(error) from error
            self._link.warm = True

    async def warm_up_async(self) -> None:
        """Do what ``warm_up`` does, without blocking the event loop."""
        if not self._link.warm:
            await asyncio.to_thread(self.warm_up)

    def close(self) -> None:
        """Close the connection of ``run``; the next one connects again. Idempotent."""
        with self._link.lock:
            client, self._link.client = self._link.client, None
            self._link.warm = False
        if client is not None:
            client.close()

    async def close_async(self) -> None:
        """Close the connections of ``run_async`` and ``run``. Idempotent."""
        client, self._link.async_client = self._link.async_client, None
        self.close()
        if client is not None and self._link.loop is asyncio.get_running_loop():
            await client.close()

    def _predict_all(self, inputs: Sequence[Sequence[str]]) -> list[Prediction]:
        """Ask for each of some lists of texts. Raises ``ModelyardError``."""
        return [self._ask(self._question(texts)) for texts in inputs]

    async def _predict_all_async(self, inputs: Sequence[Sequence[str]]) -> list[Prediction]:
        """Do what ``_predict_all`` does, without blocking the event loop."""
        return [await self._ask_async(self._question_async(texts)) for texts in inputs]

    def _question(self, texts: Sequence[str]) -> Callable[[Client], Prediction]:
        return lambda client: client.predict(self._key, list(texts))

    def _question_async(
        self, texts: Sequence[str]
    ) -> Callable[[AsyncClient], Awaitable[Prediction]]:
        return lambda client: client.predict(self._key, list(texts))

    def _ask(self, question: Callable[[Client], _AnswerT]) -> _AnswerT:
        """Warm up, and ask; once more if the server had to be told of the model again.

        Raises:
            ModelyardError: the server refused or failed.
        """
        self.warm_up()
        client = self._client()
        try:
            try:
                return question(client)
            except KeyNotFound:
                if not self._forgotten():
                    raise
            self.warm_up()
            return question(client)
        except ModelyardError as error:
            raise self._named(error) from error

    async def _ask_async(self, question: Callable[[AsyncClient], Awaitable[_AnswerT]]) -> _AnswerT:
        """Do what ``_ask`` does, without blocking the event loop."""
        await self.warm_up_async()
        client = self._async_client()
        try:
            try:
                return await question(client)
            except KeyNotFound:
                if not self._forgotten():
                    raise
            await self.warm_up_async()
            return await question(client)
        except ModelyardError as error:
            raise self._named(error) from error

    def _forgotten(self) -> bool:
        """Note that the server does not know the key. Returns whether it can be told again."""
        self._link.warm = False
        return self._source is not None

    def _models(self, client: Client, admin: Admin) -> list[str]:
        """The models that the key means, each once; registers the component's own."""
        if self._source is not None:
            return [self._source.register(client, admin, timeout_s=self.timeout_s)]
        steps = client.resolve(self._key).steps
        # Not what only some requests run, nor transformations, which are no models.
        return list(
            dict.fromkeys(step.model for step in steps if step.model and not step.conditional)
        )

    def _client(self) -> Client:
        with self._link.lock:
            if self._link.client is None:
                self._link.client = Client(self._target(), timeout_s=self.timeout_s)
            return self._link.client

    def _async_client(self) -> AsyncClient:
        loop = asyncio.get_running_loop()
        if self._link.async_client is None or self._link.loop is not loop:
            # One of an earlier loop is left to the garbage collector: only that loop can close it.
            self._link.async_client = AsyncClient(self._target(), timeout_s=self.timeout_s)
            self._link.loop = loop
        return self._link.async_client

    def _target(self) -> str:
        return self.server or os.environ.get(SERVER_VARIABLE) or DEFAULT_TARGET

    def _named(self, error: ModelyardError) -> ModelyardError:
        """The same error, with the component and its key in the text: a pipeline shows no more."""
        name = f"{type(self).__name__} of key {self._key!r}: "
        text = str(error)
        return type(error)(
            text if text.startswith(name) else name + text,
            code=error.code,
            reason=error.reason,
            metadata=error.metadata,
            retry_after_s=error.retry_after_s,
            violations=error.violations,
        )


def chunks_of(items: Sequence[_ItemT], size: int) -> list[Sequence[_ItemT]]:
    """Cut a sequence into parts of at most ``size``, in order."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def _placement_of(device: AnyDevice) -> ComponentDevice | None:
    match device:
        case None:
            return None
        case theirs.ComponentDevice():
            return from_haystack(device)
        case theirs.Device() | theirs.DeviceMap():
            return resolve_device(from_haystack(device))
        case _:
            return resolve_device(device)
