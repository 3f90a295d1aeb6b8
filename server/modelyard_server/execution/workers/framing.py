"""Frames: how messages between the server and a worker lie in the stream of a socket.

A frame is a prefix of fixed size, a header (JSON) and a body (raw bytes). Descriptors of files go
with its first byte. Every length is checked before anything is kept for it. Whoever sends a frame
that is not one is not listened to any more: after that nobody knows where the next one begins.

Between frames there may be marks, which say nothing. What they are for: both ends count the bytes
of the stream, and something that somebody else writes into it lies at the place that the stream had
reached. A mark moves that place.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "MARK",
    "MAX_BODY_BYTES",
    "MAX_DESCRIPTORS",
    "MAX_HEADER_BYTES",
    "PREFIX_BYTES",
    "Frame",
    "FrameReader",
    "MalformedMessage",
    "frame_start",
]

MAX_HEADER_BYTES = 8 * 2**20
"""Of one header. The largest are prices of models with many thousand tensors."""

MAX_BODY_BYTES = 2**32
"""Of one body."""

MAX_DESCRIPTORS = 4
"""With one frame, and on the way without one."""

_MAGIC = b"myw1"
_PREFIX = struct.Struct("<4sIQI")
PREFIX_BYTES = _PREFIX.size
_MARK_MAGIC = b"mywm"
MARK = _PREFIX.pack(_MARK_MAGIC, 0, 0, 0)
"""A mark. See the module."""


class MalformedMessage(Exception):
    """What came from the other side is not what it should be.

    Attributes:
        text: what is wrong with it, for the log.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True, slots=True)
class Frame:
    """What came as one.

    Attributes:
        header: an object of JSON.
        body: raw bytes.
        descriptors: open files; whoever takes the frame closes them.
        begins: its place in the stream: bytes of all frames and marks before it.
    """

    header: dict[str, Any]
    body: memoryview
    descriptors: tuple[int, ...]
    begins: int = 0


def frame_start(header: dict[str, Any], body_bytes: int, descriptors: int) -> bytes:
    """Everything of a frame that comes before its body.

    Args:
        header: values of JSON.
        body_bytes: size of the body that follows.
        descriptors: how many go with it.

    Raises:
        ValueError: it would be larger than a frame may be.
    """
    text = _dumps(header).encode("ascii")
    if len(text) > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise ValueError(
            f"a message of {len(text)} and {body_bytes} bytes is too large for a worker"
        )
    return _PREFIX.pack(_MAGIC, len(text), body_bytes, descriptors) + text


# ASCII, because that carries whatever a Python string can hold, halves of surrogates included.
_dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class FrameReader:
    """Finds the frames in what a socket gives. Close it: it may hold descriptors.

    Attributes:
        place: in the stream, of what comes after the frames and marks that were found.
    """

    def __init__(self) -> None:
        self.place = 0
        self._malformed: MalformedMessage | None = None
        self._rest = bytearray()
        self._needed = PREFIX_BYTES
        self._descriptors: list[int] = []

    def feed(self, data: bytes, descriptors: Sequence[int] = ()) -> list[Frame]:
        """Takes what was received, and returns the frames that are complete by that.

        Args:
            data: the next bytes of the stream.
            descriptors: that came with them; taken over in any case.

        Raises:
            MalformedMessage: it begins with what is no frame. The reader is of no more use then.
                If there are frames before that, they are returned, and `check` raises.
        """
        self._descriptors += descriptors
        self.check()
        if len(self._descriptors) > MAX_DESCRIPTORS:
            raise MalformedMessage(f"{len(self._descriptors)} descriptors at one time")
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        frames: list[Frame] = []
        view = memoryview(data)
        try:
            while len(view) >= (needed := self._size_of(view)):
                if view[: len(_MARK_MAGIC)] != _MARK_MAGIC:
                    frames.append(self._frame(view[:needed]))
                view = view[needed:]
                self.place += needed
        except MalformedMessage as error:
            self._malformed = error
            if not frames:
                raise
            return frames
        self._rest += view
        self._needed = needed
        return frames

    def check(self) -> None:
        """Raises MalformedMessage if what came after the last frames is none."""
        if self._malformed is not None:
            raise self._malformed

    def close(self) -> None:
        """Closes the descriptors whose frames have not come."""
        _close(self._descriptors)
        self._descriptors.clear()

    def _size_of(self, view: memoryview) -> int:
        """Bytes of the frame that begins here; of the prefix as long as that is not there."""
        if len(view) < PREFIX_BYTES:
            return PREFIX_BYTES
        magic, header_bytes, body_bytes, descriptors = _PREFIX.unpack_from(view)
        if magic != _MAGIC:
            if view[:PREFIX_BYTES] == MARK:
                return PREFIX_BYTES
            raise MalformedMessage("a frame does not begin like one")
        if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
            raise MalformedMessage(f"a frame of {header_bytes} and {body_bytes} bytes")
        if descriptors > MAX_DESCRIPTORS:
            raise MalformedMessage(f"a frame with {descriptors} descriptors")
        return PREFIX_BYTES + int(header_bytes) + int(body_bytes)

    def _frame(self, view: memoryview) -> Frame:
        _, header_bytes, _, count = _PREFIX.unpack_from(view)
        body_begins = PREFIX_BYTES + header_bytes
        try:
            header = json.loads(bytes(view[PREFIX_BYTES:body_begins]))
        except (ValueError, RecursionError) as error:
            raise MalformedMessage(f"a header is not JSON: {type(error).__name__}") from None
        if not isinstance(header, dict):
            raise MalformedMessage("a header is no object")
        if count > len(self._descriptors):
            raise MalformedMessage("a descriptor did not come")
        descriptors, self._descriptors = (
            tuple(self._descriptors[:count]),
            self._descriptors[count:],
        )
        return Frame(header, view[body_begins:], descriptors, self.place)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
