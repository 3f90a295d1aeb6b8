"""Figures of this process, read from /proc where there is one."""

from __future__ import annotations

import resource
from pathlib import Path

__all__ = ["peak_resident_bytes", "resident_bytes"]

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Resident set of this process, shared and mapped pages included; 0 where nobody tells."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """Highest resident set so far; never below resident_bytes()."""
    # The system counts a process's pages in batches: its peak may lag behind what is there now.
    return max(resident_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
