"""A worker as the server sees it, from its fork to its end.

Every call that is given to it ends exactly once: with an answer, or with WorkerGone when the worker
has. It goes when its process does, when it says what cannot be understood, when it does not answer
for too long, and when a call takes longer than it may. In every case its process is killed, and is
known to be over (`exited`) before anything that it held is said to be free.

Which calls were running in it at that moment, or when it said what cannot be understood, stands on
the board.

Between its end and the moment at which that is told (on_end) its process is being waited for, and
whoever gives it calls does not know yet. Those calls wait as well: an answer that came at once
would only have its caller ask again, in vain, until it gives up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from modelyard_server.execution.engine import DeviceMemory
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.execution.workers.board import Board
from modelyard_server.execution.workers.channel import Channel
from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.limits import limit_data
from modelyard_server.execution.workers.payload import decode_error, understand
from modelyard_server.execution.workers.records import decode_memory
from modelyard_server.execution.workers.settings import WorkerSettings
from modelyard_server.execution.workers.zygote_client import Forked
from modelyard_server.runtimes.tensors import TensorValue

__all__ = ["Answer", "ModelMissing", "WorkerEnd", "WorkerGone", "WorkerProcess"]

logger = logging.getLogger(__name__)

_EXIT_GRACE_S = 5.0
"""How long its calls wait at most for a killed worker to be over. There is no other worker before
that, and no memory."""

_REASON_GRACE_S = 5.0
"""And then for the reason of its end, which the zygote tells, if there still is one."""

_STOP_GRACE_S = 0.5
"""What a worker may take to be over after it has stopped."""


class WorkerGone(Exception):
    """The worker has gone before it answered.

    Attributes:
        cause: of its end.
        is_suspect: the call was running in it, and so may be to blame.
    """

    def __init__(self, cause: str, *, is_suspect: bool) -> None:
        super().__init__(cause)
        self.cause = cause
        self.is_suspect = is_suspect


class ModelMissing(Exception):
    """The worker does not know the model it was to run."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call came to.

    Attributes:
        message: the whole message, as it was sent.
        tensors: that came with it.
        error: what was raised; None if nothing was.
    """

    message: Mapping[str, Any]
    tensors: tuple[TensorValue, ...] = ()
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """How a worker ended.

    Attributes:
        cause: why, for people.
        suspects: models that were running or being loaded, of calls that named one.
    """

    cause: str
    suspects: tuple[int, ...]


Deliver = Callable[[Answer | WorkerGone], None]


@dataclass(slots=True)
class _Open:
    """A call that is not answered yet."""

    model: int | None
    limit_s: float | None
    deliver: Deliver
    ran_s: float = 0.0


@dataclass(slots=True)
class _Pings:
    """Whether it answers."""

    number: int = 0
    is_open: bool = False
    since_s: float = 0.0


@dataclass(slots=True)
class _Ending:
    """How it comes to its end.

    Attributes:
        cause: why, for people; empty until it is known.
        suspects: calls that may be to blame.
        is_told: the cause is known, and everybody is being told.
    """

    cause: str
    suspects: frozenset[int] = field(default_factory=frozenset)
    is_told: bool = False


class WorkerProcess:
    """One worker, once. For the loop's thread only.

    Args:
        name: for people.
        forked: its process; its handle is closed here.
        end: this side's end of its channel; taken over.
        board: its board; closed here.
        devices: how many the yard has.
        settings: its limits.
        on_end: called once when it has gone without being asked to, before its calls end.

    Attributes:
        name: for people.
        ready: done once it takes calls; fails with WorkerGone if it never does.
        exited: done once its process is over.
        memory: what it measured last, by position of the device, and of its copies behind the last
            of them; empty once it has exited.
    """

    def __init__(
        self,
        *,
        name: str,
        forked: Forked,
        end: socket.socket,
        board: Board,
        devices: int,
        settings: WorkerSettings,
        on_end: Callable[[WorkerProcess, WorkerEnd], None],
    ) -> None:
        self.name = name
        self.memory: dict[int, DeviceMemory] = {}
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.exited: asyncio.Future[None] = self._loop.create_future()
        self._forked = forked
        self._board = board
        self._figures = LaneFigures()
        self._devices = devices
        self._settings = settings
        self._on_end = on_end
        self._calls: dict[int, _Open] = {}
        self._next = 1
        self._pings = _Pings()
        self._ending: _Ending | None = None
        self._finishing: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._base_data_bytes = 0
        self._channel = Channel(
            end, self._loop, on_message=self._on_message, on_closed=self._on_closed
        )
        self._loop.add_reader(forked.handle, self._on_exit)

    @property
    def pid(self) -> int:
        """Number of its process."""
        return self._forked.pid

    @property
    def figures(self) -> LaneFigures:
        """What its lanes have run; also after its end."""
        return self._figures if self.exited.done() else self._board.figures()

    @property
    def is_gone(self) -> bool:
        """True once it takes no calls any more."""
        return self._ending is not None

    @property
    def was_ready(self) -> bool:
        """True if it has ever taken calls."""
        return self.ready.done() and self.ready.exception() is None

    # --- Calls ------------------------------------------------------------------------------------

    def call(
        self,
        op: str,
        deliver: Deliver,
        *,
        model: int | None = None,
        limit_s: float | None = None,
        tensors: Sequence[TensorValue] = (),
        **fields: Any,
    ) -> int:
        """Gives it a call.

        Args:
            op: which one.
            deliver: gets what came of it: on the loop, once; not before this returns.
            model: that is to blame if it ends the worker.
            limit_s: longest that it may run.
            tensors: that go with it.
            fields: values of JSON.

        Returns:
            Number of the call.

        Raises:
            WorkerGone: it takes none any more, and whoever is to know that was told.
            ValueError: the call is too large to be sent.
        """
        if self._ending is not None and self._ending.is_told:
            raise WorkerGone(self._ending.cause, is_suspect=False)
        number = self._next
        header: dict[str, Any] = {"op": op, "call": number, **fields}
        if model is not None:
            header["model"] = model
        self._channel.send(header, tensors)
        self._next += 1
        self._calls[number] = _Open(model, limit_s, deliver)
        return number

    async def ask(self, op: str, **arguments: Any) -> Answer:
        """Gives it a call and waits for the answer. Arguments are those of `call`.

        Raises:
            WorkerGone: it has gone before it answered.
            Exception: what the call raised there.
        """
        waiting: asyncio.Future[Answer | WorkerGone] = self._loop.create_future()

        def deliver(outcome: Answer | WorkerGone) -> None:
            if not waiting.done():
                waiting.set_result(outcome)

        self.call(op, deliver, **arguments)
        outcome = await waiting
        if isinstance(outcome, WorkerGone):
            raise outcome
        if outcome.error is not None:
            raise outcome.error
        return outcome

    def tell(self, op: str, **fields: Any) -> None:
        """Says something that is not answered."""
        self._channel.send({"op": op, **fields})

    # --- Limits -----------------------------------------------------------------------------------

    def limit_memory(self, more_bytes: int) -> None:
        """Lets it have this much private memory beside what it had when it started."""
        if not self.is_gone:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                limit_data(self.pid, self._base_data_bytes + more_bytes)

    def watch(self, elapsed_s: float) -> None:
        """Looks whether it keeps its limits, and kills it if not. To be called again and again.

        Args:
            elapsed_s: since it was last called. Time in which this process stood still must not be
                in it: calls are not to blame for that.
        """
        if self._ending is not None or not self.ready.done():
            return
        running = self._board.running()
        for number in running:
            call = self._calls.get(number)
            if call is None or call.limit_s is None:
                continue
            call.ran_s += elapsed_s
            if call.ran_s > call.limit_s:
                blamed = frozenset({number} | (self._runs_of(call.model) & running))
                self._end(f"ran for longer than {call.limit_s:g} s", blamed)
                return
        self._watch_pings(elapsed_s)

    def _runs_of(self, model: int | None) -> frozenset[int]:
        """Calls that name a model. Those that run at the same time share one run."""
        if model is None:
            return frozenset()
        return frozenset(number for number, call in self._calls.items() if call.model == model)

    def _watch_pings(self, elapsed_s: float) -> None:
        pings = self._pings
        pings.since_s += elapsed_s
        if pings.is_open:
            if pings.since_s > self._settings.ping_limit_s:
                limit_s = self._settings.ping_limit_s
                self._end(f"did not answer for {limit_s:g} s", self._board.running())
        elif pings.since_s >= self._settings.ping_interval_s:
            pings.number += 1
            pings.is_open = True
            pings.since_s = 0.0
            self._channel.send({"op": "ping", "number": pings.number})

    # --- The end ----------------------------------------------------------------------------------

    def kill(self, cause: str) -> None:
        """Kills it; what runs in it is not to blame."""
        self._end(cause, frozenset())

    async def stop(self, timeout_s: float) -> bool:
        """Has it end after what runs, and kills it if it does not in time.

        Returns:
            False if it, or something in it, had to be killed.
        """
        self._is_stopping = True
        ended = self.is_gone
        with contextlib.suppress(Exception):  # However it answers, it is not there afterwards.
            async with asyncio.timeout(timeout_s + _STOP_GRACE_S):
                answer = await self.ask("stop", timeout_s=timeout_s)
                ended = answer.message.get("result") is True
                await asyncio.shield(self.exited)
        if not self.is_gone:
            ended = False
            self.kill("the server stops")
        await self.exited
        if self._finishing is not None:
            await self._finishing
        return ended

    def _on_exit(self) -> None:
        """Its process is over."""
        self._loop.remove_reader(self._forked.handle)
        if not self.is_gone:
            # What it still said, and then whoever was running.
            running = self._board.running()
            self._channel.receive_rest()
            self._end("", running)
        os.close(self._forked.handle)
        self._figures = self._board.figures()
        self._board.close()
        self.memory.clear()
        self.exited.set_result(None)

    def _on_closed(self, text: str) -> None:
        if not text:
            self._end("", self._board.running())
            return
        # Whoever did that may be done already, and who runs now may have begun after it.
        writers = self._board.begun_by(self._channel.place)
        self._end(f"sent what cannot be understood ({text})", writers)

    def _end(self, cause: str, running: frozenset[int]) -> None:
        if self._ending is not None:
            return
        # Of those that there are now: what comes yet is not to blame, whatever the board says.
        self._ending = _Ending(cause, running & self._calls.keys())
        self._channel.close()
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._forked.handle, signal.SIGKILL)
        self._finishing = self._loop.create_task(self._finish(), name=f"end of {self.name}")

    async def _finish(self) -> None:
        assert self._ending is not None
        await asyncio.wait({self.exited}, timeout=_EXIT_GRACE_S)
        if not (cause := self._ending.cause):
            code = self._forked.exit_code
            await asyncio.wait({code}, timeout=_REASON_GRACE_S)
            cause = self._ending.cause = _told(code.result() if code.done() else None)
        self._ending.is_told = True
        calls, self._calls = self._calls, {}
        suspects = frozenset() if self._is_stopping else self._ending.suspects
        blamed = [calls[number].model for number in sorted(suspects)]
        models = tuple(dict.fromkeys(model for model in blamed if model is not None))
        if not self.ready.done():
            self.ready.set_exception(WorkerGone(cause, is_suspect=False))
            self.ready.exception()  # Perhaps nobody waits for it any more.
        if not self._is_stopping:
            self._call_back(partial(self._on_end, self, WorkerEnd(cause, models)))
        for number, call in calls.items():
            gone = WorkerGone(cause, is_suspect=number in suspects)
            self._call_back(partial(call.deliver, gone))

    def _call_back(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception:  # one receiver must not cost the others their outcome
            logger.exception("the receiver of the end of %s failed", self.name)

    # --- What it says -----------------------------------------------------------------------------

    def _on_message(self, message: dict[str, Any], tensors: tuple[TensorValue, ...]) -> None:
        match message.get("op"):
            case "answer":
                self._on_answer(message, tensors)
            case "pong":
                if message.get("number") == self._pings.number:
                    self._pings.is_open = False
                    self._pings.since_s = 0.0
            case "ready" if not self.ready.done():
                data_bytes = message.get("data_bytes")
                if type(data_bytes) is not int or data_bytes < 0:
                    raise MalformedMessage("it is ready, but says no size")
                self._base_data_bytes = data_bytes
                self.ready.set_result(None)
            case _:
                raise MalformedMessage("no message of a worker")

    def _on_answer(self, message: dict[str, Any], tensors: tuple[TensorValue, ...]) -> None:
        number = message.get("call")
        call = self._calls.get(number) if type(number) is int else None
        if call is None or number is None:
            raise MalformedMessage("an answer to no call")
        error: Exception | None = None
        if "error" in message:
            encoded = message["error"]
            error = ModelMissing() if encoded == ["lost"] else decode_error(encoded)
        if "memory" in message:
            read = partial(decode_memory, message["memory"], self._devices + 1)
            self.memory.update(understand(read))
        del self._calls[number]
        self._call_back(partial(call.deliver, Answer(message, tensors, error)))


def _told(code: int | None) -> str:
    """How a process ended, for people."""
    if code is None:
        return "ended"
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
