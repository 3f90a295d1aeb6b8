"""A channel: messages over a socket pair, on an event loop.

What is sent first in a turn of the loop leaves at once, and what else is sent in that turn leaves
together, in one system call as far as it goes: one message does not wait, and many do not take as
many calls. Descriptors leave with the first byte of their frame. Nothing is ever unpickled: a
header is JSON, tensors are bytes.

Whoever runs in this process can write into its socket as well. Where in the stream that was done
the other end finds out, and threads can ask how far the stream was when they began something: so
the two can be compared (see board.py).
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelyard_server.execution.workers.framing import (
    MARK,
    MAX_DESCRIPTORS,
    Frame,
    FrameReader,
    MalformedMessage,
    frame_start,
)
from modelyard_server.execution.workers.payload import decode_tensors, encode_tensors
from modelyard_server.execution.workers.segments import SegmentPool, SegmentTable
from modelyard_server.runtimes.tensors import TensorValue

__all__ = ["Channel", "OnClosed", "OnMessage"]

OnMessage = Callable[[dict[str, Any], tuple[TensorValue, ...]], None]
"""Called with what stands in a message, and the tensors that came with it.

Raises:
    MalformedMessage: it cannot be understood; the channel closes.
"""

OnClosed = Callable[[str], None]
"""Called once if the channel closes by itself: with what was wrong; "" if the other end closed."""

_RECEIVE_BYTES = 2**16
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
_MAX_BUFFERS = 256
"""Given to the system at once; it takes 1024 at most."""

# Keys of the messages' headers that belong to the channel.
_TENSORS = "tensors"
_ANNOUNCED = "segment"
_DONE = "done"
_DROPPED = "dropped"


@dataclass(slots=True)
class _Outgoing:
    """Buffers of a frame that are still to be sent, and the descriptors that go with the first."""

    buffers: deque[memoryview] = field(default_factory=deque)
    descriptors: tuple[int, ...] = ()


class Channel:
    """One end. For the loop's thread only, but for at_least, at_most and mark.

    Args:
        end: of a socket pair; taken over.
        loop: where it works.
        on_message: gets what comes.
        on_closed: is told when nothing comes any more; not after close().
    """

    def __init__(
        self,
        end: socket.socket,
        loop: asyncio.AbstractEventLoop,
        *,
        on_message: OnMessage,
        on_closed: OnClosed,
    ) -> None:
        end.setblocking(False)
        self._socket = end
        self._loop = loop
        self._on_message = on_message
        self._on_closed = on_closed
        self._reader = FrameReader()
        self._handled_place: int | None = None
        # What threads ask for; changed by whoever holds the lock.
        self._sending = threading.Lock()
        self._sent_bytes = 0
        self._is_sending = False
        self._is_amid_frame = False
        self._outgoing: deque[_Outgoing] = deque()
        self._dropped: list[int] = []
        self._done: list[int] = []
        self._pool = SegmentPool(self._dropped.append)
        self._table = SegmentTable()
        self._flush_is_due = False
        self._is_writing = False
        self._is_closed = False
        self._drained: asyncio.Future[None] | None = None
        loop.add_reader(end.fileno(), self._receive)

    @property
    def is_closed(self) -> bool:
        """True once nothing can be sent and nothing comes."""
        return self._is_closed

    @property
    def place(self) -> int:
        """Place in the stream of what is being handled, or could not be understood."""
        return self._reader.place if self._handled_place is None else self._handled_place

    @property
    def segments(self) -> int:
        """Segments that this process has mapped for it."""
        return self._pool.count + self._table.count

    def send(self, header: dict[str, Any], tensors: Sequence[TensorValue] = ()) -> None:
        """Sends a message; dropped without a word if the channel is closed.

        Args:
            header: values of JSON. Taken over.
            tensors: that go with it.

        Raises:
            ValueError: it is too large.
        """
        if self._is_closed:
            return
        if not tensors:
            self._put(header, (), 0)
            return
        packed = encode_tensors(tensors, self._pool)
        # Before a new segment is announced: the other end counts those it has.
        self._put_notice()
        header[_TENSORS] = packed.described
        descriptors: tuple[int, ...] = ()
        segment = packed.segment
        if segment is not None and not segment.is_announced:
            header[_ANNOUNCED] = [segment.number, segment.size_bytes]
            descriptors = (segment.file.fileno(),)
        try:
            self._put(header, packed.body, packed.body_bytes, descriptors)
        except ValueError:
            if segment is not None and descriptors:
                # Announced by nothing that is sent, so the next who takes it announces it.
                self._pool.give_back(segment.number)
            raise
        if segment is not None:
            segment.is_announced = True

    async def drain(self) -> None:
        """Waits until all that was sent has left, or the channel is closed."""
        self._flush()
        if self._outgoing and not self._is_closed:
            if self._drained is None:
                self._drained = self._loop.create_future()
            await asyncio.shield(self._drained)

    def receive_rest(self) -> None:
        """Takes what the other end has sent before it closed."""
        while not self._is_closed and self._receive():
            pass

    def close(self) -> None:
        """Closes it. Idempotent. What has not left yet never will."""
        if self._is_closed:
            return
        with self._sending:
            self._is_closed = True
            self._loop.remove_reader(self._socket.fileno())
            if self._is_writing:
                self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
        self._outgoing.clear()
        self._reader.close()
        self._pool.close()
        self._table.close()
        self._wake_drained()

    # --- Of any thread ----------------------------------------------------------------------------

    def at_least(self) -> int:
        """Bytes that have been sent, or fewer: none that are sent after this returns."""
        return self._sent_bytes

    def at_most(self) -> int:
        """Bytes that had been sent when this was called, or more."""
        return sys.maxsize if self._is_sending else self._sent_bytes

    def mark(self) -> int | None:
        """Puts a mark behind whatever has been written into the socket by anybody.

        Returns:
            Bytes that have been sent, the mark included; None if the socket takes none now.
        """
        with self._sending:
            if self._is_closed or self._is_amid_frame:
                return None
            try:
                # So few bytes are taken as a whole or not at all.
                self._sent_bytes += self._socket.send(MARK)
            except OSError:  # It is full, or the other end is gone.
                return None
            return self._sent_bytes

    # --- Out --------------------------------------------------------------------------------------

    def _put(
        self,
        header: dict[str, Any],
        body: Sequence[bytes],
        body_bytes: int,
        descriptors: tuple[int, ...] = (),
    ) -> None:
        start = frame_start(header, body_bytes, len(descriptors))
        buffers = deque([memoryview(part) for part in (start, *body) if part])
        self._outgoing.append(_Outgoing(buffers, descriptors))
        if not self._flush_is_due and not self._is_writing:
            self._plan_flush()
            self._send_all()

    def _put_notice(self) -> None:
        """Says which segments this end is done with, and which of its own are gone."""
        if self._done or self._dropped:
            header = {_DONE: self._done[:], _DROPPED: self._dropped[:]}
            self._done.clear()
            self._dropped.clear()
            self._put(header, (), 0)

    def _plan_flush(self) -> None:
        if not self._flush_is_due and not self._is_writing:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._is_closed:
            return
        self._put_notice()
        self._send_all()

    def _send_all(self) -> None:
        """Sends what is there, as far as it goes now."""
        try:
            while self._outgoing and self._send_some():
                pass
        except OSError:  # The other end is gone; what it sent before that is still to be read.
            self._outgoing.clear()
        self._set_writing(bool(self._outgoing))
        if not self._outgoing:
            self._wake_drained()

    def _send_some(self) -> bool:
        """Sends frames from the first on. False if the socket takes no more now."""
        first = self._outgoing[0]
        buffers = list(first.buffers)
        ancillary: list[tuple[int, int, Any]] = []
        if first.descriptors:
            ancillary = [
                (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", first.descriptors))
            ]
        else:
            for frame in list(self._outgoing)[1:_MAX_BUFFERS]:
                if frame.descriptors or len(buffers) >= _MAX_BUFFERS:
                    break
                buffers += frame.buffers
        with self._sending:
            self._is_sending = True
            try:
                sent = self._socket.sendmsg(buffers[: 2 * _MAX_BUFFERS], ancillary)
                self._sent_bytes += sent
                first.descriptors = ()
                self._is_amid_frame = self._take_off(sent)
            except (BlockingIOError, InterruptedError):
                return False
            finally:
                self._is_sending = False
        return True

    def _take_off(self, sent: int) -> bool:
        """Takes off what was sent. True if the last frame of it was not sent as a whole."""
        while self._outgoing and sent:
            buffers = self._outgoing[0].buffers
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.popleft())
            if buffers:
                buffers[0] = buffers[0][sent:]
                return True
            self._outgoing.popleft()
        return False

    def _set_writing(self, wanted: bool) -> None:
        if wanted and not self._is_writing:
            self._loop.add_writer(self._socket.fileno(), self._flush)
        elif self._is_writing and not wanted:
            self._loop.remove_writer(self._socket.fileno())
        self._is_writing = wanted

    def _wake_drained(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    # --- In ---------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Takes what is there. False if nothing is."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _RECEIVE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data, ancillary, flags = b"", [], 0
        if not data:
            self._end("")
            return False
        descriptors = _descriptors_of(ancillary) if ancillary else ()
        if flags & socket.MSG_CTRUNC:
            _close(descriptors)
            self._end("more descriptors than are taken at once")
            return False
        try:
            frames = self._reader.feed(data, descriptors)
            self._handle_all(frames)
            self._reader.check()
        except MalformedMessage as error:
            self._end(error.text)
            return False
        return True

    def _handle_all(self, frames: Sequence[Frame]) -> None:
        taken = 0
        try:
            for frame in frames:
                if self._is_closed:
                    break
                taken += 1
                self._handled_place = frame.begins
                self._handle(frame)
            self._handled_place = None
        finally:
            for frame in frames[taken:]:
                _close(frame.descriptors)

    def _handle(self, frame: Frame) -> None:
        header = frame.header
        tensors: tuple[TensorValue, ...] = ()
        if _ANNOUNCED in header or frame.descriptors:
            self._announce(frame)
        if _DONE in header:
            self._take_notice(header)
            return
        if _TENSORS in header:
            described = header[_TENSORS]
            tensors = decode_tensors(described, frame.body, self._table)
            done = {item[3] for item in described if item[3]}
            if done:
                self._done += done
                self._plan_flush()
        self._on_message(header, tensors)

    def _announce(self, frame: Frame) -> None:
        match frame.header.get(_ANNOUNCED), frame.descriptors:
            case [int(number), int(size_bytes)], (descriptor,):
                self._table.add(number, size_bytes, descriptor)
            case _:
                _close(frame.descriptors)
                raise MalformedMessage("descriptors that nothing is said of")

    def _take_notice(self, header: dict[str, Any]) -> None:
        done, dropped = header.get(_DONE), header.get(_DROPPED)
        for numbers in (done, dropped):
            if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
                raise MalformedMessage("a notice of segments is not one")
        for number in dropped or ():
            self._table.forget(number)
        for number in done or ():
            self._pool.give_back(number)
        if self._dropped:
            self._plan_flush()

    def _end(self, text: str) -> None:
        if not self._is_closed:
            self.close()
            self._on_closed(text)


def _descriptors_of(ancillary: Sequence[tuple[int, int, bytes]]) -> Sequence[int]:
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return list(numbers)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
