"""Bad input for the admin services, while predictions flow.

Every call ends with its documented reason and changes nothing it should not. Each test ends with an
audit of the ledger and a log without an error; most run beside clients whose answers are compared.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf import field_mask_pb2, struct_pb2
from tests.support.admin_calls import (
    ON_DISK,
    WATCHES,
    admin,
    all_seats_are_free,
    audited,
    create,
    delete,
    devices,
    first_of,
    gpu,
    identity,
    loud,
    models,
    outcome,
    residencies,
    serving_attacked,
    single,
    state,
    traffic,
)
from tests.support.server import RunningApp, eventually

from modelyard.v1 import (
    admin_service_pb2,
    device_pb2,
    device_service_pb2,
    model_pb2,
    model_service_pb2,
    plan_pb2,
    residency_service_pb2,
)
from modelyard.v1.plan_pb2 import DevicePlan

ds, ms, rs = device_service_pb2, model_service_pb2, residency_service_pb2
Setting, Placed = plan_pb2.DeviceSetting, plan_pb2.ModelPlacement
Component, Automatic = device_pb2.ComponentDevice, device_pb2.AutomaticPlacement

MANY = 10_000


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with serving_attacked(tmp_path_factory.mktemp("attacked")) as yard:
        yield yard


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a client sends is worth an error in the log, let alone a traceback."""
    yield
    assert not loud(caplog.records)


# --- Plans ----------------------------------------------------------------------------------------


def of_device(device: str = "devices/cuda-0", **values: Any) -> DevicePlan:
    return DevicePlan(devices=[Setting(device=device, **values)])


def mapped(parts: dict[str, device_pb2.Device], model: str = "models/text") -> DevicePlan:
    where = Component(multiple=device_pb2.DeviceMap(devices=parts))
    return DevicePlan(models=[Placed(model=model, placement=where)])


def automatic(strategy: int, *chosen: device_pb2.Device) -> DevicePlan:
    where = Automatic(strategy=strategy, devices=chosen)  # type: ignore[arg-type]  # any number
    return DevicePlan(models=[Placed(model="models/text", automatic_placement=where)])


INVALID_PLANS: dict[str, DevicePlan] = {
    "unknown device": of_device("devices/cuda-9"),
    "id over 127": of_device("devices/cuda-128"),
    "no name": of_device(""),
    "other resource": of_device("models/text"),
    "control characters": of_device("devices/\n\x1b[31m"),
    "name of 1 MB": of_device(f"devices/{'x' * 2**20}"),
    "device twice": DevicePlan(devices=[Setting(device="devices/cuda-0")] * 2),
    "many unknown devices": DevicePlan(
        devices=[Setting(device=f"devices/{i}") for i in range(MANY)]
    ),
    "negative budget": of_device(budget_bytes=-1),
    "least budget": of_device(budget_bytes=-(2**63)),
    "budget over the range": of_device(budget_bytes=2**46),
    "greatest budget": of_device(budget_bytes=2**63 - 1),
    "budget over the machine": of_device(budget_bytes=2**46 - 1),
    "bytes and per cent": of_device(budget_bytes=5, budget_percent=5),
    "placement with an id over 127": single(gpu(128)),
    "placement with a negative id": single(gpu(-1)),
    "placement with the greatest id": single(gpu(2**31 - 1)),
    "disk as a single device": single(gpu(kind=ON_DISK)),
    "unknown type": single(gpu(kind=99)),
    "no type": single(gpu(kind=0)),
    "placement without a device": DevicePlan(
        models=[Placed(model="models/text", placement=Component())]
    ),
    "empty map": mapped({}),
    "unknown strategy": automatic(99),
    "disk for auto": automatic(device_pb2.PLACEMENT_STRATEGY_AUTO, gpu(kind=ON_DISK)),
    "disk first": automatic(device_pb2.PLACEMENT_STRATEGY_BALANCED, gpu(kind=ON_DISK), gpu(0)),
    "device twice in a strategy": automatic(device_pb2.PLACEMENT_STRATEGY_BALANCED, gpu(0), gpu(0)),
    "many devices in a strategy": automatic(
        device_pb2.PLACEMENT_STRATEGY_BALANCED, *([gpu(1)] * MANY)
    ),
    "unknown model": single(gpu(0), "models/nobody"),
    "no model": single(gpu(0), ""),
    "model out of its collection": single(gpu(0), "models/../text"),
    "model with a null": single(gpu(0), "models/\x00"),
    "model twice": DevicePlan(models=[Placed(model="models/text")] * 2),
    "many unknown models": DevicePlan(models=[Placed(model=f"models/m{i}") for i in range(MANY)]),
} | {
    f"{percent} per cent": of_device(budget_percent=percent)
    for percent in (0.0, -0.0, -1.0, 100.5, 1e308, math.inf, -math.inf, math.nan)
}

OBSTRUCTED_PLANS: dict[str, tuple[DevicePlan, str]] = {
    "device the server has not": (single(gpu(7)), "PLACEMENT_INVALID"),
    "kind the server has not": (single(gpu(kind=device_pb2.DEVICE_TYPE_XPU)), "PLACEMENT_INVALID"),
    "part that is not there": (mapped({"decoder": gpu(0), "": gpu(1)}), "PLACEMENT_INVALID"),
    "half a component": (mapped({"enc": gpu(0), "": gpu(1)}), "PLACEMENT_INVALID"),
    "nothing for the rest": (mapped({"encoder": gpu(0)}), "PLACEMENT_INVALID"),
    "control characters": (mapped({"\n\x1b[31m\x00": gpu(0), "": gpu(1)}), "PLACEMENT_INVALID"),
    "dots": (mapped({"..": gpu(0), "encoder.": gpu(0), "": gpu(1)}), "PLACEMENT_INVALID"),
    "many keys": (mapped({f"k{i}.x": gpu(0) for i in range(MANY)}), "PLACEMENT_INVALID"),
    "key of 1 MB": (mapped({"k" * 2**20: gpu(0), "": gpu(1)}), "PLACEMENT_INVALID"),
    "all on the disk": (mapped({"": gpu(kind=ON_DISK)}), "PLACEMENT_INVALID"),
    "map for identity": (mapped({"a": gpu(0), "": gpu(1)}, "models/echo"), "PLACEMENT_INVALID"),
    "map to one device for identity": (mapped({"a": gpu(0)}, "models/echo"), "PLACEMENT_INVALID"),
    "too little room": (
        DevicePlan(
            devices=[Setting(device="devices/cuda-1", budget_bytes=10)],
            models=single(gpu(1)).models,
        ),
        "MODEL_NEVER_FITS",
    ),
}


@pytest.mark.parametrize("name", INVALID_PLANS)
async def test_plans_that_break_a_rule_are_refused(server: RunningApp, name: str) -> None:
    plan, before = INVALID_PLANS[name], await state(server)
    async with traffic(server):
        for call in (
            devices(server).PlanDevices(ds.PlanDevicesRequest(plan=plan)),
            devices(server).ApplyPlan(ds.ApplyPlanRequest(plan=plan)),
            devices(server).ApplyPlan(ds.ApplyPlanRequest(plan=plan, validate_only=True)),
        ):
            assert await outcome(call) == "INVALID_FIELD"
    assert await state(server) == before
    audited(server)


@pytest.mark.parametrize("name", OBSTRUCTED_PLANS)
async def test_plans_with_obstacles_are_forecast_and_not_applied(
    server: RunningApp, name: str
) -> None:
    (plan, reason), before = OBSTRUCTED_PLANS[name], await state(server)
    async with traffic(server):
        answer = await devices(server).PlanDevices(ds.PlanDevicesRequest(plan=plan))
        assert reason in {obstacle.reason for obstacle in answer.report.obstacles}
        assert await outcome(devices(server).ApplyPlan(ds.ApplyPlanRequest(plan=plan))) == reason
    assert await state(server) == before
    audited(server)


async def test_the_least_share_of_a_budget_is_no_budget(server: RunningApp) -> None:
    plan = of_device("devices/cuda-1", budget_percent=5e-324)
    answer = await devices(server).PlanDevices(ds.PlanDevicesRequest(plan=plan))
    assert not answer.report.obstacles
    assert [device.budget_bytes for device in answer.report.devices][-1] == 0


async def test_a_plan_for_many_models_is_forecast_and_applied(server: RunningApp) -> None:
    count = 200
    ids = [f"many-{i}" for i in range(count)]
    async with traffic(server):
        for name in ids:
            assert await outcome(create(server, name)) == "OK"
        plan = DevicePlan(models=[Placed(model=f"models/{name}") for name in ids])
        for placed in plan.models:
            placed.placement.single.CopyFrom(gpu(1))
        applied = await devices(server).ApplyPlan(ds.ApplyPlanRequest(plan=plan), timeout=30)
        assert len(applied.plan.models) == count + 2
        assert len(applied.report.models) == count
        for name in ids:
            assert await outcome(delete(server, name)) == "OK"
    audited(server)


# --- Names, tokens, etags, ids --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "INVALID_FIELD"),
        ("cuda-0", "INVALID_FIELD"),
        ("models/text", "INVALID_FIELD"),
        ("devices/", "DEVICE_NOT_FOUND"),
        ("devices/cuda:0", "DEVICE_NOT_FOUND"),
        ("devices/cuda-00", "DEVICE_NOT_FOUND"),
        ("devices/cuda-0/x", "DEVICE_NOT_FOUND"),
        (f"devices/{'x' * 2**20}", "DEVICE_NOT_FOUND"),
    ],
)
async def test_names_of_no_device_are_refused(server: RunningApp, name: str, reason: str) -> None:
    stub, before = devices(server), await state(server)
    for call in (
        stub.GetDevice(ds.GetDeviceRequest(name=name)),
        stub.UpdateBudget(ds.UpdateBudgetRequest(name=name, budget_bytes=1)),
        stub.DrainDevice(ds.DrainDeviceRequest(name=name)),
        stub.UndrainDevice(ds.UndrainDeviceRequest(name=name)),
    ):
        assert await outcome(call) == reason
    assert await state(server) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "INVALID_FIELD"),
        ("text", "INVALID_FIELD"),
        ("models/TEXT", "INVALID_FIELD"),
        ("models/a\nb", "INVALID_FIELD"),
        (f"models/{'x' * 129}", "INVALID_FIELD"),
        ("models/nobody", "MODEL_NOT_FOUND"),
        (f"models/{'x' * 128}", "MODEL_NOT_FOUND"),
    ],
)
async def test_names_of_no_model_are_refused(server: RunningApp, name: str, reason: str) -> None:
    catalog, memory = models(server), residencies(server)
    keys = field_mask_pb2.FieldMask(paths=["keys"])
    for call in (
        catalog.GetModel(ms.GetModelRequest(name=name)),
        catalog.DeleteModel(ms.DeleteModelRequest(name=name)),
        catalog.UpdateModel(
            ms.UpdateModelRequest(model=model_pb2.Model(name=name), update_mask=keys)
        ),
        memory.LoadModel(rs.LoadModelRequest(model=name)),
        memory.UnloadModel(rs.UnloadModelRequest(model=name)),
        memory.PinModel(rs.PinModelRequest(model=name)),
        memory.UnpinModel(rs.UnpinModelRequest(model=name)),
        memory.ExplainModel(rs.ExplainModelRequest(model=name)),
    ):
        assert await outcome(call) == reason


@pytest.mark.parametrize("token", ["x", "!!!", "YWZ0ZXI", "\u00e9", "after:text", "A" * 2**20])
async def test_page_tokens_that_are_none_are_refused(server: RunningApp, token: str) -> None:
    for call in (
        devices(server).ListDevices(ds.ListDevicesRequest(page_token=token)),
        models(server).ListModels(ms.ListModelsRequest(page_token=token)),
        residencies(server).ListResidencies(rs.ListResidenciesRequest(page_token=token)),
    ):
        assert await outcome(call) == "INVALID_FIELD"
    too_few = ms.ListModelsRequest(page_size=-(2**31))
    assert await outcome(models(server).ListModels(too_few)) == "INVALID_FIELD"


@pytest.mark.parametrize("etag", ["x", '""', "\n", "x" * 2**20])
async def test_stale_etags_are_refused(server: RunningApp, etag: str) -> None:
    before = await state(server)
    stub, name = devices(server), "devices/cuda-1"
    for call in (
        stub.ApplyPlan(ds.ApplyPlanRequest(plan=DevicePlan(etag=etag))),
        stub.UpdateBudget(ds.UpdateBudgetRequest(name=name, etag=etag, budget_bytes=1)),
        stub.DrainDevice(ds.DrainDeviceRequest(name=name, etag=etag)),
        stub.UndrainDevice(ds.UndrainDeviceRequest(name=name, etag=etag)),
    ):
        assert await outcome(call) == "ETAG_MISMATCH"
    assert await state(server) == before


@pytest.mark.parametrize("request_id", ["x" * 129, "a\nb", "\u00e9", "x" * 2**20])
async def test_unusable_request_ids_are_refused(server: RunningApp, request_id: str) -> None:
    before = await state(server)
    name = "devices/cuda-1"
    for call in (
        devices(server).ApplyPlan(ds.ApplyPlanRequest(request_id=request_id)),
        devices(server).DrainDevice(ds.DrainDeviceRequest(name=name, request_id=request_id)),
        models(server).DeleteModel(
            ms.DeleteModelRequest(name="models/text", request_id=request_id)
        ),
        create(server, "never", request_id=request_id),
    ):
        assert await outcome(call) == "INVALID_FIELD"
    assert await state(server) == before


async def test_a_request_id_is_that_of_one_call(server: RunningApp) -> None:
    stub, name = devices(server), "devices/cuda-1"
    first = ds.DrainDeviceRequest(name=name, request_id="only-once")
    async with traffic(server):
        answer = await stub.DrainDevice(first)
        other = ds.UndrainDeviceRequest(name=name, request_id="only-once")
        assert await outcome(stub.UndrainDevice(other)) == "INVALID_FIELD"
        await stub.UndrainDevice(ds.UndrainDeviceRequest(name=name))
        # A replay tells what it was, and drains nothing.
        assert await stub.DrainDevice(first) == answer
        assert not (await stub.GetDevice(ds.GetDeviceRequest(name=name))).device.drained
    audited(server)


# --- Models ---------------------------------------------------------------------------------------


def from_folder(folder: str) -> model_pb2.Model:
    return model_pb2.Model(
        runtime="transformers",
        task="feature-extraction",
        source=model_pb2.ModelSource(root="store", folder=folder),
    )


def nested(levels: int) -> model_pb2.Model:
    value = struct_pb2.Value(number_value=1)
    for _ in range(levels):
        value = struct_pb2.Value(list_value=struct_pb2.ListValue(values=[value]))
    model = model_pb2.Model(runtime="identity")
    model.options.fields["size_bytes"].CopyFrom(value)
    return model


INVALID_MODELS: dict[str, model_pb2.Model] = {
    "nothing": model_pb2.Model(),
    "unknown runtime": model_pb2.Model(runtime="x" * 2**20),
    "bad keys": model_pb2.Model(runtime="identity", keys=["", "\n", "..", "x" * 2**20]),
    "many bad keys": model_pb2.Model(runtime="identity", keys=[f"\n{i}" for i in range(MANY)]),
    "a key twice": model_pb2.Model(runtime="identity", keys=["k", "k"]),
    "many options": identity(**{f"o{i}": i for i in range(MANY)}),
    "options of 2 MB": identity(**{"x" * 2**20: "y" * 2**20}),
    "NaN": identity(size_bytes=math.nan),
    "infinity": identity(size_bytes=math.inf),
    "negative size": identity(size_bytes=-1),
    "endless size": identity(size_bytes=1e300),
    "size that is text": identity(size_bytes="5"),
    "deep options": nested(30),
    "device_map that is NaN": identity(device_map=math.nan),
    "device_map that is endless": identity(device_map=1e300),
    "device_map with an id over 127": identity(device_map=128),
    "device_map beside device": identity(device_map="cuda:0", device="cuda:1"),
    "folder out of its root": from_folder("../../etc"),
    "absolute folder": from_folder("/etc"),
    "folder with a null": from_folder("a\0b"),
    "folder of a long name": from_folder("a" * 2**20),
    "folder that is not there": from_folder("nowhere"),
    "folder for identity": model_pb2.Model(
        runtime="identity", source=model_pb2.ModelSource(root="store", folder="text")
    ),
    "unknown root": model_pb2.Model(
        runtime="identity", source=model_pb2.ModelSource(root="attic", folder="text")
    ),
    "disk as a single device": model_pb2.Model(
        runtime="identity", placement=Component(single=gpu(kind=ON_DISK))
    ),
}


@pytest.mark.parametrize("name", INVALID_MODELS)
async def test_models_that_break_a_rule_are_refused(server: RunningApp, name: str) -> None:
    before = await state(server)
    async with traffic(server):
        refused = await outcome(create(server, "bad", model=INVALID_MODELS[name]))
        assert refused == "INVALID_FIELD"
        every = field_mask_pb2.FieldMask(paths=["*"])
        assert await outcome(create(server, "good")) == "OK"
        changed = model_pb2.Model(name="models/good")
        changed.MergeFrom(INVALID_MODELS[name])
        update = ms.UpdateModelRequest(model=changed, update_mask=every)
        assert await outcome(models(server).UpdateModel(update)) == "INVALID_FIELD"
        assert await outcome(delete(server, "good")) == "OK"
    assert await state(server) == before
    audited(server)


@pytest.mark.parametrize(
    ("parts", "option"),
    [
        ({"a": 0}, True),
        ({"a": 0, "": 1}, True),
        ({f"k{i}": 0 for i in range(MANY)}, True),
        ({"a": 0}, False),
        ({f"k{i}": 0 for i in range(MANY)}, False),
    ],
)
async def test_a_model_without_parts_takes_no_map_of_parts(
    server: RunningApp, parts: dict[str, int], option: bool
) -> None:
    if option:
        model = identity(device_map=parts)
    else:
        where = device_pb2.DeviceMap(devices={key: gpu(i) for key, i in parts.items()})
        model = model_pb2.Model(runtime="identity", placement=Component(multiple=where))
    assert await outcome(create(server, "mapped", model=model)) == "PLACEMENT_INVALID"


@pytest.mark.parametrize("model_id", ["", "A", "a\nb", "..", "a" * 129, "a" * 2**20])
async def test_ids_that_are_none_are_refused(server: RunningApp, model_id: str) -> None:
    assert await outcome(create(server, model_id)) == "INVALID_FIELD"


@pytest.mark.parametrize(
    "paths",
    [
        [],
        ["nonsense"],
        ["*", "keys"],
        ["name"],
        ["etag"],
        ["source.root"],
        ["\n"],
        ["x" * 2**20],
        [f"p{i}" for i in range(MANY)],
    ],
)
async def test_masks_of_nonsense_are_refused(server: RunningApp, paths: list[str]) -> None:
    request = ms.UpdateModelRequest(
        model=model_pb2.Model(name="models/text"),
        update_mask=field_mask_pb2.FieldMask(paths=paths),
    )
    assert await outcome(models(server).UpdateModel(request)) == "INVALID_FIELD"


# --- Messages that are none -----------------------------------------------------------------------

ALL_METHODS = [
    (method.containing_service.full_name, method.name, method.server_streaming)
    for file in (device_service_pb2, model_service_pb2, residency_service_pb2, admin_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.mark.parametrize(("service", "method", "streams"), ALL_METHODS)
async def test_bytes_that_are_no_message_are_refused(
    server: RunningApp, service: str, method: str, streams: bool
) -> None:
    path = f"/{service}/{method}"
    for body in (b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 200):
        channel: Any = server.channel
        if streams:
            stream = channel.unary_stream(path)(body)
            assert await first_of(stream) == "INVALID_FIELD"
        else:
            assert await outcome(channel.unary_unary(path)(body)) == "INVALID_FIELD"


# --- Watches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "revision"), [("", 1), ("", -1), ("x", -1), ("x", -(2**63))])
async def test_places_that_no_watch_has_told_are_refused(
    server: RunningApp, epoch: str, revision: int
) -> None:
    place: dict[str, Any] = {"epoch": epoch, "revision": revision}
    stream = residencies(server).WatchResidencies(rs.WatchResidenciesRequest(**place))
    assert await first_of(stream) == "INVALID_FIELD"
    stream = admin(server).WatchEvents(admin_service_pb2.WatchEventsRequest(**place))
    assert await first_of(stream) == "INVALID_FIELD"


@pytest.mark.parametrize("epoch", ["another", "", "x" * 2**20])
async def test_a_watch_from_the_future_begins_anew(server: RunningApp, epoch: str) -> None:
    # Empty stands for the epoch of this very run.
    place: dict[str, Any] = {"epoch": epoch or server.app.journal.epoch, "revision": 2**63 - 1}
    stream = residencies(server).WatchResidencies(rs.WatchResidenciesRequest(**place))
    assert (await first_of(stream)).snapshot
    stream = admin(server).WatchEvents(admin_service_pb2.WatchEventsRequest(**place))
    assert (await first_of(stream)).truncated


async def test_too_many_watches_are_refused_and_take_nothing_from_the_others(
    server: RunningApp,
) -> None:
    async with traffic(server):
        streams = [
            residencies(server).WatchResidencies(rs.WatchResidenciesRequest())
            for _ in range(WATCHES)
        ]
        for stream in streams:
            assert (await stream.read()).snapshot
        refused = [
            residencies(server).WatchResidencies(rs.WatchResidenciesRequest())
            for _ in range(100 - WATCHES)
        ]
        assert [await first_of(stream) for stream in refused] == ["QUEUE_FULL"] * len(refused)
        for stream in streams:
            stream.cancel()
        await eventually("their seats are free", lambda: all_seats_are_free(server))
    audited(server)
