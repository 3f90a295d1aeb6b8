"""A stream of messages that survives broken connections, read by a thread of its own.

The thread that iterates never waits inside gRPC. It waits in ``SimpleQueue.get``, which is one call
into C that Ctrl-C ends at once and cleanly. gRPC's own iterator runs Python code of several layers
while it waits, some of it in callbacks where an exception is printed and forgotten, and a
KeyboardInterrupt that arrives just there is lost. So a reader thread, to which Python delivers no
signals, follows the call, and two such queues join the two: messages one way, credits the other,
so that a slow caller slows the server instead of filling memory.

A stream that breaks is opened again behind the last message received. It gives up when the server
refuses for a reason, when it was never reached, and when it has been away for too long. Each call
has a deadline of some minutes, after which it is opened again too: that sends something, and only
who sends can notice that the other end vanished without a word.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

import grpc

from modelyard import errors
from modelyard._connection import Connection, StreamingCall
from modelyard._status import error_from_rpc
from modelyard.events import WatchPosition

__all__ = ["Received", "ResumingStream", "StreamTimes"]

_MessageT = TypeVar("_MessageT")

# Messages that wait for whoever iterates. Each holds many changes; gRPC buffers more below.
_BUFFERED: Final = 16

# A call that lasted this long had a connection: gRPC tries for 20 s to make one.
_CONNECTED_S: Final = 30.0

# A cancelled call ends at once; the bound is for a machine that hardly runs.
_JOIN_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTimes:
    """How long a stream waits for what, in seconds.

    Args:
        give_up_s: longest time without a server, once there was one.
        call_s: deadline of each call.
        first_pause_s: before it is opened again; doubles up to ``most_pause_s``.
        most_pause_s: longest pause.
    """

    give_up_s: float
    call_s: float = 300.0
    first_pause_s: float = 0.1
    most_pause_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Received(Generic[_MessageT]):
    """A message, and whether it is the first of its call."""

    message: _MessageT
    first: bool


@dataclass(frozen=True, slots=True)
class _End:
    error: Exception | None


class ResumingStream(Generic[_MessageT]):
    """Messages of one kind of watch, across calls. Owns a thread, which ``close`` ends.

    Thread-safe; several threads that call ``next`` share the messages.

    Args:
        connection: whom to ask.
        open_call: begins a call behind a position, or from the start if it is None, with a
            deadline in seconds.
        position_of: where to resume behind a message; None if only from the start.
        resume: where to begin.
        timeout_s: most seconds it may last; None for as long as it is not closed.
        times: how long to wait for what.
        name: of the thread.
    """

    def __init__(
        self,
        *,
        connection: Connection,
        open_call: Callable[[WatchPosition | None, float], StreamingCall[_MessageT]],
        position_of: Callable[[_MessageT], WatchPosition | None],
        resume: WatchPosition | None,
        timeout_s: float | None,
        times: StreamTimes,
        name: str,
    ) -> None:
        self._connection = connection
        self._open_call = open_call
        self._position_of = position_of
        self._position = resume
        self._timeout_s = timeout_s
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._times = times
        self._messages: SimpleQueue[Received[_MessageT] | _End] = SimpleQueue()
        self._credits: SimpleQueue[None] = SimpleQueue()
        for _ in range(_BUFFERED):
            self._credits.put(None)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._call: StreamingCall[_MessageT] | None = None
        # A daemon: a watch that somebody forgot to close shall not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether it was closed, by ``close`` or by its end."""
        return self._closed.is_set()

    def next(self) -> Received[_MessageT]:
        """Wait for a message and return it.

        Raises:
            StopIteration: the stream is closed.
            ModelyardError: the server refused, or cannot be reached any more. Closes the stream.
            RuntimeError: the client was closed. Closes the stream.
            KeyboardInterrupt: while it waited. Closes the stream.
        """
        if self._closed.is_set():
            raise StopIteration
        try:
            item = self._messages.get()
        except BaseException:
            self.close()
            raise
        if isinstance(item, _End):
            closed = self._closed.is_set()
            self.close()
            if item.error is not None and not closed:
                raise item.error
            raise StopIteration
        self._credits.put(None)
        return item

    def close(self) -> None:
        """Cancel the call and end the thread. Idempotent."""
        with self._lock:
            self._closed.set()
            call = self._call
        if call is not None:
            call.cancel()
        # Each wakes one that waits, and whoever is woken passes it on.
        self._credits.put(None)
        self._messages.put(_End(None))
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._follow()
        except Exception as caught:
            # The thread's edge: whatever it is belongs to whoever iterates.
            error = caught
        self._messages.put(_End(error))

    def _follow(self) -> None:
        """Read calls, one after the other, until the stream is closed or one ends for good."""
        # Whoever resumes has been answered before, by this stream or another.
        reached = self._position is not None
        lost_s: float | None = None
        pause_s = self._times.first_pause_s
        while not self._closed.is_set():
            timeout_s = self._call_timeout()
            began_s = time.monotonic()
            received, error = self._read_call(timeout_s)
            if self._closed.is_set():
                return
            self._connection.check_open()
            now_s = time.monotonic()
            if received or now_s - began_s > _CONNECTED_S:
                reached, lost_s, pause_s = True, None, self._times.first_pause_s
            if _is_own_deadline(error) and (reached or not self._has_time()):
                continue
            if not (reached and _may_resume(error)):
                raise error
            lost_s = now_s if lost_s is None else lost_s
            if now_s - lost_s > self._times.give_up_s:
                raise error
            asked_s = min(error.retry_after_s or 0.0, self._times.most_pause_s)
            # Spread, so that not all who watched a server come back to it at the same moment.
            self._closed.wait(max(pause_s * random.uniform(0.5, 1.0), asked_s))
            pause_s = min(2 * pause_s, self._times.most_pause_s)

    def _read_call(self, timeout_s: float) -> tuple[bool, errors.ModelyardError]:
        """Read one call to its end; return whether anything came, and what it ended with."""
        received = False
        try:
            call = self._open_call(self._position, timeout_s)
            with self._lock:
                self._call = call
                closed = self._closed.is_set()
            if closed:
                call.cancel()
            for message in call:
                self._credits.get()
                if self._closed.is_set():
                    break
                self._messages.put(Received(message, not received))
                received = True
                self._position = self._position_of(message)
        except grpc.RpcError as error:
            return received, error_from_rpc(error, target=self._connection.settings.target)
        finally:
            # gRPC's call takes a lock when it is deleted. One that lives until the program ends
            # may find it held by a thread of gRPC's that is gone: the program would never end.
            with self._lock:
                self._call = None
        ended = errors.ServerUnavailable(
            f"the server at {self._connection.settings.target} ended the watch",
            code=grpc.StatusCode.UNAVAILABLE,
        )
        return received, ended

    def _call_timeout(self) -> float:
        """Return the deadline of the next call. Raises ``DeadlineExceeded`` if time is over."""
        if self._end_s is None:
            return self._times.call_s
        if not self._has_time():
            raise errors.DeadlineExceeded(
                f"the watch has lasted the {self._timeout_s:g} seconds it was given",
                code=grpc.StatusCode.DEADLINE_EXCEEDED,
            )
        return min(self._times.call_s, self._end_s - time.monotonic())

    def _has_time(self) -> bool:
        # A call's deadline is never met early, but the two clocks may disagree by a little.
        return self._end_s is None or self._end_s - time.monotonic() > 0.001


def _is_own_deadline(error: errors.ModelyardError) -> bool:
    return isinstance(error, errors.DeadlineExceeded) and error.reason is None


def _may_resume(error: errors.ModelyardError) -> bool:
    return isinstance(error, errors.ServerUnavailable | errors.ServerDraining)
