"""A yard kept by hand: what everything must be, told by events and actions alone.

Deliberately naive. It decides nothing and plans nothing: it is told what happened and what the core
said is to be done, works out sums anew each time it is asked, and objects to whatever the contract
in csrc/include/modelyard does not allow. It shares no code and no cleverness with the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Final

from modelyard_server import _core
from modelyard_server._core import LoadFailure, RefuseReason, State

__all__ = [
    "Actions",
    "Disagreement",
    "NaiveAccount",
    "NaiveArrival",
    "NaiveModel",
    "NaiveTicket",
    "NaiveYard",
    "Scene",
    "plus",
]

Charge = dict[int, int]

REACH_MARGIN: Final = 1.25
"""How much more than expected a hit has to have left."""
MEANT_FOR: Final = 10_000_000_000
"""Nanoseconds that a model that was given away waits for the device it was given to."""


class Disagreement(AssertionError):
    """The core did what its contract does not allow."""


def plus(a: Mapping[int, int], b: Mapping[int, int]) -> Charge:
    """Sum of two charges, without zeros."""
    total = {device: a.get(device, 0) + b.get(device, 0) for device in {*a, *b}}
    return {device: size for device, size in total.items() if size}


def minus(a: Mapping[int, int], b: Mapping[int, int]) -> Charge:
    """Difference of two charges, not below zero, without zeros."""
    rest = {device: max(0, size - b.get(device, 0)) for device, size in a.items()}
    return {device: size for device, size in rest.items() if size}


def largest(a: Mapping[int, int], b: Mapping[int, int]) -> Charge:
    """The larger amount of two charges on every device, without zeros."""
    top = {device: max(a.get(device, 0), b.get(device, 0)) for device in {*a, *b}}
    return {device: size for device, size in top.items() if size}


@dataclass(slots=True, kw_only=True)
class NaiveTicket:
    """A request that waits."""

    model: int
    sequence: int
    arrival: int
    deadline: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveArrival:
    """A request that has just come.

    Attributes:
        ticket: of it.
        state: of its model before.
        alone: nobody waited for any model that does not load.
    """

    ticket: int
    state: State
    alone: bool


@dataclass(slots=True, kw_only=True)
class NaiveModel:
    """A model."""

    placements: list[Charge]
    reload_s: float
    state: State = State.COLD
    placement: int | None = None
    held: Charge = field(default_factory=dict)
    quarantined: Charge = field(default_factory=dict)
    pinned: bool = False
    meant_for: int | None = None
    gone_at: int = 0
    removed: bool = False
    leave_after: bool = False
    stopping: bool = False
    leases: set[int] = field(default_factory=set)
    waiting: list[int] = field(default_factory=list)
    failure_count: int = 0
    retry_at: int = 0
    load_count: int = 0
    first_load: tuple[float, int] | None = None  # Seconds and bytes, until the second one.


@dataclass(slots=True, kw_only=True)
class NaiveAccount:
    """The sums of one device."""

    budget: int
    reserved: int = 0
    resident: int = 0
    draining: int = 0
    unloading: int = 0
    quarantined: int = 0

    @property
    def used(self) -> int:
        """Bytes that are promised or held."""
        return self.reserved + self.resident + self.draining + self.quarantined

    @property
    def free(self) -> int:
        """Bytes that may still be promised."""
        return max(0, self.budget - self.used)

    @property
    def deficit(self) -> int:
        """Bytes above the budget."""
        return max(0, self.used - self.budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """How things stood when the first victim of an event was asked to leave."""

    accounts: list[NaiveAccount]
    movable: Charge
    queued: list[int]


class NaiveYard:
    """See the module. Every event method is called after the core's, with the actions it gave.

    Args:
        budgets: bytes, one a device.
        max_waiting_per_model: most tickets of one model.
        max_waiting: most tickets.
        loads_per_device: most loads at once.
        overdue_after: nanoseconds.
        backoff_initial: nanoseconds.
        backoff_max: nanoseconds.
    """

    def __init__(
        self,
        *,
        budgets: Sequence[int],
        max_waiting_per_model: int,
        max_waiting: int,
        loads_per_device: int,
        overdue_after: int,
        backoff_initial: int,
        backoff_max: int,
    ) -> None:
        self.budgets = list(budgets)
        self.closed = [False] * len(budgets)
        self.max_waiting_per_model = max_waiting_per_model
        self.max_waiting = max_waiting
        self.loads_per_device = loads_per_device
        self.overdue_after = overdue_after
        self.backoff_initial = backoff_initial
        self.backoff_max = backoff_max
        self.models: dict[int, NaiveModel] = {}
        self.tickets: dict[int, NaiveTicket] = {}
        self.leases: dict[int, int] = {}
        self.ended: dict[int, str] = {}
        self.ended_leases: set[int] = set()
        self.gone: set[int] = set()
        self.now = 0
        self.wake_at: int | None = None
        # Which device the core says a model was given away to; -1 for none.
        self.meant_for: Callable[[int], int] = lambda model: -1
        self.victims: list[tuple[int, Charge]] = []
        self.at_victims: Scene | None = None
        self._sequence = 0
        self._refusals: dict[int, RefuseReason] = {}
        self._grants: set[int] = set()
        self._own: int | None = None
        self._arrival: NaiveArrival | None = None
        self._deficit_before: set[int] = set()
        self._reloads: tuple[float, float] | None = None  # Means of their seconds and bytes.

    # --- Sums -------------------------------------------------------------------------------------

    def account(self, device: int) -> NaiveAccount:
        """What a device has promised and holds."""
        account = NaiveAccount(budget=self.budgets[device])
        for model in self.models.values():
            size = model.held.get(device, 0)
            match model.state:
                case State.LOADING:
                    account.reserved += size
                case State.RESIDENT:
                    account.resident += size
                case State.DRAINING:
                    account.draining += size
                case State.UNLOADING:
                    account.draining += size
                    account.unloading += size
                case _:
                    _agree(not model.held, f"a model that is {model.state} holds bytes")
            account.quarantined += model.quarantined.get(device, 0)
        return account

    def accounts(self) -> list[NaiveAccount]:
        """All devices."""
        return [self.account(device) for device in range(len(self.budgets))]

    def deficits(self) -> dict[int, int]:
        """Bytes above the budget, where there are any."""
        return {i: a.deficit for i, a in enumerate(self.accounts()) if a.deficit}

    def has_channels(self, need: Mapping[int, int]) -> bool:
        """True if another load may start on every device of a charge."""
        running = [m.held for m in self.models.values() if m.state == State.LOADING]
        return all(
            sum(1 for held in running if held.get(device)) < self.loads_per_device
            for device, size in need.items()
            if size
        )

    def fits(self, need: Mapping[int, int]) -> bool:
        """True if a charge is within the free bytes."""
        return all(size <= self.account(device).free for device, size in need.items())

    def is_closed(self, charge: Mapping[int, int]) -> bool:
        """True if a charge touches a closed device."""
        return any(size and self.closed[device] for device, size in charge.items())

    def impossible(self, model: NaiveModel) -> RefuseReason | None:
        """Why no waiting helps: pinned and quarantined bytes, or the budget itself."""
        accounts = self.accounts()
        pinned: Charge = {}
        for other in self.models.values():
            if other.pinned and other.state in (State.LOADING, State.RESIDENT):
                pinned = plus(pinned, other.held)
        could_be = False
        for need in model.placements:
            if all(
                size <= max(0, accounts[d].budget - pinned.get(d, 0) - accounts[d].quarantined)
                for d, size in need.items()
            ):
                return None
            could_be = could_be or all(size <= accounts[d].budget for d, size in need.items())
        return RefuseReason.BUDGET_EXHAUSTED if could_be else RefuseReason.NEVER_FITS

    def queued(self) -> list[int]:
        """Models that wait for memory, the one with the oldest ticket first."""
        found = [i for i, model in self.models.items() if model.state == State.QUEUED]
        return sorted(found, key=lambda i: self.tickets[self.models[i].waiting[0]].sequence)

    def in_state(self, *states: State) -> list[int]:
        """Models in one of the states, in a stable order."""
        return sorted(i for i, model in self.models.items() if model.state in states)

    def is_overdue(self, model: NaiveModel) -> bool:
        """True if its oldest ticket has waited long enough to make others drain."""
        oldest = self.tickets[model.waiting[0]]
        patience = self.overdue_after
        if oldest.deadline != _core.NEVER_NS:
            half = (oldest.deadline - oldest.arrival) // 2
            # Nobody is asked to leave for a request that the load alone would outlast.
            if half * 1e-9 >= model.reload_s:
                patience = min(patience, half)
        return oldest.arrival + patience <= self.now

    # --- Events -----------------------------------------------------------------------------------

    def add_model(
        self, model: int, placements: Sequence[Mapping[int, int]], reload_s: float
    ) -> None:
        """A model was added."""
        _agree(model not in self.models and model not in self.gone, "an id was given out twice")
        self.models[model] = NaiveModel(
            placements=[plus(p, {}) for p in placements], reload_s=reload_s
        )

    def update_placements(
        self, model: int, placements: Sequence[Mapping[int, int]], now: int, actions: Actions
    ) -> None:
        """A model has a new price."""
        self._begin(now)
        self.models[model].placements = [plus(p, {}) for p in placements]
        self.models[model].placement = None
        self._finish(actions)

    def remove_model(self, model: int, now: int, actions: Actions) -> None:
        """A model was taken out."""
        self._begin(now, own=model)
        entry = self.models[model]
        self._refuse_all(entry, RefuseReason.REMOVED)
        entry.pinned = False
        entry.removed = True
        if entry.state == State.LOADING:
            entry.leave_after = True
        if entry.state in (State.COLD, State.QUEUED, State.FAILED):
            self._rest(model)
        self._finish(actions)
        left = self.models.get(model)
        _agree(left is None or left.state != State.RESIDENT, "a removed model stayed RESIDENT")

    def pin(self, model: int, now: int, actions: Actions) -> None:
        """A model was pinned."""
        self._begin(now)
        entry = self.models[model]
        if not entry.pinned:
            entry.pinned = True
            entry.leave_after = False
        self._finish(actions)

    def unpin(self, model: int, now: int, actions: Actions) -> None:
        """A model was let go."""
        self._begin(now)
        self.models[model].pinned = False
        self._finish(actions)

    def unload(self, model: int, now: int, actions: Actions) -> None:
        """A model was asked to leave."""
        self._begin(now, own=model)
        entry = self.models[model]
        leaves_later = entry.state == State.LOADING and not entry.leave_after
        # Whoever waits is served first.
        cancels = leaves_later and not entry.waiting and not entry.stopping
        if leaves_later:
            entry.leave_after = True
        self._finish(actions)
        _agree(entry.state != State.RESIDENT, "an unloaded model stayed RESIDENT")
        asked = any(isinstance(a, _core.CancelLoad) and a.model == model for a in actions or ())
        _agree(asked == cancels, "a load was to be cancelled exactly once")

    def set_budget(self, device: int, budget: int, now: int, actions: Actions) -> None:
        """A budget was changed."""
        self._begin(now)
        self.budgets[device] = budget
        self._deficit_before |= set(self.deficits())
        self._finish(actions)

    def set_device_closed(self, device: int, closed: bool, now: int, actions: Actions) -> None:
        """A device was closed or opened."""
        self._begin(now)
        self.closed[device] = closed
        self._finish(actions)

    def try_acquire(self, model: int, now: int, lease: int) -> None:
        """A hit was tried."""
        self.now = max(self.now, now)
        entry = self.models[model]
        _agree((lease != 0) == (entry.state == State.RESIDENT), "a lease on a model not RESIDENT")
        if lease:
            self._add_lease(model, lease)

    def request(self, model: int, ticket: int, now: int, deadline: int, actions: Actions) -> None:
        """A request came."""
        self._begin(now)
        entry = self.models[model]
        _agree(ticket not in self.tickets and ticket not in self.ended, "a ticket's id came twice")
        # Whoever waits for room or its turn; those whose model loads have it.
        alone = not any(
            model.waiting and model.state in (State.QUEUED, State.DRAINING, State.UNLOADING)
            for model in self.models.values()
        )
        self._arrival = NaiveArrival(ticket=ticket, state=entry.state, alone=alone)
        full = (
            len(self.tickets) >= self.max_waiting
            or len(entry.waiting) >= self.max_waiting_per_model
        )
        self._sequence += 1
        self.tickets[ticket] = NaiveTicket(
            model=model, sequence=self._sequence, arrival=self.now, deadline=deadline
        )
        entry.waiting.append(ticket)
        if deadline <= self.now:
            self._refuse(ticket, self._deadline_reason(entry))
        elif entry.state == State.RESIDENT:
            self._grants.add(ticket)
        elif full:
            self._refuse(ticket, RefuseReason.QUEUE_FULL)
        elif entry.state == State.FAILED and self.now < entry.retry_at:
            self._refuse(ticket, RefuseReason.LOAD_FAILED)
        elif entry.state != State.LOADING and (why := self.impossible(entry)) is not None:
            self._refuse(ticket, why)
        elif entry.state in (State.COLD, State.FAILED):
            entry.state = State.QUEUED
        self._finish(actions)

    def cancel(self, ticket: int, now: int, actions: Actions) -> None:
        """A waiter went away."""
        self._end(ticket, "cancelled")
        self._begin(now)
        self._finish(actions)

    def release(self, lease: int, now: int, actions: Actions) -> None:
        """A lease was given back."""
        self.now = max(self.now, now)
        model = self.leases.pop(lease)
        self.ended_leases.add(lease)
        entry = self.models[model]
        entry.leases.remove(lease)
        waits = any(
            m.waiting and m.state in (State.QUEUED, State.DRAINING, State.UNLOADING)
            for m in self.models.values()
        )
        if entry.leases or not (entry.state == State.DRAINING or waits or self.deficits()):
            # The short way of a hit: nothing can follow from it.
            _agree(actions is None, "a release that concerns nobody had consequences")
            return
        self._begin(now)
        self._finish(actions)
        _agree(entry.state != State.DRAINING or bool(entry.leases), "nobody uses it, yet it drains")

    def load_done(
        self, model: int, now: int, actual: Mapping[int, int], took_s: float, actions: Actions
    ) -> None:
        """A load has ended well."""
        self._begin(now)
        entry = self.models[model]
        self._learn_seconds(entry, took_s, sum(actual.values()))
        self._learn(entry, actual)
        entry.held = plus(actual, {})
        entry.stopping = False
        entry.state = State.RESIDENT
        entry.failure_count = 0
        entry.load_count += 1
        leaves = entry.removed or entry.leave_after
        entry.leave_after = False
        self._own = model if leaves else None
        self._grants |= set(entry.waiting)
        self._deficit_before |= set(self.deficits())
        self._finish(actions)
        _agree(not leaves or entry.state != State.RESIDENT, "it was to leave after its load")

    def _learn_seconds(self, entry: NaiveModel, took_s: float, size: int) -> None:
        # Models without copies, all of whose loads read files.
        if entry.load_count > 1:
            entry.reload_s = 0.7 * entry.reload_s + 0.3 * took_s
        else:
            entry.reload_s = took_s
        entry.first_load = None if entry.load_count else (took_s, size)
        if entry.load_count:
            before = self._reloads or (took_s, max(size, 1))
            self._reloads = 0.7 * before[0] + 0.3 * took_s, 0.7 * before[1] + 0.3 * max(size, 1)
        if self._reloads is None:
            return
        mean_s, mean_size = self._reloads
        for model in self.models.values():
            if model.first_load is not None:
                first_s, size = model.first_load
                # Nobody is thought to be that much dearer than all the others.
                model.reload_s = min(first_s, 4 * mean_s * max(1.0, size / mean_size))

    def load_failed(self, model: int, now: int, failure: LoadFailure, actions: Actions) -> None:
        """A load has failed."""
        self._begin(now)
        entry = self.models[model]
        entry.held = {}
        entry.leave_after = entry.stopping = False
        if failure == LoadFailure.CANCELLED:
            self._rest(model)
        else:
            entry.failure_count += 1
            wait = min(self.backoff_max, self.backoff_initial * 2 ** (entry.failure_count - 1))
            entry.retry_at = self.now + wait
            self._refuse_all(entry, RefuseReason.LOAD_FAILED)
            entry.state = State.FAILED
            if entry.removed:
                self._rest(model)
        self._finish(actions)

    def unload_done(self, model: int, now: int, freed: Mapping[int, int], actions: Actions) -> None:
        """An unload has ended."""
        self._begin(now)
        entry = self.models[model]
        entry.quarantined = plus(entry.quarantined, minus(entry.held, freed))
        entry.held = {}
        entry.gone_at = self.now
        self._rest(model)
        self._finish(actions)

    def reclaimed(self, model: int, now: int, freed: Mapping[int, int], actions: Actions) -> None:
        """Quarantined bytes came back."""
        self._begin(now)
        entry = self.models[model]
        entry.quarantined = minus(entry.quarantined, freed)
        if entry.removed and entry.state == State.COLD:
            self._rest(model)
        self._finish(actions)

    def remeasured(self, model: int, now: int, actual: Mapping[int, int], actions: Actions) -> None:
        """A model was measured again."""
        self._begin(now)
        entry = self.models[model]
        self._learn(entry, actual)
        entry.held = plus(actual, {})
        self._deficit_before |= set(self.deficits())
        self._finish(actions)

    def tick(self, now: int, actions: Actions) -> None:
        """Time passed."""
        self._begin(now)
        self._finish(actions)

    # --- Actions ----------------------------------------------------------------------------------

    def _begin(self, now: int, own: int | None = None) -> None:
        self.now = max(self.now, now)
        if self.wake_at is not None and self.wake_at <= self.now:
            self.wake_at = None
        self._own = own
        self._arrival = None
        self._refusals = {}
        self._grants = set()
        self.victims = []
        self.at_victims = None
        self._deficit_before = set(self.deficits())
        for ticket, waiting in list(self.tickets.items()):
            if waiting.deadline <= self.now:
                self._refuse(ticket, self._deadline_reason(self.models[waiting.model]))

    def _finish(self, actions: Actions) -> None:
        _agree(actions is None or len(actions) > 0, "no actions are None, not an empty list")
        for action in actions or ():
            match action:
                case _core.Grant():
                    self._on_grant(action)
                case _core.Refuse():
                    self._on_refuse(action)
                case _core.Load():
                    self._on_load(action)
                case _core.CancelLoad():
                    entry = self.models[action.model]
                    state = entry.state
                    _agree(state == State.LOADING, f"CancelLoad of a model that is {state}")
                    _agree(not entry.stopping, "a load was asked to stop twice")
                    entry.stopping = True
                case _core.Drain():
                    self._on_leave(action.model, drains=True)
                case _core.Unload():
                    self._on_leave(action.model, drains=False)
                case _core.WakeAt():
                    _agree(
                        self.wake_at is None or action.at_ns < self.wake_at,
                        "a wake-up was replaced by a later one",
                    )
                    self.wake_at = action.at_ns
        _agree(not self._refusals, f"tickets were to be refused: {self._refusals}")
        _agree(not self._grants, f"tickets were to be granted: {self._grants}")

    def _on_grant(self, grant: _core.Grant) -> None:
        _agree(grant.ticket in self._grants, "a Grant nobody was to get")
        self._grants.remove(grant.ticket)
        model = self.tickets[grant.ticket].model
        _agree(self.models[model].state == State.RESIDENT, "a Grant on a model not RESIDENT")
        self._end(grant.ticket, "granted")
        self._add_lease(model, grant.lease)

    def _on_unreachable(self, refuse: _core.Refuse) -> None:
        """Who arrives is told that it would be answered too late.

        How long it would take is the core's to say; that it says so for a reason is checked.
        """
        arrival = self._arrival
        _agree(
            arrival is not None and arrival.ticket == refuse.ticket,
            "only who arrives is told that it comes too late",
        )
        assert arrival is not None
        waiting = self.tickets[refuse.ticket]
        entry, left = self.models[waiting.model], waiting.deadline - self.now
        _agree(refuse.ticket not in self._refusals, "it is refused for another reason")
        _agree(left > 0 and waiting.deadline != _core.NEVER_NS, "no deadline is to come")
        resident = arrival.state == State.RESIDENT
        _agree(resident or entry.load_count > 0, "what a load takes has not been measured")
        _agree(refuse.left_ns == left, "that is not what is left")
        _agree(refuse.needs_ns * (REACH_MARGIN if resident else 1) > left, "there is time enough")
        _agree(
            arrival.state in (State.RESIDENT, State.LOADING)
            or refuse.needs_ns >= entry.reload_s * 1e9 - 1,
            "a load would take longer than that",
        )
        _agree(refuse.retry_after_ns > 0, "when it could is not said")
        self._grants.discard(refuse.ticket)
        self._end(refuse.ticket, "refused")
        # Where nobody else waits the model is loaded all the same: it has been asked for then.
        if not arrival.alone and arrival.state in (State.COLD, State.FAILED):
            entry.state = arrival.state

    def _on_refuse(self, refuse: _core.Refuse) -> None:
        if refuse.reason == RefuseReason.DEADLINE_UNREACHABLE:
            self._on_unreachable(refuse)
            return
        reason = self._refusals.pop(refuse.ticket, None)
        if reason is None:
            # Only one more thing ends a wait: that it has become hopeless.
            _agree(refuse.ticket in self.tickets, "a Refuse of a ticket that does not wait")
            model = self.models[self.tickets[refuse.ticket].model]
            _agree(model.state == State.QUEUED, f"a Refuse while the model is {model.state}")
            reason = self.impossible(model)
            self._end(refuse.ticket, "refused")
        _agree(refuse.reason == reason, f"refused with {refuse.reason}, not {reason}")

    def _on_load(self, load: _core.Load) -> None:
        entry = self.models[load.model]
        _agree(entry.state == State.QUEUED, f"a Load of a model that is {entry.state}")
        need = entry.placements[load.placement]
        _agree(self.fits(need), "a reservation that does not fit")
        _agree(self.has_channels(need), "more loads than a device may have")
        _agree(not self.is_closed(need), "a Load onto a closed device")
        entry.placement = load.placement
        entry.held = dict(need)
        entry.meant_for = None
        entry.state = State.LOADING

    def _on_leave(self, model: int, *, drains: bool) -> None:
        entry = self.models[model]
        _agree(bool(entry.leases) == drains, "Drain is for models in use, Unload for idle ones")
        if entry.state == State.DRAINING and not drains:
            entry.state = State.UNLOADING
            return
        _agree(entry.state == State.RESIDENT, f"it was to leave while {entry.state}")
        _agree(not entry.pinned, "a pinned model was to leave")
        if (given_to := self.meant_for(model)) >= 0:
            # It was given away: nobody waits for its room.
            _agree(len(entry.held) == 1, "a device gave away what is on others as well")
            _agree(given_to not in entry.held, "a device gave a model away to itself")
            _agree(self._may_be_on(entry, given_to), "given away to where it may not be")
            entry.meant_for = given_to
        elif model != self._own and not self.is_closed(entry.held):
            self._check_cause(entry, drains)
            if self.at_victims is None:
                movable: Charge = {}
                for other in self.models.values():
                    if other.state == State.RESIDENT and not other.pinned:
                        movable = plus(movable, other.held)
                self.at_victims = Scene(
                    accounts=self.accounts(), movable=movable, queued=self.queued()
                )
            self.victims.append((model, dict(entry.held)))
        entry.state = State.DRAINING if drains else State.UNLOADING

    def _may_be_on(self, entry: NaiveModel, first: int) -> bool:
        return any(min(need) == first and not self.is_closed(need) for need in entry.placements)

    def _check_cause(self, entry: NaiveModel, drains: bool) -> None:
        if any(device in self._deficit_before for device in entry.held):
            return
        waiting = [self.models[i] for i in self.queued()]
        _agree(bool(waiting), "a model was evicted and nobody waits for room")
        if drains:
            _agree(
                any(self.is_overdue(model) for model in waiting),
                "a model in use was drained for somebody who is not overdue",
            )

    # --- Pieces -----------------------------------------------------------------------------------

    def _refuse(self, ticket: int, reason: RefuseReason) -> None:
        self._refusals[ticket] = reason
        self._end(ticket, "refused")

    def _refuse_all(self, entry: NaiveModel, reason: RefuseReason) -> None:
        for ticket in list(entry.waiting):
            self._refuse(ticket, reason)

    def _end(self, ticket: int, how: str) -> None:
        _agree(ticket not in self.ended, f"a ticket ended twice: {self.ended.get(ticket)}, {how}")
        self.ended[ticket] = how
        entry = self.models[self.tickets.pop(ticket).model]
        entry.waiting.remove(ticket)
        if not entry.waiting and entry.state == State.QUEUED:
            entry.state = State.COLD

    def _add_lease(self, model: int, lease: int) -> None:
        _agree(lease not in self.leases and lease not in self.ended_leases, "a lease's id twice")
        self.leases[lease] = model
        self.models[model].leases.add(lease)

    def _rest(self, model: int) -> None:
        entry = self.models[model]
        entry.state = State.QUEUED if entry.waiting else State.COLD
        if entry.removed and not entry.quarantined:
            del self.models[model]
            self.gone.add(model)

    def _learn(self, entry: NaiveModel, actual: Mapping[int, int]) -> None:
        promise = entry.held
        if entry.placement is None:
            return
        if entry.state != State.LOADING:
            promise = entry.placements[entry.placement]
        if any(size > promise.get(device, 0) for device, size in actual.items()):
            entry.placements[entry.placement] = largest(entry.placements[entry.placement], actual)

    @staticmethod
    def _deadline_reason(entry: NaiveModel) -> RefuseReason:
        if entry.state == State.LOADING:
            return RefuseReason.DEADLINE_IN_LOAD
        return RefuseReason.DEADLINE_IN_QUEUE

    # --- Checks after an event --------------------------------------------------------------------

    def check_rest(self) -> None:
        """What must hold between events: nobody who can be helped is left waiting."""
        for model in self.models.values():
            _agree(
                not (model.state == State.RESIDENT and not model.pinned)
                or not self.is_closed(model.held),
                "a model rests on a closed device",
            )
        timed = [t.deadline for t in self.tickets.values() if t.deadline != _core.NEVER_NS]
        if timed:
            _agree(
                self.wake_at is not None and self.wake_at <= min(timed), "nobody wakes a deadline"
            )

    def check_head(self) -> None:
        """After a scheduling event: the first in the queue has what it can get."""
        queued = self.queued()
        if not queued:
            return
        accounts = self.accounts()
        head = self.models[queued[0]]
        idle: Charge = {}
        for model in self.models.values():
            if model.state == State.RESIDENT and not model.pinned and not model.leases:
                idle = plus(idle, model.held)
        open_needs = [need for need in head.placements if not self.is_closed(need)]
        # Who was given away is left waiting for that device for a while, and woken then.
        woken = self.wake_at is not None and self.wake_at <= self.now
        if head.meant_for is not None:
            since = max(self.tickets[head.waiting[0]].arrival, head.gone_at)
            if woken or self.now - since < min(MEANT_FOR, self.overdue_after):
                its_own = [need for need in open_needs if min(need) == head.meant_for]
                open_needs = its_own or open_needs
        for need in open_needs:
            _agree(
                not (self.fits(need) and self.has_channels(need)),
                "the first in the queue fits and is not loaded",
            )
        if self.deficits():
            return
        on_its_way = [
            need
            for need in open_needs
            if all(n <= accounts[d].free + accounts[d].draining for d, n in need.items())
        ]
        could_evict = [
            need
            for need in open_needs
            if self.has_channels(need)
            and all(
                n <= accounts[d].free + accounts[d].unloading + idle.get(d, 0)
                for d, n in need.items()
            )
        ]
        _agree(
            bool(on_its_way) or not could_evict,
            "idle models are enough for the first in the queue and stay",
        )

    def check_minimal(self, cause: int) -> bool:
        """The victims of one planning step: together enough, and none of them needless.

        Args:
            cause: the model it was done for; 0 for a deficit.

        Returns:
            False where nothing can be said from outside: others were served before it.
        """
        scene = self.at_victims
        assert scene is not None
        if cause:
            if scene.queued[:1] != [cause] or any(a.deficit for a in scene.accounts):
                return False
            # Idle models make room at once: what leaves some time later is no substitute for
            # them. It is for models in use.
            soon = {d: a.free + a.unloading for d, a in enumerate(scene.accounts)}
            later = {d: a.free + a.draining for d, a in enumerate(scene.accounts)}
            shortfalls = [
                minus(need, there)
                for need in self.models[cause].placements
                for there in (soon, later)
            ]
        else:
            # Who is pinned or still loading cannot repay; that keeps nobody else from it.
            shortfalls = [
                {
                    d: min(max(0, a.deficit - a.draining), scene.movable.get(d, 0))
                    for d, a in enumerate(scene.accounts)
                }
            ]
        charges = [held for _, held in self.victims]
        _agree(
            any(_is_minimal(charges, shortfall) for shortfall in shortfalls),
            f"victims {charges} are not a least set for any of {shortfalls}",
        )
        return True


Actions = list[Any] | None
"""What an event gave: actions in their order, or None."""


def _covers(charges: Iterable[Mapping[int, int]], shortfall: Mapping[int, int]) -> bool:
    total: Charge = {}
    for charge in charges:
        total = plus(total, charge)
    return all(total.get(device, 0) >= size for device, size in shortfall.items())


def _is_minimal(charges: Sequence[Mapping[int, int]], shortfall: Mapping[int, int]) -> bool:
    if not _covers(charges, shortfall):
        return False
    return not any(
        _covers(subset, shortfall)
        for size in range(len(charges))
        for subset in combinations(charges, size)
    )


def _agree(holds: bool, text: str) -> None:
    if not holds:
        raise Disagreement(text)
