"""Loads of the residency shell that fail, and models whose files have changed."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.fake_engine import turns
from tests.support.residency_bench import BUDGET, refusal_of

from modelyard_server.errors import Code, Reason
from modelyard_server.residency.values import State
from modelyard_server.runtimes.api import ModelFilesError

# --- Loads that fail ------------------------------------------------------------------------------


async def test_a_permanent_failure_is_told_and_not_retried_before_its_time(benches: Any) -> None:
    bench = benches(backoff_initial_s=2.0)
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].fail(ModelFilesError("model.safetensors is cut short"))
    refusal = await refusal_of(waiter)
    assert refusal.reason is Reason.LOAD_FAILED
    assert refusal.code is Code.FAILED_PRECONDITION
    assert refusal.retry_after_s is None
    use = bench.residency.use(model)
    assert use.state == State.FAILED
    assert use.failure_text == "model.safetensors is cut short"
    assert (use.failure_transient, use.failure_count) == (False, 1)
    assert use.retry_in_s == pytest.approx(2.0)
    assert bench.residency.device_use(0).reserved == 0

    bench.clock.advance(1.5)
    refusal = await refusal_of(await bench.wait_for(model))
    assert refusal.reason is Reason.LOAD_FAILED
    assert refusal.metadata["next_attempt_in_ms"] == "500"
    assert bench.engine.load_log == ["m"]

    bench.clock.advance(0.5)
    await bench.load_and_release(model)
    assert bench.residency.use(model).failure_text == ""
    assert model.failure_text == ""


async def test_a_transient_failure_is_unavailable_and_says_when_to_come_again(benches: Any) -> None:
    bench = benches(backoff_initial_s=2.0)
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].fail(ModelFilesError("cannot be read", transient=True))
    refusal = await refusal_of(waiter)
    assert refusal.reason is Reason.LOAD_FAILED
    assert refusal.code is Code.UNAVAILABLE
    assert refusal.retry_after_s == pytest.approx(2.0)
    assert bench.residency.use(model).failure_transient


@pytest.mark.parametrize(
    ("error", "text", "transient"),
    [
        (MemoryError("secret"), "the machine has no memory for it now", True),
        (RuntimeError("secret /path"), "its loader raised RuntimeError", False),
    ],
)
async def test_what_a_loader_raises_is_told_without_its_text(
    benches: Any, error: Exception, text: str, transient: bool
) -> None:
    bench = benches()
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].fail(error)
    refusal = await refusal_of(waiter)
    assert refusal.reason is Reason.LOAD_FAILED
    assert "secret" not in str(refusal)
    use = bench.residency.use(model)
    assert (use.failure_text, use.failure_transient) == (text, transient)


async def test_files_that_cannot_be_priced_any_more_fail_the_load(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    bench.engine.price_errors["m"] = ModelFilesError("config.json is gone")
    refusal = await refusal_of(await bench.wait_for(model))
    assert refusal.reason is Reason.LOAD_FAILED
    assert bench.residency.use(model).failure_text == "config.json is gone"
    assert bench.engine.load_log == []


async def test_a_broken_model_leaves_its_neighbour_alone(benches: Any) -> None:
    bench = benches()
    broken, good = bench.add("broken"), bench.add("good")
    waiter = await bench.wait_for(broken)
    other = await bench.wait_for(good)
    bench.engine.loads[broken.core_id].fail(RuntimeError("boom"))
    await refusal_of(waiter)
    await turns()
    bench.engine.loads[good.core_id].finish(100)
    (await other).release()


# --- Prices ---------------------------------------------------------------------------------------


async def test_files_that_have_grown_are_given_the_room_they_need(benches: Any) -> None:
    bench = benches()
    old, model = bench.add("old", 150), bench.add("m", 100)
    await bench.load_and_release(old)
    bench.engine.prices["m"] = 200
    waiter = await bench.wait_for(model)
    # 100 bytes were free and are not enough: nothing is loaded before the room is there.
    assert bench.engine.load_log == ["old"]
    assert model.needed_bytes == 200
    assert bench.state(old) == State.UNLOADING
    bench.engine.unloads[old.core_id].finish()
    await turns()
    assert bench.residency.device_use(0).reserved == 200
    bench.engine.loads[model.core_id].finish(200)
    (await waiter).release()
    assert bench.residency.device_use(0).peak <= BUDGET
    assert bench.residency.use(model).failure_count == 0


async def test_files_that_have_grown_beyond_every_budget_are_refused(benches: Any) -> None:
    bench = benches()
    model = bench.add("m", 100)
    bench.engine.prices["m"] = BUDGET + 1
    refusal = await refusal_of(await bench.wait_for(model))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    assert refusal.metadata == {
        "device": "devices/d0",
        "needed_bytes": "251",
        "budget_bytes": "250",
    }
    assert bench.engine.load_log == []


async def test_files_that_have_shrunk_are_loaded_as_they_are(benches: Any) -> None:
    bench = benches()
    model = bench.add("m", 100)
    bench.engine.prices["m"] = 50
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].finish(50)
    (await waiter).release()
    assert bench.residency.use(model).charges == {0: 50}
