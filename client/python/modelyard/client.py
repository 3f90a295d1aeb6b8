"""The blocking client for predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from modelyard.generation import Generation
from modelyard.prediction import Prediction
from modelyard.routes import Resolution
from modelyard.streams import DEFAULT_MAX_IN_FLIGHT, PredictStream
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
        affinity: str | None = None,
        version: str | None = None,
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
            affinity: what a route that has a choice goes by, for instance a user's id: the same
                affinity gets the same branch. At most 256 bytes.
            version: which version of what the key means, or an alias of one; None for the current.
            timeout_s: seconds this call may take; None takes the client's.

        Raises:
            TypeError: an argument of a type that cannot be sent.
            ValueError: an argument that cannot be sent: a shape beyond the limits, no input at
                all, or more than ``max_message_bytes``.
            ModelyardError: the server refused or failed; ``modelyard.errors`` has a class for
                each reason.
            RuntimeError: the client is closed.
        """
        request = predict_request(key, inputs, parameters, affinity, version)
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

    def stream(
        self, *, max_in_flight: int = DEFAULT_MAX_IN_FLIGHT, linger_s: float = 0.0
    ) -> PredictStream:
        """Open a stream: many predictions over one call, each answered as soon as it is done.

        Who has many small requests saves most of what a call costs. It begins with the first
        prediction; ``modelyard.streams`` says how it ends::

            with client.stream() as stream:
                futures = [stream.predict("sentiment", text) for text in texts]
                for future in futures:
                    print(future.result().only)

        Args:
            max_in_flight: most items that are asked and not answered, 1 to 1,024; who asks for
                more waits.
            linger_s: how long an item waits for others to go with it in one message. With 0 those
                go together that wait anyway.

        Raises:
            TypeError, ValueError: an argument of the wrong type or out of range.
        """
        return PredictStream(self._connection, max_in_flight=max_in_flight, linger_s=linger_s)

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
    ) -> Generation:
        """Generate text that goes on from a prompt, and return its pieces as they come.

        The call begins here and lasts until the generation is read to its end or closed. It is
        retried as ``predict`` is, until its first piece has come.

        Args:
            key: what to ask for; must mean one model of the task "text-generation".
            prompt: what the text is to go on from.
            max_new_tokens: most tokens to generate; None takes 64, or what the model's context
                leaves if that is less.
            stop: ends the text before the first of these, which is not in it; at most 16, of at
                most 256 bytes of UTF-8.
            temperature: 0 takes the likeliest token always; above it, at most 10, tokens are drawn
                at random, more evenly the higher it is.
            top_k: draws among so many likeliest tokens only.
            top_p: draws among the likeliest tokens only that have this probability together.
            seed: of the draws: the same seed, prompt and model give the same text, but for
                rounding. None takes another one each time.
            affinity: what a choice between models goes by, where the key's route has one.
            version: which version of what the key means.
            timeout_s: seconds the whole may take; None takes the client's.

        Raises:
            TypeError: an argument of a type that cannot be sent.
            ValueError: an argument that cannot be sent.
            RuntimeError: the client is closed.
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
        call = self._connection.open_stream(
            self._stub.Generate, request, self._connection.settings.call_timeout(timeout_s)
        )
        target = self._connection.settings.target
        return Generation(call, target=target, piece_from=piece_from)

    def resolve(
        self,
        key: str,
        *,
        affinity: str | None = None,
        version: str | None = None,
        timeout_s: float | None = None,
    ) -> Resolution:
        """Return what a request for a key would do now; nothing is run or loaded.

        Args:
            key: what would be asked for.
            affinity: as ``predict`` would be given it; without, a split answers with all branches.
            version: as ``predict`` would be given it.
            timeout_s: seconds the call may take; None takes the client's.

        Raises:
            KeyNotFound, InvalidRequest: as named.
            ModelyardError: any other failure.
            TypeError: no str.
            RuntimeError: the client is closed.
        """
        request = resolve_request(key, affinity, version)
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
