"""Figures of processes, read from /proc where there is one."""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["ProcessMemory", "peak_resident_bytes", "read_process_memory", "resident_bytes"]

_PROC: Final = Path("/proc")
_STATM: Final = _PROC / "self/statm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """What a process holds. 0 where the system does not tell.

    Attributes:
        resident_bytes: pages in memory, those of mapped files and those shared with others too.
        proportional_bytes: the same, each shared page divided by the number of its users. Of
            several processes these add up.
        anonymous_bytes: pages that are in no file: heaps, stacks, and mapped pages written to.
            Without swap only the process itself can give them back.
        private_bytes: pages that no other process has: what its end would free.
        threads: how many.
        open_files: how many descriptors.
        mappings: how many areas of addresses; the system bounds them (vm.max_map_count).
    """

    resident_bytes: int = 0
    proportional_bytes: int = 0
    anonymous_bytes: int = 0
    private_bytes: int = 0
    threads: int = 0
    open_files: int = 0
    mappings: int = 0


def read_process_memory(pid: int | str = "self", *, proc: Path = _PROC) -> ProcessMemory:
    """Reads what a process holds.

    The system walks the page tables for it, some milliseconds for a big process: for a baseline or
    a watch once in a while. resident_bytes() is for every call.

    Args:
        pid: of the process; "self" for this one.
        proc: folder that stands for /proc.

    Raises:
        ProcessLookupError: there is no such process (any more).
    """
    folder = proc / str(pid)
    if proc.is_dir() and not folder.is_dir():
        raise ProcessLookupError(f"no process {pid}")
    status = _sizes(folder / "status")
    # Of other users' processes this is kept from us, and the plainer figures are not.
    rollup = _sizes(folder / "smaps_rollup")
    return ProcessMemory(
        resident_bytes=rollup.get("Rss", status.get("VmRSS", 0)),
        proportional_bytes=rollup.get("Pss", 0),
        anonymous_bytes=rollup.get("Anonymous", status.get("RssAnon", 0)),
        private_bytes=rollup.get("Private_Clean", 0) + rollup.get("Private_Dirty", 0),
        threads=_count(folder / "task"),
        open_files=_count(folder / "fd"),
        mappings=_text(folder / "maps").count("\n"),
    )


def resident_bytes() -> int:
    """Resident set of this process, shared and mapped pages included; 0 where nobody tells."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """Highest resident set so far; never below resident_bytes()."""
    # What getrusage calls the peak may be that of the program that started this one.
    peak = _sizes(_PROC / "self/status").get("VmHWM", 0)
    if not peak:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The system counts a process's pages in batches: its peak may lag behind what is there now.
    return max(resident_bytes(), peak)


def _sizes(file: Path) -> dict[str, int]:
    """The lines of "Name: 12 kB", in bytes."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", _text(file), re.M | re.A)
    return {name: int(count) * 1024 for name, count in lines}


def _count(folder: Path) -> int:
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
