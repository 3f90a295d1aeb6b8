"""Leases on several models at once, for ensembles.

A lease that is held while others are waited for can be what those others wait for. So one request
gathers at a time, and it lets go of a model that is asked to leave, and asks for it again: whoever
needs the room gets it, and nobody waits in a circle. A request whose models are all resident takes
their leases in one step and stands in no line.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic_ns
from typing import Protocol

from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.shell import Lease, Residency
from modelyard_server.services.asked import Asked

__all__ = ["Gatherer", "Leases"]

_NS = 1_000_000_000


class Leases(Protocol):
    """What gives a request a lease on its model; see InferenceService."""

    def try_lease(self, asked: Asked, deadline_ns: int) -> Lease | None:
        """A lease if the model is resident now and can answer before the deadline."""

    def check(self, asked: Asked) -> None:
        """Checks what can be checked of a request without its model. Raises Refusal."""

    async def wait(self, asked: Asked, deadline_ns: int) -> Lease:
        """Waits for the model of a request that is not resident now. Raises Refusal."""


class Gatherer:
    """Gives a request leases on several models at once.

    Args:
        leases: gives one.
        residency: tells who is asked to leave.
    """

    def __init__(self, leases: Leases, residency: Residency) -> None:
        self._leases = leases
        self._residency = residency
        self._line = asyncio.Lock()

    async def gather(self, wanted: Sequence[Asked], deadline_ns: int) -> list[Lease]:
        """Leases on the models of all requests, in their order, each to be given back once.

        Args:
            wanted: the requests.
            deadline_ns: of the residency's clock.

        Raises:
            Refusal: one of the models does not come, or not in time. Nothing is held then.
        """
        leases = self._at_once(wanted, deadline_ns)
        if leases is not None:
            return leases
        for asked in wanted:
            self._leases.check(asked)
        async with self._turn(deadline_ns):
            return await self._in_turn(wanted, deadline_ns)

    def _at_once(self, wanted: Sequence[Asked], deadline_ns: int) -> list[Lease] | None:
        held: list[Lease] = []
        for asked in wanted:
            lease = self._leases.try_lease(asked, deadline_ns)
            if lease is None:
                for each in held:
                    each.release()
                return None
            held.append(lease)
        return held

    @asynccontextmanager
    async def _turn(self, deadline_ns: int) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout((deadline_ns - monotonic_ns()) / _NS):
                await self._line.acquire()
        except TimeoutError:
            raise Refusal(
                Reason.DEADLINE_IN_QUEUE,
                "the deadline passed before another ensemble had its models",
            ) from None
        try:
            yield
        finally:
            self._line.release()

    async def _in_turn(self, wanted: Sequence[Asked], deadline_ns: int) -> list[Lease]:
        held: dict[int, Lease] = {}
        waits: dict[int, asyncio.Task[Lease]] = {}
        try:
            with self._residency.watching_drains() as drained:
                while True:
                    for i, asked in enumerate(wanted):
                        if i in held or i in waits:
                            continue
                        lease = self._leases.try_lease(asked, deadline_ns)
                        if lease is not None:
                            held[i] = lease
                        else:
                            waits[i] = asyncio.create_task(self._leases.wait(asked, deadline_ns))
                    if not waits:
                        return [held.pop(i) for i in range(len(wanted))]
                    drained.clear()
                    told = asyncio.create_task(drained.wait())
                    try:
                        await asyncio.wait(
                            {told, *waits.values()}, return_when=asyncio.FIRST_COMPLETED
                        )
                    finally:
                        told.cancel()
                    for i in [i for i, task in waits.items() if task.done()]:
                        held[i] = waits.pop(i).result()
                    # With all of them in hand nobody needs to wait for what is asked to leave.
                    for i in [
                        i for i in held if waits and self._residency.is_leaving(held[i].handle)
                    ]:
                        held.pop(i).release()
        finally:
            for lease in held.values():
                lease.release()
            for task in waits.values():
                task.cancel()
            for outcome in await asyncio.gather(*waits.values(), return_exceptions=True):
                if isinstance(outcome, Lease):
                    outcome.release()
