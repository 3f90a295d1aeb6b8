"""What operators do to models with tensors in common: the forecast, the deed, and the books."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
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
    make_blend,
    make_family,
    told,
)

from modelyard import (
    Admin,
    BudgetExhausted,
    DevicePlan,
    DeviceSetting,
    EventType,
    ModelPlacement,
    ModelyardError,
    PlanReport,
    read_placement,
)

ONE, OTHER = "devices/cuda-0", "devices/cuda-1"
DEVICES = ("cuda:0", "cuda:1")


def two_devices(*budgets: int) -> str:
    return "".join(
        device_table(device, budget, logical=True, threads=1)
        for device, budget in zip(DEVICES, budgets, strict=True)
    )


async def ask(yard: RunningApp, model: str) -> np.ndarray[Any, Any]:
    answer = await yard.client.predict(model, TEXTS, timeout_s=60)
    return np.asarray(answer["probabilities"])


@asynccontextmanager
async def asking(
    yard: RunningApp, model: str, *wanted: np.ndarray[Any, Any]
) -> AsyncIterator[None]:
    """Asks a model meanwhile; every answer has to be one of those."""
    over = asyncio.Event()

    async def client() -> None:
        while not over.is_set():
            answer = await ask(yard, model)
            # A run that others share rounds differently: docs/configuration.md, Batching.
            assert any(np.allclose(answer, each, rtol=0, atol=1e-6) for each in wanted)

    async with asyncio.TaskGroup() as group:
        group.create_task(client())
        try:
            yield
        finally:
            over.set()


# --- Device plans -----------------------------------------------------------------------------


def random_plan(chance: random.Random, models: Sequence[str], least: int, total: int) -> DevicePlan:
    """A change of one or two budgets, drains or placements."""
    devices: dict[str, DeviceSetting] = {}
    placements: dict[str, ModelPlacement] = {}
    for _ in range(chance.randint(1, 2)):
        device = chance.choice(DEVICES)
        match chance.randrange(4):
            case 0:
                # Any of them fits, alone.
                budget = chance.randrange(least, total)
                devices[device] = DeviceSetting(device=device, budget_bytes=budget)
            case 1:
                drained = chance.random() < 0.4
                devices[device] = DeviceSetting(device=device, drained=drained)
            case _:
                for model in chance.sample(models, chance.randint(1, 3)):
                    placement = chance.choice([read_placement(device), None])
                    placements[model] = ModelPlacement(model=model, placement=placement)
    return DevicePlan(devices=tuple(devices.values()), models=tuple(placements.values()))


def came_true(
    report: PlanReport, before: Mapping[str, set[str]], after: Mapping[str, set[str]]
) -> None:
    """Checks who is where after a plan against what was said of it."""
    wanted = {device: set(models) for device, models in before.items()}
    for forecast in report.models:
        model = forecast.model.removeprefix("models/")
        for models in wanted.values():
            models.discard(model)
        for charge in forecast.planned:
            wanted[charge.device].add(model)
    assert after == wanted
    left = set().union(*before.values()) - set().union(*after.values())
    displaced = {each.model.removeprefix("models/") for each in report.displaced}
    # Who is not staged leaves its old place and is not said to be displaced.
    unstaged = {
        each.model.removeprefix("models/") for each in report.models if each.placement_changed
    }
    assert displaced <= left
    assert left <= displaced | unstaged


@pytest.mark.parametrize("seed", range(3))
async def test_what_a_plan_forecasts_comes_true(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    books, names = Books(), [f"x{i}" for i in range(8)]
    folders = [
        make_blend(tmp_path / "models", name, [chance.randrange(2) for _ in range(4)])
        for name in names
    ]
    books.add_family(folders)
    wanted = {folder.name: classes(folder) for folder in folders}
    least, total = books.sizes["x0"].total_bytes, books.held(names)
    # Other policies' scores change as time goes by, and with them who leaves.
    config = '\n[yard]\npolicy = "lru"\n' + SHARED_STORE + two_devices(total, total)
    applied = refused = 0
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for folder in folders:
                await create(yard, folder)
            for _ in range(25):
                for name in chance.sample(names, 4):
                    # Who has nowhere to go while its device is drained is left alone.
                    plan = await yard.admin(Admin.get_plan)
                    closed = {each.device for each in plan.devices if each.drained}
                    at = await places(yard, name)
                    if at - closed:
                        try:
                            answer = await ask(yard, name)
                        except ModelyardError as error:
                            assert isinstance(error, BudgetExhausted), error
                            continue
                        np.testing.assert_array_equal(answer, wanted[name])
                before = await books.check(yard)
                change = random_plan(chance, names, least, total)
                report = await yard.admin(Admin.plan_devices, change)
                if report.obstacles:
                    refused += 1
                    await refusal_of(yard.admin(Admin.apply_plan, change))
                    assert await books.check(yard) == before
                    continue
                done = await yard.admin(Admin.apply_plan, change, timeout_s=60)
                applied += 1
                assert done.report == report
                after = await books.check(yard)
                came_true(report, before, after)
                for device in report.devices:
                    assert device.used_bytes == books.held(after[device.device])
    assert applied > 10


async def places(yard: RunningApp, model: str) -> set[str]:
    """Devices that a model may be on."""
    found = await yard.admin(Admin.get_model, model)
    return {part.device for way in found.alternatives for part in way.parts}


async def test_fine_tunes_move_together_and_the_encoder_is_charged_once_in_the_new_place(
    tmp_path: Path,
) -> None:
    folders = make_family(tmp_path / "models", [f"m{i}" for i in range(5)], seed=1)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    # The other device has room for all of them only if they share.
    budget = books.held(wanted)
    move = DevicePlan(
        models=tuple(
            ModelPlacement(model=name, placement=read_placement("cuda:1")) for name in wanted
        )
    )
    with auditing():
        async with running_app(SHARED_STORE + two_devices(budget, budget), tmp_path) as yard:
            for folder in folders:
                await create(yard, folder, placement="cuda:0")
                await ask(yard, folder.name)
            before = await books.check(yard)
            report = await yard.admin(Admin.plan_devices, move)
            assert all(forecast.staged for forecast in report.models)
            assert report.displaced == ()
            assert report.obstacles == ()
            async with asking(yard, "m3", wanted["m3"]):
                done = await yard.admin(Admin.apply_plan, move, timeout_s=60)
            assert done.report == report
            after = await books.check(yard)
            came_true(report, before, after)
            assert after == {ONE: set(), OTHER: set(wanted)}
            used = {device.device: device.used_bytes for device in report.devices}
            assert used == {ONE: 0, OTHER: budget}
            for name in wanted:
                answer = await yard.client.predict(name, TEXTS)
                assert not answer.served.cold
                np.testing.assert_array_equal(answer["probabilities"], wanted[name])


async def test_a_lower_budget_has_as_many_leave_as_it_takes(tmp_path: Path) -> None:
    folders = make_family(tmp_path / "models", [f"m{i}" for i in range(8)], seed=1)
    books = Books()
    books.add_family(folders)
    names = sorted(books.sizes)
    wanted = {folder.name: classes(folder) for folder in folders}
    config = SHARED_STORE + device_table("cpu", books.held(names), threads=1)
    config += "".join(classifier(folder) for folder in folders)
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for name in names:
                await ask(yard, name)
            for stay, short in ((7, 0), (5, 1), (4, 0)):
                budget = books.held(names[:stay]) - short
                change = DevicePlan(devices=(DeviceSetting(device="cpu", budget_bytes=budget),))
                report = await yard.admin(Admin.plan_devices, change)
                before = await books.check(yard)
                await yard.admin(Admin.update_budget, "cpu", budget)
                after = await books.check(yard)
                came_true(report, before, after)
                assert len(after["devices/cpu"]) == stay - short
                assert report.devices[0].used_bytes == books.held(after["devices/cpu"])
                for name in after["devices/cpu"]:
                    np.testing.assert_array_equal(await ask(yard, name), wanted[name])
            # Pinned ones are counted as they are held: once.
            pinned = sorted((await books.check(yard))["devices/cpu"])[:3]
            for name in pinned:
                await yard.admin(Admin.pin, name)
            least = books.held(pinned)
            error = await refusal_of(yard.admin(Admin.update_budget, "cpu", least - 1))
            assert isinstance(error, BudgetExhausted), error
            assert len((await books.check(yard))["devices/cpu"]) == 4
            await yard.admin(Admin.update_budget, "cpu", least)
            assert (await books.check(yard))["devices/cpu"] == set(pinned)
            await yard.admin(Admin.update_budget, "cpu", books.held(names))
            for name in names:
                np.testing.assert_array_equal(await ask(yard, name), wanted[name])
            assert (await books.check(yard))["devices/cpu"] == set(names)


async def test_what_rebalancing_forecasts_comes_true(tmp_path: Path) -> None:
    folders = make_family(tmp_path / "models", [f"a{i}" for i in range(3)], seed=1)
    folders += make_family(tmp_path / "models", [f"b{i}" for i in range(3)], seed=2)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    budget = books.held(wanted)
    anywhere = {"strategy": "auto", "devices": list(DEVICES)}
    with auditing():
        async with running_app(SHARED_STORE + two_devices(budget, budget), tmp_path) as yard:
            await yard.admin(Admin.drain_device, "cuda:1")
            for folder in folders:
                await create(yard, folder, placement=anywhere)
                await ask(yard, folder.name)
            assert (await books.check(yard))[ONE] == set(wanted)
            await yard.admin(Admin.undrain_device, "cuda:1")
            said = await yard.admin(Admin.rebalance_devices, validate_only=True)
            assert (await books.check(yard))[ONE] == set(wanted)
            async with asking(yard, "a1", wanted["a1"]):
                done = await yard.admin(Admin.rebalance_devices)
            assert [move.model for move in done.moves] == [move.model for move in said.moves]
            assert said.moves
            after = await books.check(yard)
            assert set().union(*after.values()) == set(wanted)
            for device in done.devices:
                assert device.used_bytes == books.held(after[device.device])
            assert said.devices == done.devices
            # It has been evened out: nothing is left to do.
            assert (await yard.admin(Admin.rebalance_devices)).moves == ()
            for name in wanted:
                np.testing.assert_array_equal(await ask(yard, name), wanted[name])


# --- Models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["thread", "process"])
async def test_an_heir_shares_with_the_model_whose_place_it_takes(
    tmp_path: Path, engine: str
) -> None:
    folders = make_family(tmp_path / "models", ["m0", "m1", "new"], seed=1)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    # Both encoders would not fit; the heads of all three do.
    config = SHARED_STORE + f'\n[engine]\nkind = "{engine}"\n'
    config += device_table("cpu", books.held(wanted), threads=1)
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for folder in folders[:2]:
                await create(yard, folder)
                await ask(yard, folder.name)
            await yard.admin(Admin.pin, "m0")
            async with asking(yard, "m0", wanted["m0"], wanted["new"]):
                await yard.admin(Admin.update_model, "m0", root="models", folder="new")
                np.testing.assert_allclose(await ask(yard, "m0"), wanted["new"], rtol=0, atol=1e-6)
            events = await told(yard)
            about = [e.type for e in events if e.subject == "models/m0"]
            updated = about.index(EventType.MODEL_UPDATED)
            # Loaded beside the old one, which left only then; and nobody else had to.
            assert about[:updated].count(EventType.LOAD_DONE) == 2
            assert about.count(EventType.UNLOADED) == 1
            loads = [e for e in events if e.type is EventType.LOAD_DONE]
            assert loads[-1].shared_bytes == books.shared("new", ["m1"])
            assert (await yard.residency("m1")).load_count == 1
            assert (await yard.residency("m0")).pinned
            books.sizes["m0"] = books.sizes["new"]
            assert (await books.check(yard))["devices/cpu"] == {"m0", "m1"}


async def test_an_only_model_is_changed_to_another_fine_tune_within_a_tight_budget(
    tmp_path: Path,
) -> None:
    """Its tensors are one share until the change cuts them in two."""
    folders = make_family(tmp_path / "models", ["m0", "new", "newer"], seed=1)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    config = SHARED_STORE + device_table("cpu", books.held(["m0", "new"]), threads=1)
    with auditing():
        async with running_app(config, tmp_path) as yard:
            await create(yard, folders[0])
            await ask(yard, "m0")
            old = "m0"
            for folder in ("new", "newer", "m0", "new"):
                async with asking(yard, "m0", wanted[old], wanted[folder]):
                    await yard.admin(Admin.update_model, "m0", root="models", folder=folder)
                    np.testing.assert_allclose(
                        await ask(yard, "m0"), wanted[folder], rtol=0, atol=1e-6
                    )
                books.sizes["m0"] = books.sizes[folder]
                assert (await books.check(yard))["devices/cpu"] == {"m0"}
                old = folder


async def test_a_deleted_sharer_takes_its_head_and_its_name_is_free(tmp_path: Path) -> None:
    folders = make_family(tmp_path / "models", [f"m{i}" for i in range(4)], seed=1)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    config = SHARED_STORE + device_table("cpu", books.held(wanted), threads=1)
    with auditing():
        async with running_app(config, tmp_path) as yard:
            for folder in folders:
                await create(yard, folder)
                await ask(yard, folder.name)
            left = set(wanted)
            for name in ("m0", "m2", "m3", "m1"):
                if name != "m1":
                    async with asking(yard, "m1", wanted["m1"]):
                        await yard.admin(Admin.delete_model, name)
                else:
                    await yard.admin(Admin.delete_model, name)
                left.discard(name)
                assert (await books.check(yard))["devices/cpu"] == left
                for other in left:
                    np.testing.assert_array_equal(await ask(yard, other), wanted[other])
            # Another model of an old name, of the same weights.
            await create(yard, folders[3], model="m0")
            np.testing.assert_array_equal(await ask(yard, "m0"), wanted["m3"])
            assert (await books.check(yard))["devices/cpu"] == {"m0"}


async def test_a_server_that_starts_again_imports_nothing_and_shares_the_same(
    tmp_path: Path,
) -> None:
    folders = make_family(tmp_path / "models", [f"m{i}" for i in range(4)], seed=1)
    wanted = {folder.name: classes(folder) for folder in folders}
    books = Books()
    books.add_family(folders)
    budget = books.held(wanted)
    config = '\n[catalog]\nfile = "yard.db"\n' + SHARED_STORE
    config += device_table("cpu", budget, threads=1)

    def stored() -> dict[str, tuple[int, int, int]]:
        return {
            str(path.relative_to(tmp_path)): (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            for kind in ("packs", "models")
            for path in sorted((tmp_path / "store" / kind).rglob("*"))
            for stat in (path.stat(),)
            if path.is_file()
        }

    async with running_app(config, tmp_path) as yard:
        for folder in folders:
            await create(yard, folder)
            await ask(yard, folder.name)
        await yard.admin(Admin.pin, "m2")
        before, charges = await books.check(yard), (await yard.residency("m1")).charges
        files = stored()
    size_bytes = sum(size for name, (_, size, _) in files.items() if "packs" in name)
    assert size_bytes < 2 * books.sizes["m0"].total_bytes
    for _ in range(2):
        with auditing():
            async with running_app(config, tmp_path) as yard:
                assert stored() == files
                for name in wanted:
                    np.testing.assert_array_equal(await ask(yard, name), wanted[name])
                assert await books.check(yard) == before
                assert (await yard.residency("m1")).charges == charges
                assert (await yard.residency("m2")).pinned
                assert stored() == files
