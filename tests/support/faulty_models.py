"""Modules that misbehave, for runtime "torch", and gates that hold them up.

Every factory here makes a module with one parameter `weight` FLOAT32 [rows], so that
`make_weights` fills any of them.

A gate is a named pipe: who passes it opens it for reading, and waits until the test opens it from
the other side. It works across processes, and a gate whose file is not there is open.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["FACTORIES", "KEPT", "ROWS", "Gate", "closed_gate", "factory", "make_weights"]

_MODULE = "tests.support.faulty_models"

FACTORIES = tuple(
    f"{_MODULE}:{name}"
    for name in (
        "Adding",
        "Dropping",
        "Exiting",
        "Keeping",
        "Mutating",
        "OddOutput",
        "Raising",
        "Slow",
        "StuckInLoad",
        "StuckInRun",
    )
)
"""To be put among the allowed factories."""

ROWS = 1024
"""Elements of `weight`: 4 KiB."""

KEPT: list[torch.Tensor] = []
"""What Keeping does not let go of. Module-level because that is the fault it stands for."""


def factory(name: str) -> str:
    """The factory of that name, as options have it."""
    return f"{_MODULE}:{name}"


def make_weights(folder: Path, *, value: float = 1.0, rows: int = ROWS) -> Path:
    """Writes model.safetensors with `weight` FLOAT32 [rows], all of one value."""
    folder.mkdir(parents=True, exist_ok=True)
    weight = torch.full((rows,), value, dtype=torch.float32)
    save_file({"weight": weight}, folder / "model.safetensors")
    return folder


class Gate:
    """A closed gate. See closed_gate."""

    def __init__(self, path: Path) -> None:
        self._path = path
        os.mkfifo(path)

    def is_waited_at(self) -> bool:
        """True once somebody stands before it."""
        try:
            writer = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        # Whoever waited is woken by this, finds the gate still there, and waits again.
        os.close(writer)
        return True

    def wait_for_one(self) -> None:
        """Blocks the whole thread until somebody stands before it."""
        os.close(os.open(self._path, os.O_WRONLY))

    def open(self) -> None:
        """Lets everybody pass, now and from now on. Idempotent."""
        if not self._path.exists():
            return
        # In this order nobody is missed: who comes after the unlink finds nothing to wait for.
        writer = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
        self._path.unlink()
        os.close(writer)


@contextmanager
def closed_gate(path: Path) -> Iterator[Gate]:
    """Makes a closed gate, and opens it at the end if the test has not: nothing stays stuck."""
    gate = Gate(path)
    try:
        yield gate
    finally:
        gate.open()


def _pass(gate: str) -> None:
    while True:
        try:
            with Path(gate).open("rb") as pipe:
                pipe.read()
        except FileNotFoundError:
            return


class Adding(torch.nn.Module):
    """y = x + the first element of the weight. Behaves."""

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows))

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: the same shape."""
        return x + self.weight[0]


class Dropping(Adding):
    """Answers for the first row alone, whatever number it is given."""

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: [n, ...]. Returns: [1, ...]."""
        return super().forward(x)[:1]


class Exiting(Adding):
    """Its constructor ends the program, if a file says so."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        if Path(flag).exists():
            raise SystemExit("a model must not do this")


class Keeping(Adding):
    """Keeps its weight beyond its own life: a leak."""

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: the same shape."""
        KEPT.append(self.weight)
        return super().forward(x)


class Mutating(Adding):
    """Writes to its input."""

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: the same shape, one more."""
        return x.add_(1)


class OddOutput(Adding):
    """Answers with something that cannot be sent.

    Args:
        kind: a key of the table in forward.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: nothing good."""
        odd: dict[str, Any] = {
            "complex": x.to(torch.complex64),
            "sparse": x.reshape(1, -1).to_sparse(),
            "quantised": torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
            "float8": x.to(torch.float8_e4m3fn),
            "meta": x.to("meta"),
            "none": None,
            "text": "no tensor",
            "nothing": (),
            "numbered": {0: x},
            "mixed": (x, 1),
        }
        return odd[self.kind]


class Raising(Adding):
    """Raises.

    Args:
        kind: name of the exception, or "recursion" for a real one.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: never."""
        kinds: dict[str, type[BaseException]] = {
            error.__name__: error
            for error in (
                GeneratorExit,
                KeyboardInterrupt,
                MemoryError,
                StopIteration,
                SystemExit,
                ValueError,
            )
        }
        if self.kind == "recursion":
            return self.forward(x)
        raise kinds[self.kind]("secret text of /srv/private")


class Slow(Adding):
    """Takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: the same shape, not before so many seconds are over."""
        time.sleep(self.seconds)
        return super().forward(x)


def _nothing(*_: object) -> None:
    """A hook that does nothing."""


class StuckInLoad(Adding):
    """Its constructor waits at a gate. It is called for every load."""

    def __init__(self, gate: str) -> None:
        _pass(gate)
        super().__init__()
        # A module with hooks has no template, and is built anew each time.
        self.register_forward_hook(_nothing)


class StuckInRun(Adding):
    """Waits at a gate while it runs."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: torch.Tensor) -> Any:
        """Args: x: any shape. Returns: the same shape, in the end."""
        _pass(self.gate)
        return super().forward(x)
