"""The host tier through the whole server: what is evicted leaves a copy, and comes back from it.

Models are real, in both engines; only what loads take is said by the tests, because whether a copy
is made follows from it. The core is audited after every event.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.server import RunningApp, eventually, refusal_of, running_app
from tests.support.sharing import auditing, classes, classifier, make_family, told
from tests.support.tiered import (
    COPY_BYTES,
    MODEL_BYTES,
    PADDING_BYTES,
    ROWS,
    SECONDS,
    answer_of,
    copies_of,
    create_layers,
    make_layers,
    steady_times,
    tier_config,
    tier_of,
)
from tests.support.tiny_models import MLP_FACTORY, make_tiny_mlp

from modelyard import (
    Admin,
    CopyState,
    Event,
    EventType,
    HostTier,
    InvalidRequest,
    ResidencyState,
)
from modelyard_server.devices.probes import host_memory_bytes
from modelyard_server.residency import shell
from modelyard_server.runtimes.api import LoadSource

ENGINES = pytest.mark.parametrize("engine", ["thread", "process"])


@pytest.fixture(autouse=True)
def audits() -> Iterator[None]:
    with auditing():
        yield


async def about_copies(yard: RunningApp) -> list[Event]:
    """Events about copies, in order."""
    kinds = (EventType.COPY_KEPT, EventType.COPY_DROPPED)
    return [event for event in await told(yard) if event.type in kinds]


@ENGINES
async def test_an_evicted_model_leaves_a_copy_and_comes_back_from_it(
    tmp_path: Path, engine: str
) -> None:
    config = tier_config(tmp_path, engine=engine, copies=2)
    answers = make_layers(tmp_path, "ab")
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab")
            np.testing.assert_array_equal(await answer_of(yard, "a"), answers["a"])
            tier = await tier_of(yard)
            assert (tier.copy_count, tier.peak_bytes, tier.budget_bytes) == (
                0,
                0,
                2 * MODEL_BYTES + PADDING_BYTES,
            )
            np.testing.assert_array_equal(await answer_of(yard, "b"), answers["b"])
            tier = await tier_of(yard)
            assert (tier.resident_bytes, tier.kept_count, tier.promotion_count) == (
                COPY_BYTES,
                1,
                0,
            )
            demoted = await yard.residency("a")
            assert demoted.state is ResidencyState.COLD
            assert (demoted.copy_state, demoted.copy_bytes) == (CopyState.KEPT, COPY_BYTES)
            assert demoted.copy_load_s is None
            (event,) = await about_copies(yard)
            assert (event.type, event.subject, event.size_bytes) == (
                EventType.COPY_KEPT,
                "models/a",
                COPY_BYTES,
            )
            assert "is on the host tier" in event.description
            order = [e.type for e in await told(yard) if e.subject == "models/a"]
            assert order[-3:] == [EventType.EVICTED, EventType.COPY_KEPT, EventType.UNLOADED]

            # The copy stays while the model is back, and needs not be made again.
            for name, copies, promotions in (("a", "ab", 1), ("b", "ab", 2), ("a", "ab", 3)):
                np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
                assert await copies_of(yard) == copies
                assert (await tier_of(yard)).promotion_count == promotions
            assert (await tier_of(yard)).kept_count == 2
            promoted = await yard.residency("a")
            assert (promoted.load_s, promoted.copy_load_s) == (0.125, 0.125)
            assert (await yard.admin(Admin.stats)).load_count == 5
            story = await yard.admin(Admin.explain, "b")
            assert "a copy of its weights is on the host tier" in story.summary


@ENGINES
async def test_unload_model_returns_when_the_model_and_its_copy_are_back(
    tmp_path: Path, engine: str
) -> None:
    config = tier_config(tmp_path, engine=engine, copies=2)
    answers = make_layers(tmp_path, "ab")
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab")
            for name in "aba":
                await answer_of(yard, name)
            assert await copies_of(yard) == "ab"
            # One that is on its device and on the tier, and one that has nothing but a copy.
            for name, left in (("a", "b"), ("b", "")):
                unloaded = await yard.admin(Admin.unload, name)
                assert unloaded.state is ResidencyState.COLD
                assert (unloaded.copy_state, unloaded.copy_bytes) == (CopyState.NONE, 0)
                tier = (await yard.admin(Admin.stats)).host_tier
                assert tier is not None
                assert tier.accounted_bytes == tier.measured_bytes == len(left) * COPY_BYTES
                assert await copies_of(yard) == left
            dropped = [e for e in await about_copies(yard) if e.type is EventType.COPY_DROPPED]
            assert [(e.subject, e.cause, e.size_bytes) for e in dropped] == [
                ("models/a", "operator", COPY_BYTES),
                ("models/b", "operator", COPY_BYTES),
            ]
            assert "leaves the host tier" in dropped[0].description
            assert (await yard.device("cuda:0")).accounted_bytes == 0
            np.testing.assert_array_equal(await answer_of(yard, "a"), answers["a"])
            assert (await tier_of(yard)).promotion_count == 1


@ENGINES
async def test_delete_model_takes_the_copy_along(tmp_path: Path, engine: str) -> None:
    config = tier_config(tmp_path, engine=engine, copies=2)
    answers = make_layers(tmp_path, "ab")
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab")
            for name in "aba":
                await answer_of(yard, name)
            await yard.admin(Admin.delete_model, "b")  # It has nothing but a copy.
            assert (await tier_of(yard)).resident_bytes == COPY_BYTES
            await yard.admin(Admin.delete_model, "a")  # It is on its device as well.
            tier = await tier_of(yard)
            assert (tier.accounted_bytes, tier.dropped_count) == (0, 2)
            causes = [(e.cause, e.description) for e in await about_copies(yard)][-2:]
            assert all(cause == "operator" and "was deleted" in text for cause, text in causes)
            assert yard.app.residency.explanations()  # The core goes on.
            await create_layers(yard, "a")
            np.testing.assert_array_equal(await answer_of(yard, "a"), answers["a"])
            assert (await tier_of(yard)).promotion_count == 1


async def test_a_copy_gives_way_to_one_that_saves_more_and_not_to_one_that_saves_less(
    tmp_path: Path,
) -> None:
    config = tier_config(tmp_path, copies=1)
    answers = make_layers(tmp_path, "abc")
    with steady_times(slow="b"):
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "abc")
            for name, copies in (("a", ""), ("b", "a"), ("c", "b"), ("b", "b"), ("a", "b")):
                np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
                assert await copies_of(yard) == copies, name
            (dropped,) = [e for e in await about_copies(yard) if e.type is EventType.COPY_DROPPED]
            assert (dropped.subject, dropped.cause) == ("models/a", "models/b")
            assert dropped.score is not None
            assert "for models/b" in dropped.description
            tier = await tier_of(yard)
            assert (tier.kept_count, tier.dropped_count) == (2, 1)


async def test_copies_of_models_that_are_in_use_again_are_the_first_to_give_way(
    tmp_path: Path,
) -> None:
    config = tier_config(tmp_path, copies=1)
    answers = make_layers(tmp_path, "abcd")
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab", device="cuda:0")
            await create_layers(yard, "cd", device="cuda:1")
            for name in "ab":
                await answer_of(yard, name)
            await yard.admin(Admin.pin, "a")
            await yard.becomes("a", ResidencyState.RESIDENT)
            # The load read from the copy, so that b, for whom there was no other room, has none.
            assert await copies_of(yard) == "a"
            for name in "cd":
                np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
            # a stays on its device whatever comes: its copy is worth a part of what it was.
            assert await copies_of(yard) == "c"
            pinned = await yard.residency("a")
            assert (pinned.state, pinned.copy_state) == (ResidencyState.RESIDENT, CopyState.NONE)


async def test_what_loads_as_fast_from_files_is_not_copied(tmp_path: Path) -> None:
    config = tier_config(tmp_path, copies=4)
    answers = make_layers(tmp_path, "ab")
    with steady_times(fast="a"):
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab")
            # Until a copy has been loaded from, it is taken to be faster; so one is tried.
            for name in "abab":
                np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
            await yard.admin(Admin.unload, "a")
            for name in "abab":
                np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
            assert await copies_of(yard) == ""


async def test_a_model_larger_than_the_tier_is_evicted_as_ever(tmp_path: Path) -> None:
    config = tier_config(tmp_path, copies=0.9)
    answers = make_layers(tmp_path, "ab")
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab")
            for name in "abab":
                np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
            tier = await tier_of(yard)
            assert (tier.kept_count, tier.promotion_count, tier.peak_bytes) == (0, 0, 0)
            assert await about_copies(yard) == []


@ENGINES
@pytest.mark.parametrize("missing_bytes", [0, 1])
async def test_a_first_copy_that_needs_more_than_was_reserved_is_kept_the_next_time(
    tmp_path: Path, engine: str, missing_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "_COPY_PADDING_BYTES", 0)
    sizes: dict[str, Any] = {"inputs": 31, "hidden": 32, "outputs": 16}
    file_bytes = 4 * (31 * 32 + 32 + 32 * 16 + 16)
    copy_bytes = -(-file_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    buffer_bytes = 4 * 16  # In no file.
    assert copy_bytes > file_bytes + buffer_bytes
    config = tier_config(tmp_path, engine=engine, copies=1)
    tier_bytes = MODEL_BYTES + PADDING_BYTES
    config = config.replace(f"budget = {tier_bytes}\n", f"budget = {copy_bytes - missing_bytes}\n")
    make_tiny_mlp(tmp_path / "models" / "a", seed=1, **sizes)
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            tier = await tier_of(yard)
            assert tier.budget_bytes == copy_bytes - missing_bytes
            await yard.admin(
                Admin.create_model,
                "a",
                runtime="torch",
                root="models",
                folder="a",
                options={"factory": MLP_FACTORY, "factory_options": sizes},
                placement="cuda:0",
            )
            whole = (await yard.device("cuda:0")).budget_bytes
            options = {"size_bytes": whole}
            await yard.admin(
                Admin.create_model, "big", runtime="identity", options=options, placement="cuda:0"
            )
            first = await answer_of(yard, "a")

            async def evicted() -> HostTier:
                """What the tier holds once the model has had to leave."""
                await answer_of(yard, "big")
                tier = await tier_of(yard)
                assert (await yard.residency("a")).state is ResidencyState.COLD
                np.testing.assert_array_equal(await answer_of(yard, "a"), first)
                return tier

            # The room that was taken for it was less than what it turned out to need.
            tier = await evicted()
            assert (tier.kept_count, tier.copy_count, tier.accounted_bytes) == (0, 0, 0)
            assert 0 < tier.peak_bytes < copy_bytes
            assert await about_copies(yard) == []
            # Now that is known: it is taken if it is there, and nothing is tried if it is not.
            tier = await evicted()
            if missing_bytes:
                assert (tier.kept_count, tier.accounted_bytes) == (0, 0)
                assert tier.peak_bytes < copy_bytes
            else:
                assert (tier.kept_count, tier.accounted_bytes) == (1, copy_bytes)
                assert tier.peak_bytes == copy_bytes
            assert (await tier_of(yard)).promotion_count == 1 - missing_bytes


async def test_a_recording_that_begins_when_there_are_copies_knows_what_files_take(
    tmp_path: Path,
) -> None:
    config = tier_config(tmp_path, engine="thread", copies=2)
    make_layers(tmp_path, "ab")
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab")
            for name in "aba":
                await answer_of(yard, name)
            assert await copies_of(yard) == "ab"
            watch = await yard.admin(Admin.watch_requests)
            try:
                first = await asyncio.to_thread(next, watch)
                await answer_of(yard, "b")
                later = await asyncio.to_thread(next, watch)
            finally:
                await asyncio.to_thread(watch.close)
            assert [model.model for model in first.models] == ["models/a", "models/b"]
            known = {model.model: model for model in (*first.models, *later.models)}
            for model in known.values():
                # Files may be in the page cache or not.
                assert model.load_s is not None
                assert SECONDS[LoadSource.PAGE_CACHE] <= model.load_s <= SECONDS[LoadSource.STORAGE]
                assert model.copy_load_s == SECONDS[LoadSource.COPY]


async def test_what_has_no_files_leaves_no_copy_and_its_memory_all_the_same(tmp_path: Path) -> None:
    config = tier_config(tmp_path, copies=4)
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            for name in "ab":
                await yard.admin(
                    Admin.create_model,
                    name,
                    runtime="identity",
                    options={"size_bytes": MODEL_BYTES + COPY_BYTES},
                    placement="cuda:0",
                )
            for name in "aba":
                np.testing.assert_array_equal(await answer_of(yard, name), ROWS)
            tier = await tier_of(yard)
            assert (tier.kept_count, tier.accounted_bytes) == (0, 0)
            assert (await yard.device("cuda:0")).resident_bytes == MODEL_BYTES + COPY_BYTES


@ENGINES
async def test_copies_hold_what_they_share_once(tmp_path: Path, engine: str) -> None:
    folders = make_family(tmp_path / "models", ["m0", "m1", "m2"], seed=1)
    config = tier_config(tmp_path, engine=engine, copies=8, models_per_device=4)
    config += "".join(classifier(folder, device="cuda:0") for folder in folders)
    texts = ["the big dog ran", "a bird flew over the river house"]
    with steady_times():
        async with running_app(config, tmp_path) as yard:

            async def check(name: str) -> None:
                outputs = await yard.client.predict(name, texts, timeout_s=60)
                found = np.asarray(outputs["probabilities"])
                np.testing.assert_array_equal(found, classes(tmp_path / "models" / name))

            for folder in folders:
                await check(folder.name)
            whole = (await yard.device("cuda:0")).budget_bytes
            options = {"size_bytes": whole}
            await yard.admin(
                Admin.create_model, "big", runtime="identity", options=options, placement="cuda:0"
            )
            await yard.client.predict("big", ROWS)
            tier = await tier_of(yard)
            assert tier.copy_count == 3
            assert tier.saved_bytes > tier.resident_bytes
            for folder in folders:
                await check(folder.name)
            tier = await tier_of(yard)
            assert (tier.promotion_count, tier.copy_count) == (3, 3)
            await yard.admin(Admin.unload, "m1")
            assert (await tier_of(yard)).copy_count == 2
            await check("m0")
            await check("m1")


async def test_a_worker_that_dies_takes_its_copies_along(tmp_path: Path) -> None:
    config = tier_config(tmp_path, engine="process", copies=2)
    answers = make_layers(tmp_path, "ab")
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab")
            for name in "ab":
                await answer_of(yard, name)
            assert await copies_of(yard) == "a"
            (pid,) = [
                pid for name, pid in yard.app.engine.pids.items() if name.startswith("models")
            ]
            os.kill(pid, signal.SIGKILL)

            async def is_lost() -> bool:
                return (await yard.residency("a")).copy_state is CopyState.NONE

            await eventually("the copy is gone with its worker", is_lost)
            await yard.becomes("b", ResidencyState.RESIDENT, 60)
            tier = await tier_of(yard)
            assert (tier.accounted_bytes, tier.dropped_count) == (0, 1)
            (dropped,) = [e for e in await about_copies(yard) if e.type is EventType.COPY_DROPPED]
            assert (dropped.subject, dropped.cause) == ("models/a", "")
            assert "has died" in dropped.description
            np.testing.assert_array_equal(await answer_of(yard, "a"), answers["a"])
            assert await copies_of(yard) == "b"


async def test_a_server_starts_with_an_empty_tier(tmp_path: Path) -> None:
    config = tier_config(tmp_path, copies=2) + '\n[catalog]\nfile = "yard.db"\n'
    answers = make_layers(tmp_path, "ab")
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab")
            for name in "ab":
                await answer_of(yard, name)
            assert await copies_of(yard) == "a"
        async with running_app(config, tmp_path) as yard:
            tier = await tier_of(yard)
            assert (tier.accounted_bytes, tier.measured_bytes, tier.kept_count) == (0, 0, 0)
            np.testing.assert_array_equal(await answer_of(yard, "a"), answers["a"])
            assert (await tier_of(yard)).promotion_count == 0


async def test_many_at_once_are_answered_rightly_while_copies_come_and_go(tmp_path: Path) -> None:
    config = tier_config(tmp_path, copies=2, models_per_device=2)
    names = "abcdef"
    answers = make_layers(tmp_path, names)
    with steady_times(slow="ace"):
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, names[:3], device="cuda:0")
            await create_layers(yard, names[3:], device="cuda:1")

            async def ask(name: str) -> None:
                for _ in range(8):
                    np.testing.assert_array_equal(await answer_of(yard, name), answers[name])

            await asyncio.gather(*(ask(name) for name in names))
            await asyncio.gather(*(yard.admin(Admin.unload, name) for name in names))
            tier = await tier_of(yard)
            assert tier.accounted_bytes == 0
            assert tier.promotion_count > 0
            for device in ("cuda:0", "cuda:1"):
                assert (await yard.device(device)).accounted_bytes == 0


async def test_a_server_without_a_tier_tells_of_none(tmp_path: Path) -> None:
    config = tier_config(tmp_path, copies=2).replace("[host_tier]\nbudget", "#")
    make_layers(tmp_path, "ab")
    with steady_times():
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "ab")
            for name in "aba":
                await answer_of(yard, name)
            assert (await yard.admin(Admin.stats)).host_tier is None
            residency = await yard.residency("b")
            assert (residency.copy_state, residency.copy_bytes) == (CopyState.NONE, 0)
            assert await about_copies(yard) == []


async def test_budgets_count_the_tier_when_they_are_changed(tmp_path: Path) -> None:
    total = host_memory_bytes()
    config = tier_config(tmp_path, copies=2)
    async with running_app(config, tmp_path) as yard:
        devices = await yard.admin(Admin.list_devices)
        tier_bytes = 2 * MODEL_BYTES + PADDING_BYTES
        others = devices[1].budget_bytes + tier_bytes
        error = await refusal_of(yard.admin(Admin.update_budget, "cuda:0", total - others + 1))
        assert isinstance(error, InvalidRequest)
        assert f"the host tier {tier_bytes}" in str(error)
        changed = await yard.admin(Admin.update_budget, "cuda:0", total - others)
        assert changed.budget_bytes == total - others
