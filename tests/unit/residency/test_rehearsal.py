"""A rehearsal forecasts what the yard then does, and leaves the yard alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modelyard_server import _core
from modelyard_server.devices.placed import PlacedAs
from modelyard_server.residency.rehearsal import Rehearsal
from modelyard_server.residency.shared import SharedTensors
from modelyard_server.runtimes.targets import Target

BUDGET = 250


def way(charges: dict[int, int]) -> PlacedAs:
    """A way to load a model that shares nothing."""
    return PlacedAs(target=Target.whole(next(iter(charges))), charges=charges, prefixes={})


class Yard:
    """A real yard, whose loads and unloads end when the test says so."""

    def __init__(self, *budgets: int) -> None:
        self.core = _core.Yard(budgets=list(budgets or (BUDGET, BUDGET)))
        self.now_ns = 0
        self.models: list[int] = []

    def add(self, *charges: dict[int, int]) -> int:
        self.models.append(self.core.add_model("", list(charges), 1.0))
        return self.models[-1]

    def request(self, model: int) -> list[object]:
        return list(self.core.request(model, self.now_ns, _core.NEVER_NS)[1] or ())

    def load(self, model: int, *, leased: bool = False) -> int:
        """Makes a model resident; returns its lease, or 0 if it is idle."""
        self.request(model)
        entry = self.core.entry(model)
        assert entry is not None
        assert entry.state is _core.State.LOADING
        actions = self.core.load_done(model, self.now_ns, entry.held, 1.0) or ()
        (lease,) = [action.lease for action in actions if isinstance(action, _core.Grant)]
        self.now_ns += 1_000_000_000
        if leased:
            return lease
        self.core.release(lease, self.now_ns)
        return 0

    def rehearse(self) -> Rehearsal:
        return Rehearsal(self.core, self.now_ns, self.models, SharedTensors(self.core))

    def state(self, model: int) -> _core.State:
        entry = self.core.entry(model)
        assert entry is not None
        return entry.state

    def snapshot(self) -> object:
        """All of it that can be seen."""
        accounts = [self.core.account(i) for i in range(self.core.device_count)]
        return (
            [(a.budget, a.reserved, a.resident, a.draining, a.free) for a in accounts],
            self.core.explanations(),
            self.core.model_count,
            self.core.waiting_count,
            self.core.lease_count,
        )


@pytest.fixture
def yard() -> Iterator[Yard]:
    made = Yard()
    yield made
    made.core.audit()


def test_nothing_that_is_rehearsed_is_done(yard: Yard) -> None:
    idle, used = yard.add({0: 100}), yard.add({0: 100})
    yard.load(idle)
    lease = yard.load(used, leased=True)
    before = yard.snapshot()
    rehearsal = yard.rehearse()
    new = rehearsal.add([way({0: 150})])
    assert rehearsal.want(new)
    rehearsal.set_budget(0, 10)
    rehearsal.set_closed(1, True)
    rehearsal.remove(used)
    rehearsal.set_pinned(idle, True)
    assert yard.snapshot() == before
    yard.core.release(lease, yard.now_ns)


def test_who_is_wanted_is_resident_where_there_is_room_and_nobody_leaves(yard: Yard) -> None:
    model = yard.add({0: 100}, {1: 100})
    rehearsal = yard.rehearse()
    assert not rehearsal.is_resident(model)
    assert rehearsal.want(model)
    assert rehearsal.is_resident(model)
    assert rehearsal.held(model) == {0: 100}
    assert rehearsal.account(0).used == 100
    assert rehearsal.departures == []


def test_an_idle_model_leaves_for_one_that_is_wanted(yard: Yard) -> None:
    old, new = yard.add({0: 200}), yard.add({0: 100})
    yard.load(old)
    rehearsal = yard.rehearse()
    assert rehearsal.want(new)
    (departure,) = rehearsal.departures
    assert departure.core_id == old
    assert departure.charges == {0: 200}
    assert departure.cause == new
    assert departure.why == "MODEL"
    assert not departure.in_use
    assert not rehearsal.is_resident(old)
    assert rehearsal.held(old) == {}
    # And the yard then does just that.
    (unload,) = [a for a in yard.request(new) if isinstance(a, _core.Unload)]
    assert unload.model == old


def test_a_pinned_model_leaves_for_nobody(yard: Yard) -> None:
    old, new = yard.add({0: 200}), yard.add({0: 100})
    yard.load(old)
    rehearsal = yard.rehearse()
    rehearsal.set_pinned(old, True)
    assert not rehearsal.want(new)
    assert rehearsal.departures == []
    # The negative control: it was the pin.
    rehearsal.set_pinned(old, False)
    assert rehearsal.want(new)


def test_what_never_fits_is_not_resident_and_waits_for_nothing(yard: Yard) -> None:
    model = yard.add({0: BUDGET + 1})
    rehearsal = yard.rehearse()
    assert not rehearsal.want(model)
    assert not rehearsal.is_resident(model)
    assert rehearsal.departures == []
    # It left no ticket behind: with room it is not loaded by itself.
    rehearsal.set_budget(0, 2 * BUDGET)
    assert not rehearsal.is_resident(model)


def test_a_lower_budget_drains_idle_models_before_those_in_use(yard: Yard) -> None:
    idle, used = yard.add({0: 100}), yard.add({0: 100})
    yard.load(idle)
    lease = yard.load(used, leased=True)
    rehearsal = yard.rehearse()
    rehearsal.set_budget(0, 150)
    assert [d.core_id for d in rehearsal.departures] == [idle]
    rehearsal.set_budget(0, 50)
    first, second = rehearsal.departures
    assert (first.core_id, first.in_use) == (idle, False)
    assert (second.core_id, second.in_use) == (used, True)
    assert second.charges == {0: 100}
    assert (second.why, second.device) == ("BUDGET", 0)
    assert rehearsal.account(0).used == 0
    yard.core.release(lease, yard.now_ns)


def test_what_pinned_models_hold_above_a_budget_is_a_deficit(yard: Yard) -> None:
    model = yard.add({0: 200})
    yard.load(model)
    yard.core.pin(model, yard.now_ns)
    rehearsal = yard.rehearse()
    rehearsal.set_budget(0, 150)
    assert rehearsal.departures == []
    account = rehearsal.account(0)
    assert (account.used, account.deficit) == (200, 50)


def test_a_closed_device_empties_and_takes_nobody_until_it_is_opened(yard: Yard) -> None:
    here, either = yard.add({0: 100}), yard.add({0: 100}, {1: 100})
    for model in (here, either):
        yard.load(model)
    rehearsal = yard.rehearse()
    rehearsal.set_closed(0, True)
    assert sorted(d.core_id for d in rehearsal.departures if d.device == 0) == [
        model
        for model in (here, either)
        if yard.core.entry(model).held == {0: 100}  # type: ignore[union-attr]  # it is known
    ]
    assert not rehearsal.want(here)
    assert rehearsal.want(either)
    assert rehearsal.held(either) == {1: 100}
    rehearsal.set_closed(0, False)
    assert rehearsal.want(here)


def test_what_runs_now_ends_well(yard: Yard) -> None:
    loading, draining, unloading = (yard.add({i: 100}) for i in (0, 1, 1))
    lease = yard.load(draining, leased=True)
    yard.load(unloading)
    yard.request(loading)
    for model in (draining, unloading):
        yard.core.unload(model, yard.now_ns)
    assert [yard.state(m) for m in (loading, draining, unloading)] == [
        _core.State.LOADING,
        _core.State.DRAINING,
        _core.State.UNLOADING,
    ]
    rehearsal = yard.rehearse()
    rehearsal.settle()
    assert rehearsal.is_resident(loading)
    assert rehearsal.account(0).resident == 100
    assert rehearsal.account(1).used == 0
    # The first that is wanted has the room of all of them.
    assert rehearsal.want(rehearsal.add([way({1: BUDGET})]))
    yard.core.release(lease, yard.now_ns)


def test_models_that_are_not_known_are_settled_and_hold_nothing(yard: Yard) -> None:
    model = yard.add({0: 100})
    yard.core.remove_model(model, yard.now_ns)
    rehearsal = yard.rehearse()
    rehearsal.settle()
    assert not rehearsal.is_resident(model)
    assert rehearsal.held(model) == {}


def test_a_removed_model_gives_its_room_back_once_its_requests_have_ended(yard: Yard) -> None:
    used = yard.add({0: 200})
    lease = yard.load(used, leased=True)
    rehearsal = yard.rehearse()
    heir = rehearsal.add([way({0: 200})], replaces=used)
    rehearsal.set_pinned(used, True)
    assert not rehearsal.want(heir)  # Both do not fit.
    rehearsal.set_pinned(used, False)
    rehearsal.remove(used)
    assert rehearsal.account(0).used == 0
    assert rehearsal.want(heir)
    yard.core.release(lease, yard.now_ns)


def test_who_waits_already_is_served_when_room_is_made(yard: Yard) -> None:
    used, waiting = yard.add({0: 200}), yard.add({0: 100})
    lease = yard.load(used, leased=True)
    yard.request(waiting)
    assert yard.state(waiting) is _core.State.QUEUED
    rehearsal = yard.rehearse()
    rehearsal.remove(used)
    assert rehearsal.is_resident(waiting)
    yard.core.release(lease, yard.now_ns)


def test_what_is_held_is_nobodys_victim_until_it_is_let_go(yard: Yard) -> None:
    old, new = yard.add({0: 200}), yard.add({0: 100})
    yard.load(old)
    rehearsal = yard.rehearse()
    rehearsal.hold(old)
    assert not rehearsal.want(new)
    assert rehearsal.departures == []
    rehearsal.let_go()
    assert rehearsal.want(new, hold=True)
    assert not rehearsal.want(old)
    assert rehearsal.is_resident(new)
    rehearsal.let_go()
    assert rehearsal.want(old)


def test_a_wish_that_pinned_models_leave_no_room_for_says_how_much_there_is(yard: Yard) -> None:
    old, new, small = yard.add({0: 200}), yard.add({0: 100}), yard.add({0: 50})
    yard.load(old)
    rehearsal = yard.rehearse()
    rehearsal.set_pinned(old, True)
    assert not rehearsal.want(new)
    assert rehearsal.no_room is not None
    assert (rehearsal.no_room.device, rehearsal.no_room.needed) == (0, 100)
    assert (rehearsal.no_room.free, rehearsal.no_room.budget) == (50, BUDGET)
    assert rehearsal.want(small)
    assert rehearsal.no_room is None


def test_right_after_a_change_nothing_has_left_yet(yard: Yard) -> None:
    used = yard.add({0: 200})
    lease = yard.load(used, leased=True)
    use = yard.rehearse().right_after(0, budget_bytes=100)
    assert (use.budget, use.draining, use.deficit) == (100, 200, 100)
    use = yard.rehearse().right_after(0, closed=True)
    assert (use.budget, use.draining, use.deficit) == (BUDGET, 200, 0)
    assert yard.core.account(0).resident == 200
    yard.core.release(lease, yard.now_ns)
