"""Names that are keys of routes, over the Open Inference Protocol: versions, choices, chains."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc.aio as triton
from google.protobuf import json_format
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, model_table
from tests.support.server import RunningApp, running_app
from tritonclient.utils import InferenceServerException

from modelyard.v1 import route_pb2, route_service_pb2, route_service_pb2_grpc
from modelyard_server.routing.affinity import choose

pytestmark = pytest.mark.asyncio(loop_scope="module")

VALUES = {"a": 1.0, "b": 2.0, "c": 4.0}

ROUTES: dict[str, dict[str, Any]] = {
    "one": {"model": {"model": "models/a"}},
    "versions": {
        "versions": {
            "versions": [
                {"name": "v1", "target": "models/a"},
                {"name": "v2", "target": "models/b"},
            ],
            "current": "v2",
            "aliases": {"old": "v1"},
        }
    },
    "numbered": {
        "versions": {
            "versions": [
                {"name": "1", "target": "models/a"},
                {"name": "2", "target": "models/b"},
            ],
            "current": "2",
        }
    },
    "split": {
        "split": {
            "branches": [
                {"name": "left", "target": "models/a", "weight": 1},
                {"name": "right", "target": "models/b", "weight": 1},
            ]
        }
    },
    "twice": {
        "sequence": {
            "steps": [
                {"name": "first", "target": "models/a"},
                {"name": "second", "target": "models/b", "rename": {"output_0": "x"}},
            ]
        }
    },
    "all": {
        "ensemble": {
            "members": [
                {"name": "one", "target": "models/a"},
                {"name": "two", "target": "models/c"},
            ],
            "combine": "COMBINE_ALL",
        }
    },
    "safe": {"fallback": {"targets": ["models/huge", "models/c"]}},
    "risky": {
        "split": {
            "branches": [
                {"name": "good", "target": "models/a", "weight": 1},
                {"name": "bad", "target": "models/huge", "weight": 1},
            ]
        }
    },
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def yard(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    base: Path = tmp_path_factory.mktemp("oip-routes")
    config = (
        CPU + ROOTS + ALLOWED + model_table("huge", "identity", options={"size_bytes": 1 << 40})
    )
    for name, value in VALUES.items():
        faulty_models.make_weights(base / "store" / name, value=value)
        config += model_table(name, "torch", options={"factory": faulty_models.factory("Adding")})
    async with running_app(config, base) as made:
        stub: Any = route_service_pb2_grpc.RouteServiceStub(made.channel)
        for name, target in ROUTES.items():
            route = json_format.ParseDict({"keys": [f"key-{name}"], **target}, route_pb2.Route())
            await stub.CreateRoute(route_service_pb2.CreateRouteRequest(route_id=name, route=route))
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(yard: RunningApp) -> AsyncIterator[Any]:
    async with triton.InferenceServerClient(yard.target) as made:
        yield made


async def ask(client: Any, name: str, version: str = "", **parameters: Any) -> Any:
    x = triton.InferInput("x", [2], "FP32")
    x.set_data_from_numpy(np.zeros(2, np.float32))
    if "modelyard_affinity" not in parameters:
        return await client.infer(name, [x], model_version=version)
    return await client.infer(name, [x], model_version=version, parameters=parameters)


def told(answer: Any) -> tuple[float, str]:
    """What was added, and the version that answered."""
    response = answer.get_response()
    added = float(answer.as_numpy(response.outputs[0].name)[0])
    return added, response.model_version


async def test_a_route_to_one_model_is_that_model(client: Any) -> None:
    assert told(await ask(client, "key-one")) == (1.0, "1")
    assert told(await ask(client, "key-one", "1")) == (1.0, "1")


@pytest.mark.parametrize(
    ("name", "version", "wanted"),
    [
        ("versions", "", (2.0, "v2")),
        ("versions", "1", (2.0, "v2")),  # What clients send that know of no versions.
        ("versions", "v1", (1.0, "v1")),
        ("versions", "old", (1.0, "v1")),
        ("numbered", "", (2.0, "2")),
        ("numbered", "1", (1.0, "1")),
        ("numbered", "2", (2.0, "2")),
    ],
)
async def test_a_version_is_one_of_the_routes(
    client: Any, name: str, version: str, wanted: tuple[float, str]
) -> None:
    assert told(await ask(client, f"key-{name}", version)) == wanted


async def test_versions_are_in_the_metadata(client: Any) -> None:
    metadata = await client.get_model_metadata("key-versions")
    assert list(metadata.versions) == ["v1", "v2"]
    assert await client.is_model_ready("key-versions", "v1") is True


async def test_a_version_that_is_not_there_is_not_found(client: Any) -> None:
    for call in (
        ask(client, "key-versions", "v9"),
        client.is_model_ready("key-versions", "v9"),
        client.get_model_metadata("key-split", "v1"),
    ):
        with pytest.raises(InferenceServerException, match="has no version") as caught:
            await call
        assert caught.value.status() == "StatusCode.NOT_FOUND"


async def test_an_affinity_decides_a_split_as_it_does_for_our_own_clients(client: Any) -> None:
    branches = [("left", 1.0), ("right", 1.0)]
    for i in range(12):
        affinity = f"user-{i}"
        added, _ = told(await ask(client, "key-split", modelyard_affinity=affinity))
        assert added == (1.0, 2.0)[choose("split", branches, affinity)]


async def test_several_models_answer_as_one(client: Any) -> None:
    assert told(await ask(client, "key-twice")) == (3.0, "1")
    answer = await ask(client, "key-all")
    names = [output.name for output in answer.get_response().outputs]
    metadata = await client.get_model_metadata("key-all")
    assert names == [each.name for each in metadata.outputs]
    assert sorted(float(answer.as_numpy(name)[0]) for name in names) == [1.0, 4.0]


async def test_each_model_of_a_route_has_its_own_statistics(client: Any) -> None:
    async def counts() -> dict[str, tuple[int, int]]:
        found = (await client.get_inference_statistics("key-twice")).model_stats
        return {each.name: (each.execution_count, each.inference_count) for each in found}

    await ask(client, "key-twice")
    before = await counts()
    assert set(before) == {"a", "b"}
    await ask(client, "key-twice")
    assert await counts() == {name: (runs + 1, rows + 2) for name, (runs, rows) in before.items()}


async def test_a_refusal_behind_a_models_answer_is_not_that_models_failure(client: Any) -> None:
    stats = (await client.get_inference_statistics("a")).model_stats[0]
    with pytest.raises(InferenceServerException, match="budget"):
        await ask(client, "huge")
    with pytest.raises(InferenceServerException, match="budget"):
        # The first affinity that is sent to the branch that cannot answer.
        names = [("good", 1.0), ("bad", 1.0)]
        affinity = next(str(i) for i in range(99) if choose("risky", names, str(i)) == 1)
        await ask(client, "key-risky", modelyard_affinity=affinity)
    again = (await client.get_inference_statistics("a")).model_stats[0]
    assert again.inference_stats.fail.count == stats.inference_stats.fail.count


async def test_a_route_is_ready_if_its_requests_would_be_answered(client: Any) -> None:
    ready = {name: await client.is_model_ready(f"key-{name}") for name in ROUTES}
    # One branch of a split is not enough, and one target of a fallback is.
    assert ready == {name: name != "risky" for name in ROUTES}
    assert await client.is_model_ready("huge") is False
    assert told(await ask(client, "key-safe")) == (4.0, "1")


async def test_keys_of_routes_are_names_of_the_index(client: Any) -> None:
    index = {each.name: each for each in (await client.get_model_repository_index()).models}
    assert {f"key-{name}" for name in ROUTES} <= set(index)


async def test_a_route_is_loaded_and_unloaded_with_its_models(
    yard: RunningApp, client: Any
) -> None:
    async def state(name: str) -> str:
        index = (await client.get_model_repository_index()).models
        return str(next(each.state for each in index if each.name == name))

    await client.load_model("key-twice")
    assert [await state(name) for name in ("a", "b", "key-twice")] == ["READY"] * 3
    with pytest.raises(InferenceServerException, match="means several models") as caught:
        await client.unload_model("key-twice")
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert await state("key-twice") == "READY"
    await client.unload_model("key-twice", unload_dependents=True)
    assert "READY" not in [await state(name) for name in ("a", "b", "key-twice")]
    await client.load_model("key-one")
    await client.unload_model("key-one")  # It means one model, and that one leaves.
    assert await state("a") == "UNAVAILABLE"


async def test_a_fallback_is_loaded_when_one_of_its_targets_is(client: Any) -> None:
    await client.unload_model("key-safe", unload_dependents=True)
    await client.load_model("key-safe")
    index = {each.name: each for each in (await client.get_model_repository_index()).models}
    assert index["key-safe"].state == index["c"].state == "READY"
    with pytest.raises(InferenceServerException, match="budget"):
        await client.load_model("key-risky")
