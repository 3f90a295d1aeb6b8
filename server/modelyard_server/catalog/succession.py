"""One copy of a model takes over from another: loaded beside it, switched in one step.

A changed model is a new model to the yard, with the history of the one it replaces. It is staged
where both fit: loaded while the old one still answers, and leased so that it stays. The switch
itself is a step between two requests: from then on the key means the new copy, who waited for the
old one waits for the new one, and the old one leaves when its requests have ended. Until that step
everything can be taken back, and nobody but the memory has noticed.

What Succession does with the yard, rehearse_staging and rehearse_switch do with a rehearsal, step
by step and in the same order. That is what makes a forecast come true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, Registration
from modelyard_server.devices.placed import PlacedAs
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.rehearsal import Rehearsal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import ModelHandle, ModelUse, State
from modelyard_server.runtimes.api import ModelSpec

__all__ = ["IN_MEMORY", "Heir", "Succession", "rehearse_staging", "rehearse_switch"]

IN_MEMORY = frozenset({State.LOADING, State.RESIDENT})
"""States of models whose heirs are staged, where both fit."""


@dataclass(slots=True, kw_only=True, eq=False)
class Heir:
    """A model as it is to be.

    Attributes:
        old: as it is.
        registration: as it is to be registered.
        spec: what the engine will load.
        priced_bytes: peak bytes of the price that its ways were worked out for.
        stays: the copy in memory is where it may be anyway: it is the heir, and nothing is loaded.
        staged: it is to be loaded before it takes over.
        way: the one of its ways in which it is to be staged; None leaves the choice to the yard.
    """

    old: Model
    registration: Registration
    spec: ModelSpec
    priced_bytes: int
    staged: bool
    stays: bool = False
    way: int | None = None
    _handle: ModelHandle | None = field(default=None, init=False)

    @property
    def id(self) -> str:
        """The model's id."""
        return self.old.id

    @property
    def ways_to_stage(self) -> tuple[PlacedAs, ...]:
        """How it may be staged."""
        ways = self.registration.ways
        return ways if self.way is None else (ways[self.way],)


class Succession:
    """Several heirs that take over together, or none of them.

    Use it as a context manager: what has not been committed at its end is discarded.

    Args:
        heirs: each of another model.
        catalog: where they take over.
        residency: where they are loaded.
    """

    def __init__(self, heirs: Sequence[Heir], *, catalog: Catalog, residency: Residency) -> None:
        self._heirs = tuple(heirs)
        self._catalog = catalog
        self._residency = residency
        self._leases = ExitStack()
        self._committed = False
        self._discarded: list[ModelHandle] = []

    def __enter__(self) -> Succession:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            self.discard()

    async def stage(self, deadline_ns: int) -> None:
        """Loads the heirs that are to be staged, at once where their devices allow it.

        Args:
            deadline_ns: of the residency's clock.

        Raises:
            Refusal: one of them cannot be loaded; its text names the model. Discard then.
        """
        for heir in self._heirs:
            # Leased, the old copies are nobody's victims: least of all their heirs'. Set aside, the
            # leases are no work, and a device that is behind with its own gives nobody away.
            old = self._residency.try_lease(heir.old.handle, asked=True)
            if old is not None:
                old.set_aside()
                self._leases.callback(old.release)
        staged = [heir for heir in self._heirs if heir.staged and not heir.stays]
        try:
            async with asyncio.TaskGroup() as group:
                for heir in staged:
                    group.create_task(self._stage(heir, deadline_ns), name=f"stage {heir.id}")
        except BaseExceptionGroup as failures:
            # The others were told to stop; the first tells why.
            raise failures.exceptions[0] from None

    def commit(self) -> tuple[Model, ...]:
        """Lets the heirs take over, in one step, and returns the models as they are now."""
        self._committed = True
        models = []
        for heir in self._heirs:
            if heir.stays:
                models.append(self._keep(heir))
                continue
            staged = heir._handle
            handle = self._add(heir, heir.registration.ways) if staged is None else staged
            model = Model.of(heir.registration, handle)
            self._catalog.replace(heir.old, model)
            self._residency.replace(heir.old.handle, handle)
            ways = heir.registration.ways
            if staged is not None and ways != handle.ways == heir.ways_to_stage:
                # Staged in one way; the next time it may be another. (Other ways still: its files
                # have grown since, and the handle knows better.)
                self._residency.set_ways(handle, ways)
            models.append(model)
        self._leases.close()
        return tuple(models)

    def discard(self) -> None:
        """Takes everything back: what was loaded leaves, the old copies stay."""
        self._leases.close()
        for heir in self._heirs:
            handle, heir._handle = heir._handle, None
            if handle is not None:
                self._discarded.append(handle)
                self._residency.remove(handle)

    async def gone(self) -> None:
        """Waits until what was discarded holds nothing any more. A load takes a while to stop."""
        for handle in self._discarded:
            await self._residency.gone(handle)

    def _keep(self, heir: Heir) -> Model:
        """Lets the copy that is there be the heir."""
        handle = heir.old.handle
        handle.replan = heir.registration.replan
        handle.priced_bytes = heir.priced_bytes
        model = Model.of(heir.registration, handle)
        self._catalog.replace(heir.old, model)
        self._residency.set_ways(handle, heir.registration.ways)
        return model

    async def _stage(self, heir: Heir, deadline_ns: int) -> None:
        handle = heir._handle = self._add(heir, heir.ways_to_stage)
        try:
            lease = await self._residency.lease(handle, deadline_ns, asked=True)
        except Refusal as refusal:
            if refusal.reason is Reason.DEADLINE_IN_QUEUE:
                # To wait for another heir's load is part of the staging.
                refusal.reason = Reason.DEADLINE_IN_LOAD
            why = f": {handle.failure_text}" if handle.failure_text else ""
            refusal.text = f"models/{heir.id} in its new place: {refusal.text}{why}"
            raise
        lease.set_aside()
        self._leases.callback(lease.release)

    def _add(self, heir: Heir, ways: Sequence[PlacedAs]) -> ModelHandle:
        return self._residency.add(
            heir.spec,
            ways=ways,
            replan=heir.registration.replan,
            priced_bytes=heir.priced_bytes,
            replaces=heir.old.handle,
        )


def rehearse_staging(
    rehearsal: Rehearsal, heirs: Sequence[Heir], uses: Mapping[str, ModelUse]
) -> dict[str, int]:
    """Rehearses Succession.stage, and decides for each heir whether it is staged, and in which way.

    Args:
        rehearsal: settled.
        heirs: that are to take over together.
        uses: where the models stand now, by id.

    Returns:
        The rehearsal's ids of the heirs, by the model's id.
    """
    for heir in heirs:
        rehearsal.hold(heir.old.handle.core_id)
    ids = {}
    for heir in heirs:
        if heir.stays:
            ids[heir.id] = heir.old.handle.core_id
            continue
        core_id = ids[heir.id] = rehearsal.add(heir.ways_to_stage, replaces=heir.old.handle.core_id)
        heir.staged = uses[heir.id].state in IN_MEMORY and rehearsal.want(core_id, hold=True)
        if heir.staged and heir.way is None:
            heir.way = rehearsal.way_of(core_id)
    return ids


def rehearse_switch(
    rehearsal: Rehearsal,
    heirs: Sequence[Heir],
    uses: Mapping[str, ModelUse],
    ids: Mapping[str, int],
) -> None:
    """Rehearses Succession.commit; the arguments are those and the result of rehearse_staging."""
    for heir in heirs:
        if heir.stays:
            rehearsal.set_ways(ids[heir.id], heir.registration.ways)
            continue
        rehearsal.remove(heir.old.handle.core_id)
        if uses[heir.id].pinned:
            rehearsal.set_pinned(ids[heir.id], True)
    rehearsal.let_go()
