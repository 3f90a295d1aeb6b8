"""An operator's calls about what is in memory."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard import _admin_messages
from modelyard._admin_calls import PAGE_SIZE, AdminCalls
from modelyard._connection import StreamingCall
from modelyard._event_messages import explanation_from
from modelyard._names import model_name
from modelyard.events import Explanation, WatchPosition
from modelyard.resources import Residency
from modelyard.v1 import residency_pb2, residency_service_pb2
from modelyard.v1.residency_service_pb2_grpc import ResidencyServiceStub
from modelyard.watch import ResidencyWatch

__all__ = ["ResidencyCalls"]


class ResidencyCalls(AdminCalls):
    """Loads, unloads and pins models, and tells where each stands and why."""

    _residencies: ResidencyServiceStub

    def load(self, model: str, *, timeout_s: float | None = None) -> Residency:
        """Ask for a model to be resident and return at once with where it stands.

        Nothing keeps it resident afterwards; see ``pin``.

        Raises:
            ModelNotFound, ModelNeverFits, BudgetExhausted, LoadFailed, QueueFull: as named.
            ModelyardError: any other failure.
        """
        request = residency_service_pb2.LoadModelRequest(model=model_name(model))
        response = self._connection.call(self._residencies.LoadModel, request, timeout_s)
        return self._read_residency(response.residency)

    def unload(self, model: str, *, timeout_s: float | None = None) -> Residency:
        """Take a model and its copy on the host tier out of memory; return when both are back.

        Requests that run are answered first, so give it the time they may take. The unload goes
        on when the time runs out.

        Raises:
            ModelNotFound, ModelInUse: as named.
            DeadlineExceeded: its memory is not back yet.
            ModelyardError: any other failure.
        """
        request = residency_service_pb2.UnloadModelRequest(model=model_name(model))
        response = self._connection.call(self._residencies.UnloadModel, request, timeout_s)
        return self._read_residency(response.residency)

    def pin(self, model: str, *, timeout_s: float | None = None) -> Residency:
        """Load a model and never evict it. Returns at once. Raises as ``load``."""
        request = residency_service_pb2.PinModelRequest(model=model_name(model))
        response = self._connection.call(self._residencies.PinModel, request, timeout_s)
        return self._read_residency(response.residency)

    def unpin(self, model: str, *, timeout_s: float | None = None) -> Residency:
        """Let a pinned model be evicted again, once its room is needed.

        Raises:
            ModelNotFound: as named.
            ModelyardError: any other failure.
        """
        request = residency_service_pb2.UnpinModelRequest(model=model_name(model))
        response = self._connection.call(self._residencies.UnpinModel, request, timeout_s)
        return self._read_residency(response.residency)

    def list_residencies(self, *, timeout_s: float | None = None) -> tuple[Residency, ...]:
        """Return where every model stands, in the order of their names.

        ``timeout_s`` is for all of it.
        """

        def page(token: str, left_s: float) -> tuple[Sequence[residency_pb2.Residency], str]:
            request = residency_service_pb2.ListResidenciesRequest(
                page_size=PAGE_SIZE, page_token=token
            )
            response = self._connection.call(self._residencies.ListResidencies, request, left_s)
            return response.residencies, response.next_page_token

        return self._list(page, _admin_messages.residency_from, timeout_s)

    def watch_residencies(
        self, resume: WatchPosition | None = None, *, timeout_s: float | None = None
    ) -> ResidencyWatch:
        """Return an iterator over where every model stands, and then each change.

        Args:
            resume: the ``position`` of an earlier watch, to go on behind it; None begins with a
                snapshot, and so does a server that no longer knows what has changed since.
            timeout_s: most seconds the watch may last, whereafter it raises ``DeadlineExceeded``;
                None for as long as it is not closed.

        Raises:
            TypeError, ValueError: an argument of no use.
            RuntimeError: the client is closed.
            What ends the watch is raised by its iteration: QueueFull (too many watches),
            ServerUnavailable, ServerDraining, any other ModelyardError.
        """

        def open_call(
            position: WatchPosition | None, call_timeout_s: float
        ) -> StreamingCall[residency_service_pb2.WatchResidenciesResponse]:
            request = residency_service_pb2.WatchResidenciesRequest()
            if position is not None:
                request.epoch, request.revision = position.epoch, position.revision
            return self._connection.open_stream(
                self._residencies.WatchResidencies, request, call_timeout_s
            )

        return ResidencyWatch(
            self._connection, open_call, resume=resume, timeout_s=timeout_s, times=None
        )

    def explain(self, model: str, *, timeout_s: float | None = None) -> Explanation:
        """Tell why a model is where it is: what happened to it and for it, oldest first.

        Raises:
            ModelNotFound: not registered, and not in the server's log.
            ModelyardError: any other failure.
        """
        request = residency_service_pb2.ExplainModelRequest(model=model_name(model))
        response = self._connection.call(self._residencies.ExplainModel, request, timeout_s)
        return self._read(explanation_from, response)

    def _read_residency(self, message: residency_pb2.Residency) -> Residency:
        return self._read(_admin_messages.residency_from, message)
