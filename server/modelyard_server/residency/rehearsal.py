"""What would happen if: a clone of the yard, on which a plan is tried with everything ending well.

The clone is the very core that will carry the plan out, so a forecast and the deed go by the same
rules. In a rehearsal loads and unloads end at once and as estimated, and requests end as soon as
their model is asked to leave. What a forecast cannot know is what comes in between: requests that
arrive, and loads that fail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelyard_server import _core
from modelyard_server.devices.placed import PlacedAs, placements_of, shared_of, shares_on
from modelyard_server.residency.shared import SharedTensors
from modelyard_server.residency.uses import device_use
from modelyard_server.residency.values import DeviceUse

if TYPE_CHECKING:
    from modelyard_server._core import _Action  # Exists for type checkers only.

__all__ = ["Departure", "NoRoom", "Rehearsal"]

_LEAVES = frozenset({"EVICTED", "DRAINED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A model that would have to leave.

    Attributes:
        core_id: the yard's id for it.
        charges: what it gives back, by position of the device.
        why: the core's word for the reason: "MODEL", "BUDGET", "DEVICE_CLOSED", "REMOVED", ...
        cause: the yard's id of the model it leaves for; 0 if it is none.
        device: position of the device it leaves for; -1 if it is none.
        in_use: requests use it when it is asked to.
    """

    core_id: int
    charges: Mapping[int, int]
    why: str
    cause: int
    device: int
    in_use: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRoom:
    """Why a wish was refused: pinned models leave too little room.

    Attributes:
        device: position of the device that comes closest.
        needed: bytes that are needed there.
        free: bytes that are free there.
        budget: bytes that may be held there.
    """

    device: int
    needed: int
    free: int
    budget: int


class Rehearsal:
    """A yard on which everything ends well and at once.

    Args:
        yard: what it starts as; not changed.
        now_ns: the time, which stands still from here.
        core_ids: the yard's ids of all its models, those included that were removed and still hold
            something.
        shared: which tensors models have in common. Not changed: of a model that has only a part
            of some in common with others, a rehearsal takes that part for its own.

    Attributes:
        departures: who was asked to leave, in that order; from `settle` on.
        no_room: why the last wish was refused, if it was because of pinned models.
    """

    def __init__(
        self, yard: _core.Yard, now_ns: int, core_ids: Iterable[int], shared: SharedTensors
    ) -> None:
        self._yard = yard.clone()
        self._shared = shared
        self._now_ns = now_ns
        self._core_ids = tuple(core_ids)
        self._told = self._yard.last_explained
        # What is held until let_go: leases, and the tickets of wishes whose grants are to be held.
        self._leases: list[int] = []
        self._holding: set[int] = set()
        self._wish = 0
        self.departures: list[Departure] = []
        self.no_room: NoRoom | None = None

    def settle(self) -> None:
        """Ends what runs now: loads, unloads, and the requests of models that are to leave.

        Who leaves for that leaves anyway, and is no departure.
        """
        for core_id in self._core_ids:
            # First: unloads may be held back until these have ended.
            entry = self._yard.entry(core_id)
            if entry is not None and entry.copy_state is _core.CopyState.DROPPING:
                self._run(self._end_drop(core_id))
        for core_id in self._core_ids:
            entry = self._yard.entry(core_id)
            if entry is None:
                continue
            if entry.state is _core.State.LOADING:
                self._end_load(core_id)
            elif entry.state is _core.State.DRAINING:
                self._end_leases(core_id)
            elif entry.state is _core.State.UNLOADING:
                freed = self._yard.exclusive(core_id)
                self._run(self._yard.unload_done(core_id, self._now_ns, freed))
        self.departures.clear()

    def clear(self) -> None:
        """Takes every model out, and opens every device."""
        self.settle()
        for core_id in self._core_ids:
            entry = self._yard.entry(core_id)
            if entry is not None and not entry.removed:
                self.remove(core_id)
        for device in range(self._yard.device_count):
            if self._yard.device_closed(device):
                self.set_closed(device, False)
        self.departures.clear()

    def right_after(
        self, device: int, *, budget_bytes: int | None = None, closed: bool | None = None
    ) -> DeviceUse:
        """A device right after a change, before anything has left. The rehearsal ends with this."""
        if budget_bytes is not None:
            self._yard.set_budget(device, budget_bytes, self._now_ns)
        if closed is not None:
            self._yard.set_device_closed(device, closed, self._now_ns)
        return device_use(self._yard, device)

    def set_budget(self, device: int, budget_bytes: int) -> None:
        """Changes a budget."""
        self._run(self._yard.set_budget(device, budget_bytes, self._now_ns))

    def set_closed(self, device: int, closed: bool) -> None:
        """Closes or opens a device."""
        self._run(self._yard.set_device_closed(device, closed, self._now_ns))

    def add(self, ways: Sequence[PlacedAs], *, replaces: int = 0) -> int:
        """Adds a model, cold, and returns its id."""
        shares, size_bytes = self._shared.known(shared_of(ways))
        placements = placements_of(ways, size_bytes)
        return self._yard.add_model("", placements, 1.0, replaces, shares, shares_on(ways))

    def set_ways(self, core_id: int, ways: Sequence[PlacedAs]) -> None:
        """Replaces the ways in which a model may be loaded; what it holds stays as it is."""
        shares, size_bytes = self._shared.known(shared_of(ways))
        placements = placements_of(ways, size_bytes)
        self._run(
            self._yard.update_placements(core_id, placements, self._now_ns, shares, shares_on(ways))
        )

    def remove(self, core_id: int) -> None:
        """Takes a model out."""
        self._run(self._yard.remove_model(core_id, self._now_ns))

    def set_pinned(self, core_id: int, pinned: bool) -> None:
        """Pins a model or lets it go."""
        change = self._yard.pin if pinned else self._yard.unpin
        self._run(change(core_id, self._now_ns))

    def hold(self, core_id: int) -> None:
        """Uses a model, if it is resident, until let_go: so it is nobody's victim."""
        if lease := self._yard.try_acquire(core_id, self._now_ns):
            self._yard.set_aside(lease)  # As when it is carried out; see Succession.
            self._leases.append(lease)

    def want(self, core_id: int, *, hold: bool = False) -> bool:
        """Asks for a model. True if it is resident then; if it is not, `no_room` may say why.

        Args:
            core_id: the yard's id for it.
            hold: it is used from then on, until let_go.
        """
        self.no_room = None
        ticket, actions = self._yard.request(core_id, self._now_ns, _core.NEVER_NS)
        self._wish = ticket
        if hold:
            self._holding.add(ticket)
        self._run(actions)
        self._holding.discard(ticket)
        if self.is_resident(core_id):
            return True
        with suppress(_core.StaleIdError):  # It was refused.
            self._run(self._yard.cancel(ticket, self._now_ns))
        return False

    def let_go(self) -> None:
        """Ends the use of what is held."""
        leases, self._leases = self._leases, []
        for lease in reversed(leases):
            with suppress(_core.StaleIdError):  # Its model was asked to leave before.
                self._run(self._yard.release(lease, self._now_ns))

    def way_of(self, core_id: int) -> int:
        """In which of its ways a model that was added here was loaded, counted from 0."""
        entry = self._yard.entry(core_id)
        assert entry is not None  # Whoever asks has seen that it is resident.
        return entry.placement

    def is_resident(self, core_id: int) -> bool:
        """True if a model is in memory."""
        entry = self._yard.entry(core_id)
        return entry is not None and entry.state is _core.State.RESIDENT

    def held(self, core_id: int) -> Mapping[int, int]:
        """What a model holds, by position of the device."""
        return self._yard.held_with_shares(core_id)

    def freed(self, core_id: int) -> Mapping[int, int]:
        """What comes back when a model leaves now, by position of the device."""
        return self._yard.exclusive(core_id)

    def account(self, device: int) -> _core.Account:
        """What a device has promised and holds."""
        return self._yard.account(device)

    def _run(self, actions: Sequence[_Action] | None) -> None:
        """Carries actions out until nothing is left to do."""
        self._note()
        todo: deque[_Action] = deque(actions or ())
        while todo:
            match todo.popleft():
                case _core.Grant(ticket=ticket, lease=lease) if ticket in self._holding:
                    self._leases.append(lease)
                case _core.Grant(lease=lease):
                    todo.extend(self._yard.release(lease, self._now_ns) or ())
                case _core.Load(model=model):
                    self._end_load(model)
                case _core.CancelLoad(model=model):
                    failure = _core.LoadFailure.CANCELLED
                    todo.extend(self._yard.load_failed(model, self._now_ns, failure) or ())
                case _core.Drain(model=model):
                    self._end_leases(model)
                case _core.Unload(model=model):
                    freed = self._yard.exclusive(model)
                    todo.extend(self._yard.unload_done(model, self._now_ns, freed) or ())
                case _core.DropCopy(model=model):
                    todo.extend(self._end_drop(model) or ())
                case _core.Refuse(ticket=ticket) as refusal if ticket == self._wish:
                    self._note_refusal(refusal)
                case _:
                    pass  # Other refusals concern nobody here, and time stands still.
            self._note()

    def _note_refusal(self, refusal: _core.Refuse) -> None:
        if refusal.reason is _core.RefuseReason.BUDGET_EXHAUSTED:
            self.no_room = NoRoom(
                device=refusal.device,
                needed=refusal.needed,
                free=refusal.free,
                budget=refusal.budget,
            )

    def _end_load(self, core_id: int) -> None:
        entry = self._yard.entry(core_id)
        if entry is None or entry.state is not _core.State.LOADING:
            return  # It was stopped in between.
        took_s = entry.reload_seconds
        kept = entry.copy_state is _core.CopyState.KEPT
        source = _core.Source.COPY if kept else _core.Source.PAGE_CACHE
        self._run(self._yard.load_done(core_id, self._now_ns, entry.held, took_s, source))

    def _end_drop(self, core_id: int) -> Sequence[_Action] | None:
        freed = self._yard.copy_exclusive(core_id)
        return self._yard.copy_dropped(core_id, self._now_ns, freed)

    def _end_leases(self, core_id: int) -> None:
        for lease in self._yard.leases_of(core_id):
            self._run(self._yard.release(lease, self._now_ns))

    def _note(self) -> None:
        """Notes who was asked to leave; before the unload, while it still holds what it gives."""
        for record in self._yard.explanations_after(self._told):
            self._told = record["sequence"]
            if record["decision"] not in _LEAVES:
                continue
            self.departures.append(
                Departure(
                    core_id=record["model"],
                    charges=self.freed(record["model"]),
                    why=record["why"],
                    cause=record["cause"],
                    device=record["device"],
                    in_use=record["decision"] == "DRAINED",
                )
            )
