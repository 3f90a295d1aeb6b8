"""How much memory this process may have: of the machine's, what its control groups leave it.

A container or a service manager bounds a process by a control group. Whoever goes beyond that is
killed without a word: no allocation fails first, because memory is promised before it is touched.
So the limit has to be known before models are promised anything.

Every group on the way up to the root counts, for each may be narrower than the one below it. Both
generations of the interface are read, also where a machine has both mounted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Final

__all__ = [
    "Headroom",
    "LimitSource",
    "ProcessLimit",
    "headroom",
    "process_limit_bytes",
]

_SHARE_PERCENT: Final = 90
"""What of the limit may be planned with. The rest is for page tables, sockets, other threads' needs
and whatever else the kernel charges to a process."""

_USUAL_V1: Final = PurePosixPath("/sys/fs/cgroup/memory")
_USUAL_V2: Final = PurePosixPath("/sys/fs/cgroup")


class LimitSource(StrEnum):
    """What bounds the memory of a process."""

    MACHINE = "machine"
    CGROUP_V1 = "cgroup v1"
    CGROUP_V2 = "cgroup v2"


_LIMIT_FILES: Final = {
    LimitSource.CGROUP_V1: "memory.limit_in_bytes",
    LimitSource.CGROUP_V2: "memory.max",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimit:
    """Most memory that this process may have.

    Attributes:
        bytes: how much.
        source: what says so.
    """

    bytes: int
    source: LimitSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """What a server may come to need, compared with what its process may have.

    Attributes:
        needed_bytes: budgets of host memory, that of its tier among them, the process itself and
            the reserve for runs together.
        allowed_bytes: what of the limit may be planned with.
        warning: one line for the log; empty if what is needed is allowed.
    """

    needed_bytes: int
    allowed_bytes: int
    warning: str

    @property
    def suffices(self) -> bool:
        """True if what is needed is allowed."""
        return self.needed_bytes <= self.allowed_bytes


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted hierarchy of control groups: its group `root` is seen at `point`."""

    source: LimitSource
    root: PurePosixPath
    point: PurePosixPath


def process_limit_bytes(root: Path = Path("/")) -> ProcessLimit:
    """Returns the least of the machine's memory and the limits of this process's control groups.

    Never fails: what cannot be read bounds nothing, and the machine's memory is always known.

    Args:
        root: folder that stands for the root of the file system.
    """
    limit = ProcessLimit(bytes=_machine_bytes(root), source=LimitSource.MACHINE)
    for source, folder in _group_folders(root):
        found = _limit_in(_inside(root, folder) / _LIMIT_FILES[source])
        if found is not None and found < limit.bytes:
            limit = ProcessLimit(bytes=found, source=source)
    return limit


def headroom(
    limit: ProcessLimit,
    budgets: Sequence[int],
    baseline_bytes: int,
    activation_bytes: int,
    tier_bytes: int = 0,
) -> Headroom:
    """Says whether a process may hold what the budgets of host memory promise.

    Args:
        limit: of the process.
        budgets: bytes of the devices that are in host memory: "cpu" and the logical ones.
        baseline_bytes: what the process has without any model, after its threads have warmed up.
        activation_bytes: what runs take beside weights, of all lanes together.
        tier_bytes: budget of the host tier; 0 for none.
    """
    promised = sum(budgets) + tier_bytes
    needed = promised + baseline_bytes + activation_bytes
    allowed = limit.bytes * _SHARE_PERCENT // 100
    warning = ""
    if needed > allowed:
        tier = f" (the host tier {_shown(tier_bytes)} of it)" if tier_bytes else ""
        warning = (
            f"budgets of devices in host memory promise {_shown(promised)}{tier}, the process "
            f"itself takes {_shown(baseline_bytes)} and runs up to {_shown(activation_bytes)}, "
            f"but this process may use {_shown(limit.bytes)} ({limit.source}), of which "
            f"{_SHARE_PERCENT} % are {_shown(allowed)}"
        )
    return Headroom(needed_bytes=needed, allowed_bytes=allowed, warning=warning)


def _machine_bytes(root: Path) -> int:
    found = re.search(r"^MemTotal:\s+(\d+) kB$", _text(root / "proc/meminfo"), re.M | re.A)
    if found is not None:
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_folders(root: Path) -> Iterator[tuple[LimitSource, PurePosixPath]]:
    """Folders of this process's groups and of all above them, as far as they can be seen."""
    groups = dict(_groups(_text(root / "proc/self/cgroup")))
    mounts = list(_mounts(_text(root / "proc/self/mountinfo")))
    if not mounts:
        mounts = [
            _Mount(LimitSource.CGROUP_V2, PurePosixPath("/"), _USUAL_V2),
            _Mount(LimitSource.CGROUP_V1, PurePosixPath("/"), _USUAL_V1),
        ]
    for mount in mounts:
        below = _below(groups.get(mount.source, PurePosixPath("/")), mount.root)
        for folder in (mount.point / below, *(mount.point / below).parents):
            yield mount.source, folder
            if folder == mount.point:
                break


def _groups(text: str) -> Iterator[tuple[LimitSource, PurePosixPath]]:
    """The groups that /proc/self/cgroup names: lines of "number:controllers:path"."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, found, path = rest.partition(":")
        if not found or not path.startswith("/"):
            continue
        if number == "0" and not controllers:
            yield LimitSource.CGROUP_V2, PurePosixPath(path)
        elif "memory" in controllers.split(","):
            yield LimitSource.CGROUP_V1, PurePosixPath(path)


def _mounts(text: str) -> Iterator[_Mount]:
    """The hierarchies that can bound memory, of /proc/self/mountinfo.

    Its lines: number, parent, device, root, point, options, any number of optional fields, a dash,
    type, source, options of the file system.
    """
    for line in text.splitlines():
        before, found, after = line.partition(" - ")
        fields, of_system = before.split(" "), after.split(" ")
        if not found or len(fields) < 6 or len(of_system) < 3:
            continue
        root, point = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
        if not (root.is_absolute() and point.is_absolute()):
            continue
        if of_system[0] == "cgroup2":
            yield _Mount(LimitSource.CGROUP_V2, root, point)
        elif of_system[0] == "cgroup" and "memory" in of_system[2].split(","):
            yield _Mount(LimitSource.CGROUP_V1, root, point)


def _below(group: PurePosixPath, root: PurePosixPath) -> PurePosixPath:
    """The way from the root of a mount down to a group; none if the group is not below it.

    In a container the mount often shows the container's own group as its root, and a process that
    was moved there from outside has a path that leads out of what can be seen.
    """
    if ".." in group.parts or not group.is_relative_to(root):
        return PurePosixPath()
    return group.relative_to(root)


def _unescaped(field: str) -> str:
    """Blanks and the like are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _limit_in(file: Path) -> int | None:
    text = _text(file).strip()
    # "max", or nothing to read: no limit.
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) else None


def _inside(root: Path, path: PurePosixPath) -> Path:
    return root / path.relative_to("/")


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except (OSError, ValueError):  # the latter for a name that no file can have
        return ""


def _shown(size_bytes: int) -> str:
    size, unit = float(size_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
