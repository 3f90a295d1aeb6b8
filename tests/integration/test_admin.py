"""Administration over a real channel: models, budgets, residency, figures."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from tests.support import faulty_models, tiny_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, device_table, model_table
from tests.support.server import (
    RunningApp,
    eventually,
    refusal_of,
    running_app,
    told_refusal_of,
)

from modelyard import (
    Admin,
    AlreadyExists,
    BudgetExhausted,
    ComponentDevice,
    Device,
    DeviceNotFound,
    EtagMismatch,
    InvalidRequest,
    KeyNotFound,
    ModelInUse,
    ModelNeverFits,
    ModelNotFound,
    PlacementInvalid,
    ResidencyState,
)
from modelyard.v1 import (
    device_service_pb2,
    device_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    residency_service_pb2,
    residency_service_pb2_grpc,
)

X = np.ones(3, np.float32)
COLD, RESIDENT = ResidencyState.COLD, ResidencyState.RESIDENT


def ballast(name: str, size_bytes: int, **settings: object) -> str:
    return model_table(name, "identity", options={"size_bytes": size_bytes}, **settings)


# Models


async def test_a_created_model_is_served_until_it_is_deleted(tmp_path: Path) -> None:
    tiny_models.make_tiny_bert(tmp_path / "store" / "team" / "mood", seed=1, labels=["no", "yes"])
    async with running_app(CPU + ROOTS, tmp_path) as yard:
        began = datetime.now(UTC) - timedelta(seconds=1)
        created = await yard.admin(
            Admin.create_model,
            "mood",
            runtime="transformers",
            root="store",
            folder="team/mood",
            task="text-classification",
            keys=["acme/mood", "Mood"],
            options={"batch_size": 4},
            placement="cpu",
        )
        assert created.name == "models/mood"
        assert created.keys == ("acme/mood", "Mood")
        assert (created.root, created.folder) == ("store", "team/mood")
        assert (created.runtime, created.task) == ("transformers", "text-classification")
        assert created.options == {"batch_size": 4}
        assert created.placement == ComponentDevice.from_single(Device.cpu())
        assert created.estimated_bytes > 0
        assert created.etag
        assert created.created_at is not None
        assert began <= created.created_at <= datetime.now(UTC)
        assert await yard.admin(Admin.get_model, "mood") == created
        assert await yard.admin(Admin.list_models) == (created,)
        # Its weights have not been read.
        assert (await yard.device()).peak_accounted_bytes == 0

        for key in ("mood", "acme/mood", "Mood"):
            prediction = await yard.client.predict(key, "the dog ran")
            assert prediction["label"] in (["no"], ["yes"])
        measured = (await yard.device()).measured_bytes
        assert 0 < measured <= created.estimated_bytes

        await yard.admin(Admin.delete_model, "mood")
        for key in ("mood", "acme/mood", "Mood"):
            assert isinstance(await refusal_of(yard.client.predict(key, "a")), KeyNotFound)
        error = await refusal_of(yard.admin(Admin.get_model, "mood"))
        assert isinstance(error, ModelNotFound)
        await yard.at_rest()
        device = await yard.device()
        assert (device.measured_bytes, device.resident_bytes) == (0, 0)
        # Its name and keys are free again.
        again = await yard.admin(Admin.create_model, "mood", runtime="identity", keys=["Mood"])
        assert again.etag != created.etag


async def test_a_model_that_is_only_validated_is_not_there(tmp_path: Path) -> None:
    async with running_app(device_table("cpu", 5000), tmp_path) as yard:
        validated = await yard.admin(
            Admin.create_model,
            "draft",
            runtime="identity",
            keys=["d"],
            options={"size_bytes": 4096},
            validate_only=True,
        )
        assert validated.name == "models/draft"
        assert validated.keys == ("d",)
        # As if it had been done.
        assert validated.estimated_bytes == 4096
        assert await yard.admin(Admin.list_models) == ()
        assert isinstance(await refusal_of(yard.client.predict("d", "a")), KeyNotFound)
        error = await refusal_of(
            yard.admin(
                Admin.create_model,
                "draft",
                runtime="identity",
                options={"size_bytes": 5001},
                validate_only=True,
            )
        )
        assert isinstance(error, ModelNeverFits)


async def test_what_a_client_says_of_output_only_fields_is_ignored(tmp_path: Path) -> None:
    async with running_app(CPU, tmp_path) as yard:
        models = model_service_pb2_grpc.ModelServiceStub(yard.channel)
        for validate_only in (True, False):
            request = model_service_pb2.CreateModelRequest(
                model_id="real", validate_only=validate_only
            )
            request.model.name = "models/claimed"
            request.model.runtime = "identity"
            request.model.etag = "claimed"
            request.model.estimated_bytes = 77
            request.model.create_time.seconds = 1
            answer = (await models.CreateModel(request)).model
            assert answer.name == "models/real"
            assert answer.etag != "claimed"
            assert answer.estimated_bytes == 0
            assert answer.create_time.seconds != 1


async def test_names_and_keys_mean_one_model_only(tmp_path: Path) -> None:
    async with running_app(CPU + model_table("one", "identity", keys=["k/1"]), tmp_path) as yard:
        for name, keys in (
            ("one", []),
            ("two", ["k/1"]),
            ("two", ["one"]),
            ("two", ["new", "k/1"]),
        ):
            error = await refusal_of(
                yard.admin(Admin.create_model, name, runtime="identity", keys=keys)
            )
            assert isinstance(error, AlreadyExists), (name, keys)
        assert len(await yard.admin(Admin.list_models)) == 1
        # What was refused took nothing: not even its free keys.
        await yard.admin(Admin.create_model, "new", runtime="identity")


async def test_one_of_many_that_create_the_same_model_does(tmp_path: Path) -> None:
    async with running_app(CPU, tmp_path) as yard:

        async def create(index: int) -> str:
            models = model_service_pb2_grpc.ModelServiceStub(yard.channel)
            request = model_service_pb2.CreateModelRequest(model_id=f"m-{index}")
            request.model.runtime = "identity"
            request.model.keys.append("wanted")
            try:
                await models.CreateModel(request)
            except Exception:
                return "refused"
            return "created"

        ends = await asyncio.gather(*(create(index) for index in range(20)))
        assert sorted(ends) == ["created"] + ["refused"] * 19
        assert len(await yard.admin(Admin.list_models)) == 1


async def test_every_violation_of_a_model_is_told_at_once(tmp_path: Path) -> None:
    async with running_app(CPU, tmp_path) as yard:
        error = await refusal_of(
            yard.admin(
                Admin.create_model,
                "../Bad",
                runtime="identity",
                task="dance",
                keys=["good", "b d", "x..y"],
                root="nobody",
                folder="a",
            )
        )
        assert isinstance(error, InvalidRequest)
        fields = {violation.field for violation in error.violations}
        assert fields == {
            "model_id",
            "model.keys[1]",
            "model.keys[2]",
            "model.source",
            "model.task",
        }
        for runtime in ("", "pickle", "IDENTITY"):
            error = await refusal_of(yard.admin(Admin.create_model, "m", runtime=runtime))
            assert [violation.field for violation in error.violations] == ["model.runtime"]
        error = await refusal_of(
            yard.admin(Admin.create_model, "m", runtime="identity", options={"size_bites": 1})
        )
        assert [violation.field for violation in error.violations] == ["model.options.size_bites"]


@pytest.mark.parametrize("device", ["cuda:0", "cpu:1", "cuda", "mps"])
async def test_a_placement_on_a_device_that_is_not_managed_is_refused(
    tmp_path: Path, device: str
) -> None:
    async with running_app(CPU, tmp_path) as yard:
        error = await refusal_of(
            yard.admin(Admin.create_model, "m", runtime="identity", placement=device)
        )
        assert isinstance(error, PlacementInvalid)


async def test_a_model_is_deleted_only_as_it_was_read(tmp_path: Path) -> None:
    async with running_app(CPU, tmp_path) as yard:
        etag = (await yard.admin(Admin.create_model, "m", runtime="identity")).etag
        error = await refusal_of(yard.admin(Admin.delete_model, "m", etag='"old"'))
        assert isinstance(error, EtagMismatch)
        await yard.client.predict("m", "a")
        await yard.admin(Admin.delete_model, "m", etag=etag)
        error = await refusal_of(yard.admin(Admin.delete_model, "m", etag=etag))
        assert isinstance(error, ModelNotFound)


async def test_a_name_that_is_too_long_is_nobodys(tmp_path: Path) -> None:
    longest = "a" * 128
    async with running_app(CPU + model_table(longest, "identity"), tmp_path) as yard:
        assert (await yard.admin(Admin.get_model, longest)).id == longest
        for question in (
            lambda admin: admin.get_model(longest + "a"),
            lambda admin: admin.delete_model(longest + "a"),
            lambda admin: admin.load(longest + "a"),
        ):
            error = await refusal_of(yard.admin(question))
            assert error.reason in ("INVALID_FIELD", "MODEL_NOT_FOUND")
        assert len(await yard.admin(Admin.list_models)) == 1


async def test_deleting_a_model_answers_who_runs_and_refuses_who_waits(tmp_path: Path) -> None:
    for name in ("running", "waiting"):
        faulty_models.make_weights(tmp_path / "store" / name, value=2.0)
    async with running_app(CPU + ROOTS + ALLOWED, tmp_path) as yard:
        for name, factory in (("running", "StuckInRun"), ("waiting", "StuckInLoad")):
            # Its gate is not there yet, and so it is open while its files are looked at.
            await yard.admin(
                Admin.create_model,
                name,
                runtime="torch",
                root="store",
                folder=name,
                options={
                    "factory": faulty_models.factory(factory),
                    "factory_options": {"gate": str(tmp_path / name)},
                },
            )
        with (
            faulty_models.closed_gate(tmp_path / "running") as running,
            faulty_models.closed_gate(tmp_path / "waiting") as loading,
        ):
            runs = asyncio.create_task(yard.client.predict("running", X))
            await eventually("the model runs", running.is_waited_at)
            waits = asyncio.create_task(refusal_of(yard.client.predict("waiting", X)))
            await eventually("the model loads", loading.is_waited_at)
            for name in ("running", "waiting"):
                await yard.admin(Admin.delete_model, name)
            assert isinstance(await waits, ModelNotFound)
            assert not runs.done()
            device = await yard.device()
            assert device.draining_bytes == 4 * faulty_models.ROWS
        np.testing.assert_array_equal((await runs).only, X + 2)
        await yard.at_rest()
        device = await yard.device()
        assert (device.resident_bytes, device.draining_bytes, device.measured_bytes) == (0, 0, 0)


async def test_factory_options_are_the_same_from_the_wire_and_from_the_file(tmp_path: Path) -> None:
    tiny_models.make_tiny_mlp(tmp_path / "store" / "net", seed=1, hidden=24)
    options = {
        "factory": tiny_models.MLP_FACTORY,
        "factory_options": {"hidden": 24, "scale": 2.0, "fails": False},
    }
    x = np.ones((2, 8), np.float32)
    config = CPU + ROOTS + ALLOWED + model_table("net", "torch", options=options)
    async with running_app(config, tmp_path) as yard:
        # Numbers travel as doubles; an integer must arrive as one.
        await yard.admin(
            Admin.create_model,
            "wired",
            runtime="torch",
            root="store",
            folder="net",
            options=options,
        )
        filed, wired = [(await yard.client.predict(key, x)).only for key in ("net", "wired")]
        np.testing.assert_array_equal(np.asarray(filed), np.asarray(wired))


# Pages


async def test_pages_show_every_item_once(tmp_path: Path) -> None:
    config = device_table("cpu", "1MB") + device_table("cuda:0", "1MB", logical=True)
    names = sorted(f"m-{index}" for index in range(7))
    async with running_app(config, tmp_path) as yard:
        for name in names:
            await yard.admin(Admin.create_model, name, runtime="identity")
        models = model_service_pb2_grpc.ModelServiceStub(yard.channel)
        residencies = residency_service_pb2_grpc.ResidencyServiceStub(yard.channel)
        devices = device_service_pb2_grpc.DeviceServiceStub(yard.channel)

        async def model_names(size: int) -> list[list[str]]:
            pages, token = [], ""
            while True:
                request = model_service_pb2.ListModelsRequest(page_size=size, page_token=token)
                answer = await models.ListModels(request)
                pages.append([model.name.removeprefix("models/") for model in answer.models])
                token = answer.next_page_token
                if not token:
                    return pages

        assert await model_names(0) == [names]
        assert await model_names(3) == [names[:3], names[3:6], names[6:]]
        assert await model_names(7) == [names]
        assert await model_names(1) == [[name] for name in names]
        assert await model_names(2**31 - 1) == [names]

        first = await residencies.ListResidencies(
            residency_service_pb2.ListResidenciesRequest(page_size=4)
        )
        # Models that go between two pages hide no other.
        for name in (names[3], names[4]):
            await models.DeleteModel(model_service_pb2.DeleteModelRequest(name=f"models/{name}"))
        rest = await residencies.ListResidencies(
            residency_service_pb2.ListResidenciesRequest(page_token=first.next_page_token)
        )
        assert [item.model for item in rest.residencies] == [f"models/{n}" for n in names[5:]]

        page = await devices.ListDevices(device_service_pb2.ListDevicesRequest(page_size=1))
        assert [device.name for device in page.devices] == ["devices/cpu"]
        page = await devices.ListDevices(
            device_service_pb2.ListDevicesRequest(page_size=1, page_token=page.next_page_token)
        )
        assert [device.name for device in page.devices] == ["devices/cuda-0"]
        assert page.next_page_token == ""

        for bad in (
            models.ListModels(model_service_pb2.ListModelsRequest(page_size=-1)),
            models.ListModels(model_service_pb2.ListModelsRequest(page_token="ä?")),
            models.ListModels(model_service_pb2.ListModelsRequest(page_token="bm9uZQ==")),
        ):
            with pytest.raises(Exception, match="page_") as caught:
                await bad
            assert "INVALID_ARGUMENT" in str(caught.value)


# Budgets


async def fill(yard: RunningApp, count: int) -> None:
    for index in range(count):
        await yard.client.predict(f"m-{index}", X)


async def test_a_lower_budget_drains_what_no_longer_fits(tmp_path: Path) -> None:
    config = device_table("cpu", 4000)
    for index in range(4):
        config += ballast(f"m-{index}", 1000)
    async with running_app(config, tmp_path) as yard:
        await fill(yard, 4)
        before = await yard.device()
        assert before.resident_bytes == before.measured_bytes == 4000
        lowered = await yard.admin(Admin.update_budget, "cpu", 2500, etag=before.etag)
        assert lowered.budget_bytes == 2500
        assert lowered.etag != before.etag
        await yard.at_rest()
        after = await yard.device()
        assert after.resident_bytes == after.measured_bytes == 2000
        assert (after.deficit_bytes, after.eviction_count) == (0, 2)

        # And it is never above it again.
        for index in (0, 1, 2, 3, 2, 1, 0):
            await yard.client.predict(f"m-{index}", X)
            device = await yard.device()
            held = device.reserved_bytes + device.resident_bytes + device.draining_bytes
            assert held <= 2500
            assert device.measured_bytes <= 2500

        raised = await yard.admin(Admin.update_budget, "cpu", 4000)
        assert raised.budget_bytes == 4000
        evictions = raised.eviction_count
        await fill(yard, 4)
        await fill(yard, 4)
        full = await yard.device()
        assert full.resident_bytes == 4000
        assert full.eviction_count == evictions


async def test_a_lower_budget_waits_for_models_in_use(tmp_path: Path) -> None:
    faulty_models.make_weights(tmp_path / "store" / "stuck", value=2.0)
    options = {
        "factory": faulty_models.factory("StuckInRun"),
        "factory_options": {"gate": tmp_path / "gate"},
    }
    config = device_table("cpu", 10_000) + ROOTS + ALLOWED
    config += model_table("stuck", "torch", options=options) + ballast("small", 1000)
    async with running_app(config, tmp_path) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            runs = asyncio.create_task(yard.client.predict("stuck", X))
            await eventually("the model runs", gate.is_waited_at)
            lowered = await yard.admin(Admin.update_budget, "cpu", 2000)
            assert lowered.draining_bytes == 4096
            assert lowered.deficit_bytes == 2096
            assert (await yard.residency("stuck")).state is ResidencyState.DRAINING
            # Nothing is loaded until the device is within its budget.
            waits = asyncio.create_task(yard.client.predict("small", X))
            await yard.becomes("small", ResidencyState.QUEUED)
        np.testing.assert_array_equal((await runs).only, X + 2)
        assert (await waits).served.cold
        device = await yard.device()
        assert (device.deficit_bytes, device.resident_bytes) == (0, 1000)
        error = await refusal_of(yard.client.predict("stuck", X))
        assert isinstance(error, ModelNeverFits)
        assert (error.needed_bytes, error.budget_bytes) == (4096, 2000)


async def test_a_budget_of_nothing_and_impossible_ones(tmp_path: Path) -> None:
    async with running_app(device_table("cpu", 4000) + ballast("m-0", 1000), tmp_path) as yard:
        await fill(yard, 1)
        stale = (await yard.device()).etag
        await yard.admin(Admin.update_budget, "cpu", 0)
        await yard.at_rest()
        assert (await yard.device()).measured_bytes == 0
        assert isinstance(await refusal_of(yard.client.predict("m-0", X)), ModelNeverFits)
        error = await refusal_of(yard.admin(Admin.update_budget, "cpu", 9000, etag=stale))
        assert isinstance(error, EtagMismatch)
        for budget in (-1, -(2**63), 2**63 - 1):
            error = await refusal_of(yard.admin(Admin.update_budget, "cpu", budget))
            assert isinstance(error, InvalidRequest)
        error = await refusal_of(yard.admin(Admin.update_budget, "cuda:7", 1))
        assert isinstance(error, DeviceNotFound)
        assert (await yard.device()).budget_bytes == 0


# Residency


async def test_load_and_unload_bring_a_model_and_its_memory(tmp_path: Path) -> None:
    async with running_app(CPU + ballast("m", 1_000_000), tmp_path) as yard:
        assert (await yard.residency("m")).state is COLD
        await yard.admin(Admin.load, "m")
        await yard.becomes("m", RESIDENT)
        await yard.admin(Admin.load, "m")
        resident = await yard.becomes("m", RESIDENT)
        assert resident.load_count == 1
        assert resident.load_s is not None
        assert [charge.size_bytes for charge in resident.charges] == [1_000_000]
        assert [charge.device for charge in resident.charges] == ["devices/cpu"]
        assert not (await yard.client.predict("m", X)).served.cold
        assert (await yard.device()).measured_bytes == 1_000_000
        for _ in range(2):
            unloaded = await yard.admin(Admin.unload, "m")
            # When it answers, the memory is back.
            assert unloaded.state is COLD
            assert unloaded.charges == unloaded.quarantined == ()
            device = await yard.device()
            assert (device.measured_bytes, device.resident_bytes, device.draining_bytes) == (0,) * 3
        assert (await yard.client.predict("m", X)).served.cold
        assert (await yard.residency("m")).load_count == 2


async def test_pinned_models_stay(tmp_path: Path) -> None:
    config = device_table("cpu", 2000) + ballast("kept", 1500, pinned=True)
    config += ballast("small", 400) + ballast("large", 600) + ballast("too-large", 2500)
    async with running_app(config, tmp_path) as yard:
        kept = await yard.becomes("kept", RESIDENT)
        assert kept.pinned
        await yard.client.predict("small", X)
        error = await refusal_of(yard.client.predict("large", X))
        assert isinstance(error, BudgetExhausted)
        assert error.device == "devices/cpu"
        assert error.needed_bytes == 600
        assert error.holders is not None
        assert "kept=1500" in error.holders
        # What cannot help anybody disturbs nobody.
        assert (await yard.residency("small")).state is RESIDENT
        assert isinstance(await refusal_of(yard.admin(Admin.unload, "kept")), ModelInUse)
        # Not even for a lower budget, which is refused, and changes nothing.
        before = await yard.device()
        error = await refusal_of(yard.admin(Admin.update_budget, "cpu", 1000))
        assert isinstance(error, BudgetExhausted)
        assert (error.device, error.needed_bytes) == ("devices/cpu", 1500)
        await yard.at_rest()
        device = await yard.device()
        assert (device.budget_bytes, device.resident_bytes) == (2000, before.resident_bytes)
        assert (device.deficit_bytes, device.etag) == (0, before.etag)

        unpinned = await yard.admin(Admin.unpin, "kept")
        assert not unpinned.pinned
        await yard.admin(Admin.update_budget, "cpu", 1000)
        await yard.at_rest()
        device = await yard.device()
        assert (device.budget_bytes, device.deficit_bytes) == (1000, 0)
        assert (await yard.residency("kept")).state is COLD
        assert (await yard.client.predict("large", X)).served.cold
        pinned = await yard.admin(Admin.pin, "large")
        assert pinned.pinned
        assert isinstance(await refusal_of(yard.admin(Admin.pin, "too-large")), ModelNeverFits)
        assert not (await yard.residency("too-large")).pinned
        await yard.admin(Admin.unpin, "large")


async def test_an_unload_that_takes_too_long_goes_on(tmp_path: Path) -> None:
    faulty_models.make_weights(tmp_path / "store" / "stuck")
    options = {
        "factory": faulty_models.factory("StuckInRun"),
        "factory_options": {"gate": tmp_path / "gate"},
    }
    config = CPU + ROOTS + ALLOWED + model_table("stuck", "torch", options=options)
    async with running_app(config, tmp_path) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            runs = asyncio.create_task(yard.client.predict("stuck", X))
            await eventually("the model runs", gate.is_waited_at)
            error = await told_refusal_of(lambda: yard.admin(Admin.unload, "stuck", timeout_s=0.3))
            assert error.reason == "DEADLINE_IN_QUEUE"
            assert (await yard.residency("stuck")).state is ResidencyState.DRAINING
            # Who comes now waits, and has it loaded again.
            again = asyncio.create_task(yard.client.predict("stuck", X))

            async def waits() -> bool:
                return (await yard.residency("stuck")).waiting_request_count == 1

            await eventually("the next one waits", waits)
        await runs
        assert (await again).served.cold
        assert (await yard.residency("stuck")).load_count == 2


async def test_unknown_names_are_not_found_and_malformed_ones_invalid(tmp_path: Path) -> None:
    async with running_app(CPU, tmp_path) as yard:
        for question in (
            lambda admin: admin.load("nobody"),
            lambda admin: admin.unload("nobody"),
            lambda admin: admin.pin("nobody"),
            lambda admin: admin.unpin("nobody"),
            lambda admin: admin.get_model("nobody"),
            lambda admin: admin.delete_model("nobody"),
        ):
            assert isinstance(await refusal_of(yard.admin(question)), ModelNotFound)
        for question in (
            lambda admin: admin.load(""),
            lambda admin: admin.get_model("a/b"),
            lambda admin: admin.get_model(""),
        ):
            assert isinstance(await refusal_of(yard.admin(question)), InvalidRequest)
        error = await refusal_of(yard.admin(Admin.get_device, "cuda:0"))
        assert isinstance(error, DeviceNotFound)


# Figures


async def test_figures_agree_with_each_other_and_with_what_happened(tmp_path: Path) -> None:
    config = device_table("cpu", 2500) + device_table("cuda:0", 2500, logical=True)
    for index in range(6):
        config += ballast(f"m-{index}", 1000, device="cuda:0" if index % 2 else "cpu")
    async with running_app(config, tmp_path) as yard:
        for index in (*range(6), *range(6), 5, 5):
            await yard.client.predict(f"m-{index}", X)
        for _ in range(3):
            await refusal_of(yard.client.predict("nobody", X))
        stats = await yard.admin(Admin.stats)
        devices = await yard.admin(Admin.list_devices)
        residencies = await yard.admin(Admin.list_residencies)
        assert stats.answered_count == stats.hit_count + stats.cold_count == 14
        assert stats.error_counts == {"KEY_NOT_FOUND": 3}
        assert stats.load_count == stats.cold_count
        assert stats.load_count == sum(device.load_count for device in devices)
        assert stats.load_count == sum(residency.load_count for residency in residencies)
        assert stats.eviction_count == sum(device.eviction_count for device in devices) > 0
        assert stats.load_failure_count == 0
        assert stats.load_s > 0
        assert (stats.active_request_count, stats.waiting_request_count) == (0, 0)
        assert 0 < stats.process_resident_bytes <= stats.peak_process_resident_bytes
        for device in devices:
            charged = sum(
                charge.size_bytes
                for residency in residencies
                for charge in residency.charges
                if charge.device == device.name
            )
            assert charged == device.resident_bytes == device.measured_bytes
            assert device.peak_accounted_bytes <= device.budget_bytes
        resident = [item for item in residencies if item.state is RESIDENT]
        assert sum(device.load_count - device.eviction_count for device in devices) == len(resident)


async def test_the_server_says_what_it_is(tmp_path: Path) -> None:
    async with running_app('[yard]\npolicy = "lru"\n' + CPU, tmp_path) as yard:
        info = await yard.admin(Admin.info)
        assert info.version == version("modelyard")
        assert info.library_versions["torch"] == version("torch")
        assert set(info.runtimes) == {"identity", "torch", "transformers"}
        assert info.eviction_policy == "lru"
        assert info.process_id == os.getpid()
        assert info.started_at is not None
        assert timedelta(0) <= datetime.now(UTC) - info.started_at < timedelta(minutes=2)
