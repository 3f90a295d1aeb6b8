"""Channels: two ends, and what happens when one of them lies."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.worker_engine import files_open, maps_of_segments, until

from modelyard_server.execution.workers.channel import Channel
from modelyard_server.execution.workers.framing import (
    MARK,
    FrameReader,
    MalformedMessage,
    frame_start,
)
from modelyard_server.execution.workers.memory_files import SealedFile
from modelyard_server.runtimes.tensors import DType, TensorValue


class End:
    """One end, and what it heard."""

    def __init__(self, end: socket.socket) -> None:
        self.messages: list[tuple[dict[str, Any], tuple[TensorValue, ...]]] = []
        self.closed: list[str] = []
        self.channel = Channel(
            end,
            asyncio.get_running_loop(),
            on_message=self.hear,
            on_closed=self.closed.append,
        )

    def hear(self, header: dict[str, Any], tensors: tuple[TensorValue, ...]) -> None:
        if header.get("op") == "nonsense":
            raise MalformedMessage("nonsense")
        self.messages.append((header, tensors))


@pytest.fixture
async def sockets() -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    files, maps = len(files_open()), maps_of_segments()
    here, there = socket.socketpair()
    yield here, there
    here.close()
    there.close()
    assert len(files_open()) == files
    assert maps_of_segments() == maps


@pytest.fixture
async def ends(sockets: tuple[socket.socket, socket.socket]) -> AsyncIterator[tuple[End, End]]:
    here, there = (End(end) for end in sockets)
    yield here, there
    here.channel.close()
    there.channel.close()


def tensor(size: int) -> TensorValue:
    return TensorValue(name="x", dtype=DType.UINT8, shape=(size,), data=os.urandom(size))


async def test_messages_arrive_in_order_and_complete(ends: tuple[End, End]) -> None:
    here, there = ends
    sent = [tensor(size) for size in (0, 5, 70_000, 3_000_000, 65_536, 1, 200_000)]
    for number, value in enumerate(sent):
        here.channel.send({"n": number}, (value, tensor(0)) if number % 2 else (value,))
        here.channel.send({"n": -number})
    await until(lambda: len(there.messages) == 2 * len(sent))
    assert [header["n"] for header, _ in there.messages[::2]] == list(range(len(sent)))
    assert [tensors[0] for _, tensors in there.messages[::2]] == sent
    assert not any(tensors for _, tensors in there.messages[1::2])


async def test_what_comes_before_noise_is_heard_and_the_place_of_the_noise_is_known(
    ends: tuple[End, End], sockets: tuple[socket.socket, socket.socket]
) -> None:
    here, there = ends
    here.channel.send({"n": 1}, (tensor(70_000),))
    here.channel.send({"n": 2})
    await here.channel.drain()
    place = here.channel.mark()
    assert place == here.channel.at_least() == here.channel.at_most()
    # In one go with what can be understood, so that it is read together.
    sockets[0].send(b"this is no frame; " * 10)
    assert here.channel.mark() == place + len(MARK)
    await until(lambda: bool(there.closed))
    assert [header["n"] for header, _ in there.messages] == [1, 2]
    assert there.closed == ["a frame does not begin like one"]
    assert there.channel.place == place


async def test_the_place_of_a_message_that_makes_no_sense_is_its_beginning(
    ends: tuple[End, End],
) -> None:
    here, there = ends
    here.channel.send({"n": 1})
    await here.channel.drain()
    place = here.channel.at_least()
    here.channel.send({"op": "nonsense"})
    here.channel.send({"n": 2})
    await until(lambda: bool(there.closed))
    assert [header["n"] for header, _ in there.messages] == [1]
    assert there.channel.place == place


async def test_marks_lie_between_messages_however_these_are_cut(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    here, there = End(sockets[0]), sockets[1]
    there.setblocking(False)
    for number in range(100):
        here.channel.send({"n": number}, (tensor(60_000),))
    for _ in range(3):
        await asyncio.sleep(0)
    # All the socket takes has left; it takes no more, and it may have stopped amid a message.
    sent = here.channel.at_least()
    assert here.channel.mark() is None
    assert here.channel.at_least() == sent == here.channel.at_most()
    reader = FrameReader()
    numbers: list[int] = []
    while len(numbers) < 100:
        # In pieces of odd sizes, so that there is room for parts of messages.
        for _ in range(7):
            with contextlib.suppress(BlockingIOError):
                numbers += [frame.header["n"] for frame in reader.feed(there.recv(12_345))]
        here.channel.mark()
        await asyncio.sleep(0)
    assert numbers == list(range(100))
    assert here.channel.mark() == here.channel.at_least()
    assert not reader.feed(there.recv(12_345))
    assert reader.place == here.channel.at_least()
    here.channel.close()
    assert here.channel.mark() is None


async def test_far_more_than_the_socket_takes_leaves_in_the_end(ends: tuple[End, End]) -> None:
    here, there = ends
    value = tensor(60_000)
    for number in range(600):
        here.channel.send({"n": number}, (value,))
    await here.channel.drain()
    await until(lambda: len(there.messages) == 600)
    assert all(tensors == (value,) for _, tensors in there.messages)
    assert [header["n"] for header, _ in there.messages] == list(range(600))


async def test_segments_are_used_again_and_no_more_are_made(ends: tuple[End, End]) -> None:
    here, there = ends
    value = tensor(2**20)
    for number in range(30):
        here.channel.send({}, (value,))
        await until(lambda number=number: len(there.messages) == number + 1)  # type: ignore[misc]
        # The notice that they are done with it.
        await asyncio.sleep(0)
        await until(lambda: here.channel.segments <= 2)
    assert there.channel.segments <= 2


async def test_a_closed_end_closes_the_other_after_what_it_said(ends: tuple[End, End]) -> None:
    here, there = ends
    here.channel.send({"n": 1})
    await here.channel.drain()
    here.channel.close()
    here.channel.close()
    here.channel.send({"n": 2})
    await here.channel.drain()
    await until(lambda: there.closed == [""])
    assert there.messages == [({"n": 1}, ())]
    assert here.closed == []
    assert there.channel.is_closed


async def test_a_message_that_is_too_large_is_refused_and_the_channel_goes_on(
    ends: tuple[End, End],
) -> None:
    here, there = ends
    with pytest.raises(ValueError, match="too large"):
        here.channel.send({"x": "a" * 2**23}, (tensor(2**17),))
    value = tensor(2**17)
    here.channel.send({"n": 1}, (value,))
    await until(lambda: len(there.messages) == 1)
    assert there.messages[0][1] == (value,)


async def test_what_the_receiver_does_not_understand_closes_the_channel(
    ends: tuple[End, End],
) -> None:
    here, there = ends
    here.channel.send({"op": "nonsense"})
    here.channel.send({"n": 1})
    await until(lambda: there.closed == ["nonsense"])
    assert there.messages == []


DESCRIBED = ["x", 6, [1], 0, 0, 1]


def described(**changes: Any) -> dict[str, Any]:
    places = {"name": 0, "dtype": 1, "shape": 2, "segment": 3, "begin": 4, "size": 5}
    item: list[Any] = list(DESCRIBED)
    for name, value in changes.items():
        item[places[name]] = value
    return {"tensors": [item]}


@pytest.mark.parametrize(
    "header",
    [
        {"tensors": 5},
        {"tensors": [5]},
        {"tensors": [[]]},
        described(name=5),
        described(dtype=0),
        described(dtype=99),
        described(dtype=[1]),
        described(shape="1"),
        described(shape=[1.0]),
        described(shape=[True]),
        described(shape=[2]),
        described(shape=[-1]),
        described(shape=[1] * 9),
        described(segment=1),
        described(segment=-1),
        described(segment="0"),
        described(begin=-1),
        described(begin=1),
        described(begin=None),
        described(size=2),
        described(size=-1),
        described(size=2**70),
        described(dtype=14, size=1),
        {"segment": [1, 2**18]},
        {"segment": 7},
        {"done": [1], "dropped": []},
        {"done": [], "dropped": [1]},
        {"done": [[]], "dropped": []},
        {"done": 1},
    ],
)
async def test_lies_about_tensors_and_segments_close_the_channel(
    sockets: tuple[socket.socket, socket.socket], header: dict[str, Any]
) -> None:
    liar, end = sockets
    victim = End(end)
    good = frame_start({"tensors": [DESCRIBED]}, 1, 0) + b"a"
    liar.sendall(good + frame_start(header, 1, 0) + b"a" + good)
    await until(lambda: bool(victim.closed))
    assert victim.closed != [""]
    assert [tensors[0].data for _, tensors in victim.messages] == [b"a"]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 30])
async def test_descriptors_that_nobody_asked_for_are_closed(
    sockets: tuple[socket.socket, socket.socket], count: int
) -> None:
    liar, end = sockets
    victim = End(end)
    file = SealedFile.make("x", 2**18)
    frame = frame_start({"n": 1}, 0, min(count, 4))
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()] * count))
    liar.sendmsg([frame + frame_start({"n": 2}, 0, 0)], [rights])
    file.close()
    await until(lambda: bool(victim.closed))
    assert victim.closed != [""]
    assert victim.messages == []


async def test_a_segment_announced_twice_closes_the_channel(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    liar, end = sockets
    victim = End(end)
    file = SealedFile.make("x", 2**18)
    for _ in range(2):
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))
        liar.sendmsg([frame_start({"segment": [1, 2**18]}, 0, 1)], [rights])
    file.close()
    await until(lambda: bool(victim.closed))
    assert victim.closed == ["segment 1 is announced twice"]
    assert victim.messages == [({"segment": [1, 2**18]}, ())]
