"""The zygote as the server sees it: starts it, orders workers, learns how they ended."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from modelyard_server.execution.workers.records import plain
from modelyard_server.execution.workers.settings import RuntimeSource
from modelyard_server.execution.workers.zygote_packets import MAX_PACKET_BYTES

__all__ = ["Forked", "ZygoteClient", "ZygoteLost"]

logger = logging.getLogger(__name__)

_MODULE = "modelyard_server.execution.workers.zygote"


class ZygoteLost(Exception):
    """The zygote cannot do what it was asked to.

    Attributes:
        text: why, for people.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True, slots=True)
class Forked:
    """A process that the zygote forked.

    Attributes:
        pid: its number.
        handle: descriptor of it; whoever takes it closes it. It can be read once the process has
            ended.
        exit_code: as subprocess has them: negative for a signal. None if nobody knows.
    """

    pid: int
    handle: int
    exit_code: asyncio.Future[int | None]


class ZygoteClient:
    """A running zygote. For the loop's thread only.

    Args:
        process: of it.
        control: end of its packets.
        loop: where it is listened to.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        control: socket.socket,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._process = process
        self._control = control
        self._loop = loop
        self._ready: asyncio.Future[None] = loop.create_future()
        self._forks: deque[asyncio.Future[Forked]] = deque()
        self._exits: dict[int, asyncio.Future[int | None]] = {}
        self._is_closed = False
        loop.add_reader(control.fileno(), self._receive)

    @staticmethod
    async def start(source: RuntimeSource, warm: Iterable[str], *, limit_s: float) -> ZygoteClient:
        """Starts one and waits until it can fork.

        Args:
            source: of its runtimes.
            warm: names of the runtimes to be warmed up.
            limit_s: longest that this may take.

        Raises:
            ZygoteLost: it does not start.
        """
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            try:
                process = _spawn(there.fileno())
            except OSError as error:
                here.close()
                raise ZygoteLost(f"its process cannot be started: {error.strerror}") from None
        here.setblocking(False)
        client = ZygoteClient(process, here, asyncio.get_running_loop())
        try:
            client._send(
                {
                    "op": "init",
                    "path": sys.path,
                    "maker": source.maker,
                    "allowed_factories": sorted(source.allowed_factories),
                    "arguments": plain(source.arguments),
                    "worker_arguments": plain(source.worker_arguments),
                    "runtimes": sorted(warm),
                    "log_level": logging.getLogger().getEffectiveLevel(),
                }
            )
            async with asyncio.timeout(limit_s):
                await client._ready
        except BaseException as error:
            await client.stop(0)
            if isinstance(error, TimeoutError):
                raise ZygoteLost(f"it is not ready after {limit_s:g} s") from None
            raise
        return client

    @property
    def pid(self) -> int:
        """Number of its process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """False once it has gone."""
        return not self._is_closed

    @property
    def children(self) -> int:
        """Processes that it has forked and that are not over."""
        return len(self._exits)

    def warm_up(self, runtimes: Iterable[str]) -> None:
        """Has workers from now on begin with these runtimes warm. Not waited for."""
        with contextlib.suppress(ZygoteLost):
            self._send({"op": "warm", "runtimes": sorted(runtimes)})

    async def fork(self, order: Mapping[str, Any], end: int, board: int) -> Forked:
        """Has it fork a worker.

        Args:
            order: see run_worker.
            end: descriptor of the worker's end of its channel.
            board: descriptor of its board's file.

        Raises:
            ZygoteLost: it cannot.
        """
        answer: asyncio.Future[Forked] = self._loop.create_future()
        self._send({"op": "fork", **order}, end, board)
        self._forks.append(answer)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(_abolish)
            raise

    async def stop(self, timeout_s: float) -> bool:
        """Ends it, and with it what it forked.

        Args:
            timeout_s: how long it has to do so by itself.

        Returns:
            False if it had to be killed.
        """
        self._close("it was stopped")
        try:
            await asyncio.to_thread(self._process.wait, max(timeout_s, 0.001))
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            return False
        return True

    def _send(self, message: Mapping[str, Any], *descriptors: int) -> None:
        if self._is_closed:
            raise ZygoteLost("the zygote has ended")
        ancillary: list[tuple[int, int, Any]] = []
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._control.sendmsg([json.dumps(message).encode("ascii")], ancillary)
        except OSError as error:  # Also when it does not read what it was sent before.
            raise ZygoteLost(f"it takes no orders: {error.strerror}") from None

    def _receive(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._control, MAX_PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._close("the zygote has ended")
            return
        self._handle(json.loads(data), descriptors)

    def _handle(self, message: Mapping[str, Any], descriptors: list[int]) -> None:
        match message["op"]:
            case "ready":
                if not self._ready.done():
                    self._ready.set_result(None)
            case "failed":
                if not self._ready.done():
                    self._ready.set_exception(ZygoteLost(message["text"]))
            case "forked":
                pid = message["pid"]
                exit_code: asyncio.Future[int | None] = self._loop.create_future()
                self._exits[pid] = exit_code
                self._forks.popleft().set_result(Forked(pid, descriptors[0], exit_code))
            case "unforkable":
                self._forks.popleft().set_exception(ZygoteLost(message["text"]))
            case "ended":
                self._exits.pop(message["pid"]).set_result(message["code"])

    def _close(self, text: str) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._control.fileno())
        self._control.close()
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._forks]
        for future in waiting:
            if not future.done():
                future.set_exception(ZygoteLost(text))
                future.exception()  # Perhaps nobody waits for it any more.
        self._forks.clear()
        for exit_code in self._exits.values():
            exit_code.set_result(None)
        self._exits.clear()


def _spawn(number: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # Numpy's linear algebra would start its threads when it is imported.
        "OPENBLAS_NUM_THREADS": "1",
    }
    # In a session of its own: what a terminal sends to the server is not for it. "-P": it must not
    # find modules in the directory that the server happens to be in.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _MODULE, str(number)],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=(number,),
        env=environment,
        start_new_session=True,
    )


def _abolish(fork: asyncio.Future[Forked]) -> None:
    """Ends a worker that nobody waits for any more."""
    if fork.cancelled() or fork.exception() is not None:
        return
    forked = fork.result()
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(forked.handle, signal.SIGKILL)
    os.close(forked.handle)
