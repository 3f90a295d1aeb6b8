"""Models that have tensors in common on devices that count every byte, through the whole server.

What one load brings onto a device is one allocation, and goes back as a whole. So what a model had
alone may have to wait for others who still use the rest: it is quarantined, not free.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.config_text import device_table
from tests.support.fakegpu import UNLIMITED_BYTES, FakeGpu
from tests.support.fakegpu import load as load_fakegpu
from tests.support.part_devices import FakeDevices, nothing_is_left
from tests.support.server import RunningApp, eventually, running_app
from tests.support.sharing import (
    SHARED_STORE,
    TEXTS,
    Books,
    auditing,
    classes,
    create,
    make_blend,
    make_family,
)
from tests.support.stored_models import stored_model

from modelyard import Admin, ResidencyState
from modelyard_server.execution.lane import Lane
from modelyard_server.residency import transfers
from modelyard_server.weights.holding import Holding, WeightPool

# Whoever comes first builds the library.
pytestmark = pytest.mark.timeout(900)

WIDTH = LABELS = 64
"""So that every tensor is a multiple of what tensors are aligned to: nothing lies between them."""


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = load_fakegpu()
    gpu.reset()
    with nothing_is_left(FakeDevices(gpu)):
        yield gpu
    gpu.reset()


@pytest.fixture(autouse=True)
def only_unloads_bring_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is looked for again only after an hour must be found when another model leaves."""
    monkeypatch.setattr(transfers, "_RECHECK_S", (3600.0,))


@asynccontextmanager
async def serving(base: Path, gpu: FakeGpu, budget: int) -> AsyncIterator[RunningApp]:
    """A server with the device cuda:0 of so many bytes, and no byte more for it to hold."""
    config = SHARED_STORE + device_table("cpu", "64MB", threads=1)
    config += device_table("cuda:0", budget, threads=1)
    devices = FakeDevices(gpu)
    with auditing():
        async with running_app(config, base, probes=devices.probes(base / "models")) as yard:
            gpu.set_budget(0, budget)
            yield yard


async def ask(yard: RunningApp, gpu: FakeGpu, model: str) -> np.ndarray[Any, Any]:
    """Asks a model. What a run needs besides is no matter of these tests."""
    budget = gpu.budget_bytes(0)
    gpu.set_budget(0, UNLIMITED_BYTES)
    try:
        answer = await yard.client.predict(model, TEXTS, timeout_s=60)
    finally:
        gpu.set_budget(0, budget)
    return np.asarray(answer["probabilities"])


async def load(yard: RunningApp, model: str) -> None:
    await yard.admin(Admin.load, model)
    await yard.becomes(model, ResidencyState.RESIDENT)


async def test_what_cannot_go_back_yet_is_quarantined_and_comes_back_after_the_last(
    tmp_path: Path, gpu: FakeGpu
) -> None:
    names = ["m0", "m1", "m2"]
    folders = make_family(tmp_path / "models", names, seed=1, labels=LABELS, width=WIDTH)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    budget = books.held(["m0", "m1"])
    own = books.sizes["m0"].total_bytes - books.shared("m0", ["m1"])
    async with serving(tmp_path, gpu, budget) as yard:
        for folder in folders:
            await create(yard, folder, placement="cuda:0")
        for name in ("m0", "m1"):
            await load(yard, name)
        await books.check(yard)
        assert gpu.used_bytes(0) == gpu.peak_bytes(0) == budget
        for name in ("m0", "m1"):
            np.testing.assert_allclose(await ask(yard, gpu, name), wanted[name], atol=1e-5)
        gpu.reset_peak(0)

        # The encoder came with it, in one allocation with its head.
        await yard.admin(Admin.unload, "m0")
        device = await yard.device("cuda:0")
        assert device.quarantined_bytes == own
        assert device.resident_bytes == books.held(["m1"])
        assert device.accounted_bytes == device.measured_bytes == budget
        (charge,) = (await yard.residency("m0")).quarantined
        assert (charge.device, charge.size_bytes) == ("devices/cuda-0", own)
        # All but what it has worked out for itself is still there.
        assert budget - 1024 <= gpu.used_bytes(0) <= budget
        np.testing.assert_allclose(await ask(yard, gpu, "m1"), wanted["m1"], atol=1e-5)
        assert (await yard.residency("m1")).load_count == 1

        # Nobody gets it: the third has room only when the second has left.
        gpu.reset_peak(0)
        await load(yard, "m2")
        assert gpu.peak_bytes(0) <= budget
        assert (await yard.residency("m1")).state is ResidencyState.COLD

        async def is_back() -> bool:
            return not (await yard.residency("m0")).quarantined

        await eventually("its memory is back", is_back)
        assert (await books.check(yard))["devices/cuda-0"] == {"m2"}
        assert gpu.used_bytes(0) == books.held(["m2"])
        for name in ("m0", "m2"):
            await load(yard, name)
            np.testing.assert_allclose(await ask(yard, gpu, name), wanted[name], atol=1e-5)
        assert (await books.check(yard))["devices/cuda-0"] == {"m0", "m2"}
        assert gpu.used_bytes(0) == budget
        for name in ("m0", "m2"):
            await yard.admin(Admin.unload, name)
        await eventually("its memory is back", is_back)
        assert gpu.used_bytes(0) == 0
        await books.check(yard)


async def test_what_the_last_holder_leaves_in_anothers_allocation_is_not_free(
    tmp_path: Path, gpu: FakeGpu
) -> None:
    """The first has brought what the second and third have, and the second more of it."""
    models = {"m0": (1, 1, 1, 1), "m1": (1, 1, 1, 2), "m2": (1, 2, 2, 3)}
    books = Books()
    for name, choice in models.items():
        folder = make_blend(tmp_path / "models", name, choice, labels=LABELS, width=WIDTH)
        books.add_family([folder])
    async with serving(tmp_path, gpu, books.held(models)) as yard:
        for name in models:
            await create(yard, tmp_path / "models" / name, placement="cuda:0")
            await load(yard, name)
        await books.check(yard)
        for name in ("m0", "m1"):
            await yard.admin(Admin.unload, name)
            device = await yard.device("cuda:0")
            assert gpu.used_bytes(0) <= device.accounted_bytes
        # Room for what the two layers take; on the device they are still there.
        await load(yard, "m1")
        await yard.at_rest()
        assert gpu.used_bytes(0) <= (await yard.device("cuda:0")).accounted_bytes
        for name in models:
            await yard.admin(Admin.unload, name)

        async def is_empty() -> bool:
            return (await yard.device("cuda:0")).accounted_bytes == 0

        await eventually("everything is back", is_empty)
        assert gpu.used_bytes(0) == 0


async def test_an_unload_that_ends_before_the_loop_looks_frees_what_another_was_found_to_miss(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine loaders run ahead of the loop: two unloads are told of together.

    The memory that the first could not get back has come back with the second, before the first was
    told of. It must be found, and what the same model leaves the next time must not pass for it.
    """
    together = 1
    deliver = Lane._deliver

    def deliver_together(lane: Lane) -> None:
        if lane._thread.name.startswith("load-") and len(lane._done) < together:
            asyncio.get_running_loop().call_soon(lane._deliver)
        else:
            deliver(lane)

    books = Books()
    for name, choice in {"m0": (1, 1, 1, 1), "m1": (1, 2, 2, 2)}.items():
        folder = make_blend(tmp_path / "models", name, choice, labels=LABELS, width=WIDTH)
        books.add_family([folder])
    alone = books.sizes["m0"].total_bytes - books.shared("m0", ["m1"])
    async with serving(tmp_path, gpu, 2 * books.held(["m0", "m1"])) as yard:
        for name in ("m0", "m1"):
            await create(yard, tmp_path / "models" / name, placement="cuda:0")
            await load(yard, name)
        with monkeypatch.context() as patch:
            patch.setattr(Lane, "_deliver", deliver_together)
            together = 2
            first = asyncio.create_task(yard.admin(Admin.unload, "m0"))
            await yard.becomes("m0", ResidencyState.UNLOADING)
            await asyncio.gather(first, yard.admin(Admin.unload, "m1"))
        assert gpu.used_bytes(0) == 0
        for name in ("m0", "m1"):
            await load(yard, name)
        await yard.admin(Admin.unload, "m0")
        await yard.at_rest()
        device = await yard.device("cuda:0")
        assert gpu.used_bytes(0) <= device.accounted_bytes
        assert device.quarantined_bytes == alone
        await yard.admin(Admin.unload, "m1")

        async def is_empty() -> bool:
            return (await yard.device("cuda:0")).accounted_bytes == 0

        await eventually("everything is back", is_empty)
        assert gpu.used_bytes(0) == 0


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_device_never_holds_more_than_its_ledger_says(
    tmp_path: Path, gpu: FakeGpu, seed: int
) -> None:
    chance = random.Random(seed)
    names = [f"x{i}" for i in range(6)]
    books = Books()
    folders = [
        make_blend(
            tmp_path / "models",
            name,
            [chance.randrange(2) for _ in range(4)],
            labels=LABELS,
            width=WIDTH,
        )
        for name in names
    ]
    books.add_family(folders)
    wanted = {folder.name: classes(folder) for folder in folders}
    budget = books.held(names) * 2 // 3
    async with serving(tmp_path, gpu, budget) as yard:
        for folder in folders:
            await create(yard, folder, placement="cuda:0")
        for _ in range(60):
            name = chance.choice(names)
            if chance.random() < 0.3:
                await yard.admin(Admin.unload, name)
            else:
                # Another that is in memory is asked to leave only when that makes room.
                np.testing.assert_allclose(await ask(yard, gpu, name), wanted[name], atol=1e-5)
            await yard.at_rest()
            device = await yard.device("cuda:0")
            assert gpu.used_bytes(0) <= device.accounted_bytes <= budget
            inside = [
                each.model.removeprefix("models/")
                for each in await yard.admin(Admin.list_residencies)
                if each.state is ResidencyState.RESIDENT
            ]
            assert device.resident_bytes == books.held(inside)
            if not device.quarantined_bytes:
                assert gpu.used_bytes(0) == device.resident_bytes
        for name in names:
            await yard.admin(Admin.unload, name)

        async def is_empty() -> bool:
            return (await yard.device("cuda:0")).accounted_bytes == 0

        await eventually("everything is back", is_empty)
        assert gpu.used_bytes(0) == 0


@pytest.mark.parametrize("seed", [100, 106])
async def test_a_device_holds_no_more_while_models_come_and_go_at_once(
    tmp_path: Path, gpu: FakeGpu, seed: int
) -> None:
    """One is being unloaded while another is loaded that has something in common with it."""
    chance = random.Random(seed)
    names = [f"x{i}" for i in range(6)]
    books = Books()
    for name in names:
        choice = [chance.randrange(2) for _ in range(4)]
        folder = make_blend(tmp_path / "models", name, choice, labels=LABELS, width=WIDTH)
        books.add_family([folder])
    budget = books.held(names)
    async with serving(tmp_path, gpu, budget) as yard:
        for name in names:
            await create(yard, tmp_path / "models" / name, placement="cuda:0")
        for _ in range(40):
            deeds = [
                yard.admin(Admin.unload if chance.random() < 0.5 else Admin.load, name)
                for name in chance.sample(names, 4)
            ]
            await asyncio.gather(*deeds)
            await yard.at_rest()
            device = await yard.device("cuda:0")
            assert gpu.used_bytes(0) <= device.accounted_bytes <= budget
            found = await yard.admin(Admin.list_residencies)
            # The device itself had room for every load.
            assert [each.failure for each in found] == [None] * len(names)
        for name in names:
            await yard.admin(Admin.unload, name)
        assert gpu.used_bytes(0) == 0
        assert gpu.peak_bytes(0) <= budget


def test_what_nobody_holds_in_an_allocation_that_is_kept_can_be_joined_again(
    tmp_path: Path, gpu: FakeGpu
) -> None:
    first, second, third = (torch.full((64,), float(value)) for value in range(3))
    pool = WeightPool()

    def take(name: str, tensors: dict[str, torch.Tensor]) -> Holding:
        model = stored_model(tmp_path / name, tensors)
        return pool.take(
            model, position=0, torch_device="fakegpu:0", names=None, stop=lambda: False
        )

    both = take("a", {"first": first, "second": second})
    one = take("b", {"first": first})
    assert gpu.used_bytes(0) == pool.bytes(0) == 512
    borrowed = one.borrowed
    assert borrowed() is not None
    both.release()
    assert (pool.bytes(0), pool.stranded_bytes(0), gpu.used_bytes(0)) == (256, 256, 512)
    again = take("c", {"second": second, "third": third})
    assert (pool.bytes(0), pool.stranded_bytes(0), gpu.used_bytes(0)) == (768, 0, 768)
    assert torch.equal(again.tensors["second"].cpu(), second)
    # It is the last one to have the first tensor, which stays for the sake of the second.
    one.release()
    assert borrowed() is not None
    once_more = take("d", {"first": first})
    assert borrowed() is None
    assert gpu.used_bytes(0) == 768
    assert torch.equal(once_more.tensors["first"].cpu(), first)
    once_more.release()
    assert pool.stranded_bytes(0) == 256
    # The allocation goes with the last tensor in it that somebody has.
    again.release()
    assert (pool.bytes(0), pool.stranded_bytes(0), gpu.used_bytes(0)) == (0, 0, 0)
    assert once_more.borrowed() is None
