"""The blocking client for predictions."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import grpc

from modelyard._connection import (
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    Connection,
    ConnectionSettings,
)
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
from modelyard.prediction import Prediction
from modelyard.routes import Resolution
from modelyard.v1.inference_service_pb2_grpc import InferenceServiceStub
from modelyard.v1.route_service_pb2_grpc import RouteServiceStub

__all__ = ["Client"]


class Client:
    """Asks a modelyard server for predictions.

    Keeps one connection, so make one client and keep it. May be shared between threads. Use it as
    a context manager or call ``close``::

        with Client() as client:
            prediction = client.predict("sentiment", ["I like it", "I do not"])

    Args:
        target: where the server is: ``host:port``, ``unix:path``, or another of gRPC's forms.
        timeout_s: seconds a call may take where it does not say itself. Retries included.
        max_message_bytes: largest request to send and largest answer to accept.
        channel_credentials: for TLS; None connects without.
        identity: who is calling, for the server's fairness and log. It proves nothing to anybody.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
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
        self._stub = InferenceServiceStub(self._connection.channel)
        self._routes = RouteServiceStub(self._connection.channel)

    def predict(
        self,
        key: str,
        inputs: Inputs,
        *,
        parameters: Mapping[str, object] | None = None,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Run the model that a key means and return its outputs.

        If the model is not in memory the call waits until it is, within its deadline. Calls are
        retried while the server is unreachable or full, again within the deadline.

        Args:
            key: what to ask for.
            inputs: one value, for a model with one input, or values by input name. A value is a
                str, bytes, a list of either, or a numpy array; ``modelyard.tensors`` has the
                whole table. A list is one input with one row per element.
            parameters: parameters of this run, for instance ``{"max_new_tokens": 20}``.
            timeout_s: seconds this call may take; None takes the client's.

        Raises:
            TypeError: an argument of a type that cannot be sent.
            ValueError: an argument that cannot be sent: a shape beyond the limits, no input at
                all, or more than ``max_message_bytes``.
            ModelyardError: the server refused or failed; ``modelyard.errors`` has a class for
                each reason.
            RuntimeError: the client is closed.
        """
        request = predict_request(key, inputs, parameters)
        response = self._connection.call(self._stub.Predict, request, timeout_s)
        with reading_answer(self._connection.settings.target):
            return prediction_from(response)

    def predict_batch(
        self, items: BatchItems, *, timeout_s: float | None = None
    ) -> list[Prediction | ModelyardError]:
        """Run the models that many keys mean, in one call.

        The server groups the items by model, so their order costs nothing: each model is loaded at
        most once for the call as long as nobody else needs its memory, and different models are
        loaded and run at the same time. One item's failure is no other's. The deadline is for all:
        items that it finds unfinished end with ``DeadlineExceeded``, the others are answered.

        Args:
            items: what to ask for, 1 to 1024: ``BatchItem``, or ``(key, inputs)``.
            timeout_s: seconds the call may take; None takes the client's.

        Returns:
            For each item, in their order, its prediction, or why there is none. Such an error is
            returned and not raised, and not retried: its ``retry_after_s`` says whether and when
            asking again can help.

        Raises:
            TypeError: an item of a type that cannot be sent; the text says which.
            ValueError: an item that cannot be sent, no item at all, or more than
                ``max_message_bytes``.
            ModelyardError: the call as a whole was refused or failed.
            RuntimeError: the client is closed.
        """
        request = batch_request(items)
        response = self._connection.call(self._stub.PredictBatch, request, timeout_s)
        with reading_answer(self._connection.settings.target):
            return results_from(response, len(request.items))

    def resolve(self, key: str, *, timeout_s: float | None = None) -> Resolution:
        """Return what a request for a key would do now; nothing is run or loaded.

        Args:
            key: what would be asked for.
            timeout_s: seconds the call may take; None takes the client's.

        Raises:
            KeyNotFound, InvalidRequest: as named.
            ModelyardError: any other failure.
            TypeError: no str.
            RuntimeError: the client is closed.
        """
        request = resolve_request(key)
        response = self._connection.call(self._routes.ResolveRoute, request, timeout_s)
        return resolution_from(key, response)

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
