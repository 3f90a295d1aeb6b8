"""Device plans: what they say, and what is no plan."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from google.protobuf import text_format
from tests.support.plan_bench import PlanBench, devices_of, layers, managed
from tests.support.plan_steps import (
    BALANCED,
    A,
    B,
    change_device,
    finished,
    on,
    refusal_of,
    start,
    until,
)

from modelyard.v1 import plan_pb2
from modelyard_server.catalog.plans import PlanChange
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Reason, Refusal, Resource
from modelyard_server.services.plan_messages import change_of, plan_message


@pytest.fixture
async def bench() -> AsyncIterator[PlanBench]:
    """Two devices of 300 bytes."""
    found = PlanBench(*devices_of(300, 300))
    yield found
    await found.close()


# --- The plan -------------------------------------------------------------------------------------


async def test_the_plan_names_every_device_and_every_model(bench: PlanBench) -> None:
    await bench.add("b", 100, on(1))
    await bench.add("a", 100)
    await bench.add("c", layers(50, 50), BALANCED)
    message = plan_message(bench.plans.plan(), bench.names)
    assert [(d.device, d.budget_bytes, d.drained) for d in message.devices] == [
        (A, 300, False),
        (B, 300, False),
    ]
    assert all(d.HasField("budget_bytes") and d.HasField("drained") for d in message.devices)
    assert not any(d.HasField("budget_percent") for d in message.devices)
    assert [(m.model, m.WhichOneof("where")) for m in message.models] == [
        ("models/a", None),
        ("models/b", "placement"),
        ("models/c", "automatic_placement"),
    ]
    assert (message.revision, message.HasField("update_time")) == (0, False)
    assert message.etag


async def test_the_etag_changes_exactly_when_the_plan_does(bench: PlanBench) -> None:
    etags = [bench.plans.plan().etag]

    def changed() -> bool:
        etags.append(bench.plans.plan().etag)
        return etags[-1] != etags[-2]

    await bench.add("a", 100)
    assert changed()
    await bench.load("a")
    async with bench.writes.alone():
        await bench.run(bench.registry.set_pinned(bench.catalog.get("a"), True))
    assert not changed()
    await bench.plans.forecast(PlanChange(budgets={0: 200}))
    await bench.apply(PlanChange(budgets={0: 200}), validate_only=True)
    assert not changed()
    await bench.apply(PlanChange(budgets={0: 200}))
    assert changed()
    await change_device(bench, 0, drained=True)
    assert changed()
    await change_device(bench, 0, budget_bytes=150)
    assert changed()
    await bench.apply(PlanChange(placements={"a": on(1)}))
    assert changed()
    assert len(set(etags)) == 6
    assert bench.plans.plan().revision == 4


async def test_the_answer_is_the_plan_in_force_then(bench: PlanBench) -> None:
    await bench.add("a", 100)
    change = PlanChange(budgets={0: 200}, drained={1: True}, placements={"a": on(1)})
    before = bench.plans.plan()
    validated = await bench.apply(change, validate_only=True)
    assert bench.plans.plan() == before
    applied = await bench.apply(change)
    assert applied.plan == bench.plans.plan()
    assert applied.plan.changed is not None
    assert replace(validated.plan, changed=applied.plan.changed) == applied.plan
    assert validated.report == applied.report


async def test_the_plan_in_force_is_told_while_another_is_staged(bench: PlanBench) -> None:
    """What only makes room is not the plan yet: it may be taken back."""
    await bench.add("a", 100, on(0), resident=True)
    before = bench.plans.plan()
    task = start(bench, PlanChange(budgets={1: 900}, placements={"a": on(1)}))
    await until(lambda: bool(bench.engine.loads))
    assert bench.residency.device_use(1).budget == 900
    assert bench.plans.plan() == before
    await bench.run(finished(task))
    assert bench.plans.plan().devices[1].budget_bytes == 900


# --- Messages -------------------------------------------------------------------------------------


def message(text: str) -> plan_pb2.DevicePlan:

    return text_format.Parse(text, plan_pb2.DevicePlan())


def position_of(name: str) -> int:
    if name in (A, B):
        return (A, B).index(name)
    raise Refusal(
        Reason.DEVICE_NOT_FOUND, f"the server manages no {name!r}", resource=Resource("d", name)
    )


def read(text: str, *devices: ManagedDevice) -> PlanChange:
    return change_of(message(text), devices or devices_of(300, 300), position_of)


def test_every_violation_of_a_plan_is_told_at_once() -> None:
    with pytest.raises(Refusal) as caught:
        read(
            """
            devices { device: "devices/tpu-0" budget_bytes: 1 }
            devices { device: "devices/cuda-0" budget_bytes: 1 budget_percent: 1 }
            devices { device: "devices/cuda-0" drained: true }
            devices { device: "devices/cuda-1" budget_percent: 0 }
            models { model: "a" }
            models { model: "models/a" placement { single { type: DEVICE_TYPE_GPU index: 128 } } }
            models { model: "models/a" placement { single { type: DEVICE_TYPE_DISK } } }
            models { model: "models/b" }
            models { model: "models/b" }
            models { model: "models/c" placement { multiple { } } }
            models { model: "models/d" placement { single { } } }
            models { model: "models/e" placement { } }
            models { model: "models/f" automatic_placement { strategy: 9 } }
            """
        )
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in caught.value.violations] == [
        "plan.devices[0].device",
        "plan.devices[1]",
        "plan.devices[2].device",
        "plan.devices[3].budget_percent",
        "plan.models[0].model",
        "plan.models[1].placement",
        "plan.models[2].placement",
        "plan.models[4].model",
        "plan.models[5].placement",
        "plan.models[6].placement",
        "plan.models[7].placement",
        "plan.models[8].automatic_placement",
    ]


@pytest.mark.parametrize("percent", ["nan", "inf", "-inf", "-1", "0", "100.001"])
def test_percentages_are_above_0_and_at_most_100(percent: str) -> None:
    with pytest.raises(Refusal) as caught:
        read(f'devices {{ device: "{A}" budget_percent: {percent} }}')
    (violation,) = caught.value.violations
    assert violation.field == "plan.devices[0].budget_percent"


def test_a_percentage_is_of_what_the_device_has_less_its_reserve() -> None:
    found = managed("cuda:0", 100, total_bytes=1001, reserve_bytes=1)
    assert read(f'devices {{ device: "{A}" budget_percent: 12.55 }}', found).budgets == {0: 125}
    assert read(f'devices {{ device: "{A}" budget_percent: 100 }}', found).budgets == {0: 1000}


def test_what_a_plan_does_not_name_is_not_changed() -> None:
    change = read(
        f"""
        devices {{ device: "{A}" }}
        devices {{ device: "{B}" budget_bytes: 0 drained: false }}
        models {{ model: "models/a" }}
        models {{ model: "models/b" placement {{ single {{ type: DEVICE_TYPE_GPU index: 1 }} }} }}
        etag: "x" revision: 9
        """
    )
    assert change == PlanChange(
        budgets={1: 0}, drained={1: False}, placements={"a": None, "b": on(1)}
    )


# --- Budgets and names ----------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [-1, 1001, 2**46])
async def test_budgets_out_of_range_are_invalid(bench: PlanBench, budget: int) -> None:
    for call in (bench.plans.forecast, bench.apply):
        refusal = await refusal_of(call(PlanChange(budgets={1: budget})))
        assert refusal.reason is Reason.INVALID_FIELD
        assert [violation.field for violation in refusal.violations] == [B]
    refusal = await refusal_of(change_device(bench, 1, budget_bytes=budget))
    assert refusal.reason is Reason.INVALID_FIELD


async def test_budgets_in_host_memory_are_not_more_than_it_has_together() -> None:
    host = [replace(managed(f"cuda:{i}", 300), logical=True) for i in range(2)]
    bench = PlanBench(*host)
    refusal = await refusal_of(bench.apply(PlanChange(budgets={0: 701})))
    assert refusal.reason is Reason.INVALID_FIELD
    assert "1001 bytes together" in refusal.text
    await bench.apply(PlanChange(budgets={0: 700}))
    await bench.close()


async def test_budgets_in_host_memory_are_never_too_much_together_in_between() -> None:
    """One grows by what the other gives: not before that one has given it."""
    host = [replace(managed(f"cuda:{i}", 500), logical=True) for i in range(2)]
    bench = PlanBench(*host)
    await bench.add("a", 400, on(0), resident=True)
    lease = await bench.lease("a")
    sums = []
    task = start(bench, PlanChange(budgets={0: 200, 1: 800}, placements={"a": on(1)}))
    while not task.done():
        sums.append(sum(bench.residency.device_use(i).budget for i in range(2)))
        await bench.step()
    lease.release()
    await bench.settle()
    assert max(sums) <= 1000
    assert bench.held() == {"a": {1: 400}}
    await bench.close()


async def test_a_plan_for_a_model_that_there_is_not_is_invalid(bench: PlanBench) -> None:
    for call in (bench.plans.forecast, bench.apply):
        refusal = await refusal_of(call(PlanChange(placements={"a": None, "b": on(0)})))
        assert refusal.reason is Reason.INVALID_FIELD
        assert [violation.field for violation in refusal.violations] == ["models/a", "models/b"]
