"""Following what happens on a server: blocking iterators that survive broken connections.

::

    with admin.watch_events() as watch:
        for event in watch:
            print(event.type, event.subject)

A watch is a context manager; closing it cancels its call. Ctrl-C ends the wait for what comes next
with KeyboardInterrupt, and closes the watch. When the connection breaks, or the server stops and
comes back, the watch resumes where it was, and raises only what does not pass: a refusal, or a
server that has been away for longer than the client's ``timeout_s``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from modelyard._connection import Connection, StreamingCall, checked_timeout
from modelyard._event_messages import event_from, residency_change_from
from modelyard._recording_messages import request_records_from
from modelyard._status import reading_answer
from modelyard._stream import Received, ResumingStream, StreamTimes
from modelyard.events import Event, ResidencyChange, WatchPosition
from modelyard.recordings import RequestRecords
from modelyard.v1 import admin_service_pb2, residency_service_pb2

__all__ = ["EventWatch", "RequestWatch", "ResidencyWatch"]

_MessageT = TypeVar("_MessageT")
_ValueT = TypeVar("_ValueT")


class _Watch(Generic[_MessageT, _ValueT]):
    """What all watches are: an iterator over a stream's messages as values."""

    def __init__(
        self,
        connection: Connection,
        open_call: Callable[[WatchPosition | None, float], StreamingCall[_MessageT]],
        *,
        resume: WatchPosition | None,
        timeout_s: float | None,
        times: StreamTimes | None,
    ) -> None:
        if not isinstance(resume, WatchPosition | None):
            raise TypeError(
                f"resume must be a WatchPosition or None, got {type(resume).__name__}: "
                "take the position of a watch"
            )
        connection.check_open()
        self._target = connection.settings.target
        self._position = resume
        self._stream: ResumingStream[_MessageT] = ResumingStream(
            connection=connection,
            open_call=open_call,
            position_of=self._position_of,
            resume=resume,
            timeout_s=None if timeout_s is None else checked_timeout(timeout_s),
            times=times or StreamTimes(give_up_s=connection.settings.timeout_s),
            name=f"modelyard-{type(self).__name__}",
        )

    @property
    def position(self) -> WatchPosition | None:
        """Where another watch can resume behind what this one gave last; None if nowhere."""
        return self._position

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _ValueT:
        """Wait for what comes next.

        Raises:
            StopIteration: the watch is closed.
            ModelyardError: it ended for a reason that does not pass, or its time is over
                (``DeadlineExceeded``). Closes the watch.
            RuntimeError: the client was closed. Closes the watch.
            KeyboardInterrupt: while it waited. Closes the watch.
        """
        if self._stream.closed:
            raise StopIteration
        try:
            return self._read_next()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the watch and cancel its call. May be called from any thread. Idempotent."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read_next(self) -> _ValueT:
        raise NotImplementedError

    @staticmethod
    def _position_of(message: Any) -> WatchPosition | None:
        raise NotImplementedError


class ResidencyWatch(_Watch[residency_service_pb2.WatchResidenciesResponse, ResidencyChange]):
    """Where every model stands, and then each change; made by ``Admin.watch_residencies``.

    Changes of one model that come faster than they are read are told as one. After a break that
    the server cannot resume behind, a snapshot comes again, marked by ``snapshot_begins``.
    """

    _in_snapshot = False

    def _read_next(self) -> ResidencyChange:
        received: Received[residency_service_pb2.WatchResidenciesResponse] = self._stream.next()
        message = received.message
        with reading_answer(self._target):
            change = residency_change_from(
                message,
                # A break inside a snapshot starts it again, without its end having been told.
                begins=message.snapshot and (received.first or not self._in_snapshot),
                position=self._position_of(message),
            )
        self._in_snapshot = message.snapshot and not message.snapshot_complete
        self._position = change.position
        return change

    @staticmethod
    def _position_of(message: Any) -> WatchPosition | None:
        if message.snapshot and not message.snapshot_complete:
            # Behind a part of a snapshot the server would not tell the rest.
            return None
        return _position(message.epoch, message.revision)


class EventWatch(_Watch[admin_service_pb2.WatchEventsResponse, Event]):
    """What happens, in order; made by ``Admin.watch_events``."""

    _truncated = False
    _truncated_next = False
    # Events of the last message, and how many of them have been given.
    _events: tuple[Event, ...] = ()
    _given_count = 0
    _behind: WatchPosition | None = None

    @property
    def truncated(self) -> bool:
        """True if events are missing directly before the one given last.

        They came faster than they were read, happened while the connection was broken for longer
        than the server's log reaches back, or belong to an earlier run of the server.
        """
        return self._truncated

    def _read_next(self) -> Event:
        while self._given_count == len(self._events):
            message = self._stream.next().message
            self._truncated_next |= message.truncated
            with reading_answer(self._target):
                self._events = tuple(map(event_from, message.events))
            self._given_count = 0
            self._behind = self._position_of(message)
            if not self._events:
                # Nothing but where the watch has begun.
                self._position = self._behind
        event = self._events[self._given_count]
        self._given_count += 1
        self._truncated, self._truncated_next = self._truncated_next, False
        if self._behind is not None and self._given_count < len(self._events):
            self._position = _position(self._behind.epoch, event.revision)
        else:
            self._position = self._behind
        return event

    @staticmethod
    def _position_of(message: Any) -> WatchPosition | None:
        return _position(message.epoch, message.revision)


class RequestWatch(_Watch[admin_service_pb2.WatchRequestsResponse, RequestRecords]):
    """What became of requests; made by ``Admin.watch_requests``.

    It cannot be resumed: after a break it begins again, marked by ``begins``.
    """

    def _read_next(self) -> RequestRecords:
        received: Received[admin_service_pb2.WatchRequestsResponse] = self._stream.next()
        with reading_answer(self._target):
            return request_records_from(received.message, begins=received.first)

    @staticmethod
    def _position_of(message: Any) -> WatchPosition | None:
        return None


def _position(epoch: str, revision: int) -> WatchPosition | None:
    # Without an epoch there is nothing a server would know again.
    return WatchPosition(epoch=epoch, revision=max(revision, 0)) if epoch else None
