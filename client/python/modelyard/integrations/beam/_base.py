"""What the handlers have in common: from a batch of examples to results in their order."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import grpc

from modelyard._struct_messages import struct_from
from modelyard.errors import InvalidRequest, ModelyardError
from modelyard.integrations.beam._asking import AskingSettings, Figures
from modelyard.integrations.beam._rows import (
    Decoder,
    Encoder,
    decode_rows,
    encode_row,
    is_torch,
    size_of,
)
from modelyard.prediction import BatchItem, Prediction, Served

if TYPE_CHECKING:
    from apache_beam.metrics import Metrics
    from apache_beam.ml.inference.base import ModelHandler, PredictionResult
else:
    try:
        from apache_beam.metrics import Metrics
        from apache_beam.ml.inference.base import ModelHandler, PredictionResult
    except ImportError as error:
        raise ImportError(
            "modelyard.integrations.beam needs the package apache-beam: "
            "pip install 'modelyard[beam]'"
        ) from error

__all__ = ["OnError", "YardHandler", "is_error", "model_id_of"]

OnError: TypeAlias = Literal["raise", "return"]
"""What becomes of an example that fails: its batch fails of it, or its result says so."""

logger = logging.getLogger(__name__)

_BATCHING: Final = frozenset(
    {
        "min_batch_size",
        "max_batch_size",
        "max_batch_duration_secs",
        "batch_length_fn",
        "batch_bucket_boundaries",
        "large_model",
        "model_copies",
        "env_vars",
    }
)

_NAMESPACE: Final = "RunInference"


def model_id_of(served: Served) -> str:
    """Return what served a request: the model, with version and branch where there were any."""
    model = served.model.removeprefix("models/")
    version = f"@{served.version}" if served.version else ""
    branch = f" ({served.branch})" if served.branch else ""
    return f"{model}{version}{branch}"


class YardHandler(ModelHandler):  # type: ignore[misc]  # Beam's classes are not looked at.
    """A handler that asks a yard for predictions; see the classes that are one."""

    def __init__(
        self,
        *,
        encoder: Encoder | None = None,
        decoder: Decoder | None = None,
        on_error: OnError = "raise",
        timeout_s: float = 120.0,
        max_retries: int = 4,
        max_rows_per_request: int = 64,
        max_items_per_call: int = 1024,
        **batching: Any,
    ) -> None:
        if unknown := sorted(batching.keys() - _BATCHING):
            raise TypeError(
                f"{type(self).__name__} has no argument {unknown[0]!r}; of a ModelHandler's it "
                f"takes {', '.join(sorted(_BATCHING))}"
            )
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error is {on_error!r}: 'raise' or 'return'")
        super().__init__(**batching)
        self._encoder = encoder or encode_row
        self._decoder = decoder
        self._on_error = on_error
        self._asking = AskingSettings(
            timeout_s=timeout_s,
            max_retries=max_retries,
            max_items=max_items_per_call,
            max_rows=max_rows_per_request,
        )

    # --- What Beam asks for -------------------------------------------------------------------

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        """Return the bytes of a batch's texts, arrays and tensors."""
        return sum(map(size_of, batch))

    def get_metrics_namespace(self) -> str:
        """Return the namespace of the step's metrics."""
        return _NAMESPACE

    def validate_inference_args(self, inference_args: Mapping[str, Any] | None) -> None:
        """Refuse arguments that cannot be sent as the parameters of a run.

        Raises:
            TypeError: no mapping of texts to JSON values.
            ValueError: a number that JSON does not have.
        """
        if inference_args:
            struct_from(inference_args, "inference_args")

    def set_environment_vars(self) -> None:
        """Set the variables that were given as ``env_vars``, as texts."""
        os.environ.update({name: str(value) for name, value in self._env_vars.items()})

    # --- From a batch to its results ----------------------------------------------------------

    def _results(
        self,
        examples: Sequence[Any],
        keys: Sequence[str | ModelyardError],
        asked: Callable[[list[BatchItem], AskingSettings], tuple[Sequence[Any], Figures]],
        inference_args: Mapping[str, Any] | None,
        affinities: Sequence[str | None] | None = None,
        version: str | None = None,
    ) -> list[Any]:
        """Results in the order of the examples.

        Args:
            examples: without their keys.
            keys: what to ask for with each, or why there is nothing to ask for.
            asked: asks; see `ask_for_rows`.
            inference_args: parameters of every run.
            affinities: what routes' choices go by, for each example; None: nothing is said.
            version: which version of what keys mean.

        Raises:
            ModelyardError: of the first example that failed, unless errors are to be returned.
        """
        outcomes: list[Any] = [None] * len(examples)
        items: list[BatchItem] = []
        positions: list[int] = []
        for position, (example, key) in enumerate(zip(examples, keys, strict=True)):
            if isinstance(key, ModelyardError):
                outcomes[position] = key
                continue
            try:
                inputs = self._encoder(example)
            except (TypeError, ValueError) as error:
                outcomes[position] = _refused(error)
                continue
            items.append(
                BatchItem(
                    key=key,
                    inputs=inputs,
                    parameters=inference_args or None,
                    affinity=None if affinities is None else affinities[position],
                    version=version,
                )
            )
            positions.append(position)
        figures = Figures()
        if items:
            answers, figures = asked(items, self._asking)
            for position, answer in zip(positions, answers, strict=True):
                outcomes[position] = answer
        results = [
            self._result(example, outcome)
            for example, outcome in zip(examples, outcomes, strict=True)
        ]
        failures = [result.inference for result in results if is_error(result)]
        self._count(outcomes, len(failures), figures)
        if failures and self._on_error == "raise":
            # No note is added to it: the last line of an error is all that Beam shows.
            logger.warning("%d of %d examples of a batch failed", len(failures), len(examples))
            first: ModelyardError = failures[0]
            raise first
        return results

    def _result(self, example: Any, outcome: Prediction | ModelyardError) -> Any:
        if isinstance(outcome, ModelyardError):
            return PredictionResult(example, outcome)
        model_id = model_id_of(outcome.served)
        try:
            if self._decoder is None:
                inference = decode_rows(outcome, as_torch=is_torch(example))
            else:
                inference = self._decoder(outcome)
        except (TypeError, ValueError) as error:
            return PredictionResult(example, _refused(error), model_id)
        return PredictionResult(example, inference, model_id)

    def _count(self, outcomes: Iterable[object], failure_count: int, figures: Figures) -> None:
        """Tells Beam's metrics what its own do not have."""
        served = [outcome.served for outcome in outcomes if isinstance(outcome, Prediction)]
        cold = sum(1 for one in served if one.cold)
        counts = {
            "yard_hits": len(served) - cold,
            "yard_cold": cold,
            "yard_failed_items": failure_count,
            "yard_retried_items": figures.retried_count,
            "yard_calls": figures.call_count,
        }
        namespace = self.get_metrics_namespace()
        for name, count in counts.items():
            if count:
                Metrics.counter(namespace, name).inc(count)


def is_error(result: Any) -> bool:
    """Return whether a result says why there is no prediction; see ``on_error``.

    Args:
        result: a ``PredictionResult``, or a pair of a key and one.
    """
    if not isinstance(result, PredictionResult):
        _, result = result
    return isinstance(result.inference, ModelyardError)


def _refused(error: Exception) -> InvalidRequest:
    return InvalidRequest(str(error), code=grpc.StatusCode.INVALID_ARGUMENT)
