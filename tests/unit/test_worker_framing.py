"""Frames between the server and its workers: however they are cut, and whatever else comes."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.execution.workers.framing import (
    MARK,
    MAX_BODY_BYTES,
    MAX_DESCRIPTORS,
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    Frame,
    FrameReader,
    MalformedMessage,
    frame_start,
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)
HEADERS = st.dictionaries(st.text(), VALUES, max_size=5)
MESSAGES = st.lists(st.tuples(HEADERS, st.binary(max_size=200)), max_size=6)


def stream_of(messages: list[tuple[dict[str, Any], bytes]]) -> bytes:
    return b"".join(frame_start(header, len(body), 0) + body for header, body in messages)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(position % (len(data) + 1) for position in at)})
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


@given(MESSAGES, st.lists(st.integers(0, 10**6), max_size=12))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(
    messages: list[tuple[dict[str, Any], bytes]], at: list[int]
) -> None:
    reader = FrameReader()
    frames: list[Frame] = []
    for piece in cut(stream_of(messages), at):
        frames += reader.feed(piece)
    assert [(frame.header, bytes(frame.body)) for frame in frames] == messages
    assert not any(frame.descriptors for frame in frames)


@given(st.binary(max_size=300), st.lists(st.integers(0, 10**6), max_size=5))
def test_noise_is_refused_or_waited_for_and_nothing_else(noise: bytes, at: list[int]) -> None:
    reader = FrameReader()
    try:
        frames = [frame for piece in cut(noise, at) for frame in reader.feed(piece)]
    except MalformedMessage:
        return
    # Nobody who writes noise hits upon the four bytes that a frame begins with.
    assert not frames
    assert len(noise) < PREFIX_BYTES


@given(MESSAGES.filter(bool), st.data())
def test_a_frame_that_is_changed_somewhere_is_refused_or_is_another_frame(
    messages: list[tuple[dict[str, Any], bytes]], data: st.DataObject
) -> None:
    stream = bytearray(stream_of(messages))
    position = data.draw(st.integers(0, len(stream) - 1))
    stream[position] ^= data.draw(st.integers(1, 255))
    reader = FrameReader()
    try:
        frames = reader.feed(bytes(stream))
    except MalformedMessage:
        return
    assert all(isinstance(frame.header, dict) for frame in frames)


def prefix(header_bytes: int, body_bytes: int, descriptors: int) -> bytes:
    start = bytearray(frame_start({}, 0, 0)[:PREFIX_BYTES])
    start[4:8] = header_bytes.to_bytes(4, "little")
    start[8:16] = body_bytes.to_bytes(8, "little")
    start[16:20] = descriptors.to_bytes(4, "little")
    return bytes(start)


@pytest.mark.parametrize(
    "start",
    [
        prefix(MAX_HEADER_BYTES + 1, 0, 0),
        prefix(2, MAX_BODY_BYTES + 1, 0),
        prefix(2, 2**64 - 1, 0),
        prefix(2, 0, MAX_DESCRIPTORS + 1),
        b"myw2" + prefix(2, 0, 0)[4:],
        MARK[:-1] + b"\1",
        prefix(0, 0, 0),
        prefix(2, 0, 0) + b"[]",
        prefix(2, 0, 0) + b"\xff\xff",
        prefix(4, 0, 0) + b"nul{",
        prefix(2, 0, 1) + b"{}",
        prefix(10**5, 0, 0) + b"[" * 10**5,
    ],
)
def test_lengths_and_headers_that_cannot_be_are_refused_at_once(start: bytes) -> None:
    with pytest.raises(MalformedMessage):
        FrameReader().feed(start)


@given(MESSAGES, st.lists(st.integers(0, 10**6), max_size=5), st.data())
def test_marks_say_nothing_and_count(
    messages: list[tuple[dict[str, Any], bytes]], at: list[int], data: st.DataObject
) -> None:
    stream, places = b"", []
    for message in messages:
        stream += MARK * data.draw(st.integers(0, 2))
        places.append(len(stream))
        stream += stream_of([message])
    stream += MARK
    reader = FrameReader()
    frames = [frame for piece in cut(stream, at) for frame in reader.feed(piece)]
    assert [(frame.header, bytes(frame.body)) for frame in frames] == messages
    assert [frame.begins for frame in frames] == places
    assert reader.place == len(stream)


@given(MESSAGES.filter(bool), st.lists(st.integers(0, 10**6), max_size=5))
def test_what_comes_before_noise_is_heard_and_the_place_of_the_noise_is_known(
    messages: list[tuple[dict[str, Any], bytes]], at: list[int]
) -> None:
    good = stream_of(messages) + MARK
    reader = FrameReader()
    frames: list[Frame] = []
    with pytest.raises(MalformedMessage, match="does not begin like one"):
        for piece in cut(good + b"this is no frame; " * 10, at):
            frames += reader.feed(piece)
        reader.check()
    assert [(frame.header, bytes(frame.body)) for frame in frames] == messages
    assert reader.place == len(good)
    with pytest.raises(MalformedMessage):
        reader.feed(stream_of(messages))


def test_the_largest_lengths_are_waited_for_and_nothing_is_kept_for_them() -> None:
    reader = FrameReader()
    assert reader.feed(prefix(MAX_HEADER_BYTES, MAX_BODY_BYTES, MAX_DESCRIPTORS)) == []


def test_what_is_too_large_is_not_sent() -> None:
    with pytest.raises(ValueError, match="too large"):
        frame_start({"x": "a" * MAX_HEADER_BYTES}, 0, 0)
    with pytest.raises(ValueError, match="too large"):
        frame_start({}, MAX_BODY_BYTES + 1, 0)


def test_descriptors_belong_to_the_frames_that_name_them_and_the_rest_are_closed() -> None:
    reader = FrameReader()
    first, second, third = (os.open("/dev/null", os.O_RDONLY) for _ in range(3))
    assert reader.feed(frame_start({"n": 1}, 2, 1) + b"a", [first]) == []
    frames = reader.feed(b"b" + frame_start({"n": 2}, 0, 0) + frame_start({"n": 3}, 0, 1), [second])
    assert [(frame.header["n"], frame.descriptors) for frame in frames] == [
        (1, (first,)),
        (2, ()),
        (3, (second,)),
    ]
    reader.feed(b"my", [third])
    reader.close()
    with pytest.raises(OSError):
        os.fstat(third)
    os.close(first)
    os.close(second)


def test_descriptors_without_end_are_refused_and_closed() -> None:
    reader = FrameReader()
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(MAX_DESCRIPTORS + 1)]
    with pytest.raises(MalformedMessage):
        reader.feed(b"m", many)
    reader.close()
    for descriptor in many:
        with pytest.raises(OSError):
            os.fstat(descriptor)
