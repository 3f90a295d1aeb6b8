"""What a device plan is forecast to do, and what stands in its way."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.support.plan_bench import PlanBench, devices_of, layers
from tests.support.plan_steps import (
    BALANCED,
    A,
    B,
    automatic,
    change_device,
    finished,
    on,
    refusal_of,
    split,
    start,
    until,
)

from modelyard.devices import ComponentDevice
from modelyard.placements import PlacementStrategy
from modelyard_server.catalog.plans import PlanChange
from modelyard_server.errors import Code, Reason
from modelyard_server.runtimes.api import ModelFilesError
from modelyard_server.services.plan_messages import report_message


@pytest.fixture
async def bench() -> AsyncIterator[PlanBench]:
    """Two devices of 300 bytes."""
    found = PlanBench(*devices_of(300, 300))
    yield found
    await found.close()


# --- Forecasts ------------------------------------------------------------------------------------


async def test_a_forecast_says_who_leaves_and_for_whom(bench: PlanBench) -> None:
    await bench.add("idle", 200, on(1), resident=True)
    await bench.add("mover", 200, on(0), resident=True)
    await bench.add("busy", 80, on(0), resident=True)
    await bench.add("cold", 100, on(0))
    lease = await bench.lease("busy")
    before, revision = bench.snapshot(), bench.journal.revision

    change = PlanChange(budgets={0: 50}, placements={"mover": on(1), "cold": on(1)})
    report = await bench.plans.forecast(change)

    assert bench.snapshot() == before
    assert bench.journal.revision == revision
    text = report_message(report, bench.names)
    assert [
        (d.model, [(c.device, c.size_bytes) for c in d.charges], d.cause, d.in_use)
        for d in text.displaced
    ] == [
        ("models/idle", [(B, 200)], "models/mover", False),
        ("models/busy", [(A, 80)], A, True),
    ]
    forecasts = {m.model.removeprefix("models/"): m for m in text.models}
    assert list(forecasts) == ["busy", "cold", "idle", "mover"]
    mover, cold = forecasts["mover"], forecasts["cold"]
    assert (mover.placement_changed, mover.staged) == (True, True)
    assert [(c.device, c.size_bytes) for c in mover.current] == [(A, 200)]
    assert [(c.device, c.size_bytes) for c in mover.planned] == [(B, 200)]
    assert (cold.placement_changed, cold.staged, list(cold.planned)) == (True, False, [])
    assert not forecasts["busy"].placement_changed
    assert [(d.device, d.budget_bytes, d.used_bytes, d.drained) for d in text.devices] == [
        (A, 50, 0, False),
        (B, 300, 200, False),
    ]
    assert [o.reason for o in text.obstacles] == ["MODEL_NEVER_FITS"]  # busy may be nowhere else.
    lease.release()


async def test_a_forecast_says_which_part_is_where_with_how_many_bytes(bench: PlanBench) -> None:
    await bench.add("m", layers(10, 20, 40), on(0))
    report = await bench.plans.forecast(PlanChange(placements={"m": split(_0=0, _=1)}))
    (model,) = report_message(report, bench.names).models
    (way,) = model.alternatives
    assert [(p.device, list(p.prefixes), p.size_bytes) for p in way.parts] == [
        (A, ["0"], 10),
        (B, ["1", "2"], 60),
    ]
    report = await bench.plans.forecast(PlanChange(placements={"m": None}))
    (model,) = report_message(report, bench.names).models
    assert [
        [(p.device, list(p.prefixes), p.size_bytes) for p in way.parts]
        for way in model.alternatives
    ] == [[(A, [""], 70)], [(B, [""], 70)]]


async def test_a_placement_that_does_not_fit_the_model_is_an_obstacle(bench: PlanBench) -> None:
    await bench.add("m", layers(10, 20))
    await bench.add("whole", 50)
    change = PlanChange(
        placements={"m": split(_0=0, _7=1), "whole": ComponentDevice.from_str("mps")}
    )
    report = await bench.plans.forecast(change)
    assert [(o.subject, o.refusal.reason) for o in report.obstacles] == [
        ("models/m", Reason.PLACEMENT_INVALID),
        ("models/whole", Reason.PLACEMENT_INVALID),
    ]
    refusal = await refusal_of(bench.apply(change))
    assert refusal.reason is Reason.PLACEMENT_INVALID
    assert "models/m:" in refusal.text
    assert "models/whole:" in refusal.text
    assert refusal.metadata["model"] == "models/m"


async def test_a_model_that_fits_nowhere_any_more_is_an_obstacle(bench: PlanBench) -> None:
    await bench.add("m", 250)
    report = await bench.plans.forecast(PlanChange(budgets={0: 200, 1: 240}))
    (obstacle,) = report_message(report, bench.names).obstacles
    assert (obstacle.subject, obstacle.reason) == ("models/m", "MODEL_NEVER_FITS")
    assert (obstacle.needed_bytes, obstacle.available_bytes) == (250, 240)
    assert "250 bytes" in obstacle.description
    assert "240 bytes" in obstacle.description
    refusal = await refusal_of(bench.apply(PlanChange(budgets={0: 200, 1: 240})))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    assert {key: refusal.metadata[key] for key in ("device", "needed_bytes", "budget_bytes")} == {
        "device": B,
        "needed_bytes": "250",
        "budget_bytes": "240",
    }
    assert [violation.field for violation in refusal.violations] == [A, B]
    # Where one of its devices is still large enough there is no obstacle.
    assert not (await bench.plans.forecast(PlanChange(budgets={0: 200}))).obstacles


async def test_what_fits_nowhere_already_does_not_hinder_other_plans(bench: PlanBench) -> None:
    await bench.add("whole", 250)
    await bench.add("parts", layers(100, 100), BALANCED)
    await change_device(bench, 0, budget_bytes=80)
    await change_device(bench, 1, budget_bytes=80)
    assert not (await bench.plans.forecast(PlanChange(budgets={1: 90}))).obstacles
    await bench.apply(PlanChange(budgets={1: 90}))
    assert bench.plans.plan().devices[1].budget_bytes == 90
    # Nor does it stay so for longer than it must.
    applied = await bench.apply(PlanChange(budgets={1: 240}))
    assert [model.model for model in applied.report.models] == ["parts"]
    await bench.load("parts")
    assert bench.held() == {"parts": {1: 200}}


async def test_pinned_models_that_hold_more_than_a_budget_are_an_obstacle(bench: PlanBench) -> None:
    await bench.add("p", 100, pinned=True)
    await bench.add("q", 50, pinned=True)
    await bench.add("x", 60, on(0), resident=True)
    held = {i: sum(charges.get(i, 0) for charges in bench.held().values()) for i in range(2)}
    full = max(held, key=lambda i: held[i])
    pinned = held[full] - (60 if full == 0 else 0)
    change = PlanChange(budgets={full: 40})
    report = await bench.plans.forecast(change)
    obstacle = next(o for o in report.obstacles if o.refusal.reason is Reason.BUDGET_EXHAUSTED)
    assert obstacle.subject == bench.names[full]
    assert (obstacle.needed_bytes, obstacle.available_bytes) == (pinned, 40)
    before = bench.snapshot()
    refusal = await refusal_of(change_device(bench, full, budget_bytes=40))
    assert refusal.reason is Reason.BUDGET_EXHAUSTED
    assert refusal.metadata["device"] == bench.names[full]
    assert refusal.metadata["needed_bytes"] == str(pinned)
    assert refusal.metadata["free_bytes"] == "40"
    assert "=" in refusal.metadata["holders"]
    assert not refusal.violations
    assert bench.snapshot() == before


async def test_a_deficit_that_is_being_repaid_does_not_hide_what_is_pinned(
    bench: PlanBench,
) -> None:
    await bench.add("p", 100, on(0), pinned=True)
    await bench.add("x", 200, on(0), resident=True)
    lease = await bench.lease("x")
    await change_device(bench, 0, budget_bytes=150)
    assert bench.residency.device_use(0).deficit == 150
    refusal = await refusal_of(change_device(bench, 0, budget_bytes=50))
    assert refusal.reason is Reason.BUDGET_EXHAUSTED
    assert refusal.metadata["needed_bytes"] == "100"
    lease.release()


async def test_a_pinned_model_for_which_others_leave_no_room_is_an_obstacle(
    bench: PlanBench,
) -> None:
    await bench.add("here", 200, on(0), pinned=True)
    await bench.add("there", 150, on(1), pinned=True)
    before = bench.snapshot()
    refusal = await refusal_of(bench.apply(PlanChange(placements={"here": on(1)})))
    assert refusal.reason is Reason.BUDGET_EXHAUSTED
    assert refusal.metadata == {
        "model": "models/here",
        "device": B,
        "needed_bytes": "200",
        "free_bytes": "150",
        "holders": "there=150",
    }
    assert bench.snapshot() == before


async def test_a_pinned_model_is_not_moved_to_where_nothing_may_be(bench: PlanBench) -> None:
    await bench.add("here", layers(150, 50), on(0), pinned=True)
    before = bench.snapshot()
    change = PlanChange(drained={1: True}, placements={"here": split(_0=0, _=1)})
    refusal = await refusal_of(bench.apply(change))
    assert refusal.reason is Reason.BUDGET_EXHAUSTED
    assert refusal.metadata["device"] == B
    assert "drained" in refusal.text
    assert bench.snapshot() == before


async def test_a_model_that_is_where_it_may_be_stays(bench: PlanBench) -> None:
    """To say of a model what is so already does not load it again."""
    await bench.add("m", 200, resident=True)
    await bench.add("busy", 50, resident=True)
    held = bench.held()
    with await bench.lease("m"):
        for placement in (
            automatic(PlacementStrategy.AUTO, 0, 1),
            on(next(iter(held["m"]))),
            None,
        ):
            applied = await bench.apply(PlanChange(placements={"m": placement}))
            (report,) = applied.report.models
            assert (report.placement_changed, report.staged) == (True, True)
            assert report.current == report.planned == held["m"]
            assert bench.plans.plan().placements["m"] == placement
    await bench.settle()
    assert bench.held() == held
    assert bench.residency.counters.load_count == 2
    # And the next time it goes by what was said.
    await bench.apply(PlanChange(placements={"m": on(next(iter(held["m"])))}))
    assert [dict(way.charges) for way in bench.catalog.get("m").handle.ways] == [held["m"]]


async def test_options_that_beat_a_placement_make_it_an_obstacle(bench: PlanBench) -> None:
    await bench.add("m", layers(10, 20), options={"device_map": "cuda:1"})
    report = await bench.plans.forecast(PlanChange(placements={"m": on(0)}))
    (obstacle,) = report.obstacles
    assert (obstacle.subject, obstacle.refusal.reason) == ("models/m", Reason.PLACEMENT_INVALID)
    assert "device_map" in obstacle.refusal.text
    refusal = await refusal_of(bench.apply(PlanChange(placements={"m": on(0)})))
    assert refusal.reason is Reason.PLACEMENT_INVALID
    # To leave the choice to the server is to say nothing against the option.
    assert not (await bench.plans.forecast(PlanChange(placements={"m": None}))).obstacles


async def test_broken_files_are_an_obstacle_that_says_whether_it_may_pass(
    bench: PlanBench,
) -> None:
    await bench.add("m", 100)
    bench.engine.price_errors["m"] = ModelFilesError("the disk does not answer", transient=True)
    report = await bench.plans.forecast(PlanChange(placements={"m": on(0)}))
    assert [o.refusal.reason for o in report.obstacles] == [Reason.LOAD_FAILED]
    refusal = await refusal_of(bench.apply(PlanChange(placements={"m": on(0)})))
    assert (refusal.reason, refusal.code) == (Reason.LOAD_FAILED, Code.UNAVAILABLE)
    assert refusal.retry_after_s is not None


async def test_a_forecast_counts_what_is_still_leaving_as_gone(bench: PlanBench) -> None:
    """Right after a plan, while the old copies are being unloaded."""
    await bench.add("m", 200, on(0), resident=True)
    task = start(bench, PlanChange(placements={"m": on(1)}))
    await until(lambda: bool(bench.engine.loads))
    (load,) = bench.engine.loads.values()
    load.finish()
    await finished(task)
    assert bench.residency.device_use(0).draining == 200
    report = await bench.plans.forecast(PlanChange(placements={"m": on(0)}))
    (model,) = report.models
    assert model.staged
    assert [device.used_bytes for device in report.devices] == [200, 0]


# --- Cuts -----------------------------------------------------------------------------------------


async def test_cuts_are_made_again_when_budgets_no_longer_hold_them(bench: PlanBench) -> None:
    await bench.add("m", layers(40, 40, 40, 40), BALANCED, resident=True)
    await bench.add("n", layers(40, 40), BALANCED, resident=True)
    assert bench.held()["m"] == {0: 80, 1: 80}
    applied = await bench.apply(PlanChange(budgets={0: 79, 1: 200}))
    await bench.settle()
    report = {model.model: model for model in applied.report.models}
    assert report["m"].placement_changed
    assert report["m"].staged
    assert dict(report["m"].planned) == {0: 40, 1: 120}
    assert bench.held() == {"m": {0: 40, 1: 120}, "n": {0: 40, 1: 40}} or "n" not in bench.held()
    assert bench.catalog.get("m").given is None
    assert bench.catalog.get("m").placement == BALANCED
    # One that still fits stays as it is.
    assert "n" not in report or not report["n"].placement_changed


async def test_a_cut_by_an_option_is_made_again_as_well(bench: PlanBench) -> None:
    await bench.add("m", layers(40, 40, 40, 40), options={"device_map": "balanced"}, resident=True)
    applied = await bench.apply(PlanChange(budgets={0: 79}))
    assert dict(applied.report.models[0].planned) == {0: 40, 1: 120}


async def test_a_cut_that_cannot_be_made_is_an_obstacle(bench: PlanBench) -> None:
    await bench.add("m", layers(100, 100), BALANCED, resident=True)
    before = bench.snapshot()
    refusal = await refusal_of(bench.apply(PlanChange(budgets={0: 90, 1: 90})))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    assert refusal.metadata["budget_bytes"] == "90"
    assert refusal.metadata["device"] in (A, B)
    assert bench.snapshot() == before
