"""Device plans over a real channel, with real models on logical devices, while requests flow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf import text_format
from google.rpc import error_details_pb2, status_pb2
from tests.support import part_models, tiny_models
from tests.support.config_text import ROOTS, device_table, model_table
from tests.support.server import RunningApp, eventually, running_app

from modelyard.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    device_service_pb2,
    device_service_pb2_grpc,
    event_pb2,
    plan_pb2,
    residency_service_pb2,
    residency_service_pb2_grpc,
)

pb = device_service_pb2

A, B, C = "devices/cuda-0", "devices/cuda-1", "devices/cuda-2"
BUDGET = 200_000
CLIENTS = 16
DEVICES = "".join(device_table(f"cuda:{i}", BUDGET, logical=True, threads=1) for i in range(3))
IDENTITY = np.ones(3, np.float32)
X = np.random.default_rng(5).standard_normal((2, part_models.WIDTH)).astype(np.float32)
TEXTS = ["the cat sat on the mat", "a big red fish"]


def ballast(name: str, size_bytes: int, **settings: object) -> str:
    return model_table(name, "identity", options={"size_bytes": size_bytes}, **settings)


@asynccontextmanager
async def real_models(tmp_path: Path, more: str = "") -> AsyncIterator[RunningApp]:
    """A server with an encoder "text" and a net "chain", both on cuda:0."""
    store = tmp_path / "store"
    tiny_models.make_tiny_bert(store / "text", seed=3)
    part_models.make_factory_model(store / "chain", part_models.FACTORIES[0], seed=4)
    allowed = f'[runtimes.torch]\nallowed_factories = ["{part_models.FACTORIES[0]}"]\n'
    config = DEVICES + ROOTS + allowed
    config += model_table("text", "transformers", task="feature-extraction", device="cuda:0")
    config += model_table(
        "chain",
        "torch",
        device="cuda:0",
        options={"factory": part_models.FACTORIES[0], "outputs": ["y"]},
    )
    async with running_app(config + more, tmp_path) as yard:
        yield yard


def devices(yard: RunningApp) -> Any:
    return device_service_pb2_grpc.DeviceServiceStub(yard.channel)


def residencies(yard: RunningApp) -> Any:
    return residency_service_pb2_grpc.ResidencyServiceStub(yard.channel)


def plan(text: str) -> plan_pb2.DevicePlan:
    return text_format.Parse(text, plan_pb2.DevicePlan())


def single(model: str, index: int) -> str:
    return (
        f'models {{ model: "models/{model}" placement {{ single '
        f"{{ type: DEVICE_TYPE_GPU index: {index} }} }} }}"
    )


def mapped(model: str, **parts: int) -> str:
    entries = " ".join(
        f'devices {{ key: "{key[1:].replace("_", ".")}" '
        f"value {{ type: DEVICE_TYPE_GPU index: {index} }} }}"
        for key, index in parts.items()
    )
    return f'models {{ model: "models/{model}" placement {{ multiple {{ {entries} }} }} }}'


async def apply(yard: RunningApp, text: str, **settings: Any) -> pb.ApplyPlanResponse:
    answer: pb.ApplyPlanResponse = await devices(yard).ApplyPlan(
        pb.ApplyPlanRequest(plan=plan(text), **settings), timeout=60
    )
    return answer


async def forecast(yard: RunningApp, text: str) -> plan_pb2.PlanReport:
    answer: pb.PlanDevicesResponse = await devices(yard).PlanDevices(
        pb.PlanDevicesRequest(plan=plan(text)), timeout=60
    )
    return answer.report


class Refused:
    """How a call was refused: code, text, and what google.rpc details say."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.text = error.details() or ""
        status = status_pb2.Status()
        metadata = dict(error.trailing_metadata() or ())
        status.ParseFromString(metadata["grpc-status-details-bin"])
        self.details = {}
        for detail in status.details:
            name = detail.type_url.rpartition(".")[2]
            message = getattr(error_details_pb2, name)()
            detail.Unpack(message)
            self.details[name] = message
        info = self.details["ErrorInfo"]
        assert info.domain == "modelyard"
        self.reason = info.reason
        self.metadata = dict(info.metadata)
        assert ("RetryInfo" in self.details) == ("retry_after_ms=" in self.text)

    @property
    def fields(self) -> list[str]:
        """Fields of BadRequest."""
        return [each.field for each in self.details["BadRequest"].field_violations]


async def refused(call: Any) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return Refused(caught.value)


class Events:
    """All events from now on."""

    def __init__(self, yard: RunningApp) -> None:
        stub: Any = admin_service_pb2_grpc.AdminServiceStub(yard.channel)
        revision = yard.app.journal.revision
        self._stream = stub.WatchEvents(
            admin_service_pb2.WatchEventsRequest(epoch=yard.app.journal.epoch, revision=revision)
        )
        self.all: list[event_pb2.Event] = []

    async def until(self, type: str) -> list[tuple[str, str, str]]:
        """Reads until there is one of a type; type, subject and cause of all."""
        wanted = event_pb2.EventType.Value(f"EVENT_TYPE_{type}")
        async with asyncio.timeout(20):
            while not any(event.type == wanted for event in self.all):
                message = await self._stream.read()
                assert message is not grpc.aio.EOF
                self.all += message.events
        return [
            (event_pb2.EventType.Name(e.type).removeprefix("EVENT_TYPE_"), e.subject, e.cause)
            for e in self.all
        ]

    def close(self) -> None:
        """Ends the stream."""
        self._stream.cancel()


class Load:
    """Clients that keep asking two models, and an audit that never stops.

    Attributes:
        answered: how many answers came, by model. All of them were right.
        audits: how often the yard was looked through.
    """

    def __init__(self, yard: RunningApp) -> None:
        self._yard = yard
        self._stop = False
        self.answered = {"text": 0, "chain": 0}
        self.audits = 0
        self.devices: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Runs them; whatever one of them meets is raised here."""
        expected = {name: await self._ask(name) for name in self.answered}
        async with asyncio.TaskGroup() as group:
            for i in range(CLIENTS):
                name = ("text", "chain")[i % 2]
                group.create_task(self._client(name, expected[name]))
            auditor = group.create_task(self._audit())
            yield self
            self._stop = True
            auditor.cancel()

    async def some_more(self) -> None:
        """Waits until each model has answered again, a few times."""
        before = dict(self.answered)
        await eventually(
            "both models answer",
            lambda: all(self.answered[name] >= before[name] + CLIENTS for name in before),
            60,
        )

    async def _ask(self, name: str) -> np.ndarray[Any, Any]:
        inputs: Any = {"text": {"text": TEXTS}, "chain": {"input": X}}[name]
        answer = await self._yard.client.predict(name, inputs, timeout_s=60)
        output = next(iter(answer.values()))
        self.devices.add(str(answer.served.device))
        return np.asarray(output)

    async def _client(self, name: str, expected: np.ndarray[Any, Any]) -> None:
        while not self._stop:
            answer = await self._ask(name)
            np.testing.assert_allclose(answer, expected, atol=1e-5)
            self.answered[name] += 1

    async def _audit(self) -> None:
        """Looks the yard through whenever something has been decided."""
        residency, journal = self._yard.app.residency, self._yard.app.journal
        while await journal.wait(position := journal.position):
            assert journal.position > position
            residency.audit()
            for i in range(len(self._yard.app.devices)):
                use = residency.device_use(i)
                used = use.reserved + use.resident + use.draining + use.quarantined
                assert used <= use.budget + use.deficit, use
            self.audits += 1


# --- While requests flow --------------------------------------------------------------------------


async def test_no_request_is_lost_or_answered_wrongly_while_plans_are_applied(
    tmp_path: Path,
) -> None:
    plans = [
        single("chain", 1) + single("text", 1),
        mapped("chain", _0=0, _=2) + single("text", 0),
        f'devices {{ device: "{A}" budget_bytes: {BUDGET // 2} }}',
        f'devices {{ device: "{A}" budget_bytes: {BUDGET} drained: true }} '
        + single("text", 2)
        + 'models { model: "models/chain" automatic_placement { strategy: '
        + "PLACEMENT_STRATEGY_BALANCED devices { type: DEVICE_TYPE_GPU index: 1 } "
        + "devices { type: DEVICE_TYPE_GPU index: 2 } } }",
        f'devices {{ device: "{A}" drained: false }} models {{ model: "models/text" }} '
        'models { model: "models/chain" }',
        mapped("text", _embeddings=0, _encoder_layer_0=1, _=2) + single("chain", 0),
    ]
    async with real_models(tmp_path) as yard, Load(yard).running() as load:
        for text in plans:
            report = (
                await devices(yard).PlanDevices(pb.PlanDevicesRequest(plan=plan(text)))
            ).report
            assert not report.obstacles, report
            applied = await apply(yard, text)
            assert not applied.report.obstacles
            await load.some_more()
        for name in (A, B):
            await devices(yard).DrainDevice(pb.DrainDeviceRequest(name=name))
            await devices(yard).UndrainDevice(pb.UndrainDeviceRequest(name=name))
            await load.some_more()
        await devices(yard).RebalanceDevices(pb.RebalanceDevicesRequest())
        await load.some_more()
        final = (await devices(yard).GetPlan(pb.GetPlanRequest())).plan
        assert final.revision == len(plans) + 4
    assert load.audits > 20
    assert len(load.devices) > 1


async def test_a_plan_that_fails_half_way_leaves_the_requests_alone(tmp_path: Path) -> None:
    more = model_table(
        "broken",
        "torch",
        device="cuda:0",
        folder="chain",
        options={"factory": part_models.FACTORIES[0], "outputs": ["y"]},
    )
    async with real_models(tmp_path, more) as yard:
        await yard.client.predict("broken", {"input": X}, timeout_s=60)
        engine = yard.app.engine
        real = engine.load

        async def failing(model: int, spec: Any, target: Any) -> Any:
            if spec.name == "broken":
                raise MemoryError
            return await real(model, spec, target)

        async with Load(yard).running() as load:
            before = (await devices(yard).GetPlan(pb.GetPlanRequest())).plan
            events = Events(yard)
            engine.load = failing  # type: ignore[method-assign]
            text = single("chain", 1) + single("text", 2) + single("broken", 1)
            text += f'devices {{ device: "{A}" budget_bytes: 1 }}'
            for _ in range(3):
                found = await refused(apply(yard, text))
                assert found.reason == "LOAD_FAILED"
                assert found.code is grpc.StatusCode.UNAVAILABLE
                assert "models/broken" in found.text
                await load.some_more()
            assert (await devices(yard).GetPlan(pb.GetPlanRequest())).plan == before
            told = await events.until("PLAN_ROLLED_BACK")
            assert ("PLAN_ROLLED_BACK", "plan", "operator") in told
            events.close()
            assert load.devices == {A}
            engine.load = real  # type: ignore[method-assign]


# --- What is told ---------------------------------------------------------------------------------


async def test_what_a_plan_does_is_told_with_its_causes_and_who_asked(tmp_path: Path) -> None:
    config = DEVICES
    config += ballast("mover", 120_000, device="cuda:0") + ballast("idle", 120_000, device="cuda:1")
    config += ballast("drained", 50_000, device="cuda:2")
    async with running_app(config, tmp_path) as yard:
        for name in ("mover", "idle", "drained"):
            await yard.client.predict(name, IDENTITY)
        events = Events(yard)
        text = single("mover", 1) + f'devices {{ device: "{C}" drained: true }}'
        text += f'devices {{ device: "{A}" budget_bytes: 100000 }}'
        request = pb.ApplyPlanRequest(plan=plan(text))
        report = (
            await devices(yard).ApplyPlan(request, metadata=(("x-modelyard-identity", "ops"),))
        ).report
        assert [(d.model, d.cause, d.in_use) for d in report.displaced] == [
            ("models/idle", "models/mover", False),
            ("models/drained", C, False),
        ]
        told = await events.until("PLAN_APPLIED")
        assert ("EVICTED", "models/idle", "models/mover") in told
        assert ("EVICTED", "models/drained", C) in told
        assert ("PLACEMENT_CHANGED", "models/mover", "operator") in told
        assert ("BUDGET_CHANGED", A, "operator") in told
        assert ("DEVICE_DRAINED", C, "operator") in told
        by = {event.identity for event in events.all if event.cause == "operator"}
        assert by == {"ops"}
        events.close()


async def test_the_plan_is_complete_and_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    config = DEVICES + ballast("a", 1000) + ballast("b", 1000, device="cuda:1", pinned=True)
    async with running_app(config, tmp_path) as yard:
        await yard.at_rest()
        before = (await devices(yard).GetPlan(pb.GetPlanRequest())).plan
        assert [(d.device, d.budget_bytes, d.drained) for d in before.devices] == [
            (name, BUDGET, False) for name in (A, B, C)
        ]
        assert [(m.model, m.WhichOneof("where")) for m in before.models] == [
            ("models/a", None),
            ("models/b", "placement"),
        ]
        revision = yard.app.journal.revision
        text = single("a", 2) + f'devices {{ device: "{B}" budget_percent: 0.0001 drained: true }}'
        report = await forecast(yard, text + ' etag: "stale"')
        validated = await apply(yard, text, validate_only=True)
        assert validated.report == report
        assert validated.plan.etag != before.etag
        assert (await devices(yard).GetPlan(pb.GetPlanRequest())).plan == before
        assert yard.app.journal.revision == revision
        applied = await apply(yard, text + f" etag: '{before.etag}'")
        assert applied.report == report
        assert applied.plan == (await devices(yard).GetPlan(pb.GetPlanRequest())).plan
        assert applied.plan.etag == validated.plan.etag
        assert applied.plan.HasField("update_time")


async def test_a_replay_gets_the_first_answer_to_the_byte(tmp_path: Path) -> None:
    async with running_app(DEVICES + ballast("a", 1000, device="cuda:0"), tmp_path) as yard:
        await yard.client.predict("a", IDENTITY)
        stub = devices(yard)
        calls: list[tuple[Callable[[Any], Any], Any, Any]] = [
            (
                stub.ApplyPlan,
                pb.ApplyPlanRequest(plan=plan(single("a", 1)), request_id="1"),
                pb.ApplyPlanRequest(plan=plan(single("a", 2)), request_id="1"),
            ),
            (
                stub.UpdateBudget,
                pb.UpdateBudgetRequest(name=B, budget_bytes=100, request_id="2"),
                pb.UpdateBudgetRequest(name=B, budget_bytes=101, request_id="2"),
            ),
            (
                stub.DrainDevice,
                pb.DrainDeviceRequest(name=B, request_id="3"),
                pb.DrainDeviceRequest(name=A, request_id="3"),
            ),
            (
                stub.UndrainDevice,
                pb.UndrainDeviceRequest(name=B, request_id="4"),
                pb.UndrainDeviceRequest(name=A, request_id="4"),
            ),
        ]
        for call, request, other in calls:
            first = await call(request)
            await yard.at_rest()
            revision = (await stub.GetPlan(pb.GetPlanRequest())).plan.revision
            again = await call(request)
            assert again.SerializeToString() == first.SerializeToString()
            assert (await stub.GetPlan(pb.GetPlanRequest())).plan.revision == revision
            found = await refused(call(other))
            assert (found.reason, found.fields) == ("INVALID_FIELD", ["request_id"])


async def test_a_lower_budget_answers_with_the_deficit_that_is_left(tmp_path: Path) -> None:
    async with running_app(DEVICES + ballast("a", 1000, device="cuda:0"), tmp_path) as yard:
        await yard.client.predict("a", IDENTITY)
        handle = yard.app.catalog.get("a").handle
        lease = yard.app.residency.try_lease(handle)
        assert lease is not None
        held = sum(yard.app.residency.use(handle).charges.values())
        stub = devices(yard)
        device = (
            await stub.UpdateBudget(pb.UpdateBudgetRequest(name=A, budget_bytes=held - 100))
        ).device
        assert (device.budget_bytes, device.resident_bytes) == (held - 100, 0)
        assert (device.draining_bytes, device.deficit_bytes) == (held, 100)
        lease.release()
        await yard.at_rest()
        device = (await stub.GetDevice(pb.GetDeviceRequest(name=A))).device
        assert (device.draining_bytes, device.deficit_bytes) == (0, 0)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('devices { device: "devices/cuda-9" }', ["plan.devices[0].device"]),
        ('devices { device: "cuda-0" }', ["plan.devices[0].device"]),
        (
            f'devices {{ device: "{A}" drained: true }} devices {{ device: "{A}" }}',
            ["plan.devices[1].device"],
        ),
        (
            f'devices {{ device: "{A}" budget_bytes: 1 budget_percent: 1 }}',
            ["plan.devices[0]"],
        ),
        (f'devices {{ device: "{A}" budget_bytes: -1 }}', [A]),
        (f'devices {{ device: "{A}" budget_bytes: {2**46} }}', [A]),
        (f'devices {{ device: "{A}" budget_percent: 101 }}', ["plan.devices[0].budget_percent"]),
        (
            f'devices {{ device: "{A}" budget_percent: 60 }} '
            f'devices {{ device: "{B}" budget_percent: 60 }}',
            [A],
        ),
        ('models { model: "models/nobody" }', ["models/nobody"]),
        ('models { model: "nobody" }', ["plan.models[0].model"]),
        ('models { model: "models/a" } models { model: "models/a" }', ["plan.models[1].model"]),
        (single("a", 128), ["plan.models[0].placement"]),
        (
            'models { model: "models/a" placement { single { type: DEVICE_TYPE_DISK } } }',
            ["plan.models[0].placement"],
        ),
        (
            'models { model: "models/a" automatic_placement { devices { } } }',
            ["plan.models[0].automatic_placement"],
        ),
    ],
)
async def test_a_plan_that_breaks_a_rule_is_refused_naming_the_field(
    tmp_path: Path, text: str, fields: list[str]
) -> None:
    async with running_app(DEVICES + ballast("a", 1000), tmp_path) as yard:
        before = (await devices(yard).GetPlan(pb.GetPlanRequest())).plan
        for call in (
            devices(yard).PlanDevices(pb.PlanDevicesRequest(plan=plan(text))),
            apply(yard, text),
        ):
            found = await refused(call)
            assert found.code is grpc.StatusCode.INVALID_ARGUMENT
            assert found.reason == "INVALID_FIELD"
            assert found.fields == fields
        assert (await devices(yard).GetPlan(pb.GetPlanRequest())).plan == before


async def test_obstacles_are_refused_with_their_numbers(tmp_path: Path) -> None:
    config = (
        DEVICES + ballast("a", 10_000) + ballast("pinned", 50_000, device="cuda:1", pinned=True)
    )
    config += ballast("beaten", 1000, device="cuda:0").replace(
        "options = {", 'options = {"device_map" = "cuda:2", '
    )
    async with running_app(config, tmp_path) as yard:
        await yard.at_rest()
        before = (await devices(yard).GetPlan(pb.GetPlanRequest())).plan

        everywhere = " ".join(
            f'devices {{ device: "{name}" budget_bytes: {size} }}'
            for name, size in ((A, 100), (B, 60_000), (C, 5000))
        )
        needed = yard.app.catalog.get("a").estimated_bytes
        found = await refused(apply(yard, single("a", 2) + everywhere))
        assert found.code is grpc.StatusCode.FAILED_PRECONDITION
        assert found.reason == "MODEL_NEVER_FITS"
        assert found.metadata == {
            "model": "models/a",
            "device": C,
            "needed_bytes": str(needed),
            "budget_bytes": "5000",
        }
        (violation,) = found.details["PreconditionFailure"].violations
        assert (violation.type, violation.subject) == ("BUDGET", C)

        request = pb.UpdateBudgetRequest(name=B, budget_bytes=1000)
        found = await refused(devices(yard).UpdateBudget(request))
        assert found.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert found.reason == "BUDGET_EXHAUSTED"
        assert found.metadata["device"] == B
        assert found.metadata["free_bytes"] == "1000"
        assert found.metadata["holders"].startswith("pinned=")
        assert int(found.metadata["needed_bytes"]) >= 50_000
        (quota,) = found.details["QuotaFailure"].violations
        assert quota.subject == B
        assert "BadRequest" not in found.details

        for text in (
            'models { model: "models/a" placement { single { type: DEVICE_TYPE_MPS } } }',
            single("beaten", 1),
            mapped("a", _0=0, _=1),
        ):
            found = await refused(apply(yard, text))
            assert found.code is grpc.StatusCode.FAILED_PRECONDITION
            assert found.reason == "PLACEMENT_INVALID", found.text
            report = (
                await devices(yard).PlanDevices(pb.PlanDevicesRequest(plan=plan(text)))
            ).report
            assert [each.reason for each in report.obstacles] == ["PLACEMENT_INVALID"]

        found = await refused(apply(yard, 'etag: "stale"'))
        assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
        assert (await devices(yard).GetPlan(pb.GetPlanRequest())).plan == before


@pytest.mark.parametrize("method", ["UpdateBudget", "DrainDevice", "UndrainDevice"])
async def test_calls_for_one_device_say_what_is_wrong_with_it(tmp_path: Path, method: str) -> None:
    request = getattr(pb, f"{method}Request")
    async with running_app(DEVICES, tmp_path) as yard:
        call = getattr(devices(yard), method)
        found = await refused(call(request(name="devices/cuda-9")))
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "DEVICE_NOT_FOUND")
        assert found.details["ResourceInfo"].resource_name == "devices/cuda-9"
        found = await refused(call(request(name="cuda-0")))
        assert (found.reason, found.fields) == ("INVALID_FIELD", ["name"])
        found = await refused(call(request(name=A, etag="stale")))
        assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
        assert found.details["ResourceInfo"].resource_name == A


async def test_a_drain_names_the_pinned_models_that_stay(tmp_path: Path) -> None:
    config = DEVICES + ballast("p", 1000, device="cuda:0", pinned=True)
    config += ballast("q", 1000, device="cuda:0")
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("q", IDENTITY)
        await yard.at_rest()
        answer = await devices(yard).DrainDevice(pb.DrainDeviceRequest(name=A))
        assert list(answer.pinned_models) == ["models/p"]
        assert answer.device.drained
        await yard.at_rest()
        assert (await yard.client.predict("p", IDENTITY)).served.device is not None
        await residencies(yard).UnpinModel(
            residency_service_pb2.UnpinModelRequest(model="models/p")
        )
        await yard.at_rest()
        device = (await devices(yard).GetDevice(pb.GetDeviceRequest(name=A))).device
        assert device.resident_bytes == 0


async def test_a_plan_that_takes_too_long_is_taken_back(tmp_path: Path) -> None:
    config = device_table("cuda:0", "1MB", logical=True)
    config += device_table("cuda:1", "1MB", logical=True, transfer_bandwidth=1000)
    config += ballast("a", 500_000, device="cuda:0")
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("a", IDENTITY)
        before = (await devices(yard).GetPlan(pb.GetPlanRequest())).plan
        call = devices(yard).ApplyPlan(pb.ApplyPlanRequest(plan=plan(single("a", 1))), timeout=0.5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await yard.client.predict("a", IDENTITY)
        await yard.at_rest()
        assert (await devices(yard).GetPlan(pb.GetPlanRequest())).plan == before
        kinds = [event.type.name for event in yard.app.journal.events_after(0)[0]]
        assert kinds.count("PLAN_ROLLED_BACK") == 1
        # And others get their turn.
        await apply(yard, f'devices {{ device: "{A}" budget_bytes: 900000 }}')
