"""Calls of the admin services at the worst moment, while predictions flow.

Calls that race for one model, models that are deleted while they run or move, devices that are all
drained, watchers that read nothing: the ledger is right afterwards, and nobody else has noticed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from google.protobuf import field_mask_pb2
from tests.support import faulty_models
from tests.support.admin_calls import (
    BUDGET,
    CLIENTS,
    EVENTS,
    TEXTS,
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
from tests.support.server import (
    COMMAND,
    RunningApp,
    child_environment,
    eventually,
    told_refusal_of,
)

from modelyard import DeadlineExceeded, KeyNotFound, ModelNeverFits, ModelNotFound
from modelyard.v1 import (
    admin_service_pb2,
    device_pb2,
    device_service_pb2,
    model_pb2,
    model_service_pb2,
    residency_service_pb2,
)
from modelyard_server.residency.journal import EventType

ds, ms, rs = device_service_pb2, model_service_pb2, residency_service_pb2

X = np.ones(3, np.float32)


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


async def test_a_watcher_that_is_stopped_holds_up_nobody(server: RunningApp) -> None:
    journal = server.app.journal
    process = await asyncio.create_subprocess_exec(
        COMMAND,
        *("watch", "--events", "--json", "--server", server.target),
        stdout=subprocess.PIPE,
        env=child_environment(),
        limit=2**20,
    )
    assert process.stdout is not None
    try:
        begun = asyncio.create_task(process.stdout.readline())

        def tell() -> bool:
            journal.publish(EventType.PINNED, "models/text")
            return begun.done()

        await eventually("it watches", tell)
        async with traffic(server):
            os.kill(process.pid, signal.SIGSTOP)
            first = journal.revision
            # More than what the connection and the log hold together.
            text = "x" * 2_000
            for _ in range(40):
                for _ in range(2 * EVENTS):
                    journal.publish(EventType.PINNED, "models/text", description=text)
                await asyncio.sleep(0)
            stream = admin(server).WatchEvents(admin_service_pb2.WatchEventsRequest())
            assert (await first_of(stream)).revision >= first + 80 * EVENTS
            os.kill(process.pid, signal.SIGCONT)
            # It missed some, is told so, and goes on.
            revisions = []
            async with asyncio.timeout(60):
                while True:
                    line = json.loads(await process.stdout.readline())
                    revisions.append(line["event"]["revision"])
                    if line["truncated"]:
                        break
        assert len(revisions) < revisions[-1] - first
    finally:
        process.kill()
        await process.wait()
    await eventually("its seat is free", lambda: all_seats_are_free(server))


# --- Calls at the worst moment --------------------------------------------------------------------

RACE_REASONS = {
    "OK",
    "MODEL_NOT_FOUND",
    "ALREADY_EXISTS",
    "MODEL_IN_USE",
    "DEADLINE_IN_QUEUE",
    # A plan or an unload that names a model which has just been deleted.
    "INVALID_FIELD",
    "BUDGET_EXHAUSTED",
}


async def test_calls_that_race_for_one_model_leave_a_right_ledger(server: RunningApp) -> None:
    before = await state(server)
    stub, memory = models(server), residencies(server)
    name = "models/contested"

    def on(index: int) -> Any:
        plan = single(gpu(index), name)
        return devices(server).ApplyPlan(ds.ApplyPlanRequest(plan=plan), timeout=20)

    def update(size_bytes: int) -> Any:
        model = identity(size_bytes=size_bytes)
        model.name = name
        mask = field_mask_pb2.FieldMask(paths=["options"])
        return stub.UpdateModel(ms.UpdateModelRequest(model=model, update_mask=mask), timeout=20)

    calls: list[Callable[[], Any]] = [
        lambda: create(server, "contested", 50_000),
        lambda: on(0),
        lambda: update(60_000),
        lambda: memory.PinModel(rs.PinModelRequest(model=name)),
        lambda: on(1),
        lambda: memory.UnloadModel(rs.UnloadModelRequest(model=name), timeout=5),
        lambda: update(40_000),
        lambda: memory.UnpinModel(rs.UnpinModelRequest(model=name)),
        lambda: memory.LoadModel(rs.LoadModelRequest(model=name)),
        lambda: delete(server, "contested"),
        lambda: devices(server).RebalanceDevices(ds.RebalanceDevicesRequest(), timeout=20),
    ]

    async def ask() -> str:
        try:
            await server.client.predict("contested", X)
        except (KeyNotFound, ModelNotFound):
            return "gone"
        return "answered"

    async with traffic(server):
        for turn in range(12):
            order = [calls[(turn * 5 + i * (1 + turn % 3)) % len(calls)] for i in range(40)]
            pending = [outcome(call()) for call in order]
            found = await asyncio.gather(*pending, *(ask() for _ in range(8)))
            assert set(found[: len(pending)]) <= RACE_REASONS, sorted(set(found))
            server.app.residency.audit()
        await outcome(delete(server, "contested"))
    await server.at_rest()
    assert (await state(server))[1] == before[1]
    plan = (await devices(server).GetPlan(ds.GetPlanRequest())).plan
    assert name not in [placed.model for placed in plan.models]
    await nothing_is_left_of("contested", server)


async def nothing_is_left_of(model: str, yard: RunningApp) -> None:
    """What devices hold is what the models that there are hold."""
    audited(yard)

    async def agree() -> bool:
        found = (await residencies(yard).ListResidencies(rs.ListResidenciesRequest())).residencies
        assert f"models/{model}" not in [each.model for each in found]
        held = (await devices(yard).ListDevices(ds.ListDevicesRequest())).devices
        charged = sum(charge.size_bytes for each in found for charge in each.charges)
        return bool(sum(device.resident_bytes for device in held) == charged)

    await eventually(f"the memory of {model} is back", agree)


def stuck(kind: str, gate: Path) -> model_pb2.Model:
    """A model that waits at a gate, if there is one, in its load or in its run; on cuda:0."""
    model = model_pb2.Model(
        runtime="torch",
        source=model_pb2.ModelSource(root="store", folder="stuck"),
        placement=device_pb2.ComponentDevice(single=gpu(0)),
    )
    options: dict[str, Any] = {
        "factory": faulty_models.factory(kind),
        "factory_options": {"gate": str(gate)},
    }
    model.options.update(options)
    return model


async def test_a_model_that_is_in_use_is_deleted_and_answers_what_runs(
    server: RunningApp, tmp_path: Path
) -> None:
    path = tmp_path / "gate"
    async with traffic(server):
        with faulty_models.closed_gate(path) as gate:
            assert await outcome(create(server, "used", model=stuck("StuckInRun", path))) == "OK"
            running = asyncio.create_task(server.client.predict("used", X))
            await eventually("it runs", gate.is_waited_at)
            assert await outcome(delete(server, "used")) == "OK"
            with pytest.raises(KeyNotFound):
                await server.client.predict("used", X)
            gate.open()
            assert np.asarray((await running).only).shape == X.shape
    await nothing_is_left_of("used", server)


async def test_a_model_is_deleted_behind_the_plan_that_moves_it(
    server: RunningApp, tmp_path: Path
) -> None:
    path, stub, name = tmp_path / "gate", devices(server), "models/moving"
    async with traffic(server):
        assert await outcome(create(server, "moving", model=stuck("StuckInLoad", path))) == "OK"
        wanted = np.asarray((await server.client.predict("moving", X)).only)
        with faulty_models.closed_gate(path) as gate:
            request = ds.ApplyPlanRequest(plan=single(gpu(1), name))
            moving = asyncio.create_task(outcome(stub.ApplyPlan(request, timeout=30)))
            await eventually("its new copy loads", gate.is_waited_at)
            deleting = asyncio.create_task(outcome(delete(server, "moving")))
            # It is answered by the old copy, whoever wants to change it.
            assert np.array_equal((await server.client.predict("moving", X)).only, wanted)
            assert not moving.done() and not deleting.done()
            gate.open()
            assert (await moving, await deleting) == ("OK", "OK")
    await nothing_is_left_of("moving", server)


async def test_a_plan_whose_caller_gives_up_changes_nothing(
    server: RunningApp, tmp_path: Path
) -> None:
    path, stub, name = tmp_path / "gate", devices(server), "models/moving"
    async with traffic(server):
        assert await outcome(create(server, "moving", model=stuck("StuckInLoad", path))) == "OK"
        await server.client.predict("moving", X)
        before = await state(server)
        with faulty_models.closed_gate(path) as gate:
            request = ds.ApplyPlanRequest(plan=single(gpu(1), name))
            moving = stub.ApplyPlan(request, timeout=30)
            await eventually("its new copy loads", gate.is_waited_at)
            moving.cancel()
            await server.client.predict("moving", X)
            gate.open()
            # The next change has its turn only when all is taken back.
            await stub.PlanDevices(ds.PlanDevicesRequest())
        assert await state(server) == before
        assert await outcome(delete(server, "moving")) == "OK"
    await nothing_is_left_of("moving", server)


async def test_requests_wait_while_every_device_is_drained(server: RunningApp) -> None:
    stub = devices(server)
    names = [device.name for device in (await stub.ListDevices(ds.ListDevicesRequest())).devices]
    async with traffic(server) as seen:
        try:
            for name in names:
                await stub.DrainDevice(ds.DrainDeviceRequest(name=name))
            # A load that was on its way ends, and whoever waited for it is still served by it.
            for index in (0, 1):
                await eventually("it is empty", partial(holds_nothing, server, index))
            error = await told_refusal_of(
                lambda: server.client.predict("text", TEXTS, timeout_s=0.5)
            )
            assert isinstance(error, DeadlineExceeded)
            assert error.phase == "queue"
            assert "drained" in str(error)
            count = seen.count
        finally:
            for name in names:
                await stub.UndrainDevice(ds.UndrainDeviceRequest(name=name))
        await eventually("those who waited are served", lambda: seen.count >= count + CLIENTS)
    audited(server)


def budget(yard: RunningApp, index: int, size_bytes: int) -> Any:
    name = f"devices/cuda-{index}"
    return devices(yard).UpdateBudget(ds.UpdateBudgetRequest(name=name, budget_bytes=size_bytes))


async def test_a_budget_of_nothing_moves_models_elsewhere(server: RunningApp) -> None:
    async with traffic(server):
        for index in (0, 1):
            answer = await budget(server, index, 0)
            assert answer.device.budget_bytes == 0
            await eventually("it is empty", partial(holds_nothing, server, index))
            await server.client.predict("text", TEXTS)
            await budget(server, index, BUDGET)
    audited(server)


async def holds_nothing(yard: RunningApp, index: int) -> bool:
    name = f"devices/cuda-{index}"
    device = (await devices(yard).GetDevice(ds.GetDeviceRequest(name=name))).device
    held = device.reserved_bytes, device.resident_bytes, device.draining_bytes, device.deficit_bytes
    return not any(held)


async def test_without_any_budget_models_are_refused_and_come_back(server: RunningApp) -> None:
    for index in (0, 1):
        await budget(server, index, 0)
    for index in (0, 1):
        await eventually("it is empty", partial(holds_nothing, server, index))
    with pytest.raises(ModelNeverFits):
        await server.client.predict("text", TEXTS)
    # One that holds nothing goes on.
    assert (await server.client.predict("echo", "a")).only == ["a"]
    for index in (0, 1):
        await budget(server, index, BUDGET)
    await server.client.predict("text", TEXTS)
    audited(server)


async def test_clients_would_notice(server: RunningApp) -> None:
    # The traffic of all these tests is only worth something if it fails when it should.
    with pytest.raises(AssertionError, match="ModelNeverFits"):
        async with traffic(server):
            for index in (0, 1):
                await budget(server, index, 0)
    for index in (0, 1):
        await budget(server, index, BUDGET)
    await server.client.predict("text", TEXTS)


async def test_errors_in_the_log_would_be_noticed() -> None:
    def record(level: int, exc_info: Any = None) -> logging.LogRecord:
        return logging.LogRecord("x", level, "f", 1, "said", None, exc_info)

    assert not loud([record(logging.WARNING)])
    assert loud([record(logging.ERROR)]) == ["said"]
    assert loud([record(logging.INFO, (ValueError, ValueError(), None))]) == ["said"]
