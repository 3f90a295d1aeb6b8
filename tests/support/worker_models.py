"""A runtime whose models do what their options say, in whatever process they are.

Options:
    size: bytes of the model on its home device, or a list of [position, bytes].
    at: what happens at "price", "load", "run" and "close": a key of FAULTS, or "raise NAME".
    armed: path of a file; faults happen only while it is there. Left out: always.
    gate: path of a gate (see faulty_models) before which loads, or with `gate_at` other stages,
        wait.
    keep: the model's memory outlives it, until a model of option `release` runs.
    cycle: the model's memory is part of a cycle.
    brief: it is a brief one.
    until_stopped: a load goes on until it is asked to stop.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import ref

from modelyard_server.runtimes.api import (
    JsonValue,
    LoadCancelled,
    LoadedModel,
    ModelFilesError,
    ModelSpec,
    OptionError,
    Price,
    Runtime,
    StopCheck,
    Witness,
)
from modelyard_server.runtimes.identity import IdentityRuntime
from modelyard_server.runtimes.targets import Place, Structure, TensorPart
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = ["FAULTS", "MAKER", "OddRuntime", "gate_pass", "make_runtimes"]

MAKER = "tests.support.worker_models:make_runtimes"

KEPT: list[Memory] = []
"""What options `keep` do not let go of."""


class Memory:
    """What a model holds on one device."""

    def __init__(self, device: int, size_bytes: int) -> None:
        self.device = device
        self.size_bytes = size_bytes
        self.me: Memory | None = None


def make_runtimes(
    allowed_factories: frozenset[str], *, torch: bool = False, broken: str = ""
) -> Mapping[str, Runtime]:
    """Runtimes "odd" and "identity".

    Args:
        allowed_factories: of runtime "torch".
        torch: make that as well.
        broken: path of a file: while it is there, warming up ends the process.
    """
    runtimes: list[Runtime] = [OddRuntime(broken), IdentityRuntime()]
    if torch:
        import threading

        from modelyard_server.runtimes.torch_runtime import TorchRuntime

        lock = threading.Lock()
        runtimes.append(TorchRuntime(allowed_factories=allowed_factories, construction_lock=lock))
    return MappingProxyType({runtime.name: runtime for runtime in runtimes})


def gate_pass(gate: str) -> None:
    """Waits until a gate is open. See faulty_models.Gate."""
    while True:
        try:
            with Path(gate).open("rb") as pipe:
                pipe.read()
        except FileNotFoundError:
            return


def _grow() -> None:
    kept = []
    while True:
        kept.append(bytearray(2**24))


def _reach_out() -> None:
    with socket.create_connection(("192.0.2.1", 80), timeout=1):
        pass


def _scribble() -> None:
    """Writes into every socket that this process has."""
    for link in list(Path("/proc/self/fd").iterdir()):
        if link.is_symlink() and str(link.readlink()).startswith("socket:"):
            os.write(int(link.name), b"this is no frame; " * 10)


FAULTS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "abort": os.abort,
        "exit": lambda: os._exit(3),
        "grow": _grow,
        # Called with the interpreter's lock held, which nobody gets until it returns.
        "hog": lambda: ctypes.PyDLL(None).sleep(1000),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "network": _reach_out,
        "scribble": _scribble,
        "segv": lambda: ctypes.string_at(0),
        "sleep": lambda: time.sleep(1000),
        "spin": lambda: [None for _ in iter(int, 1)],
    }
)

_ERRORS: Mapping[str, Callable[[], BaseException]] = MappingProxyType(
    {
        "files": lambda: ModelFilesError("cut short"),
        "io": lambda: ModelFilesError("cannot be read", transient=True),
        "cancelled": LoadCancelled,
        "memory": MemoryError,
        "option": lambda: OptionError("top_k", "unknown"),
        "tensor": lambda: TensorError("x", "too long"),
        "value": lambda: ValueError("secret"),
        "exit": lambda: SystemExit("secret"),
        "stop": lambda: StopIteration("secret"),
    }
)


def _stage(spec: ModelSpec, stage: str) -> None:
    options = spec.options
    if "gate" in options and options.get("gate_at", "load") == stage:
        gate_pass(options["gate"])
    what = options.get("at", {}).get(stage)
    if what is None or not Path(options.get("armed", "/")).exists():
        return
    if what.startswith("raise "):
        raise _ERRORS[what.removeprefix("raise ")]()
    FAULTS[what]()


class _Odd(LoadedModel):
    def __init__(self, spec: ModelSpec) -> None:
        self.parts: dict[int, Memory] = {}
        self._spec = spec

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        _stage(self._spec, "run")
        if self._spec.options.get("release"):
            KEPT.clear()
        if self._spec.options.get("modules"):
            import sys

            text = "\n".join(sorted(sys.modules))
            return (TensorValue(name="modules", dtype=DType.TEXT, shape=(1,), data=(text,)),)
        return tuple(inputs)

    def measured_bytes(self) -> Mapping[int, int]:
        return {device: part.size_bytes for device, part in self.parts.items()}

    def witnesses(self) -> tuple[Witness, ...]:
        return tuple(
            Witness(device=device, reference=ref(part)) for device, part in self.parts.items()
        )

    def close(self) -> None:
        self.parts.clear()
        _stage(self._spec, "close")


class _BriefOdd(_Odd):
    brief = True


class OddRuntime(Runtime):
    """See the module."""

    def __init__(self, broken: str = "") -> None:
        self._broken = broken

    @property
    def name(self) -> str:
        """What specs call it."""
        return "odd"

    def warm_up(self) -> None:
        """Ends the process while a file is there."""
        if self._broken and Path(self._broken).exists():
            os._exit(7)

    def check(self, spec: ModelSpec) -> None:
        """Takes no task."""
        if spec.task:
            raise OptionError("task", "there is none")

    def price(self, spec: ModelSpec) -> Price:
        """The sum of the sizes."""
        _stage(spec, "price")
        size_bytes = sum(_sizes(spec, 0).values())
        structure = Structure(
            tensors=(TensorPart(names=("a", "b"), size_bytes=size_bytes, as_filed=False),),
            blocks=("a",),
            units=("b",),
        )
        return Price(
            resting_bytes=size_bytes,
            peak_bytes=size_bytes + 1,
            structure=structure,
            shared={"ab": 1},
            activation_bytes=3,
        )

    def load(self, spec: ModelSpec, *, place: Place, stop: StopCheck) -> LoadedModel:
        """Makes one part after the other."""
        odd = (_BriefOdd if spec.options.get("brief") else _Odd)(spec)
        for device, size_bytes in _sizes(spec, place.target.home).items():
            part = odd.parts[device] = Memory(device, size_bytes)
            if spec.options.get("keep"):
                KEPT.append(part)
            if spec.options.get("cycle"):
                part.me = part
            _stage(spec, "load")
            while spec.options.get("until_stopped") and not stop():
                time.sleep(0.001)
            if stop():
                raise LoadCancelled
        return odd


def _sizes(spec: ModelSpec, home: int) -> dict[int, int]:
    size = spec.options.get("size", 100)
    return {home: size} if isinstance(size, int) else dict(size)
