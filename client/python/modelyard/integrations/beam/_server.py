"""Handlers that call a modelyard server."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from modelyard._connection import DEFAULT_TARGET
from modelyard.client import Client
from modelyard.errors import ModelyardError
from modelyard.integrations.beam._asking import AskingSettings, Figures, Predictor
from modelyard.integrations.beam._base import YardHandler
from modelyard.integrations.beam._stacking import ask_for_rows
from modelyard.prediction import BatchItem, Prediction

__all__ = ["KeyedServerModelHandler", "ServerModelHandler", "keys_and_examples"]


class _ServerModel:
    """What a worker loads: a connection."""

    def __init__(self, client: Predictor) -> None:
        self._client = client

    def answer(
        self, items: list[BatchItem], settings: AskingSettings
    ) -> tuple[list[Prediction | ModelyardError], Figures]:
        """Asks for items; see `ask_for_rows`. Public, so that Beam's proxies pass it on."""
        figures = Figures()
        return ask_for_rows(self._client, items, settings, figures=figures), figures


class _Calling(YardHandler):
    """A handler that calls a server."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        identity: str | None = None,
        client: Callable[[], Client] | None = None,
        affinity: Callable[[Any], str] | None = None,
        version: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._affinity = affinity
        self._version = version
        self._target = target
        self._identity = identity
        self._make_client = client

    def load_model(self) -> _ServerModel:
        """Connect. Called by Beam in the worker, once for all of its threads."""
        if self._make_client is not None:
            return _ServerModel(self._make_client())
        return _ServerModel(Client(self._target, identity=self._identity))

    def _affinities(self, elements: Sequence[Any]) -> list[str | None] | None:
        return None if self._affinity is None else [self._affinity(one) for one in elements]


class ServerModelHandler(_Calling):
    """Asks a modelyard server for one key's predictions.

    ::

        examples | RunInference(ServerModelHandler("sentiment", "yard:8470"))

    An example is one row: a str, an array or tensor without the batch dimension, or a dict of them
    by the names of the model's inputs. It gives a ``PredictionResult(example, inference,
    model_id)`` in the order of the batch, where ``inference`` is the row that came back (a dict of
    rows if the model has several outputs) and ``model_id`` what served it. ``inference_args`` are
    the parameters of every run.

    Args:
        key: what to ask for.
        target: where the server is.
        identity: who is calling, for the server's fairness and log.
        client: makes the client in the worker, in place of ``target`` and ``identity``: for TLS,
            whose credentials cannot be pickled. Has to be picklable itself.
        affinity: from an element to what a route's choice goes by, for instance a user's id.
            Without it such a choice is made for each request, which may be of several examples: see
            ``max_rows_per_request``.
        version: which version of what the key means; None for the current one.
        encoder: from an example to the inputs of one request.
        decoder: from a ``Prediction`` to ``inference``.
        on_error: "raise": a batch of which an example fails raises that error, when all of its
            examples have been asked for. "return": such an example's result has the
            ``ModelyardError`` as its ``inference``, and its neighbours have theirs; see
            ``is_error``.
        timeout_s: seconds that a batch may take, with all that is asked for again.
        max_retries: how often an example is asked for again that failed with what the server says
            can pass. The server says when; without a word of it, after 0.1 s and then twice as long
            each time.
        max_rows_per_request: examples of one key that are sent as rows of one request. If it fails,
            each of them is asked for alone. 1 for a model that does not do with each row what it
            would do without the others.
        max_items_per_call: requests of one call, at most 1,024. Calls have at most 8 MiB of inputs.
        min_batch_size, max_batch_size, max_batch_duration_secs, batch_length_fn,
        batch_bucket_boundaries: how Beam makes batches, as those of its own handlers.
        large_model, model_copies, env_vars: as those of Beam's own handlers. What is shared, or
            there several times, is the connection.

    Raises:
        TypeError, ValueError: an argument of no use.
    """

    def __init__(self, key: str, target: str = DEFAULT_TARGET, **settings: Any) -> None:
        if not isinstance(key, str):
            raise TypeError(f"key must be a str, got {type(key).__name__}")
        super().__init__(target, **settings)
        self._key = key

    def run_inference(
        self,
        batch: Sequence[Any],
        model: _ServerModel,
        inference_args: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Return the batch's results, in its order. See the class."""
        examples = list(batch)
        return self._results(
            examples,
            [self._key] * len(examples),
            model.answer,
            inference_args,
            self._affinities(examples),
            self._version,
        )


class KeyedServerModelHandler(_Calling):
    """Asks a modelyard server for predictions of many keys: elements are ``(key, example)``.

    ::

        keyed_examples | RunInference(KeyedServerModelHandler("yard:8470"))

    Results are ``(key, PredictionResult)``. A batch may mix keys: it goes to the server as it is,
    which groups it by model and answers in its order, so no GroupByKey is needed before.

    Args:
        target: where the server is.
        key_of: from an element's key to what is asked for; None: the key is a str, and it is that.
        settings: as those of ``ServerModelHandler``.

    Raises:
        TypeError, ValueError: an argument of no use.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        key_of: Callable[[Any], str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(target, **settings)
        self._key_of = key_of

    def run_inference(
        self,
        batch: Sequence[tuple[Hashable, Any]],
        model: _ServerModel,
        inference_args: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Return the batch's results with their keys, in its order. See the class.

        Raises:
            TypeError: an element that is no pair, or whose key is no str (see ``key_of``).
        """
        keys, examples = keys_and_examples(batch)
        wanted = keys if self._key_of is None else [self._key_of(key) for key in keys]
        for key in wanted:
            if not isinstance(key, str):
                raise TypeError(
                    f"keys are sent as text, got the {type(key).__name__} {key!r}: give key_of"
                )
        results = self._results(
            examples,
            wanted,
            model.answer,
            inference_args,
            self._affinities(batch),
            self._version,
        )
        return list(zip(keys, results, strict=True))


def keys_and_examples(batch: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the keys and the examples of keyed elements.

    Raises:
        TypeError: an element is no pair.
    """
    for element in batch:
        if not isinstance(element, tuple) or len(element) != 2:
            raise TypeError(
                f"elements must be pairs (key, example), got a {type(element).__name__}"
            )
    return [key for key, _ in batch], [example for _, example in batch]
