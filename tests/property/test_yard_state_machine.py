"""The real core beside a yard kept by hand, through whatever can happen to it, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.support.naive_yard import (
    Actions,
    Disagreement,
    NaiveModel,
    NaiveTicket,
    NaiveYard,
    plus,
)

from modelyard_server import _core
from modelyard_server._core import LoadFailure, State

settings.register_profile(
    "yard",
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SECOND = 10**9
PICK = st.integers(0, 2**16)
SIZES = st.integers(0, 12)
STEPS = st.integers(-3, 9)
ACTUAL = st.sampled_from(["exact", "exact", "exact", "smaller", "more", "elsewhere", "nothing"])
NEVER = _core.NEVER_NS


class YardMachine(RuleBasedStateMachine):
    """Drives both. Every rule is an event; what follows every event is in `settle`."""

    reference: ClassVar[type[NaiveYard]] = NaiveYard

    def __init__(self) -> None:
        super().__init__()
        self.devices = 1
        self.now = 0
        self.failed = False
        self.peaks: list[int] = []
        self.deficits: dict[int, int] = {}
        self.explained = 0
        self.minimal_checks = 0

    @initialize(
        budgets=st.lists(st.integers(6, 24), min_size=1, max_size=3),
        policy=st.sampled_from(_core.POLICIES),
        loads=st.integers(1, 2),
        sizes=st.lists(SIZES, min_size=2, max_size=5),
    )
    def begin(self, budgets: list[int], policy: str, loads: int, sizes: list[int]) -> None:
        self.devices = len(budgets)
        self.yard = _core.Yard(
            budgets=budgets,
            policy=policy,
            max_waiting_per_model=3,
            max_waiting=6,
            loads_per_device=loads,
            overdue_after_s=8.0,
            backoff_initial_s=1.0,
            backoff_max_s=4.0,
            explain_capacity=64,
        )
        self.naive = self.reference(
            budgets=budgets,
            max_waiting_per_model=3,
            max_waiting=6,
            loads_per_device=loads,
            overdue_after=8 * SECOND,
            backoff_initial=SECOND,
            backoff_max=4 * SECOND,
        )
        self.naive.meant_for = self._meant_for
        for i, size in enumerate(sizes):
            self._add([{i % self.devices: size}])

    # --- Events -----------------------------------------------------------------------------------

    def _add(self, placements: list[dict[int, int]]) -> None:
        model = self.yard.add_model(f"m{len(self.naive.models)}", placements, 0.5)
        self.naive.add_model(model, placements, 0.5)
        self.settle()

    def _meant_for(self, model: int) -> int:
        entry = self.yard.entry(model)
        return -1 if entry is None else entry.meant_for

    def _placements(self, sizes: list[dict[int, int]]) -> list[dict[int, int]]:
        return [{d % self.devices: size for d, size in charge.items()} for charge in sizes]

    def _pick(self, pick: int, *states: State) -> int:
        found = self.naive.in_state(*(states or tuple(State.__members__.values())))
        return found[pick % len(found)]

    def _live(self, pick: int) -> int:
        found = [i for i, model in sorted(self.naive.models.items()) if not model.removed]
        return found[pick % len(found)]

    def _any_live(self) -> bool:
        return any(not model.removed for model in self.naive.models.values())

    def _has(self, *states: State) -> bool:
        return bool(self.naive.in_state(*states))

    charges = st.lists(
        st.dictionaries(st.integers(0, 2), SIZES, min_size=1, max_size=3), min_size=1, max_size=3
    )

    @precondition(lambda self: len(self.naive.models) < 7)
    @rule(charges=charges)
    def add_model(self, charges: list[dict[int, int]]) -> None:
        self._add(self._placements(charges))

    @precondition(lambda self: self._any_live())
    @rule(pick=PICK, charges=charges)
    def update_placements(self, pick: int, charges: list[dict[int, int]]) -> None:
        model, placements = self._live(pick), self._placements(charges)
        actions = self.yard.update_placements(model, placements, self.now)
        self.naive.update_placements(model, placements, self.now, actions)
        self.settle()

    @precondition(lambda self: self._any_live())
    @rule(pick=PICK)
    def remove_model(self, pick: int) -> None:
        model = self._live(pick)
        actions = self.yard.remove_model(model, self.now)
        self.naive.remove_model(model, self.now, actions)
        self.settle()

    @precondition(lambda self: self._any_live())
    @rule(pick=PICK, patience=st.none() | st.integers(-1, 20))
    def request(self, pick: int, patience: int | None) -> None:
        model = self._live(pick)
        deadline = NEVER if patience is None else self.now + patience * SECOND
        ticket, actions = self.yard.request(model, self.now, deadline)
        self.naive.request(model, ticket, self.now, deadline, actions)
        self.settle()

    @precondition(lambda self: self._any_live())
    @rule(pick=PICK)
    def request_without_deadline(self, pick: int) -> None:
        self.request(pick, None)

    @precondition(lambda self: self._any_live())
    @rule(pick=PICK)
    def try_acquire(self, pick: int) -> None:
        model = self._live(pick)
        self.naive.try_acquire(model, self.now, self.yard.try_acquire(model, self.now))
        self.settle()

    @precondition(lambda self: self.naive.tickets)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        ticket = sorted(self.naive.tickets)[pick % len(self.naive.tickets)]
        self.naive.cancel(ticket, self.now, self.yard.cancel(ticket, self.now))
        self.settle()

    @precondition(lambda self: self.naive.leases)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        lease = sorted(self.naive.leases)[pick % len(self.naive.leases)]
        self.naive.release(lease, self.now, self.yard.release(lease, self.now))
        self.settle()

    @precondition(lambda self: self._has(State.LOADING))
    @rule(pick=PICK, how=ACTUAL, by=st.integers(1, 6))
    def load_done(self, pick: int, how: str, by: int) -> None:
        model = self._pick(pick, State.LOADING)
        actual = self._measured(self.naive.models[model].held, how, by)
        # What only a first load does takes longer than all the rest.
        took_s = 0.25 * by * by * (1 if self.naive.models[model].load_count else 40)
        actions = self.yard.load_done(model, self.now, actual, took_s)
        self.naive.load_done(model, self.now, actual, took_s, actions)
        self.settle(grows=True)

    @precondition(lambda self: self._has(State.LOADING))
    @rule(pick=PICK)
    def load_done_as_promised(self, pick: int) -> None:
        self.load_done(pick, "exact", 1)

    @precondition(lambda self: self._has(State.LOADING))
    @rule(pick=PICK, failure=st.sampled_from(list(LoadFailure.__members__.values())))
    def load_failed(self, pick: int, failure: LoadFailure) -> None:
        model = self._pick(pick, State.LOADING)
        actions = self.yard.load_failed(model, self.now, failure)
        self.naive.load_failed(model, self.now, failure, actions)
        self.settle()

    @precondition(lambda self: self._has(State.UNLOADING))
    @rule(pick=PICK, missing=st.sampled_from([0, 0, 0, 1, 3, 99]))
    def unload_done(self, pick: int, missing: int) -> None:
        model = self._pick(pick, State.UNLOADING)
        held = self.naive.models[model].held
        freed = {device: max(0, size - missing) for device, size in held.items()}
        actions = self.yard.unload_done(model, self.now, freed)
        self.naive.unload_done(model, self.now, freed, actions)
        self.settle()

    @precondition(lambda self: any(m.quarantined for m in self.naive.models.values()))
    @rule(pick=PICK, part=st.booleans())
    def reclaimed(self, pick: int, part: bool) -> None:
        short = [i for i, m in sorted(self.naive.models.items()) if m.quarantined]
        model = short[pick % len(short)]
        quarantined = self.naive.models[model].quarantined
        back = {d: (size + 1) // 2 if part else size for d, size in quarantined.items()}
        actions = self.yard.reclaimed(model, self.now, back)
        self.naive.reclaimed(model, self.now, back, actions)
        self.settle()

    @precondition(lambda self: self._has(State.RESIDENT, State.DRAINING))
    @rule(pick=PICK, how=ACTUAL, by=st.integers(1, 6))
    def remeasured(self, pick: int, how: str, by: int) -> None:
        model = self._pick(pick, State.RESIDENT, State.DRAINING)
        actual = self._measured(self.naive.models[model].held, how, by)
        actions = self.yard.remeasured(model, self.now, actual)
        self.naive.remeasured(model, self.now, actual, actions)
        self.settle(grows=True)

    def _measured(self, held: Mapping[int, int], how: str, by: int) -> dict[int, int]:
        match how:
            case "smaller":
                return {device: max(0, size - by) for device, size in held.items()}
            case "more":
                return {device: size + by for device, size in held.items()}
            case "elsewhere":
                return plus(held, {by % self.devices: by})
            case "nothing":
                return {}
            case _:
                return dict(held)

    @precondition(lambda self: self._any_live())
    @rule(pick=PICK)
    def pin(self, pick: int) -> None:
        model = self._live(pick)
        self.naive.pin(model, self.now, self.yard.pin(model, self.now))
        self.settle()

    @precondition(lambda self: self._any_live())
    @rule(pick=PICK)
    def unpin(self, pick: int) -> None:
        pinned = [i for i, m in sorted(self.naive.models.items()) if m.pinned]
        model = pinned[pick % len(pinned)] if pinned else self._live(pick)
        self.naive.unpin(model, self.now, self.yard.unpin(model, self.now))
        self.settle()

    @precondition(lambda self: self._any_live())
    @rule(pick=PICK)
    def unload(self, pick: int) -> None:
        model = self._live(pick)
        if self.naive.models[model].pinned:
            with pytest.raises(_core.PinnedError):
                self.yard.unload(model, self.now)
        else:
            self.naive.unload(model, self.now, self.yard.unload(model, self.now))
        self.settle()

    @rule(pick=PICK, budget=st.integers(0, 24))
    def set_budget(self, pick: int, budget: int) -> None:
        device = pick % self.devices
        actions = self.yard.set_budget(device, budget, self.now)
        self.naive.set_budget(device, budget, self.now, actions)
        self.settle(grows=True)

    @rule(pick=PICK, closed=st.booleans())
    def set_device_closed(self, pick: int, closed: bool) -> None:
        device = pick % self.devices
        actions = self.yard.set_device_closed(device, closed, self.now)
        self.naive.set_device_closed(device, closed, self.now, actions)
        self.settle()

    @rule(step=STEPS)
    def time_goes_on(self, step: int) -> None:
        # Not told to the core: the next event may be earlier than the one before it.
        self.now = max(0, self.now + step * SECOND)

    @rule(step=STEPS)
    def tick(self, step: int) -> None:
        self.time_goes_on(step)
        self.naive.tick(self.now, self.yard.tick(self.now))
        self.settle()

    # --- What must change nothing -----------------------------------------------------------------

    @rule(never=st.sampled_from([0, 1, -1, 2**63 - 1, 2**32, 77 << 32]), pick=PICK)
    def stale_ids(self, never: int, pick: int) -> None:
        naive, later = self.naive, self.now + 1000 * SECOND
        models = [*sorted(naive.gone), *([] if never in naive.models else [never])]
        removed = [i for i, m in sorted(naive.models.items()) if m.removed]
        tickets = [*sorted(naive.ended), *([] if never in naive.tickets else [never])]
        leases = [*sorted(naive.ended_leases), *([] if never in naive.leases else [never])]
        yard = self.yard
        calls: list[Callable[[], object]] = []
        for model in (models + removed)[pick % 3 :: 3]:
            calls += [
                partial(yard.request, model, later, NEVER),
                partial(yard.try_acquire, model, later),
                partial(yard.pin, model, later),
                partial(yard.unpin, model, later),
                partial(yard.unload, model, later),
                partial(yard.remove_model, model, later),
                partial(yard.update_placements, model, [{0: 1}], later),
            ]
        for model in models[pick % 3 :: 3]:
            assert yard.entry(model) is None
            calls += [
                partial(yard.load_done, model, later, {}, 1.0),
                partial(yard.load_failed, model, later, LoadFailure.TRANSIENT),
                partial(yard.unload_done, model, later, {}),
                partial(yard.reclaimed, model, later, {}),
                partial(yard.remeasured, model, later, {}),
            ]
        calls += [partial(yard.cancel, t, later) for t in tickets[pick % 5 :: 5]]
        calls += [partial(yard.release, x, later) for x in leases[pick % 5 :: 5]]
        for call in calls:
            with pytest.raises(_core.StaleIdError):
                call()
        self.settle()

    @precondition(lambda self: self.naive.models)
    @rule(pick=PICK)
    def events_that_do_not_fit(self, pick: int) -> None:
        model = self._pick(pick)
        entry, later, yard = self.naive.models[model], self.now + 1000 * SECOND, self.yard
        wrong: list[Callable[[], object]] = []
        if entry.state != State.LOADING:
            wrong.append(lambda: yard.load_done(model, later, {}, 1.0))
            wrong.append(lambda: yard.load_failed(model, later, LoadFailure.PERMANENT))
        if entry.state != State.UNLOADING:
            wrong.append(lambda: yard.unload_done(model, later, {}))
        if entry.state not in (State.RESIDENT, State.DRAINING):
            wrong.append(lambda: yard.remeasured(model, later, {}))
        for call in wrong:
            with pytest.raises(_core.WrongStateError):
                call()
        too_many = plus(entry.quarantined, {0: 1})
        with pytest.raises(ValueError, match="came back"):
            yard.reclaimed(model, later, too_many)
        if entry.state == State.UNLOADING:
            with pytest.raises(ValueError, match="came back"):
                yard.unload_done(model, later, plus(entry.held, {0: 1}))
        self.settle()

    # --- After every event ------------------------------------------------------------------------

    def settle(self, *, grows: bool = False) -> None:
        """Compares, after an event.

        Args:
            grows: the event may have made or widened a deficit.
        """
        self.failed = True
        self.yard.audit()
        self._compare_models()
        self._compare_accounts(grows)
        self.naive.check_rest()
        self.naive.check_head()
        self._check_victims()
        self.failed = False

    def _compare_models(self) -> None:
        naive, yard = self.naive, self.yard
        assert yard.model_count == len(naive.models)
        assert yard.waiting_count == len(naive.tickets)
        assert yard.lease_count == len(naive.leases)
        for model, mine in naive.models.items():
            entry = yard.entry(model)
            if entry is None:
                raise Disagreement("a model is gone too early")
            assert entry.state == mine.state
            assert entry.held == mine.held
            assert entry.quarantined == mine.quarantined
            assert entry.placements == mine.placements
            assert entry.lease_count == len(mine.leases)
            assert entry.waiting_count == len(mine.waiting)
            assert (entry.pinned, entry.removed) == (mine.pinned, mine.removed)
            assert entry.load_count == mine.load_count
            assert math.isclose(entry.reload_seconds, mine.reload_s, rel_tol=1e-9)
            assert entry.failure_count == mine.failure_count
            if mine.state == State.FAILED:
                assert entry.retry_at_ns == mine.retry_at

    def _compare_accounts(self, grows: bool) -> None:
        for device, mine in enumerate(self.naive.accounts()):
            theirs = self.yard.account(device)
            assert theirs.budget == mine.budget
            assert theirs.reserved == mine.reserved
            assert theirs.resident == mine.resident
            assert theirs.draining == mine.draining
            assert theirs.quarantined == mine.quarantined
            assert theirs.used == mine.used <= theirs.budget + theirs.deficit
            assert theirs.free == mine.free
            assert theirs.deficit == mine.deficit
            assert theirs.peak >= mine.used
            if not grows:
                assert mine.deficit <= self.deficits.get(device, 0)
        self.deficits = self.naive.deficits()

    def _check_victims(self) -> None:
        if not self.naive.victims:
            return
        new = [e for e in self.yard.explanations() if e["sequence"] > self.explained]
        self.explained = new[-1]["sequence"]
        causes = [
            e["cause"]
            for e in new
            if e["decision"] in ("EVICTED", "DRAINED") and e["why"] in ("MODEL", "BUDGET")
        ]
        assert len(causes) == len(self.naive.victims)
        if len(set(causes)) == 1:
            self.minimal_checks += self.naive.check_minimal(causes[0])
        self.naive.victims = []

    # --- The end ----------------------------------------------------------------------------------

    def teardown(self) -> None:
        if self.failed or not hasattr(self, "yard"):
            return
        naive = self.naive
        for device in range(self.devices):
            self.set_device_closed(device, False)
        for model in [i for i, m in naive.models.items() if m.pinned]:
            naive.unpin(model, self.now, self.yard.unpin(model, self.now))
            self.settle()
        for _ in range(200):
            if not naive.tickets:
                break
            self._complete_everything()
            self.tick(9)
        assert not naive.tickets, "requests wait although everything else has ended"
        for model in [i for i, m in naive.models.items() if not m.removed]:
            self.naive.unload(model, self.now, self.yard.unload(model, self.now))
            self.settle()
        self._complete_everything()
        assert not naive.tickets
        assert not naive.leases
        for device in range(self.devices):
            account = self.yard.account(device)
            assert (account.reserved, account.resident, account.draining) == (0, 0, 0)
            assert account.used == account.quarantined
        for _ in range(len(naive.models)):
            if any(m.quarantined for m in naive.models.values()):
                self.reclaimed(0, False)
        assert [self.yard.account(d).used for d in range(self.devices)] == [0] * self.devices
        assert all(not m.removed for m in naive.models.values()), "a removed model never went"

    def _complete_everything(self) -> None:
        busy = True
        while busy:
            busy = False
            while self.naive.leases:
                self.release(0)
                busy = True
            if self._has(State.LOADING):
                self.load_done(0, "exact", 1)
                busy = True
            if self._has(State.UNLOADING):
                self.unload_done(0, 0)
                busy = True


YardMachine.TestCase.settings = settings.get_profile("yard")
TestYard = YardMachine.TestCase


# --- Negative controls: a reference that is wrong must be found out -------------------------------


class ForgetsQuarantine(NaiveYard):
    """Believes that whatever was asked to go is gone."""

    def unload_done(self, model: int, now: int, freed: Mapping[int, int], actions: Actions) -> None:
        super().unload_done(model, now, self.models[model].held, actions)


class GrantsOneWaiter(NaiveYard):
    """Takes a finished load for the answer to its oldest request only."""

    def load_done(
        self, model: int, now: int, actual: Mapping[int, int], took_s: float, actions: Actions
    ) -> None:
        for ticket in self.models[model].waiting[1:]:
            self.ended[ticket] = "overlooked"
        super().load_done(model, now, actual, took_s, actions)


class KeepsFailedReservation(NaiveYard):
    """Leaves behind what a failed load was promised."""

    def load_failed(self, model: int, now: int, failure: LoadFailure, actions: Actions) -> None:
        held = self.models[model].held
        super().load_failed(model, now, failure, actions)
        if model in self.models:
            self.models[model].quarantined = plus(self.models[model].quarantined, held)


class TrustsEstimates(NaiveYard):
    """Does not learn from an overshoot."""

    def _learn(self, entry: Any, actual: Mapping[int, int]) -> None:
        return


class MixesFirstLoads(NaiveYard):
    """Expects later loads to be like the first one."""

    def _learn_seconds(self, entry: NaiveModel, took_s: float, size: int) -> None:
        entry.reload_s = 0.7 * entry.reload_s + 0.3 * took_s if entry.load_count else took_s


class BelievesFirstLoads(NaiveYard):
    """Does not doubt a first load because of what others' reloads take."""

    def _learn_seconds(self, entry: NaiveModel, took_s: float, size: int) -> None:
        super()._learn_seconds(entry, took_s, size)
        for model in self.models.values():
            if model.first_load is not None:
                model.reload_s = model.first_load[0]


class ForgetsBackOff(NaiveYard):
    """Tries a broken model again at once."""

    def load_failed(self, model: int, now: int, failure: LoadFailure, actions: Actions) -> None:
        super().load_failed(model, now, failure, actions)
        if model in self.models:
            self.models[model].retry_at = self.now


@pytest.mark.parametrize(
    "mistaken",
    [
        ForgetsQuarantine,
        GrantsOneWaiter,
        KeepsFailedReservation,
        TrustsEstimates,
        MixesFirstLoads,
        BelievesFirstLoads,
        ForgetsBackOff,
    ],
)
def test_a_seeded_mistake_is_found(mistaken: type[NaiveYard]) -> None:
    class Mistaken(YardMachine):
        reference = mistaken

    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(
            Mistaken,
            settings=settings(
                settings.get_profile("yard"),
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                verbosity=hypothesis.Verbosity.quiet,
                report_multiple_bugs=False,
            ),
        )


def test_the_minimality_check_finds_a_needless_victim() -> None:
    naive = NaiveYard(
        budgets=[10],
        max_waiting_per_model=3,
        max_waiting=6,
        loads_per_device=1,
        overdue_after=SECOND,
        backoff_initial=SECOND,
        backoff_max=SECOND,
    )
    for model, size in ((1, 4), (2, 5), (3, 6)):
        naive.add_model(model, [{0: size}], 1.0)
        naive.models[model].held = {0: size} if model < 3 else {}
        naive.models[model].state = State.RESIDENT if model < 3 else State.QUEUED
    naive.models[3].waiting = [9]
    naive.tickets[9] = NaiveTicket(model=3, sequence=1, arrival=0, deadline=NEVER)
    naive._on_leave(2, drains=False)
    assert naive.check_minimal(3)
    naive._on_leave(1, drains=False)
    with pytest.raises(Disagreement, match="least set"):
        naive.check_minimal(3)
