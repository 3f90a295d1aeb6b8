"""The checks of `make bench-plan` see what they are there to see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bench.audited_server import Steps, audited
from bench.budget_watch import BudgetWatch
from bench.load import Answers
from bench.plan_change import Changes, problems
from bench.plan_models import TOLERANCE, Question, difference
from bench.split import SplitResult
from tests.support.kill9 import Kill9Report

from modelyard.v1 import admin_service_pb2, device_pb2, event_pb2, tensor_pb2
from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server import _core


def _loads(actions: list[Any] | None) -> list[Any]:
    return [action for action in actions or () if isinstance(action, _core.Load)]


def test_every_event_is_a_step_and_a_lowered_budget_is_no_offence() -> None:
    steps = Steps()
    yard = audited(steps)(budgets=[100])
    model = yard.add_model("a", [{0: 80}], 1.0)
    _, actions = yard.request(model, 1, _core.NEVER_NS)
    assert _loads(actions)
    (grant,) = list(yard.load_done(model, 2, {0: 80}, 0.1) or ())
    yard.set_budget(0, 40, 3)
    assert yard.account(0).deficit == 40
    assert isinstance(grant, _core.Grant)
    yard.release(grant.lease, 4)
    yard.unload_done(model, 5, {0: 80})
    assert (steps.count, steps.wrong) == (6, 0)


def test_a_model_that_turns_out_larger_than_the_budget_is_seen() -> None:
    steps = Steps()
    yard = audited(steps)(budgets=[100])
    model = yard.add_model("a", [{0: 80}], 1.0)
    yard.request(model, 1, _core.NEVER_NS)
    yard.load_done(model, 2, {0: 120}, 0.1)
    assert steps.wrong == 1
    assert "load_done: device 0 holds 120 of 100 bytes" in steps.texts[0]


def test_a_core_whose_own_audit_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(yard: _core.Yard) -> None:
        raise RuntimeError("I1")

    steps = Steps()
    kind = audited(steps)
    monkeypatch.setattr(kind, "audit", fail, raising=False)
    kind(budgets=[100]).add_model("a", [{0: 80}], 1.0)
    assert steps.wrong == 1


def test_what_a_lowered_budget_leaves_behind_is_no_offence() -> None:
    watch = BudgetWatch()
    watch.look(_device(budget_bytes=100, resident_bytes=90))
    watch.look(_device(budget_bytes=50, resident_bytes=100, deficit_bytes=50))
    watch.look(_device(budget_bytes=50, resident_bytes=60, draining_bytes=20, deficit_bytes=30))
    assert (watch.samples, watch.over) == (3, 0)


@pytest.mark.parametrize(
    "after",
    [
        {"resident_bytes": 91, "reserved_bytes": 10, "deficit_bytes": 1},
        {"resident_bytes": 100, "quarantined_bytes": 1, "deficit_bytes": 1},
        {"budget_bytes": 50, "draining_bytes": 101, "deficit_bytes": 51},
        {"budget_bytes": 50, "resident_bytes": 90, "deficit_bytes": 39},
        {"resident_bytes": 90, "measured_bytes": 91},
    ],
)
def test_a_device_that_has_come_to_hold_too_much_is_seen(after: dict[str, int]) -> None:
    watch = BudgetWatch()
    watch.look(_device(budget_bytes=100, resident_bytes=90))
    watch.look(_device(**({"budget_bytes": 100} | after)))
    assert watch.over == 1


def test_an_overshoot_and_missed_events_are_seen() -> None:
    watch = BudgetWatch()
    overshoot = event_pb2.Event(type=event_pb2.EVENT_TYPE_OVERSHOOT)
    watch.hear(admin_service_pb2.WatchEventsResponse(events=[event_pb2.Event(), overshoot]))
    watch.hear(admin_service_pb2.WatchEventsResponse(truncated=True))
    assert (watch.events, watch.over) == (2, 2)


def test_an_answer_of_other_numbers_or_another_kind_is_wrong() -> None:
    right = np.array([[0.25, 0.75]], np.float32)
    question = Question(model="a", frame=b"", output="probabilities", expected=right)
    assert difference(question, _response("probabilities", right)) == 0
    off = right + np.float32(1e-3)
    assert difference(question, _response("probabilities", off)) > TOLERANCE
    for answer in (
        _response("probabilities", right * np.float32("nan")),
        _response("probabilities", right[:, :1]),
        _response("embedding", right),
        pb.PredictResponse(),
    ):
        assert difference(question, answer) == float("inf")


def _split(most_apart: float = 0.0, charged: int = 8) -> SplitResult:
    return SplitResult(
        model="a",
        most_apart=most_apart,
        expected_bytes={"devices/cuda-0": 8},
        charged_bytes={"devices/cuda-0": charged},
    )


def _kills(**found: tuple[str, ...]) -> Kill9Report:
    lost, half, damaged = (found.get(name, ()) for name in ("lost", "half", "damaged"))
    return Kill9Report(
        kills=1,
        acknowledged=1,
        plans=1,
        in_flight_kept=0,
        lost=lost,
        half_applied=half,
        damaged=damaged,
        start_s=1.0,
    )


def test_a_run_in_which_all_is_well_has_no_problems() -> None:
    assert list(problems(Changes(), [_split()], [_kills()])) == []


@pytest.mark.parametrize(
    ("changes", "split", "kills"),
    [
        (Changes(steady=Answers(lost=["a: UNAVAILABLE"])), _split(), _kills()),
        (Changes(changing=Answers(wrong=["a: 0.1"])), _split(), _kills()),
        (Changes(texts=["device 0 holds 2 of 1 bytes"]), _split(), _kills()),
        (Changes(), _split(most_apart=2e-5), _kills()),
        (Changes(), _split(most_apart=float("nan")), _kills()),
        (Changes(), _split(charged=9), _kills()),
        (Changes(), _split(), _kills(lost=("models/a",))),
        (Changes(), _split(), _kills(half=("plan",))),
        (Changes(), _split(), _kills(damaged=("page 3",))),
    ],
)
def test_each_thing_that_must_not_be_is_a_problem_of_the_run(
    changes: Changes, split: SplitResult, kills: Kill9Report
) -> None:
    assert len(list(problems(changes, [split], [kills]))) == 1


def _device(**bytes_held: int) -> device_pb2.ManagedDevice:
    device = device_pb2.ManagedDevice(name="devices/cuda-0")
    for name, size_bytes in bytes_held.items():
        setattr(device, name, size_bytes)
    return device


def _response(output: str, values: np.ndarray[Any, Any]) -> pb.PredictResponse:
    tensor = tensor_pb2.Tensor(
        name=output,
        data_type=tensor_pb2.DATA_TYPE_FLOAT32,
        shape=values.shape,
        raw=values.tobytes(),
    )
    return pb.PredictResponse(outputs=[tensor])
