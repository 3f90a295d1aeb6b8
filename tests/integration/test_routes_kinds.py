"""Routes of every kind on a live server: what answers, what that says of itself, and what fails."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, ROOTS, device_table, model_table
from tests.support.server import RunningApp, eventually, running_app

from modelyard.v1 import (
    inference_service_pb2,
    inference_service_pb2_grpc,
    residency_service_pb2,
    residency_service_pb2_grpc,
    route_pb2,
    route_service_pb2,
    route_service_pb2_grpc,
    tensor_pb2,
)
from modelyard_server.routing import transforms
from modelyard_server.routing.affinity import choose

MIB = 1 << 20
ROWS = MIB // 4
VALUES = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0}
X = np.zeros(3, np.float32)

pytestmark = pytest.mark.asyncio


def config_of(base: Path, *, budget_mib: float = 64, queue: int = 1000) -> str:
    """Models a to d of 1 MiB each, which add 1, 2, 4 and 8; echo; one that raises, one that is
    not there, one too large."""
    config = f"[yard]\nmax_waiting = {queue}\n" + ROOTS + ALLOWED
    config += device_table("cpu", int(budget_mib * MIB))
    for name, value in VALUES.items():
        faulty_models.make_weights(base / "store" / name, value=value, rows=ROWS)
        config += torch_model(name, "Adding", rows=ROWS)
    faulty_models.make_weights(base / "store" / "raising")
    faulty_models.make_weights(base / "store" / "broken")
    (base / "store" / "broken" / "model.safetensors").write_bytes(b"no weights")
    config += torch_model("raising", "Raising", kind="ValueError")
    return config + model_table("echo", "identity")


def torch_model(name: str, factory: str, **settings: object) -> str:
    options = {"factory": faulty_models.factory(factory), "factory_options": settings}
    return model_table(name, "torch", options=options)


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[RunningApp]:
    async with running_app(config_of(tmp_path), tmp_path) as made:
        yield made


def routes(yard: RunningApp) -> Any:
    return route_service_pb2_grpc.RouteServiceStub(yard.channel)


async def make(yard: RunningApp, name: str, target: dict[str, Any], **fields: Any) -> Any:
    """Makes a route whose key is "key-" and its name, of a target as JSON."""
    message = json_format.ParseDict(
        {"keys": [f"key-{name}"], **target, **fields}, route_pb2.Route()
    )
    request = route_service_pb2.CreateRouteRequest(route_id=name, route=message)
    return (await routes(yard).CreateRoute(request, timeout=20)).route


async def ask(
    yard: RunningApp,
    key: str,
    *,
    affinity: str = "",
    version: str = "",
    x: Any = X,
    timeout_s: float = 20,
    **inputs: list[str],
) -> inference_service_pb2.PredictResponse:
    request = inference_service_pb2.PredictRequest(key=key, affinity=affinity, version=version)
    if inputs:
        for name, values in inputs.items():
            tensor = request.inputs.add(name=name, data_type="DATA_TYPE_TEXT", shape=[len(values)])
            tensor.text.values.extend(values)
    else:
        array = np.asarray(x, np.float32)
        request.inputs.add(
            data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=array.shape, raw=array.tobytes()
        )
    stub = inference_service_pb2_grpc.InferenceServiceStub(yard.channel)
    return await stub.Predict(request, timeout=timeout_s)


def added(response: inference_service_pb2.PredictResponse) -> float:
    return float(np.frombuffer(response.outputs[0].raw, np.float32)[0])


def refused(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """Reason and text of a refusal."""
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason, error.details() or ""
    raise AssertionError("an error without ErrorInfo")


async def refusal(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refused(caught.value)


async def load_counts(yard: RunningApp) -> dict[str, int]:
    stub = residency_service_pb2_grpc.ResidencyServiceStub(yard.channel)
    found = await stub.ListResidencies(residency_service_pb2.ListResidenciesRequest())
    return {each.model.removeprefix("models/"): each.load_count for each in found.residencies}


# --- Splits ---------------------------------------------------------------------------------------

SPLIT = {
    "split": {
        "branches": [
            {"name": "old", "target": "models/a", "weight": 75},
            {"name": "new", "target": "models/b", "weight": 25},
        ]
    }
}


async def test_a_split_answers_by_affinity_and_says_so(yard: RunningApp) -> None:
    await make(yard, "exp", SPLIT)
    for i in range(200):
        answer = await ask(yard, "key-exp", affinity=f"u{i}")
        branch = choose("exp", [("old", 75.0), ("new", 25.0)], f"u{i}")
        assert answer.served.branch == ("old", "new")[branch]
        assert added(answer) == (1.0, 2.0)[branch]
        assert answer.served.route == "routes/exp"
        assert answer.served.model == ("models/a", "models/b")[branch]
        assert not answer.served.steps


async def test_requests_without_affinity_are_spread(yard: RunningApp) -> None:
    await make(yard, "exp", SPLIT)
    counts = Counter([(await ask(yard, "key-exp")).served.branch for _ in range(400)])
    assert 250 <= counts["old"] <= 350, "six standard deviations to either side"


async def test_a_split_in_a_batch(yard: RunningApp) -> None:
    await make(yard, "exp", SPLIT)
    x = np.zeros(1, np.float32)
    items = [
        inference_service_pb2.PredictRequest(
            key="key-exp" if i % 3 else "c",
            affinity=f"u{i}",
            inputs=[
                tensor_pb2.Tensor(
                    data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1], raw=x.tobytes()
                )
            ],
        )
        for i in range(60)
    ]
    items.append(inference_service_pb2.PredictRequest(key="key-exp", version="v1"))
    stub = inference_service_pb2_grpc.InferenceServiceStub(yard.channel)
    answer = await stub.PredictBatch(inference_service_pb2.PredictBatchRequest(items=items))
    for i, result in enumerate(answer.results[:60]):
        if i % 3:
            branch = choose("exp", [("old", 75.0), ("new", 25.0)], f"u{i}")
            assert result.response.served.branch == ("old", "new")[branch]
        else:
            assert result.response.served.model == "models/c"
    assert answer.results[60].error.reason == 2  # INVALID_TENSOR: it has no inputs.


async def test_what_has_no_choice_takes_no_version_and_affinities_have_a_bound(
    yard: RunningApp,
) -> None:
    await make(yard, "exp", SPLIT)
    assert (await refusal(ask(yard, "a", version="v1")))[0] == "INVALID_FIELD"
    assert (await refusal(ask(yard, "key-exp", version="v1")))[0] == "INVALID_FIELD"
    reason, text = await refusal(ask(yard, "key-exp", affinity="x" * 257))
    assert reason == "INVALID_FIELD" and "256 bytes" in text
    assert added(await ask(yard, "a", affinity="anybody")) == 1.0


# --- Versions -------------------------------------------------------------------------------------


async def test_versions_switch_and_a_canary_is_promoted(yard: RunningApp) -> None:
    target = {
        "versions": {
            "versions": [
                {"name": "v1", "target": "models/a"},
                {"name": "v2", "target": "models/b"},
            ],
            "current": "stable",
            "aliases": {"stable": "v1"},
        }
    }
    await make(yard, "r", target)
    answer = await ask(yard, "key-r")
    assert (added(answer), answer.served.version) == (1.0, "v1")
    assert added(await ask(yard, "key-r", version="v2")) == 2.0
    assert added(await ask(yard, "key-r", version="stable")) == 1.0
    assert (await refusal(ask(yard, "key-r", version="v3")))[0] == "INVALID_FIELD"


# --- Sequences ------------------------------------------------------------------------------------


async def test_a_sequence_gives_each_step_what_the_one_before_answered(yard: RunningApp) -> None:
    target = {
        "sequence": {
            "steps": [
                {"name": "first", "target": "models/a"},
                {"target": "models/b", "rename": {"": "x"}},
                {"name": "last", "target": "models/c", "rename": {"": "x"}},
            ]
        }
    }
    await make(yard, "r", target)
    answer = await ask(yard, "key-r")
    assert added(answer) == 7.0
    assert [(step.model, step.branch) for step in answer.served.steps] == [
        ("models/a", "first"),
        ("models/b", "1"),
        ("models/c", "last"),
    ]
    assert answer.served.cold and answer.served.model == "models/c"
    again = await ask(yard, "key-r")
    assert not again.served.cold
    assert not again.served.HasField("load_duration")


async def test_steps_between_models(yard: RunningApp) -> None:
    target = {
        "sequence": {
            "steps": [
                {"target": "models/echo"},
                {"transform": {"name": "template", "parameters": {"template": "<{t}>"}}},
                {"target": "models/echo"},
                {
                    "transform": {
                        "name": "label_to_text",
                        "parameters": {"labels": {"<x>": "ex"}, "default": "?"},
                    }
                },
            ]
        }
    }
    await make(yard, "r", target)
    answer = await ask(yard, "key-r", t=["x", "y"])
    assert list(answer.outputs[0].text.values) == ["ex", "?"]
    reason, text = await refusal(ask(yard, "key-r"))
    assert reason == "INVALID_TENSOR" and "step '1'" in text and "there is no tensor 't'" in text


async def test_large_tensors_are_worked_on_beside_the_loop(
    yard: RunningApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []
    real = transforms.transformed

    def noted(*given: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return real(*given)

    monkeypatch.setattr("modelyard_server.services.routed.transformed", noted)
    steps = [{"target": "models/a"}, {"transform": {"name": "top_k", "parameters": {"k": 1}}}]
    await make(yard, "r", {"sequence": {"steps": steps}})
    assert added(await ask(yard, "key-r")) == 1.0
    assert added(await ask(yard, "key-r", x=np.zeros(1 << 20))) == 1.0
    assert threads == [True, False]


async def test_a_step_that_fails_is_named(yard: RunningApp) -> None:
    steps = [
        {"target": "models/a"},
        {"name": "boom", "target": "models/raising", "rename": {"": "x"}},
    ]
    await make(yard, "r", {"sequence": {"steps": steps}})
    reason, text = await refusal(ask(yard, "key-r"))
    assert reason == "MODEL_FAILED" and text.startswith("boom: ")


async def test_a_sequence_whose_models_do_not_fit_at_once_is_answered(tmp_path: Path) -> None:
    async with running_app(config_of(tmp_path, budget_mib=1.5), tmp_path) as yard:
        steps = [{"target": "models/a"}, {"target": "models/b", "rename": {"": "x"}}]
        await make(yard, "r", {"sequence": {"steps": steps}})
        answers = await asyncio.gather(*(ask(yard, "key-r") for _ in range(8)))
        assert {added(answer) for answer in answers} == {3.0}


# --- Ensembles ------------------------------------------------------------------------------------


def ensemble(combine: str, *members: str) -> dict[str, Any]:
    listed = [{"name": name, "target": f"models/{name}"} for name in members]
    return {"ensemble": {"combine": combine, "members": listed}}


async def test_an_ensemble_is_the_mean_or_all_of_its_members(yard: RunningApp) -> None:
    await make(yard, "mean", ensemble("COMBINE_MEAN", "a", "b"))
    await make(yard, "all", ensemble("COMBINE_ALL", "a", "c"))
    await make(yard, "row", ensemble("COMBINE_CONCAT", "a", "c"))
    answer = await ask(yard, "key-mean")
    assert added(answer) == 1.5
    assert {step.branch for step in answer.served.steps} == {"a", "b"}
    found = await ask(yard, "key-all")
    names = [output.name.split(".")[0] for output in found.outputs]
    assert names == ["a", "c"]
    assert list((await ask(yard, "key-row")).outputs[0].shape) == [6]


async def test_a_member_that_fails_fails_the_whole(yard: RunningApp) -> None:
    await make(yard, "r", ensemble("COMBINE_MEAN", "a", "raising"))
    reason, text = await refusal(ask(yard, "key-r"))
    assert reason == "MODEL_FAILED" and text.startswith("raising: ")


async def test_ensembles_that_want_each_others_room_are_all_answered(tmp_path: Path) -> None:
    # Room for two of four: whoever holds one and waits for another is in somebody's way.
    async with running_app(config_of(tmp_path, budget_mib=2.5), tmp_path) as yard:
        pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")]
        for one, other in pairs:
            await make(yard, one + other, ensemble("COMBINE_MEAN", one, other))

        async def many(one: str, other: str) -> None:
            for _ in range(3):
                answer = await ask(yard, f"key-{one}{other}", timeout_s=60)
                assert added(answer) == (VALUES[one] + VALUES[other]) / 2

        async def single(name: str) -> None:
            for _ in range(3):
                assert added(await ask(yard, name, timeout_s=60)) == VALUES[name]

        async with asyncio.timeout(100), asyncio.TaskGroup() as group:
            for one, other in pairs * 2:
                group.create_task(many(one, other))
            for name in VALUES:
                group.create_task(single(name))
        yard.app.residency.audit()


async def test_callers_of_an_ensemble_that_leave_leave_nothing(tmp_path: Path) -> None:
    async with running_app(config_of(tmp_path, budget_mib=2.5), tmp_path) as yard:
        await make(yard, "ab", ensemble("COMBINE_MEAN", "a", "b"))
        await make(yard, "cd", ensemble("COMBINE_MEAN", "c", "d"))
        calls = [
            asyncio.create_task(ask(yard, key, timeout_s=60)) for key in ("key-ab", "key-cd") * 6
        ]
        for i, call in enumerate(calls):
            if i % 3 == 0:
                await asyncio.sleep(0)
                call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        answered = [each for each in outcomes if not isinstance(each, BaseException)]
        assert {added(each) for each in answered} <= {1.5, 6.0}
        assert len(answered) >= 8
        await yard.at_rest()


# --- Shadows --------------------------------------------------------------------------------------


def shadow(sample: float = 1.0, tried: str = "b") -> dict[str, Any]:
    return {"shadow": {"target": "models/a", "shadow": f"models/{tried}", "sample": sample}}


def shadows(yard: RunningApp) -> Any:
    return yard.app.inference.shadow_figures


async def test_a_shadow_is_tried_and_never_answers(yard: RunningApp) -> None:
    await make(yard, "r", shadow())
    for _ in range(5):
        answer = await ask(yard, "key-r")
        assert (added(answer), answer.served.model) == (1.0, "models/a")
    await eventually("it was tried", lambda: shadows(yard).answered_count == 5)
    assert (await load_counts(yard))["b"] == 1
    assert yard.app.inference.figures.answered_count == 5, "a trial is no request"


async def test_a_shadow_that_fails_is_nobodys_matter(yard: RunningApp) -> None:
    await make(yard, "r", shadow(tried="raising"))
    for _ in range(3):
        assert added(await ask(yard, "key-r")) == 1.0
    await eventually("it failed", lambda: shadows(yard).failed_count == 3)
    assert not yard.app.inference.figures.error_counts


async def test_a_shadow_evicts_nobody(tmp_path: Path) -> None:
    async with running_app(config_of(tmp_path, budget_mib=1.5), tmp_path) as yard:
        await make(yard, "r", shadow())
        for _ in range(3):
            assert added(await ask(yard, "key-r")) == 1.0
        counts = await load_counts(yard)
        assert (counts["a"], counts["b"]) == (1, 0)
        # It may come where the one that answers has gone.
        stub = residency_service_pb2_grpc.ResidencyServiceStub(yard.channel)
        await stub.UnloadModel(residency_service_pb2.UnloadModelRequest(model="models/a"))
        await eventually("there is room now", lambda: shadows(yard).answered_count == 3)
        assert (await load_counts(yard))["b"] == 1


async def test_a_part_of_the_requests_is_tried(yard: RunningApp) -> None:
    await make(yard, "r", shadow(sample=0.5))
    for i in range(40):
        await ask(yard, "key-r", affinity=f"u{i}")
    odds = [("tried", 0.5), ("left", 0.5)]
    wanted = sum(choose("r", odds, f"u{i}") == 0 for i in range(40))
    assert 0 < wanted < 40
    await eventually("all were tried", lambda: shadows(yard).answered_count == wanted)


# --- Fallbacks ------------------------------------------------------------------------------------


def fallback(*names: str, prefer_warm: bool = False) -> dict[str, Any]:
    targets = [f"models/{name}" for name in names]
    return {"fallback": {"targets": targets, "prefer_warm": prefer_warm}}


async def test_who_cannot_answer_is_followed_by_who_can(yard: RunningApp) -> None:
    await make(yard, "r", fallback("raising", "b"))
    answer = await ask(yard, "key-r")
    assert (added(answer), answer.served.model, answer.served.branch) == (2.0, "models/b", "b")
    assert added(await ask(yard, "key-r")) == 2.0


async def test_what_is_wrong_with_the_request_is_told_at_once(yard: RunningApp) -> None:
    await make(yard, "r", fallback("a", "b"))
    reason, _ = await refusal(ask(yard, "key-r", x=X, t=["text"]))
    assert reason == "INVALID_TENSOR"
    assert (await load_counts(yard))["b"] == 0


async def test_if_none_answers_the_first_ones_error_is_told(yard: RunningApp) -> None:
    await make(yard, "s", fallback("raising", "raising"))
    reason, text = await refusal(ask(yard, "key-s"))
    assert reason == "MODEL_FAILED" and text.startswith("raising: ")


async def test_the_warm_one_is_taken_before_anybody_waits(yard: RunningApp) -> None:
    await make(yard, "r", fallback("a", "b", prefer_warm=True))
    assert added(await ask(yard, "b")) == 2.0
    answer = await ask(yard, "key-r")
    assert (added(answer), answer.served.cold) == (2.0, False)
    assert (await load_counts(yard))["a"] == 0
    assert added(await ask(yard, "a")) == 1.0
    assert added(await ask(yard, "key-r")) == 1.0, "of two warm ones the first"


# --- Keys -----------------------------------------------------------------------------------------


async def test_prefixes_and_the_default(yard: RunningApp) -> None:
    await make(yard, "default", {"model": {"model": "models/d"}}, keys=[], prefixes=[""])
    await make(yard, "acme", {"model": {"model": "models/a"}}, keys=[], prefixes=["acme/"])
    await make(yard, "fr", fallback("b", "c"), keys=["acme/fr/x"], prefixes=["acme/fr/"])
    expected = {"x": 8.0, "acme/x": 1.0, "acme/fr/y": 2.0, "acme/fr/x": 2.0, "c": 4.0}
    for key, value in expected.items():
        assert added(await ask(yard, key)) == value, key
    await routes(yard).DeleteRoute(route_service_pb2.DeleteRouteRequest(name="routes/default"))
    assert (await refusal(ask(yard, "x")))[0] == "KEY_NOT_FOUND"


async def test_resolving_tells_every_step(yard: RunningApp) -> None:
    await make(yard, "exp", SPLIT)
    steps = [{"target": "routes/exp"}, {"transform": {"name": "top_k", "parameters": {"k": 1}}}]
    await make(yard, "r", {"sequence": {"steps": steps}})
    await ask(yard, "a")

    async def resolve(key: str, **fields: str) -> list[tuple[str, str, str, bool, bool]]:
        request = route_service_pb2.ResolveRouteRequest(key=key, **fields)
        found = (await routes(yard).ResolveRoute(request)).steps
        return [(s.model, s.branch, s.transform, s.resident, s.conditional) for s in found]

    assert await resolve("key-exp") == [
        ("models/a", "old", "", True, True),
        ("models/b", "new", "", False, True),
    ]
    chosen = choose("exp", [("old", 75.0), ("new", 25.0)], "u1")
    assert await resolve("key-r", affinity="u1") == [
        [("models/a", "0/old", "", True, False), ("models/b", "0/new", "", False, False)][chosen],
        ("", "1", "top_k", False, False),
    ]
    assert await resolve("c") == [("models/c", "", "", False, False)]
