"""The host tier of a whole server while workers are killed, memory is short, and the server stops.

What a test does to it happens exactly when a transfer begins: a stage is the start of a demotion, a
promotion or a drop, on the event loop that the server is on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.server import RunningApp, eventually, refusal_of, running_app
from tests.support.sharing import auditing, classes, classifier, make_family, told
from tests.support.tiered import (
    COPY_BYTES,
    MODEL_BYTES,
    answer_of,
    copies_of,
    create_layers,
    make_layers,
    steady_times,
    tier_config,
    tier_of,
)

from modelyard import (
    Admin,
    BudgetExhausted,
    CopyState,
    EventType,
    ModelFailed,
    ModelyardError,
    ResidencyState,
    WorkerLost,
)
from modelyard_server.residency.actions import Actions
from modelyard_server.residency.transfers import Transfers
from modelyard_server.residency.values import CopyState as CoreCopyState
from modelyard_server.weights.copies import Copies

ENGINES = pytest.mark.parametrize("engine", ["thread", "process"])
STAGES = ("demotion", "promotion", "drop")


@pytest.fixture(autouse=True)
def audits() -> Iterator[None]:
    with auditing(), steady_times():
        yield


@contextmanager
def at_stages(act: Callable[[str, str], None]) -> Iterator[None]:
    """Calls `act` with the stage and the model right after a transfer of a copy has begun."""
    load, unload, drop_copy = Transfers.load, Transfers.unload, Transfers.drop_copy

    def on_load(self: Transfers, handle: Any, target: Any) -> None:
        load(self, handle, target)
        assert isinstance(self._outcomes, Actions)
        entry = self._outcomes._yard.entry(handle.core_id)
        if entry is not None and entry.copy_state is CoreCopyState.KEPT:
            act("promotion", handle.name)

    def on_unload(self: Transfers, handle: Any, *, keep: bool, most_bytes: int) -> None:
        unload(self, handle, keep=keep, most_bytes=most_bytes)
        if keep:
            act("demotion", handle.name)

    def on_drop(self: Transfers, handle: Any) -> None:
        drop_copy(self, handle)
        act("drop", handle.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transfers, "load", on_load)
        patch.setattr(Transfers, "unload", on_unload)
        patch.setattr(Transfers, "drop_copy", on_drop)
        yield


def worker_pid(yard: RunningApp) -> int | None:
    pids = yard.app.engine.pids
    return next((pid for name, pid in pids.items() if name.startswith("models")), None)


async def everything_leaves(yard: RunningApp, names: Sequence[str]) -> None:
    """All models are unloaded by hand, and nothing of them is left."""
    await yard.at_rest()
    for name in names:
        unloaded = await yard.admin(Admin.unload, name)
        assert unloaded.state in (ResidencyState.COLD, ResidencyState.FAILED)
        assert (unloaded.copy_state, unloaded.copy_bytes) == (CopyState.NONE, 0)
    tier = await tier_of(yard)
    assert (tier.accounted_bytes, tier.measured_bytes, tier.copy_count) == (0, 0, 0)
    for device in ("cuda:0", "cuda:1"):
        found = await yard.device(device)
        assert (found.accounted_bytes, found.measured_bytes) == (0, 0)


# --- Workers that die -----------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [0, 3])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_worker_killed_at_a_stage_costs_nobody_more_than_a_reload(
    tmp_path: Path, stage: str, turn: int
) -> None:
    config = tier_config(tmp_path, engine="process", copies=2)
    answers = make_layers(tmp_path, "abc")
    killed: list[str] = []

    async with running_app(config, tmp_path) as yard:
        await create_layers(yard, "abc")

        def later(turns: int) -> None:
            if turns:
                asyncio.get_running_loop().call_soon(later, turns - 1)
            elif (pid := worker_pid(yard)) is not None:
                os.kill(pid, signal.SIGKILL)

        def kill(begun: str, model: str) -> None:
            if begun == stage and not killed:
                killed.append(model)
                later(turn)

        with at_stages(kill):
            for name in "abcabcab":
                np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
            if stage == "drop" and not killed:
                await yard.admin(Admin.unload, (await copies_of(yard))[0])
        assert killed
        # The tier goes on as if nothing had been.
        for name in "abcabc":
            np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
        assert (await tier_of(yard)).copy_count > 0
        await everything_leaves(yard, "abc")


@pytest.mark.parametrize("seed", range(2))
async def test_workers_that_die_again_and_again_while_all_kinds_of_things_happen(
    tmp_path: Path, seed: int
) -> None:
    config = tier_config(tmp_path, engine="process", copies=2.3, models_per_device=2)
    config = config.replace('kind = "process"', 'kind = "process"\nstrikes = 1000')
    names = "abcdef"
    answers = make_layers(tmp_path, names)
    chance = random.Random(seed)
    kills = 0
    async with running_app(config, tmp_path) as yard:
        await create_layers(yard, names[:3], device="cuda:0")
        await create_layers(yard, names[3:], device="cuda:1")

        def kill(begun: str, model: str) -> None:
            nonlocal kills
            if kills < 5 and chance.random() < 0.25 and (pid := worker_pid(yard)) is not None:
                kills += 1
                os.kill(pid, signal.SIGKILL)

        async def ask(name: str) -> None:
            for _ in range(6):
                # Who runs when a worker dies is told so, and pins may leave no room for a while.
                with suppress(ModelFailed, WorkerLost, BudgetExhausted):
                    np.testing.assert_array_equal(await answer_of(yard, name), answers[name])

        async def disturb() -> None:
            for _ in range(10):
                name = chance.choice(names)
                try:
                    match chance.randrange(4):
                        case 0:
                            await yard.admin(Admin.unload, name)
                        case 1:
                            await yard.admin(Admin.pin, name)
                            await yard.admin(Admin.unpin, name)
                        case 2:
                            await yard.admin(Admin.load, name)
                        case 3:
                            device = chance.choice(["cuda:0", "cuda:1"])
                            await yard.admin(Admin.drain_device, device)
                            await yard.admin(Admin.undrain_device, device)
                except ModelyardError as error:
                    assert "internal" not in str(error).lower(), error

        with at_stages(kill):
            await asyncio.gather(*(ask(name) for name in names), disturb())
        assert kills
        for name in names:
            np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
        await everything_leaves(yard, names)


# --- The end --------------------------------------------------------------------------------------


class StopHere(Exception):
    """The test stops the server now."""


@ENGINES
@pytest.mark.parametrize("stage", STAGES)
async def test_a_server_that_is_stopped_at_a_stage_stops_without_a_word(
    tmp_path: Path, stage: str, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = tier_config(tmp_path, engine=engine, copies=1)
    make_layers(tmp_path, "abc")
    reached = asyncio.Event()
    before = set(threading.enumerate())
    callers: list[asyncio.Task[Any]] = []

    def note(begun: str, model: str) -> None:
        if begun == stage:
            reached.set()

    with caplog.at_level(logging.WARNING), pytest.raises(StopHere):
        async with running_app(config, tmp_path) as yard:
            await create_layers(yard, "abc")
            for name in "ab":
                await answer_of(yard, name)
            with at_stages(note):
                row = np.zeros((1, 31), np.float32)
                steps: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
                    "demotion": lambda: yard.client.predict("c", row),
                    "promotion": lambda: yard.client.predict("a", row),
                    "drop": lambda: yard.admin(Admin.unload, "a"),
                }
                if stage == "demotion":
                    await yard.admin(Admin.unload, "a")
                callers.append(asyncio.create_task(steps[stage]()))
                async with asyncio.timeout(30):
                    await reached.wait()
            raise StopHere
    await asyncio.gather(*callers, return_exceptions=True)
    ours = [record for record in caplog.records if record.name.startswith("modelyard")]
    assert not [record for record in ours if record.levelno >= logging.ERROR]

    def lanes() -> list[str]:
        return [
            thread.name
            for thread in set(threading.enumerate()) - before
            if thread.name.startswith(("lane-", "load-", "price", "copies"))
        ]

    await eventually("no thread of the engine is left", lambda: not lanes())


# --- Whoever reads from what is dropped -----------------------------------------------------------


class Reading:
    """Holds up loads that read from copies."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.is_begun = threading.Event()
        self.may_go_on = threading.Event()
        reading = Copies.reading

        @contextmanager
        def held(copies: Copies, identities: Any) -> Iterator[Any]:
            with reading(copies, identities) as rooms:
                if rooms:
                    self.is_begun.set()
                    assert self.may_go_on.wait(60)
                yield rooms

        patch.setattr(Copies, "reading", held)


@pytest.fixture
def readers() -> Iterator[Reading]:
    with pytest.MonkeyPatch.context() as patch:
        reading = Reading(patch)
        try:
            yield reading
        finally:
            reading.may_go_on.set()


async def test_a_copy_is_dropped_while_a_load_of_another_model_reads_what_they_share(
    tmp_path: Path, readers: Reading
) -> None:
    folders = make_family(tmp_path / "models", ["m0", "m1"], seed=1)
    config = tier_config(tmp_path, copies=8, models_per_device=4)
    config += "".join(classifier(folder, device="cuda:0") for folder in folders)
    texts = ["the big dog ran", "a bird flew over the river house"]
    async with running_app(config, tmp_path) as yard:

        async def check(name: str) -> None:
            outputs = await yard.client.predict(name, texts, timeout_s=60)
            expected = classes(tmp_path / "models" / name)
            np.testing.assert_array_equal(np.asarray(outputs["probabilities"]), expected)

        await check("m0")
        # All of it, so that they leave: the copy of m0 alone has what m1 will read.
        size = (await yard.device("cuda:0")).budget_bytes
        await yard.admin(
            Admin.create_model,
            "big",
            runtime="identity",
            options={"size_bytes": size},
            placement="cuda:0",
        )
        await yard.client.predict("big", np.zeros(1, np.float32))
        assert (await tier_of(yard)).copy_count == 1
        load = asyncio.create_task(check("m1"))
        await asyncio.to_thread(readers.is_begun.wait, 60)
        # Its memory cannot be back, and is not said to be; nobody else waits for it.
        unloaded = await yard.admin(Admin.unload, "m0")
        tier = (await yard.admin(Admin.stats)).host_tier
        assert tier is not None
        assert tier.draining_bytes == tier.accounted_bytes == tier.measured_bytes > 0
        assert (unloaded.copy_state, unloaded.copy_bytes) == (
            CopyState.DROPPING,
            tier.draining_bytes,
        )
        assert not load.done()
        readers.may_go_on.set()
        await load

        async def is_back() -> bool:
            tier = (await yard.admin(Admin.stats)).host_tier
            assert tier is not None
            return tier.accounted_bytes == tier.measured_bytes == 0

        await eventually("the memory of the copy is back", is_back)
        await check("m0")
        kinds = [event.type for event in await told(yard) if event.subject == "models/m0"]
        assert EventType.COPY_DROPPED in kinds
        assert EventType.QUARANTINED not in kinds


@pytest.mark.parametrize("deed", ["unload", "delete", "pin", "cancel"])
async def test_what_happens_to_a_model_while_its_load_reads_from_its_copy(
    tmp_path: Path, readers: Reading, deed: str
) -> None:
    config = tier_config(tmp_path, copies=2)
    answers = make_layers(tmp_path, "ab")
    async with running_app(config, tmp_path) as yard:
        await create_layers(yard, "ab")
        for name in "ab":
            await answer_of(yard, name)
        assert await copies_of(yard) == "a"
        load = asyncio.create_task(answer_of(yard, "a"))
        await asyncio.to_thread(readers.is_begun.wait, 60)
        did: asyncio.Task[Any] | None = None
        match deed:
            case "unload":
                did = asyncio.create_task(yard.admin(Admin.unload, "a"))
            case "delete":
                did = asyncio.create_task(yard.admin(Admin.delete_model, "a"))
                assert (await refusal_of(load)).reason == "MODEL_NOT_FOUND"
            case "pin":
                await yard.admin(Admin.pin, "a")
            case _:
                load.cancel()
        readers.may_go_on.set()
        if did is not None:
            await did
        if deed in ("unload", "pin"):
            np.testing.assert_array_equal(await load, answers["a"])
        else:
            await asyncio.wait([load])
        if deed == "pin":
            await yard.admin(Admin.unpin, "a")
        await yard.at_rest()

        async def is_settled() -> bool:
            tier = (await yard.admin(Admin.stats)).host_tier
            assert tier is not None
            return tier.quarantined_bytes == 0

        await eventually("nothing is missing", is_settled)
        # Its copy stays, unless it was asked to leave; that of b was made when b gave way.
        assert await copies_of(yard) == ("b" if deed in ("unload", "delete") else "ab")
        await everything_leaves(yard, "b" if deed == "delete" else "ab")


# --- Memory ---------------------------------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/statm").read_text(encoding="ascii")
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_the_memory_of_a_worker_is_back_when_everything_was_dropped(tmp_path: Path) -> None:
    config = tier_config(tmp_path, engine="process", copies=6)
    names = "abcdef"
    answers = make_layers(tmp_path, names)
    async with running_app(config, tmp_path) as yard:
        await create_layers(yard, names)
        pid = worker_pid(yard)
        assert pid is not None
        sizes = []
        for _ in range(4):
            for name in names + names[0]:
                np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
            tier = await tier_of(yard)
            assert tier.copy_count == 6
            full = resident_bytes(pid)
            await everything_leaves(yard, names)
            sizes.append(resident_bytes(pid))
            # What was measured really was there, and has really gone.
            assert full - sizes[-1] > 5 * COPY_BYTES
        assert worker_pid(yard) == pid
        assert sizes[-1] - sizes[0] < MODEL_BYTES


# --- Tiers of all sizes ---------------------------------------------------------------------------


@ENGINES
async def test_a_tier_of_one_byte_is_a_tier_without_copies(tmp_path: Path, engine: str) -> None:
    config = tier_config(tmp_path, engine=engine, copies=1)
    lines = [
        "budget = 1" if previous == "[host_tier]" else line
        for previous, line in zip(["", *config.splitlines()], config.splitlines(), strict=False)
    ]
    answers = make_layers(tmp_path, "ab")
    async with running_app("\n".join(lines), tmp_path) as yard:
        await create_layers(yard, "ab")
        for name in "abab":
            np.testing.assert_array_equal(await answer_of(yard, name), answers[name])
        tier = await tier_of(yard)
        assert (tier.budget_bytes, tier.kept_count, tier.peak_bytes) == (1, 0, 0)
