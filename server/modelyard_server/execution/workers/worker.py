"""A worker process: an engine of threads that is spoken to over a channel.

It is forked from the zygote and does nothing but translate: a message becomes a call of the engine,
what comes of it becomes a message. What it may do is little (limits.py), and whatever happens to it
happens to nobody else.

Messages to it, each with `op`: price, load, unload, drop_copy, recheck, run and stop carry `call`,
a number that comes back with the answer; cancel, abandon and ping do not. From it: ready, pong, and
answers, which are `result`, `error` or, of a run that was abandoned in time, neither. Answers that
change what is measured say what it is now (`memory`): of each device, and behind the last of them
of the copies that are kept. Answers of runs that were measured say what they took (`measured`).
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import traceback
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from modelyard_server.execution.batcher import BatchLimits
from modelyard_server.execution.engine import DeviceMemory, EngineDevice, RunOutcome, Work
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.execution.workers.board import BoardWriter
from modelyard_server.execution.workers.channel import Channel
from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.limits import (
    close_all_but,
    data_bytes,
    die_with_parent,
    limit_process,
    refuse_network,
)
from modelyard_server.execution.workers.measurements import encode_points
from modelyard_server.execution.workers.payload import RemoteError, encode_error, understand
from modelyard_server.execution.workers.records import (
    decode_device,
    decode_spec,
    decode_target,
    encode_bytes,
    encode_loaded,
    encode_memory,
    encode_price,
    encode_unloaded,
)
from modelyard_server.execution.workers.settings import RuntimeSource
from modelyard_server.execution.workers.watched import CalledInputs, CalledSpec, WatchedRuntime
from modelyard_server.runtimes.api import Runtime
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.targets import DISK
from modelyard_server.runtimes.tensors import TensorValue
from modelyard_server.weights.activation_model import ActivationPoint

__all__ = ["run_worker"]

logger = logging.getLogger(__name__)


def run_worker(
    end: int,
    board: int,
    order: Mapping[str, Any],
    source: RuntimeSource,
    *,
    parent_pid: int,
) -> None:
    """Is a worker until it is told to stop or nobody is there any more. Never returns.

    Args:
        end: descriptor of its end of the channel.
        board: descriptor of its board's file.
        order: what is to be known of it: its `name`, `devices` (by position; None for those of
            other groups), the `runtimes` to be warmed up, and most rows and bytes of `batches`.
        source: of its runtimes.
        parent_pid: of the process that forked it.
    """
    code = 1
    try:
        die_with_parent(parent_pid)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        close_all_but((0, 1, 2, end, board))
        faulthandler.enable()
        limit_process()
        refuse_network()
        runtimes = source.make(in_worker=True)
        with asyncio.Runner() as runner:
            worker = _Worker(socket.socket(fileno=end), BoardWriter(board), order, runtimes)
            runner.get_loop().set_exception_handler(_log_unhandled)
            runner.run(worker.work())
        code = 0
    except BaseException:
        logger.exception("worker %s fails", order.get("name"))
    finally:
        # No clean-up: threads may still run models, and what this process holds goes with it.
        os._exit(code)


def _log_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    logger.error("in a worker: %s", context.get("message"), exc_info=context.get("exception"))


class _Worker:
    def __init__(
        self,
        end: socket.socket,
        board: BoardWriter,
        order: Mapping[str, Any],
        runtimes: Mapping[str, Runtime],
    ) -> None:
        self._end = end
        self._board = board
        self._name: str = order["name"]
        self._warm: Sequence[str] = order["runtimes"]
        # A device of another group has neither lane nor loader here, just like a disk.
        self._devices = [
            EngineDevice(name=DISK, torch_device=DISK, threads=1)
            if device is None
            else decode_device(device)
            for device in order["devices"]
        ]
        self._own = [
            position for position, device in enumerate(order["devices"]) if device is not None
        ]
        # Of loads whose answers are not sent yet.
        self._held: dict[int, Mapping[int, int]] = {}
        # Calls that loaded the models that are there, and by those the calls that keep their
        # weights now.
        self._load_calls: dict[int, int] = {}
        self._keeps: dict[int, int] = {}
        most_rows, most_bytes = order["batches"]
        self._engine = ThreadEngine(
            devices=self._devices,
            batches=BatchLimits(most_rows=most_rows, most_bytes=most_bytes),
            on_ran=board.write_figures,
            runtimes={
                name: WatchedRuntime(runtime, board, self._held, self._keeps)
                for name, runtime in runtimes.items()
            },
        )
        self._engine.on_measured = self._on_measured
        self._measured: Sequence[ActivationPoint] = ()
        self._works: dict[int, Work] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._channel: Channel

    async def work(self) -> None:
        """Answers until it is over."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        self._over = over
        started = data_bytes()
        await self._engine.start(self._warm)
        self._channel = Channel(
            self._end, loop, on_message=self._on_message, on_closed=self._on_closed
        )
        self._board.follow(self._channel)
        self._channel.send({"op": "ready", "data_bytes": started})
        await over
        await self._channel.drain()

    def _on_closed(self, text: str) -> None:
        if text:
            logger.error("worker %s was sent what it cannot understand: %s", self._name, text)
        if not self._over.done():
            self._over.set_result(None)

    def _on_message(self, message: dict[str, Any], tensors: tuple[TensorValue, ...]) -> None:
        op = message.get("op")
        if op == "run":
            self._run(message, tensors)
        elif op == "abandon":
            work = self._works.get(message["call"])
            if work is not None:
                work.abandon()
        elif op == "ping":
            self._channel.send({"op": "pong", "number": message["number"]})
        elif op == "cancel":
            # Behind the load that it is for: that one's task may have been made in this same turn
            # of the loop, and the engine knows of no load before its task has begun.
            asyncio.get_running_loop().call_soon(self._engine.cancel_load, message["model"])
        else:
            self._start_call(op, message)

    # --- Runs -------------------------------------------------------------------------------------

    def _run(self, message: dict[str, Any], tensors: tuple[TensorValue, ...]) -> None:
        call = message["call"]
        inputs = CalledInputs(tensors, call)
        is_done = False

        def on_done(outcome: RunOutcome | None) -> None:
            nonlocal is_done
            is_done = True
            self._works.pop(call, None)
            measured, self._measured = self._measured, ()
            self._answer_run(call, outcome, measured)

        try:
            client = partial(str, message["client"])
            work = self._engine.run(
                message["model"],
                inputs,
                message["parameters"],
                on_done,
                client,
                message["waited_s"],
            )
        except KeyError:
            self._channel.send({"op": "answer", "call": call, "error": ["lost"]})
            return
        if not is_done:
            self._works[call] = work

    def _on_measured(self, model: int, points: Sequence[ActivationPoint]) -> None:
        # The answer that they go with is the next one, in this turn of the loop.
        self._measured = points

    def _answer_run(
        self, call: int, outcome: RunOutcome | None, measured: Sequence[ActivationPoint]
    ) -> None:
        answer: dict[str, Any] = {"op": "answer", "call": call}
        try:
            if outcome is None:
                self._channel.send(answer)
            elif isinstance(outcome, BaseException):
                self._channel.send(answer | {"error": encode_error(outcome, "")})
            else:
                what = {"measured": encode_points(measured)} if measured else {}
                self._channel.send(answer | {"result": None, **what}, outcome)
        except (MemoryError, ValueError) as error:  # The answer is too large, for here or for them.
            failed = ["failed", type(error).__name__, f"its outputs cannot be sent: {error}"]
            self._channel.send(answer | {"error": failed})

    # --- Everything else --------------------------------------------------------------------------

    def _start_call(self, op: object, message: dict[str, Any]) -> None:
        calls = {
            "price": self._price,
            "load": self._load,
            "unload": self._unload,
            "drop_copy": self._drop_copy,
            "recheck": self._recheck,
            "stop": self._stop,
        }
        if not isinstance(op, str) or op not in calls:
            raise MalformedMessage(f"{op!r} is no message to a worker")
        work = understand(partial(calls[op], message))
        task = asyncio.get_running_loop().create_task(self._call(message["call"], work), name=op)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _call(self, call: int, work: Coroutine[Any, Any, dict[str, Any]]) -> None:
        answer: dict[str, Any] = {"op": "answer", "call": call}
        try:
            answer |= await work
        except Exception as error:  # the process's edge: it becomes an answer
            answer["error"] = encode_error(error, "".join(traceback.format_exception(error)))
            forget_frames(error)
        try:
            self._channel.send(answer)
        except ValueError as error:
            failed = RemoteError(str(error))
            self._channel.send(
                {"op": "answer", "call": call, "error": encode_error(failed, failed.log_text)}
            )

    async def _price(self, message: dict[str, Any]) -> dict[str, Any]:
        spec = CalledSpec.of(decode_spec(message["spec"]), message["call"])
        return {"result": encode_price(await self._engine.price(spec))}

    async def _load(self, message: dict[str, Any]) -> dict[str, Any]:
        call = message["call"]
        spec = CalledSpec.of(decode_spec(message["spec"]), call)
        target = decode_target(message["target"])
        try:
            loaded = await self._engine.load(message["model"], spec, target)
            held = self._held[call]
        finally:
            self._held.pop(call, None)
        self._load_calls[message["model"]] = call
        return {"result": encode_loaded(loaded), "held": encode_bytes(held), **self._memory()}

    async def _unload(self, message: dict[str, Any]) -> dict[str, Any]:
        model, keep = message["model"], message["keep"]
        load_call = self._load_calls[model]
        if keep:
            self._keeps[load_call] = message["call"]
        try:
            unloaded = await self._engine.unload(model, keep=keep, most_bytes=message["most_bytes"])
        finally:
            self._keeps.pop(load_call, None)
        del self._load_calls[model]
        return {"result": encode_unloaded(unloaded), **self._memory()}

    async def _drop_copy(self, message: dict[str, Any]) -> dict[str, Any]:
        is_back = await self._engine.drop_copy(message["model"])
        return {"result": is_back, **self._memory()}

    async def _recheck(self, message: dict[str, Any]) -> dict[str, Any]:
        back = await self._engine.recheck(message["model"])
        return {"result": encode_bytes(back), **self._memory()}

    async def _stop(self, message: dict[str, Any]) -> dict[str, Any]:
        ended = await self._engine.stop(message["timeout_s"])
        # After the answer, which is sent in this turn of the loop.
        asyncio.get_running_loop().call_soon(self._on_closed, "")
        return {"result": ended}

    def _memory(self) -> dict[str, Any]:
        read: dict[int, DeviceMemory] = {
            position: self._engine.memory(position) for position in self._own
        }
        read[len(self._devices)] = self._engine.copies
        return {"memory": encode_memory(read)}
