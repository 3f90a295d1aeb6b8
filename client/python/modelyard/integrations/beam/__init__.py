"""Handlers for Apache Beam's ``RunInference`` whose models are served by a yard.

::

    from modelyard.integrations.beam import KeyedServerModelHandler

    predictions = keyed_examples | RunInference(KeyedServerModelHandler("yard:8470"))

``ServerModelHandler`` and ``KeyedServerModelHandler`` call a modelyard server; they need the client
alone. ``YardModelHandler`` and ``KeyedModelHandler`` run a yard inside the worker, in place of
Beam's own handlers: models of all steps share budgets in bytes, and what does not fit is swapped.
They need the package ``modelyard_server`` too, where pipelines are built and in workers.

Importing this module imports Beam.
"""

from __future__ import annotations

from modelyard.integrations.beam._base import OnError, YardHandler, is_error, model_id_of
from modelyard.integrations.beam._embedded import (
    KeyedModelHandler,
    KeyModelUpdate,
    YardModelHandler,
)
from modelyard.integrations.beam._rows import Decoder, Encoder, decode_rows, encode_row
from modelyard.integrations.beam._server import KeyedServerModelHandler, ServerModelHandler
from modelyard.integrations.beam._yard import EmbeddedYard, RunningYard, YardModel

# Behind the base module, which says what to do if Beam is not there.
from apache_beam.ml.inference.base import (  # isort: skip
    KeyModelMapping,
    KeyModelPathMapping,
    PredictionResult,
)

__all__ = [
    "Decoder",
    "EmbeddedYard",
    "Encoder",
    "KeyModelMapping",
    "KeyModelPathMapping",
    "KeyModelUpdate",
    "KeyedModelHandler",
    "KeyedServerModelHandler",
    "OnError",
    "PredictionResult",
    "RunningYard",
    "ServerModelHandler",
    "YardHandler",
    "YardModel",
    "YardModelHandler",
    "decode_rows",
    "encode_row",
    "is_error",
    "model_id_of",
]
