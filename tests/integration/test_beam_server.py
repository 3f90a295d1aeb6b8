"""Beam handlers that call a server, against a real one: order, keys, errors, settings, pickling."""

from __future__ import annotations

import asyncio
import pickle
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, model_table
from tests.support.server import running_app
from tests.support.tiny_models import MLP_FACTORY, TinyMlp, make_tiny_masked_lm, make_tiny_mlp

from modelyard import Client, InvalidRequest, KeyNotFound, ModelFailed

pytest.importorskip("apache_beam")

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from tests.support.beam_pipelines import (
    COLLECTED,
    collect,
    metrics_of,
    own_temporary_folder,
    run_pipeline,
)

from modelyard.integrations.beam import (
    KeyedServerModelHandler,
    PredictionResult,
    ServerModelHandler,
    is_error,
)

_STEP = 1000.0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on a thread of its own: pipelines block theirs."""
    base = tmp_path_factory.mktemp("beam")
    config = CPU + ROOTS + ALLOWED
    for number, name in enumerate("abc", start=1):
        faulty_models.make_weights(base / "store" / name, value=number * _STEP)
        config += model_table(name, "torch", options={"factory": faulty_models.factory("Adding")})
    faulty_models.make_weights(base / "store" / "raising")
    config += model_table(
        "raising",
        "torch",
        options={
            "factory": faulty_models.factory("Raising"),
            "factory_options": {"kind": "ValueError"},
        },
    )
    faulty_models.make_weights(base / "store" / "dropping", value=7)
    config += model_table(
        "dropping", "torch", options={"factory": faulty_models.factory("Dropping")}
    )
    make_tiny_mlp(base / "store" / "mlp", seed=1)
    config += model_table("mlp", "torch", options={"factory": MLP_FACTORY})
    make_tiny_masked_lm(base / "store" / "words", seed=1)
    config += model_table("words", "transformers", task="fill-mask")
    started: queue.Queue[str] = queue.Queue()
    stop = threading.Event()

    async def serve() -> None:
        async with running_app(config, base) as yard:
            started.put(yard.target)
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield started.get(timeout=60)
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def one(value: float) -> Any:
    return np.array([value], np.float32)


def test_a_pipeline_of_tensors_gets_the_model_s_own_answers(target: str, tmp_path: Path) -> None:
    examples = [torch.full((8,), float(value)) for value in range(5)]
    handler = ServerModelHandler("mlp", target, min_batch_size=5, max_batch_size=5)
    results, run = run_pipeline(examples, handler)
    module = TinyMlp()
    make_tiny_mlp(tmp_path, seed=1)
    module.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for example, result in zip(examples, results, strict=True):
        assert type(result) is PredictionResult
        assert torch.equal(result.example, example)
        assert isinstance(result.inference, torch.Tensor)
        assert torch.allclose(result.inference, module(example[None])[0], atol=1e-5)
        assert result.model_id == "mlp"
    metrics = metrics_of(run)
    assert metrics["RunInference/num_inferences"] == 5
    # Items of one call, which found the model cold together or one after the other.
    assert metrics["RunInference/yard_calls"] == 1
    assert metrics["RunInference/yard_cold"] + metrics.get("RunInference/yard_hits", 0) == 5


def test_a_batch_mixes_keys_and_keeps_its_order(target: str) -> None:
    keys = ["a", "b", "c"] * 10
    elements = [(key, one(position)) for position, key in enumerate(keys)]
    handler = KeyedServerModelHandler(target, min_batch_size=30, max_batch_size=30)
    results, run = run_pipeline(elements, handler)
    assert [key for key, _ in results] == keys
    for position, (key, result) in enumerate(results):
        assert result.inference == position + _STEP * ("abc".index(key) + 1)
        assert result.model_id == key
    metrics = metrics_of(run)
    assert metrics["RunInference/yard_calls"] == 1
    assert metrics["RunInference/num_inferences"] == 30


def test_a_failure_leaves_its_neighbours_alone_where_errors_are_returned(target: str) -> None:
    handler = KeyedServerModelHandler(target, on_error="return")
    batch = [("a", one(1)), ("nobody", one(2)), ("raising", one(3)), ("b", [4.0]), ("b", one(5))]
    results = handler.run_inference(batch, handler.load_model())
    assert [key for key, _ in results] == ["a", "nobody", "raising", "b", "b"]
    assert [is_error(result) for result in results] == [False, True, True, True, False]
    kinds = [type(result.inference) for _, result in results]
    assert kinds[1:4] == [KeyNotFound, ModelFailed, InvalidRequest]
    assert [result.model_id for _, result in results] == ["a", None, None, None, "b"]
    # Results cross from worker to worker.
    again = pickle.loads(pickle.dumps(results[1][1].inference))
    assert (type(again), again.reason) == (KeyNotFound, "KEY_NOT_FOUND")


def test_a_failure_fails_its_batch_where_errors_are_raised(
    target: str, caplog: pytest.LogCaptureFixture
) -> None:
    handler = KeyedServerModelHandler(target)
    with pytest.raises(KeyNotFound, match="nobody"):
        handler.run_inference(
            [("a", one(1)), ("nobody", one(2)), ("c", one(3))], handler.load_model()
        )
    assert "1 of 3 examples of a batch failed" in caplog.text


def test_rows_that_a_model_loses_are_asked_for_alone(target: str) -> None:
    """Beam's own handlers cut such an answer silently: the rest of the examples is gone."""
    handler = ServerModelHandler("dropping", target)
    results = handler.run_inference([one(value) for value in range(5)], handler.load_model())
    assert [float(result.inference[0]) for result in results] == [7, 8, 9, 10, 11]


def test_arguments_of_the_inference_are_parameters_of_the_run(target: str) -> None:
    handler = ServerModelHandler("words", target)
    model = handler.load_model()
    texts = ["the cat [MASK] on the mat", "a big [MASK]"]
    three = handler.run_inference(texts, model, {"top_k": 3})
    assert [len(result.inference["token"]) for result in three] == [3, 3]
    with pytest.raises(InvalidRequest, match="tpo_k"):
        handler.run_inference(texts, model, {"tpo_k": 3})
    handler.validate_inference_args(None)
    handler.validate_inference_args({"top_k": 3})
    with pytest.raises(TypeError, match="inference_args"):
        handler.validate_inference_args({"top_k": object()})


def test_handlers_travel_and_connect_where_they_arrive(target: str) -> None:
    handler = KeyedServerModelHandler(target, key_of=_letter, on_error="return")
    there = pickle.loads(pickle.dumps(handler))
    ((key, result),) = there.run_inference([(7, one(1))], there.load_model())
    assert (key, result.inference, result.model_id) == (7, 1 + _STEP, "a")
    own = ServerModelHandler("b", client=_Connect(target), encoder=one, decoder=_rounded)
    own = pickle.loads(pickle.dumps(own))
    (result,) = own.run_inference([2.0], own.load_model())
    assert (result.example, result.inference) == (2.0, 2002)


def _letter(key: int) -> str:
    return "a" if key == 7 else "b"


def _rounded(prediction: Any) -> int:
    return round(float(prediction.only[0]))


class _Connect:
    """Makes a client; picklable."""

    def __init__(self, target: str) -> None:
        self._target = target

    def __call__(self) -> Client:
        return Client(self._target)


def test_batches_that_somebody_else_made_are_taken_as_they_are(target: str) -> None:
    handler = ServerModelHandler("a", target).with_no_batching()
    assert handler.should_skip_batching()
    results, _ = run_pipeline([[one(1), one(2)], [one(3)]], handler)
    assert [float(result.inference[0]) for result in results] == [1001, 1002, 1003]


def test_failed_batches_go_where_the_pipeline_sends_them(target: str) -> None:
    """Beam's own way with failures sees typed errors, and its unit is the batch."""
    handler = KeyedServerModelHandler(target, max_batch_size=1, min_batch_size=1)
    COLLECTED.clear()
    with own_temporary_folder(), beam.Pipeline(runner="FnApiRunner") as pipeline:
        good, bad = (
            pipeline
            | beam.Create([("a", one(1)), ("nobody", one(2))], reshuffle=False)
            | RunInference(handler).with_exception_handling(threshold=1)
        )
        _ = good | "good" >> beam.Map(collect)
        _ = bad.failed_inferences | "bad" >> beam.Map(collect)
    told = {key: result for key, result in COLLECTED if isinstance(key, str)}
    assert list(told) == ["a"]
    ((batch, (kind, *_)),) = [found for found in COLLECTED if not isinstance(found[0], str)]
    assert (batch[0][0], kind) == ("nobody", KeyNotFound)


def test_what_handlers_tell_beam() -> None:
    handler = ServerModelHandler(
        "a", min_batch_size=2, max_batch_size=9, max_batch_duration_secs=3, batch_length_fn=len
    )
    assert handler.batch_elements_kwargs() == {
        "min_batch_size": 2,
        "max_batch_size": 9,
        "max_batch_duration_secs": 3,
        "length_fn": len,
    }
    assert handler.get_metrics_namespace() == "RunInference"
    assert handler.get_num_bytes([torch.zeros(3), "abc", {"x": np.zeros(2, np.uint8)}]) == 18
    assert KeyedServerModelHandler().get_num_bytes([("key", np.zeros(5, np.uint8))]) == 8


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_batchsize": 3}, "no argument 'max_batchsize'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"timeout_s": -1}, "timeout_s is -1"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"max_items_per_call": 2000}, "max_items is 2000"),
        ({"max_rows_per_request": 0}, "max_rows is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        ServerModelHandler("a", **settings)
    with pytest.raises(TypeError, match="key must be a str"):
        ServerModelHandler(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("element", ["a", ("a", 1, 2), ["a", 1]])
def test_elements_without_a_key_are_refused(element: object) -> None:
    handler = KeyedServerModelHandler()
    with pytest.raises(TypeError, match=r"must be pairs \(key, example\)"):
        handler.run_inference([element], None)  # type: ignore[list-item,arg-type]


def test_keys_that_are_no_text_are_refused_with_a_way_out() -> None:
    handler = KeyedServerModelHandler()
    with pytest.raises(TypeError, match="int 7: give key_of"):
        handler.run_inference([(7, "x")], None)  # type: ignore[arg-type]
