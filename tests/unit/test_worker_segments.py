"""Segments: memory that two processes share, from both of its sides."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.worker_engine import files_open, maps_of_segments

from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.memory_files import SealedFile, is_sealed
from modelyard_server.execution.workers.segments import Segment, SegmentPool, SegmentTable

SIZE = 2**18


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    files, maps = len(files_open()), maps_of_segments()
    yield
    assert len(files_open()) == files
    assert maps_of_segments() == maps


def announced(pool: SegmentPool, size: int) -> Segment:
    segment = pool.take(size)
    assert segment is not None
    segment.is_announced = True
    return segment


def test_what_is_written_on_one_side_is_read_on_the_other() -> None:
    pool, table = SegmentPool(lambda number: None), SegmentTable()
    segment = announced(pool, 10)
    table.add(segment.number, segment.size_bytes, os.dup(segment.file.fileno()))
    segment.map[3:6] = b"abc"
    assert table.read(segment.number, 2, 5) == b"\0abc\0"
    pool.close()
    # The other side's map stays.
    assert table.read(segment.number, 3, 3) == b"abc"
    table.close()


def test_a_segment_is_used_again_when_the_other_side_is_done_with_it() -> None:
    pool = SegmentPool(lambda number: None)
    first = announced(pool, 2**20)
    second = announced(pool, SIZE)
    assert first.number != second.number
    pool.give_back(first.number)
    assert pool.take(2**20) is first
    with pytest.raises(MalformedMessage, match="not in use"):
        pool.give_back(77)
    pool.give_back(first.number)
    with pytest.raises(MalformedMessage, match="not in use"):
        pool.give_back(first.number)
    pool.close()


def test_free_segments_are_bounded_and_the_other_side_is_told() -> None:
    dropped: list[int] = []
    pool = SegmentPool(dropped.append)
    segments = [announced(pool, 2**25) for _ in range(4)]
    for segment in segments:
        pool.give_back(segment.number)
    assert dropped == [segment.number for segment in segments[:2]]
    assert pool.count == 2
    pool.close()


def test_a_segment_that_the_other_side_never_saw_is_dropped_without_a_word() -> None:
    dropped: list[int] = []
    pool = SegmentPool(dropped.append)
    segments = [pool.take(2**26), pool.take(2**26)]
    for segment in segments:
        assert segment is not None
        pool.give_back(segment.number)
    assert pool.count == 1
    assert not dropped
    pool.close()


def test_there_is_an_end_to_segments_on_both_sides() -> None:
    pool, table = SegmentPool(lambda number: None), SegmentTable()
    taken = 0
    while (segment := pool.take(SIZE)) is not None:
        table.add(segment.number, segment.size_bytes, os.dup(segment.file.fileno()))
        taken += 1
    assert taken == 64
    file = SealedFile.make("one-more", SIZE)
    with pytest.raises(MalformedMessage, match="more segments"):
        table.add(999, SIZE, os.dup(file.fileno()))
    file.close()
    assert pool.take(2**31) is None
    pool.close()
    table.close()


@pytest.mark.parametrize(
    ("begin", "size"), [(-1, 1), (0, SIZE + 1), (SIZE, 1), (2, -1), (2**70, 1), (1, 2**70)]
)
def test_what_is_not_all_in_a_segment_is_not_read(begin: int, size: int) -> None:
    table = SegmentTable()
    file = SealedFile.make("x", SIZE)
    table.add(1, SIZE, os.dup(file.fileno()))
    file.close()
    with pytest.raises(MalformedMessage, match="are not in segment 1"):
        table.read(1, begin, size)
    with pytest.raises(MalformedMessage, match="was not announced"):
        table.read(2, 0, 1)
    assert table.read(1, SIZE, 0) == b""
    table.close()


def _unsealed() -> int:
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    return descriptor


def _small() -> int:
    file = SealedFile.make("x", SIZE // 2)
    descriptor = os.dup(file.fileno())
    file.close()
    return descriptor


def _no_memory_file() -> int:
    return os.open("/dev/zero", os.O_RDWR)


@pytest.mark.parametrize("make", [_unsealed, _small, _no_memory_file])
def test_only_sealed_files_of_the_right_size_are_mapped(make: Callable[[], int]) -> None:
    table = SegmentTable()
    with pytest.raises(MalformedMessage, match="is not sealed"):
        table.add(1, SIZE, make())
    assert table.count == 0


def test_a_sealed_file_keeps_its_size() -> None:
    file = SealedFile.make("x", SIZE)
    assert is_sealed(file.fileno(), SIZE)
    assert not is_sealed(file.fileno(), SIZE - 1)
    for size in (0, SIZE * 2):
        with pytest.raises(OSError):
            os.ftruncate(file.fileno(), size)
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.fileno()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2**21), st.booleans()), max_size=40))
def test_both_sides_agree_on_what_there_is(steps: list[tuple[int, bool]]) -> None:
    table = SegmentTable()
    pool = SegmentPool(table.forget)
    taken: list[Segment] = []
    for size, is_done in steps:
        if is_done and taken:
            pool.give_back(taken.pop(0).number)
            continue
        segment = pool.take(size)
        assert segment is not None
        if not segment.is_announced:
            segment.is_announced = True
            table.add(segment.number, segment.size_bytes, os.dup(segment.file.fileno()))
        taken.append(segment)
        segment.map[0:1] = bytes([segment.number % 256])
        assert table.read(segment.number, 0, 1) == bytes([segment.number % 256])
    assert table.count == pool.count
    pool.close()
    table.close()
