"""A server that is stopped or killed comes back with everything that was acknowledged."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, ROOTS, device_table, model_table
from tests.support.server import (
    ServerProcess,
    eventually,
    refusal_of,
    running_app,
    server_process,
)

from modelyard import (
    Admin,
    AsyncClient,
    CatalogUnavailable,
    ComponentDevice,
    Device,
    DevicePlan,
    DeviceSetting,
    ModelPlacement,
    ModelyardError,
    ResidencyState,
)

T = TypeVar("T")

X = np.ones(3, np.float32)
DEVICES = "".join(device_table(f"cuda:{index}", 100_000, logical=True) for index in range(3))
CONFIG = (
    DEVICES
    + ROOTS
    + ALLOWED
    + model_table("filed", "identity", device="cuda:0", options={"size_bytes": 1000})
    + model_table("filed-pinned", "identity", device="cuda:0", pinned=True)
)
CATALOG = "modelyard.db"


def on(device: str) -> ComponentDevice:
    return ComponentDevice.from_single(Device.from_str(device))


async def ask(process: ServerProcess, question: Callable[[Admin], T]) -> T:
    def asks() -> T:
        with Admin(process.target) as admin:
            return question(admin)

    return await asyncio.to_thread(asks)


def change_everything(admin: Admin) -> None:
    """Every change there is, the last of each kind being one that can be seen afterwards."""
    torch = {"factory": faulty_models.factory("Adding")}
    for name in ("made", "deleted"):
        admin.create_model(
            name, runtime="torch", root="store", folder="v1", options=torch, keys=[f"key/{name}"]
        )
    admin.create_model("pinned", runtime="identity", options={"size_bytes": 500})
    admin.update_model("made", keys=["key/new"], folder="v2", root="store")
    admin.delete_model("deleted")
    admin.pin("pinned")
    admin.pin("filed")
    admin.unpin("filed-pinned")
    admin.update_budget("cuda:1", 50_000)
    admin.drain_device("cuda:1")
    admin.drain_device("cuda:2")
    admin.undrain_device("cuda:2")
    admin.apply_plan(
        DevicePlan(
            devices=(DeviceSetting(device="cuda:2", budget_bytes=70_000),),
            models=(
                ModelPlacement(model="filed", placement=on("cuda:2")),
                ModelPlacement(model="made", placement=on("cuda:2")),
            ),
        )
    )


def seen(admin: Admin) -> Any:
    """What a restart must not change."""
    return (
        admin.list_models(),
        admin.get_plan(),
        {item.model: item.pinned for item in admin.list_residencies()},
        [(d.name, d.budget_bytes, d.drained, d.etag) for d in admin.list_devices()],
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with two sets of weights, of the values 1 and 2."""
    for name, value in (("v1", 1.0), ("v2", 2.0)):
        faulty_models.make_weights(tmp_path / "store" / name, value=value)
    return tmp_path


# --- Stopped and killed ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_everything_acknowledged_is_there_after_a_restart(
    base: Path, number: signal.Signals
) -> None:
    async with server_process(CONFIG, base) as process:
        await ask(process, change_everything)
        before = await ask(process, seen)
        process.send(number)
        assert await process.exit_code() == (0 if number is signal.SIGTERM else -number)
    async with server_process(CONFIG, base) as process:
        assert await ask(process, seen) == before
        models, plan, pins, _ = before
        assert [model.id for model in models] == ["filed", "filed-pinned", "made", "pinned"]
        assert pins == {
            "models/filed": True,
            "models/filed-pinned": False,
            "models/made": False,
            "models/pinned": True,
        }
        assert plan.revision == 5

        async def are_loaded() -> bool:
            found = await ask(process, Admin.list_residencies)
            resident = {item.model for item in found if item.state is ResidencyState.RESIDENT}
            return {"models/filed", "models/pinned"} <= resident

        await eventually("pinned models are loaded again", are_loaded)
        async with AsyncClient(process.target) as client:
            prediction = await client.predict("key/new", X)
            np.testing.assert_array_equal(prediction.only, X + 2)
            assert prediction.served.device == "devices/cuda-2"
            assert (await client.predict("filed", X)).served.device == "devices/cuda-2"
        # And it goes on from there.
        after = await ask(process, lambda admin: admin.undrain_device("cuda:1"))
        assert not after.drained
        assert (await ask(process, Admin.get_plan)).revision == 6


async def test_a_replay_after_a_crash_gets_the_first_answer(base: Path) -> None:
    def create(admin: Admin) -> Any:
        options = {"size_bytes": 4096}
        return admin.create_model("m", runtime="identity", options=options, request_id="id-1")

    async with server_process(CONFIG, base) as process:
        first = await ask(process, create)
        process.send(signal.SIGKILL)
        await process.exit_code()
    async with server_process(CONFIG, base) as process:
        assert await ask(process, create) == first
        await ask(process, lambda admin: admin.delete_model("m"))
        assert await ask(process, create) == first
        assert "m" not in [model.id for model in await ask(process, Admin.list_models)]


async def test_the_file_is_followed_and_what_it_says_anew_counts(base: Path) -> None:
    async with server_process(CONFIG, base) as process:
        await ask(process, change_everything)
        process.send(signal.SIGTERM)
        assert await process.exit_code() == 0
    changed = CONFIG.replace(
        'device = "cuda:2"\nbudget = 100000', 'device = "cuda:2"\nbudget = 90000'
    )
    changed = changed.replace('size_bytes" = 1000', 'size_bytes" = 2000')
    assert changed != CONFIG
    async with server_process(changed, base) as process:
        budgets = {d.name: d.budget_bytes for d in await ask(process, Admin.list_devices)}
        assert budgets["devices/cuda-2"] == 90_000
        assert budgets["devices/cuda-1"] == 50_000
        filed = await ask(process, lambda admin: admin.get_model("filed"))
        assert filed.options == {"size_bytes": 2000}
        # The file says nothing new of its placement, but did of the model: the pin is the file's.
        assert filed.placed_by_plan
        assert not filed.pinned
        assert "devices/cuda-2" in process.stderr


async def test_a_model_whose_files_have_gone_is_there_and_the_server_starts(base: Path) -> None:
    async with server_process(CONFIG, base) as process:
        await ask(process, change_everything)
        process.send(signal.SIGTERM)
        await process.exit_code()
    (base / "store" / "v2" / "model.safetensors").unlink()
    async with server_process(CONFIG, base) as process, AsyncClient(process.target) as client:
        error = await refusal_of(client.predict("made", X))
        assert error.reason == "LOAD_FAILED"
        assert (await client.predict("pinned", X)).only is not None
        faulty_models.make_weights(base / "store" / "v2", value=5.0)
        await ask(process, lambda admin: admin.update_model("made", task=""))
        np.testing.assert_array_equal((await client.predict("made", X)).only, X + 5)


async def test_without_a_durable_catalog_nothing_is_kept(base: Path) -> None:
    config = CONFIG + "\n[catalog]\ndurable = false\n"
    async with server_process(config, base) as process:
        await ask(process, change_everything)
        process.send(signal.SIGTERM)
        assert await process.exit_code() == 0
    assert not (base / CATALOG).exists()
    async with server_process(config, base) as process:
        assert [m.id for m in await ask(process, Admin.list_models)] == ["filed", "filed-pinned"]


# --- Files that cannot be used --------------------------------------------------------------------


async def one_line_of_refusal(config: str, base: Path) -> str:
    """What a server that cannot start says: one line, and exit code 2."""
    async with server_process(config, base, name="other", serves=False) as process:
        assert await process.exit_code() == 2, process.stderr
        assert process.stdout == ""
        assert process.stderr.count("\n") == 1, process.stderr
        assert process.stderr.startswith("modelyard: ")
        assert "Traceback" not in process.stderr
        return process.stderr


async def test_a_catalog_has_one_server(base: Path) -> None:
    async with server_process(CONFIG, base) as process:
        line = await one_line_of_refusal(CONFIG, base)
        assert str(base / CATALOG) in line
        assert "in use" in line
        # The first one has not noticed.
        await ask(process, lambda admin: admin.create_model("m", runtime="identity"))
        process.send(signal.SIGKILL)
        await process.exit_code()
    # Who is dead holds nothing.
    async with server_process(CONFIG, base, name="other") as process:
        assert "m" in [model.id for model in await ask(process, Admin.list_models)]


@pytest.mark.parametrize("kind", ["text", "cut short", "overwritten", "another program's", "newer"])
async def test_a_damaged_catalog_is_one_line_and_left_as_it_is(base: Path, kind: str) -> None:
    path = base / CATALOG
    async with server_process(CONFIG, base) as process:
        await ask(process, change_everything)
        process.send(signal.SIGTERM)
        assert await process.exit_code() == 0
    content = path.read_bytes()
    match kind:
        case "text":
            path.write_text("this is no database\n" * 100)
        case "cut short":
            path.write_bytes(content[: len(content) // 2])
        case "overwritten":
            path.write_bytes(content[:5000] + bytes(len(content) - 5000))
        case "another program's":
            path.unlink()
            with sqlite3.connect(path) as connection:
                connection.execute("CREATE TABLE notes (text)")
            connection.close()
        case "newer":
            with sqlite3.connect(path) as connection:
                connection.execute("PRAGMA user_version = 9999")
            connection.close()
    damaged = path.read_bytes()
    assert str(path) in await one_line_of_refusal(CONFIG, base)
    assert path.read_bytes() == damaged


async def test_a_name_that_the_file_and_the_catalog_both_have_is_one_line(base: Path) -> None:
    async with server_process(CONFIG, base) as process:
        await ask(process, lambda admin: admin.create_model("both", runtime="identity"))
        process.send(signal.SIGTERM)
        await process.exit_code()
    config = CONFIG + model_table("both", "identity")
    async with server_process(config, base, name="other", serves=False) as process:
        assert await process.exit_code() == 2
        assert "models.both" in process.stderr
        assert "CreateModel" in process.stderr
        assert "Traceback" not in process.stderr
    async with server_process(CONFIG, base) as process:
        assert "both" in [model.id for model in await ask(process, Admin.list_models)]


# --- Disks that are full or read-only -------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Writes a file until nothing more fits."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1024)):
                pass
        except OSError:
            pass
    return ballast


async def test_a_full_disk_refuses_changes_and_nothing_else_until_there_is_room(
    base: Path, small_disk: Path
) -> None:
    config = CONFIG + f'\n[catalog]\nfile = "{small_disk}/catalog.db"\n'
    acknowledged: list[str] = []
    async with running_app(config, base) as yard:
        await yard.admin(Admin.create_model, "m", runtime="identity", options={"size_bytes": 2000})
        ballast = fill(small_disk)

        async def create_until_refused() -> ModelyardError:
            for index in range(200):  # What is free in the log's last page is still used.
                name = f"more-{len(acknowledged)}-{index}"
                try:
                    await yard.admin(Admin.create_model, name, runtime="identity")
                except ModelyardError as error:
                    return error
                acknowledged.append(name)
            raise AssertionError("the disk is not full")

        error = await create_until_refused()
        assert isinstance(error, CatalogUnavailable)
        assert str(small_disk) not in str(error)
        assert error.retry_after_s is not None
        before = await yard.admin(seen)
        for question in (
            lambda admin: admin.update_model("m", keys=["k"]),
            lambda admin: admin.delete_model("m"),
            lambda admin: admin.pin("m"),
            lambda admin: admin.update_budget("cuda:1", 10),
            lambda admin: admin.drain_device("cuda:1"),
            lambda admin: admin.apply_plan(
                DevicePlan(models=(ModelPlacement(model="m", placement=on("cuda:2")),))
            ),
        ):
            error = await refusal_of(yard.admin(question))
            assert isinstance(error, CatalogUnavailable), error
            assert await yard.admin(seen) == before
            # Predictions go on, hits and misses.
            assert (await yard.client.predict("m", X)).only is not None
            await yard.admin(Admin.unload, "m")
        ballast.unlink()
        await yard.admin(Admin.update_model, "m", keys=["k"])
        await yard.admin(Admin.update_budget, "cuda:1", 10_000)
        after = await yard.admin(seen)
    async with running_app(config, base) as yard:
        assert await yard.admin(seen) == after
        names = {model.id for model in await yard.admin(Admin.list_models)}
        assert names == {"filed", "filed-pinned", "m", *acknowledged}


async def test_a_read_only_disk_is_one_line(base: Path, small_disk: Path) -> None:
    config = CONFIG + f'\n[catalog]\nfile = "{small_disk}/catalog.db"\n'
    await asyncio.to_thread(
        subprocess.run, ["mount", "-o", "remount,ro", str(small_disk)], check=True
    )
    assert f"{small_disk}/catalog.db" in await one_line_of_refusal(config, base)


async def test_a_full_disk_keeps_no_server_from_starting(base: Path, small_disk: Path) -> None:
    config = CONFIG + f'\n[catalog]\nfile = "{small_disk}/catalog.db"\n'
    async with running_app(config, base) as yard:
        await yard.admin(change_everything)
        before = await yard.admin(seen)
    ballast = fill(small_disk)
    # A model the file has newly, too: it is known, though not stored yet.
    new = config + model_table("new", "identity", keys=["key/deleted"], device="cuda:0")
    async with running_app(new, base) as yard:
        assert (await yard.client.predict("new", X)).only is not None
        error = await refusal_of(yard.admin(Admin.pin, "new"))
        assert isinstance(error, CatalogUnavailable)
        ballast.unlink()
        await yard.admin(Admin.pin, "new")
        await yard.admin(
            Admin.apply_plan,
            DevicePlan(models=(ModelPlacement(model="new", placement=on("cuda:2")),)),
        )
    async with running_app(new, base) as yard:
        model = await yard.admin(Admin.get_model, "new")
        assert (model.pinned, model.placement) == (True, on("cuda:2"))
        models, *_ = before
        kept = await yard.admin(Admin.list_models)
        assert [model for model in kept if model.id != "new"] == list(models)
