"""What is done when a worker dies, over a residency that only notes what it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest

from modelyard_server.errors import Reason, Refusal
from modelyard_server.execution.engine import WorkerDeath
from modelyard_server.residency.recovery import Recovery
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import ModelHandle
from modelyard_server.runtimes.api import ModelSpec

NOON = datetime(2026, 5, 4, 12, 0, 30, 999, tzinfo=UTC)


def no_ways(price: object) -> tuple[()]:
    return ()


class NotedResidency:
    """Has the models it is given, all of them resident, and notes what becomes of them."""

    def __init__(self) -> None:
        self.handles: dict[int, ModelHandle] = {}
        self.pinned: set[str] = set()
        self.refusing: set[str] = set()
        self.wanted: list[str] = []
        self.forgiven: list[str] = []
        self.without_copy: set[int] = set()

    def add(self, name: str) -> ModelHandle:
        core_id = len(self.handles) + 1
        handle = ModelHandle(
            name=name,
            core_id=core_id,
            spec=ModelSpec(name=name, runtime="fake"),
            ways=(),
            replan=no_ways,
            priced_bytes=0,
        )
        self.handles[core_id] = handle
        return handle

    def handle_of(self, core_id: int) -> ModelHandle | None:
        return self.handles.get(core_id)

    def lost(self, core_ids: Iterable[int]) -> tuple[ModelHandle, ...]:
        return tuple(self.handles[core_id] for core_id in core_ids if core_id in self.handles)

    def copies_lost(self, core_ids: Iterable[int]) -> None:
        # A model that is loaded again must not be loaded from a copy that is gone.
        assert not self.wanted
        self.without_copy |= set(core_ids)

    def use(self, handle: ModelHandle) -> SimpleNamespace:
        return SimpleNamespace(pinned=handle.name in self.pinned)

    def want(self, handle: ModelHandle) -> None:
        if handle.name in self.refusing:
            raise Refusal(Reason.BUDGET_EXHAUSTED, "no room")
        self.wanted.append(handle.name)

    def forgive(self, handle: ModelHandle) -> None:
        self.forgiven.append(handle.name)


class Bench:
    """A recovery of such a residency."""

    def __init__(self) -> None:
        self.residency = NotedResidency()
        self.now_s = 0.0
        self.recovery = Recovery(
            cast(Residency, self.residency),
            strikes=3,
            now_s=lambda: self.now_s,
            time_of_day=lambda: NOON,
        )

    def die(
        self,
        *suspects: ModelHandle,
        idle: tuple[ModelHandle, ...] = (),
        copies: tuple[ModelHandle, ...] = (),
    ) -> list[str]:
        """A worker dies with these in it; returns who is loaded again."""
        self.residency.wanted.clear()
        self.recovery.on_death(
            WorkerDeath(
                worker="cpu",
                models=frozenset(handle.core_id for handle in (*suspects, *idle)),
                copies=frozenset(handle.core_id for handle in copies),
                suspects=tuple(handle.core_id for handle in suspects),
                cause="killed by SIGSEGV",
            )
        )
        return sorted(self.residency.wanted)


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield Bench()


def test_who_did_not_run_is_loaded_again_and_a_suspect_is_not(bench: Bench) -> None:
    a, b, idle = (bench.residency.add(name) for name in ("a", "b", "idle"))
    assert bench.die(a, b, idle=(idle,)) == ["idle"]


def test_copies_that_were_in_it_are_gone_before_anything_is_loaded_again(bench: Bench) -> None:
    idle, copied = bench.residency.add("idle"), bench.residency.add("copied")
    assert bench.die(idle=(idle,), copies=(copied,)) == ["idle"]
    assert bench.residency.without_copy == {copied.core_id}


def test_a_pinned_suspect_is_loaded_again_until_it_is_barred(bench: Bench) -> None:
    model = bench.residency.add("m")
    bench.residency.pinned.add("m")
    assert bench.die(model) == ["m"]
    assert bench.die(model) == ["m"]
    assert bench.die(model) == []
    assert model.barred_text


def test_who_is_cleared_is_loaded_again_at_once(bench: Bench) -> None:
    hot, culprit = bench.residency.add("hot"), bench.residency.add("culprit")
    hot.finished_runs = 5000
    assert bench.die(hot, culprit) == ["hot"]


def test_a_hot_model_is_not_barred_with_the_culprit_that_it_always_runs_beside(
    bench: Bench,
) -> None:
    hot, culprit = bench.residency.add("hot"), bench.residency.add("culprit")
    for _ in range(3):
        hot.finished_runs += 1000
        culprit.finished_runs += 2
        assert not culprit.barred_text
        bench.die(hot, culprit)
    assert culprit.barred_text
    for _ in range(7):
        bench.recovery.forgive(culprit)
        hot.finished_runs += 1000
        culprit.finished_runs += 2
        bench.die(culprit, hot)
    assert not hot.barred_text


def test_runs_of_former_suspects_are_asked_for_at_each_death(bench: Bench) -> None:
    a, b, culprit = (bench.residency.add(name) for name in ("a", "b", "culprit"))
    bench.die(a, culprit)
    bench.die(a, culprit)
    a.finished_runs = 1000
    b.finished_runs = 1000
    # Were it not known that the first one has gone on well, the culprit would have two strikes.
    bench.die(b, culprit)
    assert culprit.barred_text.startswith("it brought its worker down 3 times in 10 minutes")
    assert not a.barred_text


def test_the_text_of_a_barred_model_says_what_since_when_and_how_to_lift_it(bench: Bench) -> None:
    model = bench.residency.add("m")
    for _ in range(3):
        bench.die(model)
    assert model.barred_text == (
        "it brought its worker down 3 times in 10 minutes, the last time so: killed by SIGSEGV; "
        "not loaded any more since 2026-05-04 12:00:30 UTC; load it by hand to try again "
        "(modelyard load m)"
    )


def test_the_text_of_models_that_are_barred_together_does_not_say_it_was_one(bench: Bench) -> None:
    a, b = bench.residency.add("a"), bench.residency.add("b")
    for _ in range(5):
        bench.die(a, b)
    assert not a.barred_text and not b.barred_text
    bench.die(a, b)
    for model in (a, b):
        assert model.barred_text.startswith(
            "it was running or being loaded the 6 times that its worker died in 10 minutes, "
        )


def test_strikes_age_out_of_ten_minutes(bench: Bench) -> None:
    model = bench.residency.add("m")
    for _ in range(6):
        bench.die(model)
        bench.now_s += 300.5
    assert not model.barred_text


def test_a_forgiven_model_is_not_barred_and_may_do_it_as_often_again(bench: Bench) -> None:
    model = bench.residency.add("m")
    for _ in range(3):
        bench.die(model)
    bench.recovery.forgive(model)
    assert not model.barred_text
    assert bench.residency.forgiven == ["m"]
    for _ in range(2):
        bench.die(model)
        assert not model.barred_text
    bench.die(model)
    assert model.barred_text


def test_a_model_that_is_barred_does_not_come_back_when_it_was_idle(bench: Bench) -> None:
    model = bench.residency.add("m")
    for _ in range(3):
        bench.die(model)
    assert bench.die(idle=(model,)) == []


def test_suspects_that_nobody_knows_any_more_are_no_suspects(bench: Bench) -> None:
    gone, model = bench.residency.add("gone"), bench.residency.add("m")
    del bench.residency.handles[gone.core_id]
    for _ in range(3):
        bench.die(gone, model)
    # It was the only one that is left, so it is held for the one.
    assert model.barred_text.startswith("it brought its worker down 3 times")
    assert not gone.barred_text


def test_a_model_that_cannot_be_loaded_again_does_not_stop_the_others(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = bench.residency.add("a"), bench.residency.add("b")
    bench.residency.refusing.add("a")
    with caplog.at_level(logging.WARNING):
        assert bench.die(idle=(a, b)) == ["b"]
    assert "a cannot be loaded again: BUDGET_EXHAUSTED: no room" in caplog.messages


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([], "none"),
        ([0], "m0"),
        ([0, 0], "m0 (50%), m1 (50%)"),
        ([0, 50], "m0 (100%), m1 (0%)"),
    ],
)
def test_the_log_says_who_was_there_and_what_each_gets(
    bench: Bench, caplog: pytest.LogCaptureFixture, runs: list[int], said: str
) -> None:
    handles = [bench.residency.add(f"m{i}") for i in range(len(runs))]
    for handle, count in zip(handles, runs, strict=True):
        handle.finished_runs = count
    with caplog.at_level(logging.ERROR):
        bench.die(*handles)
    (message,) = caplog.messages
    assert message.endswith(f"running or loading: {said}")
