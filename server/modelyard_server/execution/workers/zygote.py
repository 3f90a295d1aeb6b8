"""The zygote: a process that has imported everything, has one thread, and forks the workers.

It is started before gRPC and shares nothing with it but a socket: forking a process that uses gRPC
is not safe, and importing the frameworks takes seconds, which a worker that comes back has not.
Until it forks it starts no thread: the child of a process with threads may find locks that nobody
will ever release.

Orders come as messages of JSON, one a packet: first `init`, which says how to make the runtimes and
which to warm up; then `fork`, which comes with two descriptors and is answered with the child's
number and a descriptor of the child itself; and `warm`, which is not answered. What the zygote says
unasked is that a child has ended, and how. It ends when the other end closes.
"""

from __future__ import annotations

import array
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from modelyard_server.execution.workers.limits import close_all_but
from modelyard_server.execution.workers.settings import RuntimeSource
from modelyard_server.execution.workers.worker import run_worker
from modelyard_server.execution.workers.zygote_packets import MAX_PACKET_BYTES
from modelyard_server.observability.log import start_logging
from modelyard_server.runtimes.api import Runtime

__all__ = ["main"]

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0005
"""How long a thread that computes in Python may keep the others waiting. The default is 5 ms, and a
model's every operation would wait as long while a neighbour tokenises (see facts on loading)."""


class _Zygote:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, int] = {}  # By descriptor of the child.
        self._source = RuntimeSource()
        self._runtimes: Mapping[str, Runtime] = {}
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def serve(self) -> None:
        """Follows orders until nobody gives any more."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._control.fileno():
                    if not self._follow_one():
                        return
                else:
                    self._bury(descriptor)

    def _follow_one(self) -> bool:
        data, descriptors, flags, _ = socket.recv_fds(self._control, MAX_PACKET_BYTES, 2)
        if not data:
            return False
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise RuntimeError("an order is too long")
        order = json.loads(data)
        match order["op"]:
            case "init":
                self._init(order)
            case "warm":
                try:
                    self._warm_up(order["runtimes"])
                except Exception:  # of a library; whoever needs it will meet it in his worker
                    logger.exception("the zygote cannot warm up")
            case "fork":
                self._fork(order, descriptors)
        return True

    def _init(self, order: Mapping[str, Any]) -> None:
        start_logging("info")
        logging.getLogger().setLevel(order["log_level"])
        sys.path[:] = order["path"]
        self._source = RuntimeSource(
            maker=order["maker"],
            allowed_factories=frozenset(order["allowed_factories"]),
            arguments=order["arguments"],
            worker_arguments=order["worker_arguments"],
        )
        try:
            self._runtimes = self._source.make()
            self._warm_up(order["runtimes"])
            threads = _threads()
            if threads != 1:
                raise RuntimeError(f"{threads} threads run in the zygote; it must have one")
        except Exception as error:  # the process's edge: it becomes an answer
            traceback.print_exc()
            self._say({"op": "failed", "text": f"{type(error).__name__}: {error}"[:1000]})
        else:
            self._say({"op": "ready"})

    def _warm_up(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._runtimes:
                self._runtimes[name].warm_up()
        if (torch := sys.modules.get("torch")) is not None:
            # Whoever wants more sets more; the threads would start here otherwise.
            torch.set_num_threads(1)
        # What is there now will never be looked at by the collector, neither here nor in a child,
        # so that the pages it lies in stay shared.
        gc.collect()
        gc.freeze()

    def _fork(self, order: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        if len(descriptors) != 2:
            raise RuntimeError("a fork without its descriptors")
        if (threads := _threads()) != 1:
            self._say({"op": "unforkable", "text": f"{threads} threads run in the zygote"})
            _close(descriptors)
            return
        own = os.getpid()
        try:
            child = os.fork()
        except OSError as error:
            self._say({"op": "unforkable", "text": error.strerror or "fork failed"})
            _close(descriptors)
            return
        if child == 0:
            end, board = descriptors
            run_worker(end, board, order, self._source, parent_pid=own)
        _close(descriptors)
        handle = os.pidfd_open(child)
        self._children[handle] = child
        self._poll.register(handle, select.POLLIN)
        self._say({"op": "forked", "pid": child}, handle)

    def _bury(self, handle: int) -> None:
        child = self._children.pop(handle)
        self._poll.unregister(handle)
        os.close(handle)
        _, status = os.waitpid(child, 0)
        self._say({"op": "ended", "pid": child, "code": os.waitstatus_to_exitcode(status)})

    def _say(self, message: Mapping[str, Any], *descriptors: int) -> None:
        ancillary: list[tuple[int, int, Any]] = []
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        self._control.sendmsg([json.dumps(message).encode("ascii")], ancillary)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 - names only


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def main(arguments: Sequence[str]) -> int:
    """Is the zygote.

    Args:
        arguments: the number of the descriptor that orders come from.

    Returns:
        The code to exit with.
    """
    number = int(arguments[0])
    close_all_but((0, 1, 2, number))
    os.set_inheritable(number, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The server decides when it is over.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    control = socket.socket(fileno=number)
    try:
        _Zygote(control).serve()
    except (BrokenPipeError, ConnectionResetError):
        logger.debug("the server is gone")
    return 0


if __name__ == "__main__":
    # At once: taking down the frameworks that it has imported takes longer than all else.
    os._exit(main(sys.argv[1:]))
