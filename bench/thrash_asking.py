"""Asking a server for one text after the other: by callers that wait for answers, or at a pace.

Requests are messages made beforehand, and answers are only unpacked: what asks shares the machine's
processors with what is measured.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from google.rpc import status_pb2 as rpc_status_pb2

from bench.load import connected
from bench.thrash_figures import Answer
from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1 import tensor_pb2

__all__ = ["answer_at_a_pace", "answer_in_turn", "frame_of", "refusal_facts", "zipf_draws"]

_CONNECTIONS: Final = 4
_STATUS_DETAILS: Final = "grpc-status-details-bin"


def frame_of(model: str, text: str) -> bytes:
    """A PredictRequest for one text."""
    request = pb.PredictRequest(key=model)
    tensor = request.inputs.add()
    tensor.data_type = tensor_pb2.DATA_TYPE_TEXT
    tensor.shape.append(1)
    tensor.text.values.append(text)
    return request.SerializeToString()


def zipf_draws(names: Sequence[str], exponent: float, count: int, seed: int) -> list[str]:
    """Names drawn at random, the i-th of them with a weight of i to the minus exponent."""
    weights = [(i + 1) ** -exponent for i in range(len(names))]
    return random.Random(seed).choices(names, weights, k=count)


def answer_in_turn(
    target: str,
    frames: Sequence[bytes],
    callers: int,
    deadline_s: float,
    *,
    check: Callable[[pb.PredictResponse], None] = lambda _: None,
) -> float:
    """Have requests answered by callers, each of which asks for the next one that is left.

    Args:
        target: the server's address.
        frames: requests, in order.
        callers: requests in flight at once.
        deadline_s: of each.
        check: looks at an answer.

    Returns:
        Seconds from the first request to the last answer.

    Raises:
        grpc.aio.AioRpcError: a request was not answered.
    """
    return asyncio.run(_in_turn(target, iter(frames), callers, deadline_s, check))


async def _in_turn(
    target: str,
    frames: Iterator[bytes],
    callers: int,
    deadline_s: float,
    check: Callable[[pb.PredictResponse], None],
) -> float:
    async def caller(predict: Any) -> None:
        for frame in frames:
            check(await predict(frame, timeout=deadline_s))

    async with connected(target, min(_CONNECTIONS, callers)) as clients:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for i in range(callers):
                group.create_task(caller(clients[i % len(clients)]))
        return time.perf_counter() - began


async def answer_at_a_pace(
    target: str,
    frames: Sequence[bytes],
    phases: Sequence[tuple[float, float]],
    deadline_s: float,
    seed: int,
) -> list[list[Answer]]:
    """Ask at random times of a mean rate, whether or not earlier requests have been answered.

    Args:
        target: the server's address.
        frames: requests, drawn at random.
        phases: of each its rate, a second, and how long it lasts, in seconds; one follows on the
            other.
        deadline_s: of each request.
        seed: of the times and of who is asked.

    Returns:
        For each phase what became of the requests that were due in it; times are seconds from the
        beginning of the first.
    """
    chance = random.Random(seed)
    found: list[list[Answer]] = [[] for _ in phases]
    async with connected(target, _CONNECTIONS) as clients:
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def ask(predict: Any, frame: bytes, due_s: float, into: list[Answer]) -> None:
            # Its time counts from when it was due, and it may not have been sent at once.
            left_s = due_s + deadline_s - (loop.time() - began)
            try:
                await predict(frame, timeout=max(0.001, left_s))
            except grpc.aio.AioRpcError as error:
                reason, has_retry = refusal_facts(error)
                ended_s = loop.time() - began
                into.append(Answer(due_s=due_s, ended_s=ended_s, error=reason, has_retry=has_retry))
            else:
                into.append(Answer(due_s=due_s, ended_s=loop.time() - began))

        async with asyncio.TaskGroup() as group:
            begin_s = 0.0
            for (rate, seconds), into in zip(phases, found, strict=True):
                due_s = begin_s + chance.expovariate(rate)
                while due_s < begin_s + seconds:
                    await asyncio.sleep(max(0.0, due_s - (loop.time() - began)))
                    frame = chance.choice(frames)
                    client = clients[chance.randrange(len(clients))]
                    group.create_task(ask(client, frame, due_s, into))
                    due_s += chance.expovariate(rate)
                begin_s += seconds
    return found


def refusal_facts(error: grpc.aio.AioRpcError) -> tuple[str, bool]:
    """The server's reason for an error, and whether it says when to come again.

    A call whose time is over at this side has no reason; then it is the status code.
    """
    for key, value in error.trailing_metadata() or ():
        if key == _STATUS_DETAILS and isinstance(value, bytes):
            details = rpc_status_pb2.Status.FromString(value).details
            info = error_details_pb2.ErrorInfo()
            reasons = [info.reason for detail in details if detail.Unpack(info)]
            retry = error_details_pb2.RetryInfo.DESCRIPTOR
            return "".join(reasons[:1]), any(detail.Is(retry) for detail in details)
    return error.code().name, False
