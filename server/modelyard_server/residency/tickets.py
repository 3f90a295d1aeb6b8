"""Requests that wait for a model: from the core's ticket to a lease or a refusal.

A ticket is the core's name for a request that waits. Its future is here, and is settled by the
core's Grant or Refuse, which may come at once, while the request is being made. A client may leave
at any moment in between; which moment it was is decided here and nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from modelyard_server import _core
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.journal import Journal
from modelyard_server.residency.refusals import refusal_of
from modelyard_server.residency.values import NEVER_NS, ModelHandle

if TYPE_CHECKING:
    from modelyard_server._core import _Action  # Exists for type checkers only.

__all__ = ["CarryOut", "Tickets"]


class CarryOut(Protocol):
    """Carries out the actions of an event."""

    def __call__(self, actions: list[_Action] | None, *, asked: int = 0) -> None:
        """See Actions.carry_out."""


class Tickets:
    """Who waits for a lease. All methods on the event loop's thread.

    Invariants: every ticket that is open has a future here; a lease that is granted is taken by who
    waited for it or goes back, whenever that one left.

    Args:
        yard: what gives tickets.
        now_ns: the yard's clock.
        carry_out: carries out the yard's actions, and by that comes back here.
        journal: is told of requests that left.
        device_names: resource names of the devices, for refusals.
        name_of: a model's id by the core's id for it, for refusals.
    """

    def __init__(
        self,
        yard: _core.Yard,
        *,
        now_ns: Callable[[], int],
        carry_out: CarryOut,
        journal: Journal,
        device_names: Sequence[str],
        name_of: Callable[[int], str],
    ) -> None:
        self._yard = yard
        self._now_ns = now_ns
        self._carry_out = carry_out
        self._journal = journal
        self._device_names = tuple(device_names)
        self._name_of = name_of
        self._futures: dict[int, asyncio.Future[int]] = {}

    def __len__(self) -> int:
        """How many are open."""
        return len(self._futures)

    async def lease_id(self, handle: ModelHandle, deadline_ns: int, *, asked: bool) -> int:
        """Asks the core for a model and waits for the lease.

        Who is cancelled leaves nothing: no ticket, and no lease that was granted meanwhile.

        Args:
            handle: the model.
            deadline_ns: of the yard's clock; NEVER_NS for none.
            asked: it is for an operator, not for a request.

        Raises:
            Refusal: see Residency.lease.
        """
        try:
            ticket, actions = self._yard.request(handle.core_id, self._now_ns(), deadline_ns)
        except _core.StaleIdError:  # It was removed after the caller had looked it up.
            raise Refusal(Reason.MODEL_NOT_FOUND, f"no model {handle.name!r}") from None
        future = self._open(ticket)
        self._carry_out(actions, asked=handle.core_id if asked else 0)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())  # Granted, and cancelled before it could be seen.
            elif self._futures.pop(ticket, None) is not None:
                self._carry_out(self._yard.cancel(ticket, self._now_ns()))
                self._journal.changed(handle.name)  # It may wait no more, and no decision says so.
            raise

    def want(self, handle: ModelHandle) -> None:
        """Asks the core for a model, as an operator does, and waits for nothing.

        A grant is given back at once; a refusal that comes later is the model's state.

        Raises:
            Refusal: it came at once.
        """
        ticket, actions = self._yard.request(handle.core_id, self._now_ns(), NEVER_NS)
        future = self._open(ticket)
        self._carry_out(actions, asked=handle.core_id)
        if future.done():
            self.release(future.result())
        else:
            future.add_done_callback(self._give_back)

    def release(self, lease_id: int) -> None:
        """Gives a lease back. What that makes possible begins at once."""
        actions = self._yard.release(lease_id, self._now_ns())
        if actions:
            self._carry_out(actions)

    def grant(self, grant: _core.Grant) -> None:
        """The core grants a ticket its lease."""
        future = self._futures.pop(grant.ticket, None)
        if future is None or future.done():
            self.release(grant.lease)
        else:
            future.set_result(grant.lease)

    def refuse(self, refuse: _core.Refuse) -> None:
        """The core refuses a ticket."""
        future = self._futures.pop(refuse.ticket, None)
        if future is not None and not future.done():
            future.set_exception(
                refusal_of(refuse, device_names=self._device_names, name_of=self._name_of)
            )

    def close(self) -> None:
        """Refuses all who wait, with SERVER_DRAINING, and takes their tickets back."""
        futures, self._futures = self._futures, {}
        for ticket, future in futures.items():
            if not future.done():
                future.set_exception(
                    Refusal(
                        Reason.SERVER_DRAINING, "the server is shutting down", retry_after_s=1.0
                    )
                )
            with suppress(_core.StaleIdError):  # Its deadline has passed meanwhile.
                self._carry_out(self._yard.cancel(ticket, self._now_ns()))

    def _open(self, ticket: int) -> asyncio.Future[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._futures[ticket] = future
        return future

    def _give_back(self, future: asyncio.Future[int]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.release(future.result())
