"""What a worker process may do: little, and it is the first to go when memory is short.

The limits are for models that run away, not for an attacker with native code of his own: such code
could lift what a process may lift for itself. What it cannot undo are the network namespace, where
the system allows one, and that no new rights are to be had.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

__all__ = [
    "close_all_but",
    "data_bytes",
    "die_with_parent",
    "limit_data",
    "limit_process",
    "refuse_network",
]

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_OPEN_FILES = 4096
_OOM_SCORE = 500
"""Added to the kernel's thousandths of memory used: the server itself is to outlive its workers."""

_NETWORK_CALLS = frozenset(
    {
        "socket.bind",
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "socket.getnameinfo",
        "socket.sendto",
    }
)


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when the thread that made it ends. Linux only.

    Args:
        parent_pid: of the process that made it. If it has ended already, so does this one.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def close_all_but(kept: Collection[int]) -> None:
    """Closes every open file but these."""
    # A list, because the directory itself is one of them.
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:  # noqa: PTH208 - names only
        if number not in kept:
            with contextlib.suppress(OSError):
                os.close(number)


def limit_process() -> None:
    """No core files, few open files, no new rights, first to be killed when memory is short."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")
    except OSError as error:
        logger.debug("oom_score_adj cannot be set: %s", error)


def data_bytes() -> int:
    """Bytes of this process that RLIMIT_DATA counts: private memory that can be written."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def limit_data(pid: int, limit_bytes: int) -> None:
    """Limits the private memory of a process: what asks for more gets none.

    The limit is a soft one, so that whoever set it can also raise it without special rights.

    Args:
        pid: of a process of the same user; 0 for this one.
        limit_bytes: for all of its private writable memory.

    Raises:
        ProcessLookupError: there is no such process.
    """
    _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
    soft = limit_bytes if hard == resource.RLIM_INFINITY else min(hard, limit_bytes)
    resource.prlimit(pid, resource.RLIMIT_DATA, (soft, hard))


def refuse_network() -> bool:
    """Takes the network away from this process. Sockets that it has already stay.

    Where the system allows it, the process gets a network namespace of its own with nothing in it.
    In any case Python code is refused every socket that is not a local one, every name look-up and
    every connection. The process must have one thread only.

    Returns:
        True if there is a namespace.
    """
    isolated = _enter_empty_network()
    sys.addaudithook(_refuse)
    return isolated


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if not event.startswith("socket."):
        return
    # A file that is opened as a socket is of the kind that it is; -1 stands for that.
    if event == "socket.__new__" and args[1] in (socket.AF_UNIX, -1):
        return
    if event == "socket.__new__" or event in _NETWORK_CALLS:
        raise PermissionError(errno.EACCES, "a worker has no network")
    if event == "socket.sendmsg" and args[1] is not None:
        raise PermissionError(errno.EACCES, "a worker has no network")


def _enter_empty_network() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) == 0:
        return True
    # Without the right to do so, one more namespace gives it. Whoever has the right stays in the
    # one where he is: he may need his other rights to read the models' files.
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        logger.debug("no network namespace: %s", os.strerror(ctypes.get_errno()))
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    except OSError as error:
        # Its files are still its own; only what it calls itself is "nobody".
        logger.debug("the user of the namespace has no name: %s", error)
    return True
