"""A disk that loses what was not synced, and one whose syncs fail: disk_shim.c, used from Python.

shim = build_shim(folder)          None if there is no C compiler or it is not Linux
environment = shim_environment(...) for a child process
for image in power_cuts(log, rng):  what the disk may hold after a cut
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Image", "build_shim", "power_cuts", "read_log", "shim_environment"]

_HEAD = struct.Struct("<iiqq")
_SECTOR = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One record of the log; see disk_shim.c."""

    kind: str
    name: str
    number: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a disk may hold after a power cut.

    Attributes:
        step: after how many operations the power failed.
        files: contents by name.
        noted: the last number that the process noted before.
    """

    step: int
    files: dict[str, bytes]
    noted: int


def build_shim(folder: Path) -> Path | None:
    """Compiles the shim, if this machine can."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    made = folder / "disk_shim.so"
    source = Path(__file__).with_name("disk_shim.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(source)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True)
    return made


def shim_environment(shim: Path, watch: Path, log: Path | None = None) -> dict[str, str]:
    """The environment for a child that the shim is loaded into."""
    environment = os.environ | {"LD_PRELOAD": str(shim), "DISK_WATCH": str(watch)}
    return environment | ({"DISK_LOG": str(log)} if log else {})


def read_log(log: Path) -> list[Operation]:
    """What was done to the disk, in order."""
    data = log.read_bytes()
    operations: list[Operation] = []
    at = 0
    while at < len(data):
        kind, name_size, number, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        name = data[at : at + name_size].decode()
        at += name_size
        operations.append(
            Operation(kind=chr(kind), name=name, number=number, data=data[at : at + size])
        )
        at += size
    return operations


@dataclass(slots=True)
class _File:
    """A file: what a sync made sure of, and what was done to it since."""

    durable: bytes = b""
    pending: list[Operation] = field(default_factory=list)

    def sync(self) -> None:
        self.durable = self.after(None)
        self.pending.clear()

    def after(self, rng: random.Random | None) -> bytes:
        """The contents if all (None) or any of what is pending, sector by sector, was kept."""
        data = bytearray(self.durable)
        for operation in self.pending:
            if operation.kind == "T":
                if rng is None or rng.random() < 0.5:
                    _resize(data, operation.number)
            else:
                _write(data, operation, rng)
        return bytes(data)


class _Disk:
    """Files by the names that a sync of their folder made sure of, and by those of the moment."""

    def __init__(self) -> None:
        self.now: dict[str, _File] = {}
        self.durable: dict[str, _File] = {}

    def do(self, operation: Operation) -> None:
        match operation.kind:
            case "C":
                self.now[operation.name] = _File()
            case "U":
                del self.now[operation.name]
            case "W" | "T":
                self.now[operation.name].pending.append(operation)
            case "S" if operation.name in self.now:
                self.now[operation.name].sync()
            case "S":  # Of a folder.
                below = operation.name + "/"
                kept = {n: f for n, f in self.durable.items() if not n.startswith(below)}
                self.durable = kept | {n: f for n, f in self.now.items() if n.startswith(below)}

    def cut(self, rng: random.Random) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for name in sorted(self.now.keys() | self.durable.keys()):
            choices = [self.now.get(name), self.durable.get(name)]
            file = choices[0] if choices[0] is choices[1] else rng.choice(choices)
            if file is not None:
                files[name] = file.after(rng)
        return files


def power_cuts(log: Path, rng: random.Random, images_a_step: int = 1) -> Iterator[Image]:
    """What the disk may hold if the power fails, for every step of the log.

    Of what was not synced any 512-byte sectors may be there; a file that was made or removed may
    be so or not until its folder is synced. A disk that lies about syncs is not modelled.
    """
    disk = _Disk()
    noted = 0
    for step, operation in enumerate(read_log(log), 1):
        if operation.kind == "N":
            noted = operation.number
            continue
        disk.do(operation)
        for _ in range(images_a_step):
            yield Image(step=step, files=disk.cut(rng), noted=noted)
    yield Image(step=step + 1, files=disk.cut(rng), noted=noted)


def _resize(data: bytearray, size: int) -> None:
    del data[size:]
    data.extend(bytes(size - len(data)))


def _write(data: bytearray, operation: Operation, rng: random.Random | None) -> None:
    start, end = operation.number, operation.number + len(operation.data)
    at = start
    while at < end:
        stop = min(end, (at // _SECTOR + 1) * _SECTOR)
        if rng is None or rng.random() < 0.5:
            _resize(data, max(len(data), stop))
            data[at:stop] = operation.data[at - start : stop - start]
        at = stop
