"""Predict's request and answer: what ``Client`` and ``AsyncClient`` have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from google.protobuf.duration_pb2 import Duration

from modelyard._status import error_from_item
from modelyard._struct_messages import struct_from
from modelyard.errors import ModelyardError
from modelyard.prediction import BatchItem, Inputs, Prediction, Served
from modelyard.tensors import InputValue, TensorError, TensorValue, from_tensor, to_tensor
from modelyard.v1 import inference_service_pb2

__all__ = [
    "BatchItems",
    "Inputs",
    "batch_request",
    "item_request",
    "predict_request",
    "prediction_from",
    "result_from",
    "results_from",
    "seconds_from",
    "served_from",
]

BatchItems: TypeAlias = Iterable[BatchItem | tuple[str, Inputs]]
"""What ``predict_batch`` and streams take."""


def predict_request(
    key: str,
    inputs: Inputs,
    parameters: Mapping[str, object] | None,
    affinity: str | None = None,
    version: str | None = None,
) -> inference_service_pb2.PredictRequest:
    """Return the message of a prediction.

    Raises:
        TypeError: an argument of a type that cannot be sent.
        ValueError: an argument of the right type that cannot be sent.
    """
    if not isinstance(key, str):
        raise TypeError(f"key must be a str, got {type(key).__name__}")
    named: Mapping[str, InputValue]
    if isinstance(inputs, Mapping):
        if not inputs:
            raise ValueError("inputs is empty: a prediction needs at least one input")
        named = inputs
    else:
        named = {"": inputs}
    request = inference_service_pb2.PredictRequest(
        key=key, inputs=[to_tensor(value, name) for name, value in named.items()]
    )
    if parameters is not None:
        request.parameters.CopyFrom(struct_from(parameters, "parameters"))
    if affinity is not None:
        request.affinity = _checked_text(affinity, "affinity")
    if version is not None:
        request.version = _checked_text(version, "version")
    return request


def _checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str or None, got {type(value).__name__}")
    return value


def prediction_from(response: inference_service_pb2.PredictResponse) -> Prediction:
    """Return what an answer says.

    Raises:
        ValueError: the answer breaks the contract.
    """
    outputs: dict[str, TensorValue] = {}
    for tensor in response.outputs:
        if tensor.name in outputs:
            raise TensorError(f"two outputs have the name {tensor.name!r}")
        outputs[tensor.name] = from_tensor(tensor)
    return Prediction(outputs, served_from(response.served))


def served_from(served: inference_service_pb2.Served) -> Served:
    """Return what an answer says of how it came about."""
    return Served(
        model=served.model,
        device=served.device,
        cold=served.cold,
        wait_s=seconds_from(served.wait_duration),
        load_s=seconds_from(served.load_duration) if served.HasField("load_duration") else None,
        run_s=seconds_from(served.run_duration),
        route=served.route,
        branch=served.branch,
        version=served.version,
        steps=tuple(map(served_from, served.steps)),
    )


def batch_request(items: BatchItems) -> inference_service_pb2.PredictBatchRequest:
    """Return the message of a batch.

    Raises:
        TypeError, ValueError: as ``predict_request``, for the item that the text names.
    """
    if isinstance(items, str | bytes | Mapping | BatchItem) or not isinstance(items, Iterable):
        raise TypeError(f"items must be a list of BatchItem, got {type(items).__name__}")
    request = inference_service_pb2.PredictBatchRequest()
    for position, item in enumerate(items):
        try:
            request.items.append(item_request(item))
        except TypeError as error:
            raise TypeError(f"items[{position}]: {error}") from error
        except ValueError as error:
            raise ValueError(f"items[{position}]: {error}") from error
    if not request.items:
        raise ValueError("items is empty: a batch needs at least one")
    return request


def item_request(item: object) -> inference_service_pb2.PredictRequest:
    """Return the message of an item.

    Raises:
        TypeError, ValueError: as ``predict_request``, or it is no item.
    """
    if isinstance(item, BatchItem):
        return predict_request(item.key, item.inputs, item.parameters, item.affinity, item.version)
    if isinstance(item, tuple) and len(item) == 2:
        return predict_request(*item, None)
    raise TypeError(f"must be a BatchItem or (key, inputs), got {type(item).__name__}")


def results_from(
    response: inference_service_pb2.PredictBatchResponse, count: int
) -> list[Prediction | ModelyardError]:
    """Return what became of each item.

    Args:
        response: the answer to a batch.
        count: of its items.

    Raises:
        ValueError: the answer breaks the contract.
    """
    if len(response.results) != count:
        raise ValueError(f"{len(response.results)} results for {count} items")
    return [result_from(result) for result in response.results]


def result_from(
    result: inference_service_pb2.PredictBatchResult | inference_service_pb2.PredictStreamResult,
) -> Prediction | ModelyardError:
    """Return what became of one item. Raises ``ValueError`` as ``results_from``."""
    match result.WhichOneof("result"):
        case "response":
            return prediction_from(result.response)
        case "error":
            return error_from_item(result.error)
        case _:
            raise ValueError("an item has neither an answer nor an error")


def seconds_from(duration: Duration) -> float:
    """Return a duration in seconds."""
    return duration.seconds + duration.nanos / 1e9
