"""Models that have tensors in common, through the whole server: charged once, and never wrong.

What a server says is compared with books that are kept from the files alone, and what its models
answer with what the library answers.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.config_text import device_table
from tests.support.server import RunningApp, refusal_of, running_app
from tests.support.sharing import (
    SHARED_STORE,
    TEXTS,
    Books,
    auditing,
    classes,
    classifier,
    create,
    create_big,
    make_family,
    telling,
    told,
)

from modelyard import Admin, BudgetExhausted, EventType, ModelNeverFits, ResidencyState

ENGINES = pytest.mark.parametrize("engine", ["thread", "process"])


def engine_table(kind: str) -> str:
    return f'\n[engine]\nkind = "{kind}"\n'


async def ask(yard: RunningApp, model: str) -> np.ndarray[Any, Any]:
    answer = await yard.client.predict(model, TEXTS, timeout_s=60)
    return np.asarray(answer["probabilities"])


@ENGINES
async def test_fifty_fine_tunes_are_resident_in_one_encoder_and_fifty_heads(
    tmp_path: Path, engine: str
) -> None:
    folders = make_family(tmp_path / "models", [f"m{i:02}" for i in range(50)], seed=1)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    budget = books.held(wanted)
    whole = books.sizes["m00"]
    assert budget < 2 * whole.total_bytes
    config = SHARED_STORE + engine_table(engine) + device_table("cpu", budget, threads=1)
    config += "".join(classifier(folder) for folder in folders)
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for number, name in enumerate(wanted, start=1):
                np.testing.assert_array_equal(await ask(yard, name), wanted[name])
                if number in (1, 2, 25):
                    assert len((await books.check(yard))["devices/cpu"]) == number
            found = await asyncio.gather(*(ask(yard, name) for name in wanted))
            for name, answer in zip(wanted, found, strict=True):
                np.testing.assert_array_equal(answer, wanted[name])
            assert (await books.check(yard))["devices/cpu"] == set(wanted)
            device = await yard.device()
            assert device.accounted_bytes == device.peak_accounted_bytes == budget
            assert device.peak_measured_bytes == budget
            assert (device.load_count, device.eviction_count) == (50, 0)
            assert telling(books, await told(yard)) == set(wanted)

            # The first to come leaves like any other: with its head alone.
            residency = await yard.admin(Admin.unload, "m00")
            assert residency.state is ResidencyState.COLD
            assert (await books.check(yard))["devices/cpu"] == set(wanted) - {"m00"}
            story = await yard.admin(Admin.explain, "m00")
            (evicted,) = [e for e in story.events if e.type is EventType.EVICTED]
            (unloaded,) = [e for e in story.events if e.type is EventType.UNLOADED]
            shared = books.shared("m00", ["m01"])
            assert (evicted.size_bytes, evicted.shared_bytes) == (
                whole.total_bytes - shared,
                shared,
            )
            assert unloaded.size_bytes == whole.total_bytes - shared
            assert device.accounted_bytes - budget == 0

            # With the last one the encoder leaves as well.
            for name in sorted(wanted)[1:]:
                await yard.admin(Admin.unload, name)
            assert (await yard.device()).accounted_bytes == 0
            await books.check(yard)
            events = await told(yard)
            assert telling(books, events) == set()
            assert events[-1].size_bytes == whole.total_bytes
            np.testing.assert_array_equal(await ask(yard, "m07"), wanted["m07"])
            await books.check(yard)


@ENGINES
async def test_a_big_stranger_displaces_as_many_as_it_takes_and_no_more(
    tmp_path: Path, engine: str
) -> None:
    folders = make_family(tmp_path / "models", [f"m{i:02}" for i in range(12)], seed=1)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    head = books.sizes["m00"].total_bytes - books.shared("m00", ["m01"])
    encoder = books.shared("m00", ["m01"])
    free = 1000
    budget = books.held(wanted) + free
    config = SHARED_STORE + engine_table(engine) + device_table("cpu", budget, threads=1)
    config += "".join(classifier(folder) for folder in folders)
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for name, size_bytes, leave in (
                ("none", free, 0),
                ("one", free + 1, 1),
                ("three", free + 3 * head, 3),
                ("four", free + 3 * head + 1, 4),
                ("eleven", free + 11 * head, 11),
                # A byte more, and the last of them leaves with the encoder.
                ("all", free + 11 * head + 1, 12),
                ("full", free + 12 * head + encoder, 12),
            ):
                for model in wanted:
                    np.testing.assert_array_equal(await ask(yard, model), wanted[model])
                assert (await books.check(yard))["devices/cpu"] == set(wanted)
                await create_big(yard, books, name, size_bytes)
                await yard.client.predict(name, np.zeros(1, np.float32))
                after = (await books.check(yard))["devices/cpu"]
                assert len(wanted.keys() - after) == leave, name
                assert name in after
                for model in sorted(after & wanted.keys())[:2]:
                    np.testing.assert_array_equal(await ask(yard, model), wanted[model])
                assert (await books.check(yard))["devices/cpu"] == after
                await yard.admin(Admin.delete_model, name)
            over = budget + 1
            error = await refusal_of(create_big(yard, books, "over", over))
            assert isinstance(error, ModelNeverFits)
            telling(books, await told(yard))


async def test_pinned_fine_tunes_keep_the_encoder_and_their_heads_alone(tmp_path: Path) -> None:
    folders = make_family(tmp_path / "models", [f"m{i}" for i in range(6)], seed=1)
    books = Books()
    books.add_family(folders)
    wanted = {folder.name: classes(folder) for folder in folders}
    held = books.held(["m1", "m4"])
    budget = books.held(wanted)
    config = SHARED_STORE + device_table("cpu", budget, threads=1)
    config += "".join(classifier(folder) for folder in folders)
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for name in wanted:
                await ask(yard, name)
            for name in ("m1", "m4"):
                assert (await yard.admin(Admin.pin, name)).pinned
            await create_big(yard, books, "fits", budget - held)
            await create_big(yard, books, "more", budget - held + 1)
            error = await refusal_of(yard.client.predict("more", np.zeros(1, np.float32)))
            assert isinstance(error, BudgetExhausted)
            # What cannot be done has disturbed nobody.
            assert (await books.check(yard))["devices/cpu"] == set(wanted)
            await yard.client.predict("fits", np.zeros(1, np.float32))
            assert (await books.check(yard))["devices/cpu"] == {"m1", "m4", "fits"}
            for name in ("m4", "m1"):
                np.testing.assert_array_equal(await ask(yard, name), wanted[name])
            await yard.admin(Admin.unpin, "m1")
            # One head for another: the encoder stays for the one that is pinned.
            await create_big(yard, books, "less", budget - books.held(["m4"]))
            await yard.client.predict("less", np.zeros(1, np.float32))
            assert (await books.check(yard))["devices/cpu"] == {"m4", "less"}
            telling(books, await told(yard))


@ENGINES
async def test_answers_are_right_while_two_families_displace_each_other(
    tmp_path: Path, engine: str
) -> None:
    books = Books()
    families = {}
    for letter, seed in (("a", 1), ("b", 2)):
        names = [f"{letter}{i}" for i in range(4)]
        families[letter] = make_family(tmp_path / "models", names, seed=seed)
        books.add_family(families[letter])
    wanted = {f.name: classes(f) for folders in families.values() for f in folders}
    # One of the families and a half: whoever asks the other one has some of this one leave.
    budget = books.held(f"a{i}" for i in range(4)) + books.sizes["b0"].total_bytes
    config = SHARED_STORE + engine_table(engine) + device_table("cpu", budget - 1, threads=1)
    config += "".join(classifier(folder) for folders in families.values() for folder in folders)
    clients, count = 4, 100
    wrong: list[str] = []
    with auditing():
        async with running_app(config, tmp_path) as yard:

            async def client(seed: int) -> None:
                chance = random.Random(seed)
                names = sorted(wanted)
                for _ in range(count):
                    # For a while the same one, so that hits stand beside loads.
                    name = chance.choice(names)
                    for _ in range(chance.choice([1, 1, 3])):
                        # Requests share runs, and what is rounded depends on who is beside one.
                        if not np.allclose(await ask(yard, name), wanted[name], atol=1e-5):
                            wrong.append(name)

            async with asyncio.TaskGroup() as group:
                for seed in range(clients):
                    group.create_task(client(seed))
            assert wrong == []
            where = await books.check(yard)
            assert where["devices/cpu"]
            device = await yard.device()
            assert device.eviction_count > 20
            assert device.load_count > 20
            assert device.peak_accounted_bytes <= device.budget_bytes
            assert device.peak_measured_bytes <= device.budget_bytes


async def test_models_in_parts_share_nothing_and_each_device_is_charged_for_itself(
    tmp_path: Path,
) -> None:
    folders = make_family(tmp_path / "models", [f"m{i}" for i in range(4)], seed=1)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    whole = books.sizes["m0"].total_bytes
    config = SHARED_STORE + device_table("cuda:0", "1MB", logical=True, threads=1)
    config += device_table("cuda:1", "1MB", logical=True, threads=1)
    one, other = "devices/cuda-0", "devices/cuda-1"
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for folder, device in zip(folders, ["cuda:0", "cuda:1"] * 2, strict=True):
                await create(yard, folder, placement=device)
                await ask(yard, folder.name)
            # The same encoder twice: once for each of the memories.
            assert await books.check(yard) == {one: {"m0", "m2"}, other: {"m1", "m3"}}
            before = [device.accounted_bytes for device in await yard.admin(Admin.list_devices)]
            saved = [device.saved_bytes for device in await yard.admin(Admin.list_devices)]
            for name in ("p0", "p1"):
                parts = {"": "cuda:0", "bert.encoder.layer.1": "cuda:1"}
                await create(yard, folders[0], model=name, placement=parts)
                np.testing.assert_array_equal(await ask(yard, name), wanted["m0"])
            await yard.at_rest()
            devices = await yard.admin(Admin.list_devices)
            more = [d.accounted_bytes - b for d, b in zip(devices, before, strict=True)]
            assert all(more)
            assert sum(more) == 2 * whole
            assert [device.saved_bytes for device in devices] == saved
            assert [device.measured_bytes for device in devices] == [
                device.resident_bytes for device in devices
            ]
            for name in ("p0", "p1"):
                charges = (await yard.residency(name)).charges
                assert sum(charge.size_bytes for charge in charges) == whole
                assert [charge.shared_bytes for charge in charges] == [0, 0]
                await yard.admin(Admin.unload, name)
                np.testing.assert_array_equal(await ask(yard, "m0"), wanted["m0"])
            await yard.admin(Admin.delete_model, "p0")
            await yard.admin(Admin.delete_model, "p1")
            assert await books.check(yard) == {one: {"m0", "m2"}, other: {"m1", "m3"}}


async def test_a_model_that_may_be_on_two_devices_shares_where_it_is(tmp_path: Path) -> None:
    folders = make_family(tmp_path / "models", [f"m{i}" for i in range(6)], seed=1)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    # Three on each; the fourth does not fit.
    budget = books.held(["m0", "m1", "m2"])
    config = SHARED_STORE + "".join(
        device_table(f"cuda:{i}", budget, logical=True, threads=1) for i in range(2)
    )
    placement = {"strategy": "auto", "devices": ["cuda:0", "cuda:1"]}
    one, other = "devices/cuda-0", "devices/cuda-1"
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for folder in folders:
                await create(yard, folder, placement=placement)
                np.testing.assert_array_equal(await ask(yard, folder.name), wanted[folder.name])
            where = await books.check(yard)
            assert {device: len(models) for device, models in where.items()} == {one: 3, other: 3}
            await yard.admin(Admin.drain_device, "cuda:0")
            for name in sorted(where[one]):
                np.testing.assert_array_equal(await ask(yard, name), wanted[name])
            drained = await books.check(yard)
            assert drained[one] == set()
            assert len(drained[other]) == 3
            await yard.admin(Admin.undrain_device, "cuda:0")
            for name in wanted:
                np.testing.assert_array_equal(await ask(yard, name), wanted[name])
            where = await books.check(yard)
            assert {device: len(models) for device, models in where.items()} == {one: 3, other: 3}
