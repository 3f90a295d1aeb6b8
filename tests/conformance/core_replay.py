"""The decision core, one request after the other: what is loaded, and who leaves for it.

A budget of N models of one size is what a cap of N models is. The core says who is loaded and who
leaves; here that is done at once and reported back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from modelyard_server import _core

__all__ = ["CoreReplay"]


class CoreReplay:
    """A yard of one device.

    Args:
        budget: bytes.
        sizes: bytes of each model, by name.
        policy: of `_core.POLICIES`.

    Attributes:
        loads: names of the models that were loaded, in order.
        deleted: names of the models that left, in order.
    """

    def __init__(self, budget: int, sizes: dict[str, int], policy: str) -> None:
        self._yard = _core.Yard(budgets=[budget], policy=policy)
        self._ids = {
            name: self._yard.add_model(name, [{0: size}], 1.0) for name, size in sizes.items()
        }
        self._names = {core_id: name for name, core_id in self._ids.items()}
        self._now = 0
        self.loads: list[str] = []
        self.deleted: list[str] = []

    @property
    def used(self) -> int:
        """Bytes that are held."""
        return self._yard.account(0).used

    def serve(self, name: str) -> str:
        """Serves one request to its end: "hit", "load", or "load -x" where x had to leave."""
        self._now += 1
        lease = self._yard.try_acquire(self._ids[name], self._now)
        if lease:
            self._carry_out(self._yard.release(lease, self._now))
            return "hit"
        left = len(self.deleted)
        _, actions = self._yard.request(self._ids[name], self._now, _core.NEVER_NS)
        granted = self._carry_out(actions)
        assert granted == 1, f"{name} was granted {granted} times"
        assert self.loads[-1] == name
        self._yard.audit()
        return " ".join(["load", *(f"-{victim}" for victim in self.deleted[left:])])

    def serve_together(self, names: Sequence[str]) -> None:
        """Asks for all at once, and serves as the core grants."""
        self._now += 1
        todo: deque[_core._Action] = deque()
        expected = 0
        for name in names:
            lease = self._yard.try_acquire(self._ids[name], self._now)
            if lease:
                todo.extend(self._yard.release(lease, self._now) or ())
            else:
                expected += 1
                _, actions = self._yard.request(self._ids[name], self._now, _core.NEVER_NS)
                todo.extend(actions or ())
        granted = self._carry_out(todo)
        assert granted == expected, f"{granted} of {expected} were granted"
        self._yard.audit()

    def next_to_leave(self) -> list[str]:
        """Who is there, in the order in which they would leave: the budget of a copy is cut."""
        copy = CoreReplay.__new__(CoreReplay)
        copy._yard, copy._names, copy._now = self._yard.clone(), self._names, self._now
        copy.loads, copy.deleted = [], []
        for budget in range(copy.used - 1, -1, -1):
            if copy.used > budget:
                copy._carry_out(copy._yard.set_budget(0, budget, copy._now))
        return copy.deleted

    def _carry_out(self, actions: Iterable[_core._Action] | None) -> int:
        """Does what the core says until it says nothing more; returns how many were granted."""
        todo, granted = deque(actions or ()), 0
        while todo:
            action = todo.popleft()
            answer: Sequence[_core._Action] | None = None
            match action:
                case _core.Grant():
                    granted += 1
                    answer = self._yard.release(action.lease, self._now)
                case _core.Load():
                    self.loads.append(self._names[action.model])
                    entry = self._yard.entry(action.model)
                    assert entry is not None
                    answer = self._yard.load_done(action.model, self._now, entry.held, 1.0)
                case _core.Unload():
                    self.deleted.append(self._names[action.model])
                    freed = self._yard.exclusive(action.model)
                    answer = self._yard.unload_done(action.model, self._now, freed)
                case _core.Refuse():
                    raise AssertionError(f"refused: {action.reason.name}")
                case _:
                    pass
            todo.extend(answer or ())
        return granted
