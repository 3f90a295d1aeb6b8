"""What goes on: WatchResidencies, ExplainModel and WatchEvents.

A watcher holds a position in the journal and nothing else. Each time round it looks at what has
happened behind it, sends that in messages of a bounded size, and waits. Sending waits for the
reader, so whoever reads slowly finds more at once the next time, or what the log still has.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from modelyard.v1 import admin_service_pb2, residency_pb2
from modelyard.v1 import residency_service_pb2 as pb
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model
from modelyard_server.errors import QuotaViolation, Reason, Refusal, Violation
from modelyard_server.residency.journal import Journal, Position
from modelyard_server.residency.shell import Residency
from modelyard_server.services.evictions import evictions_of
from modelyard_server.services.explanation import summary_of
from modelyard_server.services.handler import draining, invalid
from modelyard_server.services.models import model_id_of
from modelyard_server.services.residency_messages import (
    event_message,
    eviction_message,
    residency_message,
)
from modelyard_server.transport.api import Call

__all__ = ["WatchService"]

_PAGE = 200
"""Most residencies, names or events in a message."""

_MOST_EXPLAINED = 4096
"""Most events in the answer of ExplainModel."""

_RETRY_S = 5.0


class WatchService:
    """Tells what happens, and why a model is where it is.

    Args:
        journal: what happened.
        residency: where each model stands.
        catalog: the registered models.
        device_names: resource names of the devices, by position.
        max_watches: most streams at once, over both kinds.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        residency: Residency,
        catalog: Catalog,
        device_names: Sequence[str],
        max_watches: int = 64,
    ) -> None:
        self._journal = journal
        self._residency = residency
        self._catalog = catalog
        self._device_names = tuple(device_names)
        self._max_watches = max_watches
        self._watch_count = 0

    @property
    def watch_count(self) -> int:
        """Streams that are open."""
        return self._watch_count

    # --- Residencies --------------------------------------------------------------------------

    async def watch_residencies(
        self, request: pb.WatchResidenciesRequest, call: Call
    ) -> AsyncGenerator[pb.WatchResidenciesResponse, None]:
        """See ResidencyService.WatchResidencies."""
        _check_place(request.epoch, request.revision)
        journal = self._journal
        with self._seat():
            # Revision 0 is also what the parts of a snapshot say that cannot be resumed from.
            known = request.epoch == journal.epoch and request.revision > 0
            at = Position(request.revision) if known else None
            resuming = known
            while True:
                changes = None if at is None else journal.changes_after(at)
                now = journal.position
                if at is None or changes is None:
                    for message in self._snapshot(now):
                        yield message
                # With nothing to tell, one message tells all the same that the stream is resumed.
                elif any(changes) or resuming:
                    for message in self._changes(changes, at, now):
                        yield message
                resuming = False
                at = now
                if not await journal.wait(at):
                    raise draining()

    def _snapshot(self, now: Position) -> Iterator[pb.WatchResidenciesResponse]:
        """Every residency at one moment. Captured at once, made into messages as they are read."""
        time = datetime.now(UTC)
        models = [(model.id, self._residency.use(model.handle)) for model in self._catalog.models()]
        for start in range(0, max(1, len(models)), _PAGE):
            last = start + _PAGE >= len(models)
            yield pb.WatchResidenciesResponse(
                residencies=[
                    residency_message(model_id, use, self._device_names, now=time)
                    for model_id, use in models[start : start + _PAGE]
                ],
                epoch=self._journal.epoch,
                # Whoever has only a part of it has to begin anew.
                revision=now.revision if last else 0,
                snapshot=True,
                snapshot_complete=last,
            )

    def _changes(
        self, changes: tuple[list[str], list[str]], before: Position, now: Position
    ) -> Iterator[pb.WatchResidenciesResponse]:
        """What is so now of the models that changed. Only the last message says it is all told."""
        names = changes[0] + changes[1]
        for start in range(0, max(1, len(names)), _PAGE):
            message = pb.WatchResidenciesResponse(epoch=self._journal.epoch)
            for model_id in names[start : start + _PAGE]:
                # The catalog knows best: names come back, and some are told of after they are gone.
                if (model := self._registered(model_id)) is not None:
                    message.residencies.append(self._residency_message(model))
                else:
                    message.removed.append(f"residencies/{model_id}")
            last = start + _PAGE >= len(names)
            message.revision = now.revision if last else before.revision
            yield message

    async def explain_model(
        self, request: pb.ExplainModelRequest, call: Call
    ) -> pb.ExplainModelResponse:
        """See ResidencyService.ExplainModel."""
        model_id = model_id_of(request.model, "model")
        events, truncated = self._journal.about(request.model)
        model = self._registered(model_id)
        if model is None and not events:
            self._catalog.get(model_id)  # Refuses.
        if len(events) > _MOST_EXPLAINED:
            events, truncated = events[-_MOST_EXPLAINED:], True
        use = None if model is None else self._residency.use(model.handle)
        response = pb.ExplainModelResponse(
            events=map(event_message, events),
            summary=summary_of(
                request.model,
                use,
                events,
                device_names=self._device_names,
                truncated=truncated,
            ),
            truncated=truncated,
            evictions=map(eviction_message, evictions_of(request.model, events)),
        )
        if use is not None:
            response.residency.CopyFrom(residency_message(model_id, use, self._device_names))
        return response

    # --- Events -------------------------------------------------------------------------------

    async def watch_events(
        self, request: admin_service_pb2.WatchEventsRequest, call: Call
    ) -> AsyncGenerator[admin_service_pb2.WatchEventsResponse, None]:
        """See AdminService.WatchEvents."""
        _check_place(request.epoch, request.revision)
        journal = self._journal
        with self._seat():
            lost = False
            if request.epoch:
                lost = request.epoch != journal.epoch or request.revision > journal.revision
                revision = 0 if lost or request.include_past else request.revision
            else:
                revision = 0 if request.include_past else journal.revision
            # The first message is sent at once, even if there is nothing to tell yet.
            first = True
            while True:
                at = journal.position
                while first or revision < journal.revision:
                    events, truncated = journal.events_after(revision, most=_PAGE)
                    revision = events[-1].revision if events else revision
                    yield admin_service_pb2.WatchEventsResponse(
                        events=map(event_message, events),
                        epoch=journal.epoch,
                        revision=revision,
                        truncated=truncated or (first and lost),
                    )
                    first = False
                if not await journal.wait(at):
                    raise draining()

    # --- Inside -------------------------------------------------------------------------------

    @contextmanager
    def _seat(self) -> Iterator[None]:
        if self._watch_count >= self._max_watches:
            text = f"{self._max_watches} watches are open already"
            raise Refusal(
                Reason.QUEUE_FULL,
                text,
                quota=(QuotaViolation("watches", text),),
                retry_after_s=_RETRY_S,
            )
        self._watch_count += 1
        try:
            yield
        finally:
            self._watch_count -= 1

    def _registered(self, model_id: str) -> Model | None:
        try:
            return self._catalog.get(model_id)
        except Refusal:
            return None

    def _residency_message(self, model: Model) -> residency_pb2.Residency:
        use = self._residency.use(model.handle)
        return residency_message(model.id, use, self._device_names)


def _check_place(epoch: str, revision: int) -> None:
    """Raises Refusal INVALID_FIELD for a place that no message can have told."""
    if revision < 0:
        raise invalid(Violation("revision", "must not be negative"))
    if revision and not epoch:
        raise invalid(Violation("epoch", "must be given with a revision"))
