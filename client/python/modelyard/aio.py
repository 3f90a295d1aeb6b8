"""The client for predictions in asyncio programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

import grpc

from modelyard._connection import (
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    AsyncConnection,
    ConnectionSettings,
)
from modelyard._generate_messages import generate_request, piece_from
from modelyard._predict_messages import (
    BatchItems,
    Inputs,
    batch_request,
    predict_request,
    prediction_from,
    results_from,
)
from modelyard._route_messages import resolution_from, resolve_request
from modelyard._status import reading_answer
from modelyard.errors import ModelyardError
from modelyard.generation import AsyncGeneration
from modelyard.prediction import Prediction
from modelyard.routes import Resolution
from modelyard.streams import DEFAULT_MAX_IN_FLIGHT, AsyncPredictStream
from modelyard.v1.inference_service_pb2_grpc import InferenceServiceStub
from modelyard.v1.route_service_pb2_grpc import RouteServiceStub

__all__ = ["AsyncClient"]


class AsyncClient:
    """Asks a modelyard server for predictions, without blocking the event loop.

    Keeps one connection, so make one client and keep it. Any number of tasks of one event loop may
    share it; it connects when it is first used and belongs to that loop from then on::

        async with AsyncClient() as client:
            prediction = await client.predict("sentiment", ["I like it", "I do not"])

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
        self._connection = AsyncConnection(
            ConnectionSettings(
                target=target,
                timeout_s=timeout_s,
                max_message_bytes=max_message_bytes,
                channel_credentials=channel_credentials,
                identity=identity,
            )
        )

    async def predict(
        self,
        key: str,
        inputs: Inputs,
        *,
        parameters: Mapping[str, object] | None = None,
        affinity: str | None = None,
        version: str | None = None,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Run the model that a key means and return its outputs, as ``Client.predict`` does.

        Cancelling the task cancels the call; the server stops waiting for it, though not what it
        has begun to compute.

        Raises:
            TypeError: an argument of a type that cannot be sent.
            ValueError: an argument that cannot be sent.
            ModelyardError: the server refused or failed.
            RuntimeError: the client is closed, or in use on another event loop.
        """
        request = predict_request(key, inputs, parameters, affinity, version)
        # A stub is a handful of bound methods; the channel is what is worth keeping.
        stub = InferenceServiceStub(self._connection.channel())
        response = await self._connection.call(stub.Predict, request, timeout_s)
        with reading_answer(self._connection.settings.target):
            return prediction_from(response)

    async def predict_batch(
        self, items: BatchItems, *, timeout_s: float | None = None
    ) -> list[Prediction | ModelyardError]:
        """Run the models that many keys mean, in one call, as ``Client.predict_batch`` does.

        Cancelling the task cancels every item; what a model has begun to compute goes on.

        Returns:
            For each item, in their order, its prediction, or the error it ended with.

        Raises:
            TypeError: an item of a type that cannot be sent; the text says which.
            ValueError: an item that cannot be sent, no item at all, or more than
                ``max_message_bytes``.
            ModelyardError: the call as a whole was refused or failed.
            RuntimeError: the client is closed, or in use on another event loop.
        """
        request = batch_request(items)
        stub = InferenceServiceStub(self._connection.channel())
        response = await self._connection.call(stub.PredictBatch, request, timeout_s)
        with reading_answer(self._connection.settings.target):
            return results_from(response, len(request.items))

    def stream(
        self, *, max_in_flight: int = DEFAULT_MAX_IN_FLIGHT, linger_s: float = 0.0
    ) -> AsyncPredictStream:
        """Open a stream of predictions, as ``Client.stream`` does.

        ::

            async with client.stream() as stream:
                answers = await asyncio.gather(*(stream.predict("echo", x) for x in texts))

        Raises:
            TypeError, ValueError: an argument of the wrong type or out of range.
        """
        return AsyncPredictStream(self._connection, max_in_flight=max_in_flight, linger_s=linger_s)

    def generate(
        self,
        key: str,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        stop: str | Iterable[str] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        affinity: str | None = None,
        version: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGeneration:
        """Generate text that goes on from a prompt, as ``Client.generate`` does.

        Not a coroutine: it begins the call and returns what ``async for`` reads. Cancelling the
        task that reads cancels the call.

        Raises:
            TypeError: an argument of a type that cannot be sent.
            ValueError: an argument that cannot be sent.
            RuntimeError: the client is closed, or in use on another event loop, or none runs.
        """
        request = generate_request(
            key,
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            affinity=affinity,
            version=version,
        )
        stub = InferenceServiceStub(self._connection.channel())
        call = self._connection.open_stream(stub.Generate, request, timeout_s)
        target = self._connection.settings.target
        return AsyncGeneration(call, target=target, piece_from=piece_from)

    async def resolve(
        self,
        key: str,
        *,
        affinity: str | None = None,
        version: str | None = None,
        timeout_s: float | None = None,
    ) -> Resolution:
        """Return what a request for a key would do now, as ``Client.resolve`` does.

        Raises:
            KeyNotFound, InvalidRequest: as named.
            ModelyardError: any other failure.
            TypeError: no str.
            RuntimeError: the client is closed, or in use on another event loop.
        """
        request = resolve_request(key, affinity, version)
        stub = RouteServiceStub(self._connection.channel())
        response = await self._connection.call(stub.ResolveRoute, request, timeout_s)
        return resolution_from(key, response)

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
