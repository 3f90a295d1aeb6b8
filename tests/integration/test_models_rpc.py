"""Models that are changed and removed while they are used, over a real channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import field_mask_pb2
from tests.support import faulty_models
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
    AutomaticPlacement,
    ComponentDevice,
    ConfigOwned,
    Device,
    EtagMismatch,
    InvalidRequest,
    KeyNotFound,
    LoadFailed,
    Model,
    ModelNeverFits,
    ModelNotFound,
    ModelOwner,
    PlacementStrategy,
    ResidencyState,
)
from modelyard.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc

X = np.ones(3, np.float32)
COLD, RESIDENT = ResidencyState.COLD, ResidencyState.RESIDENT
WEIGHT_BYTES = 4 * faulty_models.ROWS
TWO_DEVICES = CPU + device_table("cuda:0", "1MB", logical=True)


def torch_model(factory: str = "Adding", folder: str = "v1", **options: object) -> dict[str, Any]:
    """Arguments of create_model and update_model."""
    given: dict[str, object] = {"factory": faulty_models.factory(factory)}
    if options:
        given["factory_options"] = {name: str(value) for name, value in options.items()}
    return {"runtime": "torch", "root": "store", "folder": folder, "options": given}


async def registered(yard: RunningApp) -> Model:
    """The model m as it was registered: without what its runs have shown since then."""
    model = await yard.admin(Admin.get_model, "m")
    return replace(model, estimated_activation_bytes=0)


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[RunningApp]:
    """A server with weights v1 (all 1) and v2 (all 2), and no models."""
    for name, value in (("v1", 1.0), ("v2", 2.0)):
        faulty_models.make_weights(tmp_path / "store" / name, value=value)
    async with running_app(CPU + ROOTS + ALLOWED, tmp_path) as made:
        yield made


# --- What is changed ------------------------------------------------------------------------------


async def test_an_update_changes_what_its_mask_names_and_nothing_else(yard: RunningApp) -> None:
    created = await yard.admin(
        Admin.create_model, "m", keys=["a", "b"], placement="cpu", **torch_model()
    )
    updated = await yard.admin(Admin.update_model, "m", keys=["b", "c"])
    assert updated.keys == ("b", "c")
    assert updated.etag != created.etag
    for same in ("name", "root", "folder", "runtime", "options", "placement", "created_at"):
        assert getattr(updated, same) == getattr(created, same), same
    assert await yard.admin(Admin.get_model, "m") == updated
    assert isinstance(await refusal_of(yard.client.predict("a", X)), KeyNotFound)
    for key in ("m", "b", "c"):
        np.testing.assert_array_equal((await yard.client.predict(key, X)).only, X + 1)

    updated = await yard.admin(Admin.update_model, "m", root="store", folder="v2")
    np.testing.assert_array_equal((await yard.client.predict("c", X)).only, X + 2)
    updated = await yard.admin(Admin.update_model, "m", placement=None)
    assert updated.placement is None
    assert (updated.folder, updated.keys) == ("v2", ("b", "c"))

    # To a model of another kind, in one step.
    updated = await yard.admin(
        Admin.update_model, "m", runtime="identity", root=None, folder=None, options=None
    )
    assert (updated.runtime, updated.root, updated.folder) == ("identity", None, None)
    np.testing.assert_array_equal((await yard.client.predict("m", X)).only, X)


async def test_other_keys_alone_load_nothing(yard: RunningApp) -> None:
    await yard.admin(Admin.create_model, "m", keys=["a"], placement="cpu", **torch_model())
    await yard.client.predict("a", X)
    await yard.admin(Admin.update_model, "m", keys=["b"])
    answer = await yard.client.predict("b", X)
    assert not answer.served.cold
    assert (await yard.residency("m")).load_count == 1
    # Anything else does, even if it says what was so before: the files may have changed.
    await yard.admin(Admin.update_model, "m", root="store", folder="v1")
    assert (await yard.residency("m")).load_count == 2


async def test_every_field_is_changed_by_a_star_and_others_are_not_looked_at(
    yard: RunningApp,
) -> None:
    models = model_service_pb2_grpc.ModelServiceStub(yard.channel)
    await yard.admin(Admin.create_model, "m", runtime="identity", keys=["a"], placement="cpu")

    async def update(*paths: str, **fields: Any) -> model_pb2.Model:
        request = model_service_pb2.UpdateModelRequest(
            model=model_pb2.Model(name="models/m", **fields),
            update_mask=field_mask_pb2.FieldMask(paths=paths),
        )
        return (await models.UpdateModel(request)).model

    # A placement that makes no sense, but nobody asked for it.
    answer = await update("keys", keys=["b"], placement={"multiple": {}}, task="dance", runtime="x")
    assert (list(answer.keys), answer.runtime, answer.task) == (["b"], "identity", "")
    assert answer.WhichOneof("where") == "placement"
    # The one that is named is not set, so the server chooses.
    automatic = {"strategy": "PLACEMENT_STRATEGY_BALANCED"}
    answer = await update("placement", automatic_placement=automatic)
    assert answer.WhichOneof("where") is None
    answer = await update("automatic_placement", automatic_placement=automatic)
    assert answer.WhichOneof("where") == "automatic_placement"
    answer = await update("*", runtime="identity")
    assert list(answer.keys) == []
    assert answer.WhichOneof("where") is None


@pytest.mark.parametrize(
    "paths",
    [(), ("name",), ("keys", "etag"), ("",), ("*", "keys"), ("placement.single",), ("a\n",)],
)
async def test_a_mask_of_no_use_is_refused(yard: RunningApp, paths: tuple[str, ...]) -> None:
    await yard.admin(Admin.create_model, "m", runtime="identity")
    before = await registered(yard)
    models = model_service_pb2_grpc.ModelServiceStub(yard.channel)
    request = model_service_pb2.UpdateModelRequest(
        model=model_pb2.Model(name="models/m", keys=["k"]),
        update_mask=field_mask_pb2.FieldMask(paths=paths),
    )
    with pytest.raises(Exception, match="update_mask"):
        await models.UpdateModel(request)
    assert await registered(yard) == before


async def test_an_update_that_is_refused_changes_nothing(yard: RunningApp) -> None:
    await yard.admin(Admin.create_model, "other", runtime="identity", keys=["taken"])
    before = await yard.admin(Admin.create_model, "m", keys=["mine"], **torch_model())
    await yard.client.predict("m", X)
    for error_type, changes in (
        (AlreadyExists, {"keys": ["taken"]}),
        (AlreadyExists, {"keys": ["free", "other"]}),
        (InvalidRequest, {"keys": ["b d"]}),
        (InvalidRequest, {"task": "dance"}),
        (InvalidRequest, {"root": "store", "folder": "nowhere"}),
        (EtagMismatch, {"keys": ["new"], "etag": '"old"'}),
        (
            ModelNeverFits,
            {
                "runtime": "identity",
                "root": None,
                "folder": None,
                "options": {"size_bytes": 65_000_000},
            },
        ),
    ):
        error = await refusal_of(yard.admin(Admin.update_model, "m", **changes))
        assert isinstance(error, error_type), (error, changes)
    assert await registered(yard) == before
    assert not (await yard.client.predict("mine", X)).served.cold
    error = await refusal_of(yard.admin(Admin.update_model, "nobody", keys=[]))
    assert isinstance(error, ModelNotFound)
    # Its own keys are no obstacle, and its etag is right.
    await yard.admin(Admin.update_model, "m", keys=["mine", "new"], etag=before.etag)


async def test_an_update_that_is_only_validated_answers_as_if_it_were_done(
    yard: RunningApp,
) -> None:
    before = await yard.admin(Admin.create_model, "m", **torch_model())
    await yard.client.predict("m", X)
    await yard.admin(Admin.pin, "m")
    checked = await yard.admin(
        Admin.update_model, "m", keys=["k"], root="store", folder="v2", validate_only=True
    )
    assert (checked.keys, checked.folder, checked.pinned) == (("k",), "v2", True)
    after = await yard.admin(Admin.get_model, "m")
    assert (after.keys, after.folder, after.etag) == ((), "v1", before.etag)
    np.testing.assert_array_equal((await yard.client.predict("m", X)).only, X + 1)
    assert (await yard.residency("m")).load_count == 1


async def test_models_of_the_configuration_file_are_the_files(tmp_path: Path) -> None:
    config = TWO_DEVICES + model_table("m", "identity", keys=["k"], device="cpu")
    async with running_app(config, tmp_path) as yard:
        before = await registered(yard)
        assert before.owner is ModelOwner.CONFIG
        for question in (
            lambda admin: admin.update_model("m", keys=[]),
            lambda admin: admin.update_model("m", keys=[], validate_only=True),
            lambda admin: admin.delete_model("m"),
        ):
            assert isinstance(await refusal_of(yard.admin(question)), ConfigOwned)
        assert await registered(yard) == before
        # A pin is not the file's.
        await yard.admin(Admin.pin, "m")
        assert (await yard.admin(Admin.get_model, "m")).pinned
        created = await yard.admin(Admin.create_model, "n", runtime="identity")
        assert created.owner is ModelOwner.API


async def test_a_replay_is_answered_with_the_first_answer(yard: RunningApp) -> None:
    first = await yard.admin(
        Admin.create_model, "m", runtime="identity", options={"size_bytes": 7}, request_id="id-1"
    )
    changed = await yard.admin(Admin.update_model, "m", keys=["k"], request_id="id-2")
    again = await yard.admin(
        Admin.create_model, "m", runtime="identity", options={"size_bytes": 7}, request_id="id-1"
    )
    assert again == first
    assert await yard.admin(Admin.get_model, "m") == changed
    error = await refusal_of(yard.admin(Admin.delete_model, "m", request_id="id-2"))
    assert isinstance(error, InvalidRequest)
    assert [violation.field for violation in error.violations] == ["request_id"]
    for _ in range(2):
        await yard.admin(Admin.delete_model, "m", request_id="id-3")
    assert await yard.admin(Admin.list_models) == ()


# --- While requests flow --------------------------------------------------------------------------


async def test_an_update_loses_no_request_and_mixes_no_answers(yard: RunningApp) -> None:
    await yard.admin(Admin.create_model, "m", **torch_model())
    await yard.client.predict("m", X)
    stop = asyncio.Event()
    values: list[float] = []
    cold: list[bool] = []

    async def ask() -> None:
        while not stop.is_set():
            prediction = await yard.client.predict("m", X)
            (value,) = set(np.asarray(prediction.only).tolist())  # All of one copy.
            values.append(value)
            cold.append(prediction.served.cold)

    async def answered(count: int) -> None:
        await eventually("requests are answered", lambda: len(values) >= count)

    clients = [asyncio.create_task(ask()) for _ in range(8)]
    for folder, expected in (("v2", 3.0), ("v1", 2.0), ("v2", 3.0)):
        await answered(len(values) + 20)
        await yard.admin(Admin.update_model, "m", root="store", folder=folder)
        # Who asks now is answered by the new one.
        np.testing.assert_array_equal((await yard.client.predict("m", X)).only, X + expected - 1)
    stop.set()
    await asyncio.gather(*clients)
    assert set(values) == {2.0, 3.0}
    # Each was loaded beside the old one: nobody waited.
    assert not any(cold)
    await yard.at_rest()
    device = await yard.device()
    assert device.resident_bytes == device.measured_bytes == WEIGHT_BYTES
    assert device.peak_accounted_bytes <= 2 * WEIGHT_BYTES


async def test_who_runs_is_answered_by_what_he_began_with(yard: RunningApp, tmp_path: Path) -> None:
    stuck = torch_model("StuckInRun", gate=tmp_path / "gate")
    await yard.admin(Admin.create_model, "m", **stuck)
    with faulty_models.closed_gate(tmp_path / "gate") as gate:
        runs = asyncio.create_task(yard.client.predict("m", X))
        await eventually("the model runs", gate.is_waited_at)
        await yard.admin(Admin.update_model, "m", **torch_model(folder="v2"))
        device = await yard.device()
        assert (device.resident_bytes, device.draining_bytes) == (WEIGHT_BYTES, WEIGHT_BYTES)
        # It is deleted meanwhile, and still.
        await yard.admin(Admin.delete_model, "m")
        assert isinstance(await refusal_of(yard.client.predict("m", X)), KeyNotFound)
        assert not runs.done()
    np.testing.assert_array_equal((await runs).only, X + 1)
    await yard.at_rest()
    device = await yard.device()
    assert (device.resident_bytes, device.draining_bytes, device.measured_bytes) == (0, 0, 0)


async def test_an_update_that_cannot_be_loaded_leaves_the_old_one_serving(
    yard: RunningApp, tmp_path: Path
) -> None:
    before = await yard.admin(Admin.create_model, "m", **torch_model())
    await yard.client.predict("m", X)
    exiting = torch_model("Exiting", "v2", flag=tmp_path / "flag")
    # What was looked at once is remembered, so that only its load fails.
    await yard.admin(Admin.update_model, "m", validate_only=True, **exiting)
    (tmp_path / "flag").touch()
    error = await refusal_of(yard.admin(Admin.update_model, "m", request_id="id", **exiting))
    assert isinstance(error, LoadFailed)
    assert "models/m" in str(error)
    assert await registered(yard) == before
    prediction = await yard.client.predict("m", X)
    assert not prediction.served.cold
    np.testing.assert_array_equal(prediction.only, X + 1)
    await yard.at_rest()
    assert (await yard.device()).measured_bytes == WEIGHT_BYTES
    # Nothing is left that would keep it from working later, the request's id neither.
    (tmp_path / "flag").unlink()
    await yard.admin(Admin.update_model, "m", request_id="id", **exiting)
    np.testing.assert_array_equal((await yard.client.predict("m", X)).only, X + 2)


async def test_an_update_that_is_not_loaded_in_time_leaves_the_old_one_serving(
    yard: RunningApp, tmp_path: Path
) -> None:
    before = await yard.admin(Admin.create_model, "m", **torch_model())
    await yard.client.predict("m", X)
    stuck = torch_model("StuckInLoad", "v2", gate=tmp_path / "gate")
    await yard.admin(Admin.update_model, "m", validate_only=True, **stuck)
    with faulty_models.closed_gate(tmp_path / "gate"):
        error = await told_refusal_of(
            lambda: yard.admin(Admin.update_model, "m", timeout_s=1, **stuck)
        )
        assert error.reason == "DEADLINE_IN_LOAD"
        assert not (await yard.client.predict("m", X)).served.cold
        assert await registered(yard) == before
    await yard.at_rest()
    assert (await yard.device()).measured_bytes == WEIGHT_BYTES


async def test_where_both_copies_do_not_fit_the_next_request_loads_the_new_one(
    tmp_path: Path,
) -> None:
    config = device_table("cpu", 1000)
    async with running_app(config, tmp_path) as yard:
        size = {"size_bytes": 600}
        await yard.admin(Admin.create_model, "m", runtime="identity", options=size)
        await yard.client.predict("m", X)
        await yard.admin(Admin.update_model, "m", keys=["k"], options=size)
        await yard.at_rest()
        assert (await yard.residency("m")).state is COLD
        assert (await yard.client.predict("k", X)).served.cold
        assert (await yard.device()).peak_accounted_bytes == 600


async def test_an_update_of_a_cold_model_loads_nothing(yard: RunningApp) -> None:
    await yard.admin(Admin.create_model, "m", **torch_model())
    await yard.admin(Admin.update_model, "m", root="store", folder="v2")
    assert (await yard.residency("m")).state is COLD
    assert (await yard.device()).peak_accounted_bytes == 0


async def test_a_pinned_model_stays_pinned_and_resident_when_it_is_changed(
    yard: RunningApp,
) -> None:
    await yard.admin(Admin.create_model, "m", **torch_model())
    await yard.admin(Admin.pin, "m")
    await yard.becomes("m", RESIDENT)
    updated = await yard.admin(Admin.update_model, "m", root="store", folder="v2")
    assert updated.pinned
    residency = await yard.residency("m")
    assert (residency.state, residency.pinned) == (RESIDENT, True)
    # It is deleted like any other.
    await yard.admin(Admin.delete_model, "m")
    await yard.at_rest()
    assert (await yard.device()).measured_bytes == 0


async def test_a_changed_placement_moves_a_resident_model(tmp_path: Path) -> None:
    async with running_app(TWO_DEVICES, tmp_path) as yard:
        size = {"size_bytes": 5000}
        await yard.admin(Admin.create_model, "m", runtime="identity", options=size, placement="cpu")
        assert (await yard.client.predict("m", X)).served.device == "devices/cpu"
        updated = await yard.admin(Admin.update_model, "m", placement="cuda:0")
        assert updated.placement == ComponentDevice.from_single(Device.from_str("cuda:0"))
        served = (await yard.client.predict("m", X)).served
        assert (served.device, served.cold) == ("devices/cuda-0", False)
        await yard.at_rest()
        assert (await yard.device("cpu")).measured_bytes == 0
        assert (await yard.device("cuda:0")).measured_bytes == 5000
        auto = AutomaticPlacement(strategy=PlacementStrategy.AUTO)
        assert (await yard.admin(Admin.update_model, "m", placement=auto)).placement == auto


async def test_many_changes_of_one_model_at_once_are_made_one_after_another(
    yard: RunningApp,
) -> None:
    await yard.admin(Admin.create_model, "m", **torch_model())
    await yard.client.predict("m", X)
    etag = (await yard.admin(Admin.get_model, "m")).etag

    async def update(index: int) -> str:
        try:
            folder = "v2" if index % 2 else "v1"
            await yard.admin(
                Admin.update_model, "m", keys=[f"k-{index}"], root="store", folder=folder, etag=etag
            )
        except EtagMismatch:
            return "stale"
        return f"k-{index}"

    ends = await asyncio.gather(*(update(index) for index in range(12)))
    (winner,) = [end for end in ends if end != "stale"]
    assert (await yard.admin(Admin.get_model, "m")).keys == (winner,)
    await yard.at_rest()
    assert (await yard.device()).measured_bytes == WEIGHT_BYTES


async def test_models_that_come_and_go_between_pages_hide_no_others(yard: RunningApp) -> None:
    names = [f"m-{index:02}" for index in range(9)]
    for name in names:
        await yard.admin(Admin.create_model, name, runtime="identity")
    models = model_service_pb2_grpc.ModelServiceStub(yard.channel)
    page = await models.ListModels(model_service_pb2.ListModelsRequest(page_size=4))
    seen = [model.name for model in page.models]
    await yard.admin(Admin.delete_model, "m-03")
    await yard.admin(Admin.delete_model, "m-06")
    await yard.admin(Admin.create_model, "m-035", runtime="identity")
    await yard.admin(Admin.update_model, "m-07", keys=["k"])
    while page.next_page_token:
        page = await models.ListModels(
            model_service_pb2.ListModelsRequest(page_size=2, page_token=page.next_page_token)
        )
        seen += [model.name for model in page.models]
    expected = ["m-00", "m-01", "m-02", "m-03", "m-035", "m-04", "m-05", "m-07", "m-08"]
    assert seen == [f"models/{name}" for name in expected]
