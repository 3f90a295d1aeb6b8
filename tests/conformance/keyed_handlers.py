"""Real Beam handlers for the keyed operations: yards in this process, real models, real pipelines.

Importing this imports Beam.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from apache_beam.ml.inference.base import MaybeKeyedModelHandler
from tests.support import faulty_models
from tests.support.beam_pipelines import run_pipeline

from modelyard.integrations.beam import (
    EmbeddedYard,
    KeyedModelHandler,
    KeyModelMapping,
    PredictionResult,
    YardModel,
    YardModelHandler,
)

__all__ = [
    "batch_settings",
    "copies_in_a_mapping",
    "defaults",
    "function_order",
    "keyed_and_unkeyed",
    "keyed_answers",
    "preprocessing_in_a_mapping",
    "result_fields",
]

_NOTHING = YardModel(runtime="identity")
"""A model for what never runs one."""

_STEP = 1000.0
"""What model number i adds, times i."""


@contextmanager
def _yard() -> Iterator[tuple[EmbeddedYard, Path]]:
    """A yard of its own, and a folder for its models."""
    with tempfile.TemporaryDirectory() as folder:
        # Of its own, because it is named after the folder.
        yard = EmbeddedYard(budgets={"cpu": "64MB"}, name=folder)
        try:
            yield yard, Path(folder)
        finally:
            assert yard.stop(), "something still runs in the yard"


def _adder(base: Path, name: str, number: int) -> YardModel:
    """A model that adds 1000 times its number."""
    folder = faulty_models.make_weights(base / name, value=number * _STEP)
    return YardModel.torch(folder, faulty_models.factory("Adding"), name=name)


def _told(result: Any) -> str:
    """ "A:1": which model answered, and to what."""
    return f"{result.model_id.upper()}:{float(result.inference) % _STEP:g}"


def copies_in_a_mapping(count: int) -> int:
    """How many copies a keyed handler has whose mapping's handler wants some."""
    handler = YardModelHandler(_NOTHING, model_copies=count)
    return KeyedModelHandler([KeyModelMapping(["a"], handler)]).model_copies()


def preprocessing_in_a_mapping() -> str:
    """Makes a keyed handler of one with a preprocessing function."""
    handler = YardModelHandler(_NOTHING).with_preprocess_fn(str)
    return repr(KeyedModelHandler([KeyModelMapping(["a"], handler)]))


def _with_name(text: str, name: str) -> str:
    return f"{text}{name} "


def _result_with_name(result: Any, name: str) -> Any:
    return result._replace(inference=_with_name(result.inference, name))


def function_order(pre: Sequence[str], post: Sequence[str]) -> dict[str, list[str]]:
    """Names of functions in the order in which a pipeline calls them.

    Args:
        pre: of preprocessing functions, as they are added.
        post: of postprocessing functions.
    """
    with _yard() as (yard, _):
        handler: Any = YardModelHandler(_NOTHING, yard)
        for name in pre:
            handler = handler.with_preprocess_fn(partial(_with_name, name=name))
        for name in post:
            handler = handler.with_postprocess_fn(partial(_result_with_name, name=name))
        (result,), _ = run_pipeline(["|"], handler)
    before, after = result.inference[len("|") :].split(), result.example[len("|") :].split()
    # What the model was given is its example, and what it gave went through the rest.
    return {"pre": after, "post": before[len(after) :]}


def batch_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What Beam is told of batches by a keyed handler whose mapping's handler has settings."""
    handler = YardModelHandler(_NOTHING, **given)
    keyed = KeyedModelHandler([KeyModelMapping(["a"], handler)])
    return dict(keyed.batch_elements_kwargs())


def defaults() -> dict[str, Any]:
    """What handlers say of themselves that were told nothing."""
    plain = YardModelHandler(_NOTHING)
    keyed = KeyedModelHandler([KeyModelMapping(["a"], plain)])
    return {
        "ns": plain.get_metrics_namespace(),
        "keyed_ns": keyed.get_metrics_namespace(),
        "copies": plain.model_copies(),
        "share": plain.share_model_across_processes(),
        "share_large": YardModelHandler(_NOTHING, large_model=True).share_model_across_processes(),
        "share_copies": YardModelHandler(_NOTHING, model_copies=1).share_model_across_processes(),
    }


def result_fields(example: Any, inference: Any) -> dict[str, Any]:
    """The fields of what handlers answer with, given all but the last of them."""
    with _yard() as (yard, _):
        handler = YardModelHandler(_NOTHING, yard)
        (result,) = handler.run_inference(["x"], handler.load_model())
    if type(result) is not PredictionResult or result != ("x", "x", _NOTHING.id):
        raise RuntimeError(f"the handler answered {result!r}")
    fields: dict[str, Any] = type(result)(example, inference)._asdict()
    return fields


def keyed_and_unkeyed(items: Sequence[tuple[str, float]]) -> list[list[Any]]:
    """What a model answers that may be asked with keys and without: with them, then without."""
    with _yard() as (yard, base):
        handler = MaybeKeyedModelHandler(YardModelHandler(_adder(base, "a", 1), yard))
        model = handler.load_model()
        arrays = [(key, np.float32(value)) for key, value in items]
        keyed = list(handler.run_inference(arrays, model))
        unkeyed = list(handler.run_inference([array for _, array in arrays], model))
    return [[[key, _told(result)] for key, result in keyed], [_told(one) for one in unkeyed]]


def keyed_answers(
    cohorts: Mapping[str, Sequence[str]], items: Sequence[tuple[str, float]]
) -> list[list[str]]:
    """What a keyed handler answers to a batch: for each item its key, and by which model to what.

    Args:
        cohorts: keys by the name of their model.
        items: key and input.
    """
    with _yard() as (yard, base):
        handler = KeyedModelHandler(
            [
                KeyModelMapping(list(keys), _adder(base, name, number))
                for number, (name, keys) in enumerate(cohorts.items(), start=1)
            ],
            yard=yard,
            on_error="return",
        )
        batch = [(key, np.float32(value)) for key, value in items]
        results = handler.run_inference(batch, handler.load_model())
    return [
        [key, _told(result) if result.model_id else str(result.inference.reason)]
        for key, result in results
    ]
