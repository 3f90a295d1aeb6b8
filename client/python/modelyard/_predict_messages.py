"""Predict's request and answer: what ``Client`` and ``AsyncClient`` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from google.protobuf.duration_pb2 import Duration

from modelyard._struct_messages import struct_from
from modelyard.prediction import Prediction, Served
from modelyard.tensors import InputValue, TensorError, TensorValue, from_tensor, to_tensor
from modelyard.v1 import inference_service_pb2

__all__ = ["Inputs", "predict_request", "prediction_from", "seconds_from"]

Inputs: TypeAlias = InputValue | Mapping[str, InputValue]
"""One unnamed input, or inputs by name."""


def predict_request(
    key: str, inputs: Inputs, parameters: Mapping[str, object] | None
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
    return request


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
    served = response.served
    return Prediction(
        outputs,
        Served(
            model=served.model,
            device=served.device,
            cold=served.cold,
            wait_s=seconds_from(served.wait_duration),
            load_s=(
                seconds_from(served.load_duration) if served.HasField("load_duration") else None
            ),
            run_s=seconds_from(served.run_duration),
        ),
    )


def seconds_from(duration: Duration) -> float:
    """Return a duration in seconds."""
    return duration.seconds + duration.nanos / 1e9
