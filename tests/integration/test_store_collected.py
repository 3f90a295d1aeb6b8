"""The weight store of a real server with worker processes: what nobody uses comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from tests.support.config_text import device_table
from tests.support.served import served_app
from tests.support.server import RunningApp, eventually, refusal_of, running_app
from tests.support.tiny_models import MLP_FACTORY, make_tiny_mlp

from modelyard import Admin, Client, ModelInUse, StoreCollected
from modelyard.route_targets import Version, VersionsTarget
from modelyard.v1 import admin_service_pb2
from modelyard.v1.admin_service_pb2_grpc import AdminServiceStub
from modelyard_server.weights.store import WeightStore

ROWS = np.ones((2, 8), dtype=np.float32)
OPTIONS = {"factory": MLP_FACTORY}


def config(base: Path, *, keep_unused_s: float = 86_400, engine: str = "process") -> str:
    return "\n".join(
        [
            device_table("cpu", "64MB"),
            f'[engine]\nkind = "{engine}"',
            f'[weights]\nstore = "{base / "store"}"\nkeep_unused_s = {keep_unused_s}',
            f'[roots]\nmodels = "{base / "models"}"',
            f'[runtimes.torch]\nallowed_factories = ["{MLP_FACTORY}"]',
        ]
    )


@pytest_asyncio.fixture
async def yard(tmp_path: Path) -> AsyncIterator[RunningApp]:
    (tmp_path / "models").mkdir()
    async with running_app(config(tmp_path, engine="thread"), tmp_path) as running:
        yield running


@pytest_asyncio.fixture
async def workers(tmp_path: Path) -> AsyncIterator[RunningApp]:
    (tmp_path / "models").mkdir()
    async with running_app(config(tmp_path), tmp_path) as running:
        yield running


def create(admin: Admin, folder: Path) -> None:
    admin.create_model(
        folder.name, runtime="torch", root="models", folder=folder.name, options=OPTIONS
    )


def look_again(admin: Admin, model: str) -> None:
    """Has the server read a model's files, as it does before a load, and load nothing."""
    admin.update_model(model, validate_only=True, options=OPTIONS)


async def collect(yard: RunningApp, keep_s: float | None = 0) -> StoreCollected:
    return await yard.admin(lambda admin: admin.collect_store(keep_s=keep_s))


def models_in(base: Path) -> set[str]:
    return {path.name for path in (base / "store/models").iterdir()}


async def answer(yard: RunningApp, key: str) -> np.ndarray:
    return np.asarray((await yard.client.predict(key, ROWS))["output_0"])


def ask(target: str, key: str) -> None:
    with Client(target) as client:
        client.predict(key, ROWS)


async def test_what_is_deleted_or_replaced_comes_back(workers: RunningApp, tmp_path: Path) -> None:
    yard = workers
    store = tmp_path / "store"
    one, two = (tmp_path / "models" / name for name in ("one", "two"))
    for seed, folder in enumerate((one, two)):
        make_tiny_mlp(folder, seed=seed)
        await yard.admin(create, folder)
    first = await answer(yard, "one")
    assert (await collect(yard)).freed_count == 0
    assert len(models_in(tmp_path)) == 2
    packs = len(list((store / "packs").iterdir()))

    # Its files change, and somebody looks at them: the version in memory is nobody's any more.
    make_tiny_mlp(one, seed=7)
    await yard.admin(look_again, "one")
    assert len(models_in(tmp_path)) == 3
    kept = await collect(yard, keep_s=None)
    assert kept.store is not None and kept.store.due_at is not None
    assert (kept.freed_count, kept.store.unused_count) == (0, 1)
    collected = await collect(yard)
    assert collected.freed_count == 1
    assert collected.freed_bytes == kept.store.unused_bytes > 900
    assert len(list((store / "packs").iterdir())) == packs

    # What is loaded goes on answering, off files that have no names any more.
    assert np.array_equal(await answer(yard, "one"), first)
    await yard.admin(lambda admin: admin.unload("one"))
    second = await answer(yard, "one")
    assert not np.array_equal(second, first)
    assert (await collect(yard)).freed_count == 0

    await yard.admin(lambda admin: admin.delete_model("one"))
    assert (await collect(yard)).freed_count == 1
    assert len(models_in(tmp_path)) == 1
    await answer(yard, "two")
    stats = await yard.admin(lambda admin: admin.stats())
    assert stats.store is not None
    assert (stats.store.model_count, stats.store.freed_count) == (1, 2)
    assert stats.store.freed_bytes >= 2 * collected.freed_bytes

    # And it can be registered again.
    await yard.admin(create, one)
    assert np.array_equal(await answer(yard, "one"), second)
    await yard.admin(lambda admin: admin.delete_model("one"))
    await yard.admin(lambda admin: admin.delete_model("two"))
    await collect(yard)
    assert models_in(tmp_path) == set()
    assert list((store / "packs").iterdir()) == []


async def test_what_routes_name_stays(yard: RunningApp, tmp_path: Path) -> None:
    for seed, name in enumerate(("old", "new")):
        make_tiny_mlp(tmp_path / "models" / name, seed=seed)
        await yard.admin(create, tmp_path / "models" / name)
    versions = VersionsTarget(
        versions=[
            Version(name="1", target="old"),
            Version(name="2", target="new"),
        ],
        current="2",
    )
    await yard.admin(lambda admin: admin.create_route("net", ["net"], target=versions))
    refused = await refusal_of(yard.admin(lambda admin: admin.delete_model("old")))
    assert isinstance(refused, ModelInUse)
    assert (await collect(yard)).freed_count == 0
    assert len(models_in(tmp_path)) == 2
    await answer(yard, "net")
    await yard.client.predict("net", ROWS, version="1")


async def test_a_store_that_is_shared_keeps_what_any_server_uses(
    yard: RunningApp, tmp_path: Path
) -> None:
    for seed, name in enumerate(("mine", "theirs")):
        make_tiny_mlp(tmp_path / "models" / name, seed=seed)
    await yard.admin(create, tmp_path / "models/mine")
    with served_app(config(tmp_path, engine="thread"), tmp_path) as other:
        await other.admin(create, tmp_path / "models/theirs")
        assert (await collect(yard)).freed_count == 0
        assert (await collect(other)).freed_count == 0
        await asyncio.to_thread(ask, other.target, "theirs")
        await yard.admin(lambda admin: admin.delete_model("mine"))
        # Said at once, so that the other one may give it back.
        assert (await collect(yard)).freed_count + (await collect(other)).freed_count == 1
        assert len(models_in(tmp_path)) == 1
        await asyncio.to_thread(ask, other.target, "theirs")
    assert (await collect(yard)).freed_count == 1


async def test_it_happens_by_itself_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_mlp(tmp_path / "models" / "one", seed=1)
    # What a server left that was killed, and whose catalog is another today.
    before = WeightStore.open(tmp_path / "store")
    before.take(folder)
    before.close()
    assert len(models_in(tmp_path)) == 1
    caplog.set_level("INFO", "modelyard_server.weights.store_keeper")
    async with running_app(config(tmp_path, keep_unused_s=0, engine="thread"), tmp_path):
        await eventually("it came back", lambda: not models_in(tmp_path))
        await eventually("it is told", lambda: "gave back" in caplog.text)


async def test_a_configured_model_stays_over_the_start(tmp_path: Path) -> None:
    make_tiny_mlp(tmp_path / "models" / "one", seed=1)
    text = config(tmp_path, keep_unused_s=0, engine="thread")
    text += '\n[models.one]\nruntime = "torch"\nroot = "models"\nfolder = "one"\n'
    text += f'options.factory = "{MLP_FACTORY}"\n'
    for _ in range(2):
        async with running_app(text, tmp_path) as yard:
            found = await collect(yard)
            assert (found.freed_count, len(models_in(tmp_path))) == (0, 1)


async def test_what_is_asked_for_is_checked(yard: RunningApp, tmp_path: Path) -> None:
    request = admin_service_pb2.CollectStoreRequest()
    for seconds in (-1, 10**10):
        request.keep_duration.seconds = seconds
        call = AdminServiceStub(yard.channel).CollectStore(request)
        with pytest.raises(grpc.aio.AioRpcError, match="keep_duration"):
            await call


async def test_a_server_that_reads_in_place_has_nothing_to_give_back(tmp_path: Path) -> None:
    async with running_app(device_table("cpu", "64MB"), tmp_path) as yard:
        assert (await collect(yard)).store is None
        assert (await yard.admin(lambda admin: admin.stats())).store is None
