"""What components read out of a prediction, and the error for a model that answers otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelyard.devices import Device
from modelyard.prediction import Prediction, Served

__all__ = ["UnsuitableModel", "embeddings_of", "figures_of", "meta_of", "texts_of"]


class UnsuitableModel(Exception):
    """The model that a key means does not answer with what the component needs.

    Attributes:
        key: the component's key.
        model: resource name of the model that answered.
        outputs: names of its outputs.
    """

    def __init__(self, key: str, model: str, outputs: Sequence[str], needed: str) -> None:
        found = ", ".join(map(repr, outputs)) or "nothing"
        super().__init__(
            f"key {key!r} means {model}, which answers with {found}; the component needs {needed}"
        )
        self.key = key
        self.model = model
        self.outputs = tuple(outputs)
        self._needed = needed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.model, self.outputs, self._needed)


def embeddings_of(prediction: Prediction, key: str, rows: int) -> NDArray[Any]:
    """Return the vectors of texts, shape [rows, dimensions]. Raises ``UnsuitableModel``."""
    needed = f"'embedding', one vector for each of {rows} texts (task feature-extraction)"
    vectors = _output(prediction, "embedding", key, needed)
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or len(vectors) != rows:
        raise UnsuitableModel(key, prediction.served.model, tuple(prediction), needed)
    return vectors


def texts_of(prediction: Prediction, name: str, key: str, rows: int, task: str) -> list[str]:
    """Return an output of texts, one a row. Raises ``UnsuitableModel``."""
    needed = f"{name!r}, a text for each of {rows} texts (task {task})"
    values = np.asarray(_output(prediction, name, key, needed)).reshape(-1).tolist()
    if len(values) != rows or not all(isinstance(value, str) for value in values):
        raise UnsuitableModel(key, prediction.served.model, tuple(prediction), needed)
    return values


def figures_of(prediction: Prediction, name: str, key: str, rows: int, task: str) -> list[Any]:
    """Return an output of numbers, one a row. Raises ``UnsuitableModel``."""
    needed = f"{name!r}, a number for each of {rows} texts (task {task})"
    values = _output(prediction, name, key, needed)
    if (
        not isinstance(values, np.ndarray)
        or values.shape != (rows,)
        or not np.issubdtype(values.dtype, np.number)
    ):
        raise UnsuitableModel(key, prediction.served.model, tuple(prediction), needed)
    figures: list[Any] = values.tolist()
    return figures


def meta_of(served: Sequence[Served], key: str) -> dict[str, Any]:
    """Return what served some requests: key, model, device, and whether any waited for a load.

    Only the key if there were none.
    """
    meta: dict[str, Any] = {"key": key}
    if served:
        meta |= {
            "model": served[-1].model.removeprefix("models/"),
            "device": _device_text(served[-1].device),
            "cold": any(each.cold for each in served),
        }
    return meta


def _device_text(name: str) -> str:
    identity = name.removeprefix("devices/")
    try:
        return str(Device.from_str(identity.replace("-", ":")))
    except ValueError:
        # A kind of device that this version does not know.
        return identity


def _output(prediction: Prediction, name: str, key: str, needed: str) -> object:
    if name not in prediction:
        raise UnsuitableModel(key, prediction.served.model, tuple(prediction), needed)
    return prediction[name]
