"""A runtime whose models do what their options say, in whatever process they are.

Options:
    size: bytes of the model on its home device, or a list of [position, bytes].
    at: what happens at "price", "load", "prepare", "run", "keep", "drop" and "close": a key of
        FAULTS, or "raise NAME".
    armed: path of a file; faults happen only while it is there. Left out: always.
    gate: path of a gate (see faulty_models) before which loads, or with `gate_at` other stages,
        wait.
    keep: the model's memory outlives it, until a model of option `release` runs.
    shared: what of its size it holds together with others on its home device: bytes by identity.
    copy: own bytes of the copies of its weights, which share what it shares; left out: there are
        none. A load of a model whose copy is there comes from that.
    in_use: path of a file: while it is there, somebody reads from the copy.
    source: where loads come from else; one that there is not is told all the same.
    cycle: the model's memory is part of a cycle.
    brief: it is a brief one.
    batch: its requests share runs, at most 16; each is answered with its inputs, and how many did.
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
from types import MappingProxyType, SimpleNamespace
from typing import Any
from weakref import ref

from modelyard_server.runtimes.api import (
    JsonValue,
    KeptWeights,
    LoadCancelled,
    LoadedModel,
    LoadSource,
    ModelFilesError,
    ModelSpec,
    OptionError,
    Prepared,
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

COPIES: dict[str, Copy] = {}
"""Copies that loads can come from, by the model's name."""


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


class Copy(KeptWeights):
    """A copy of a model's weights. See the options."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._is_released = False

    @property
    def own_bytes(self) -> int:
        """As the options say."""
        own_bytes: int = self._spec.options["copy"]
        return own_bytes

    @property
    def shared(self) -> Mapping[str, int]:
        """What its model shares."""
        return dict(self._spec.options.get("shared", {}))

    def release(self) -> None:
        """No load comes from it any more."""
        if COPIES.get(self._spec.name) is self:
            del COPIES[self._spec.name]
        self._is_released = True
        _stage(self._spec, "drop")

    @property
    def is_held(self) -> bool:
        """As long as somebody reads from it."""
        return not self._is_released or Path(self._spec.options.get("in_use", "")).is_file()


class _Odd(LoadedModel):
    def __init__(self, spec: ModelSpec, home: int) -> None:
        self.parts: dict[int, Memory] = {}
        self._spec = spec
        self._home = home
        source = spec.options.get("source", "storage")
        self._source: Any = LoadSource.COPY if spec.name in COPIES else _source(source)

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

    def prepare(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> Prepared | None:
        if not self._spec.options.get("batch"):
            return None
        _stage(self._spec, "prepare")
        return Prepared(key=(), rows=1, most_rows=16, content=inputs)

    def run_batch(self, requests: Sequence[Prepared]) -> Sequence[tuple[TensorValue, ...]]:
        _stage(self._spec, "run")
        # Each with how many shared its run.
        count = TensorValue(name="count", dtype=DType.UINT8, shape=(), data=bytes([len(requests)]))
        return [(*request.content, count) for request in requests]

    def measured_bytes(self) -> Mapping[int, int]:
        return {device: part.size_bytes for device, part in self.parts.items()}

    def shared_bytes(self) -> Mapping[int, Mapping[str, int]]:
        shared = self._spec.options.get("shared")
        return {self._home: shared} if shared else {}

    @property
    def source(self) -> LoadSource:
        source: LoadSource = self._source
        return source

    def keep(self) -> KeptWeights | None:
        assert self.parts, "it is kept after it was closed"
        _stage(self._spec, "keep")
        if "copy" not in self._spec.options:
            return None
        copy = COPIES[self._spec.name] = Copy(self._spec)
        return copy

    def witnesses(self) -> tuple[Witness, ...]:
        return tuple(
            Witness(device=device, reference=ref(part)) for device, part in self.parts.items()
        )

    def close(self) -> None:
        self.parts.clear()
        _stage(self._spec, "close")


def _source(value: str) -> Any:
    try:
        return LoadSource(value)
    except ValueError:
        return SimpleNamespace(value=value)


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
        home = place.target.home
        odd = (_BriefOdd if spec.options.get("brief") else _Odd)(spec, home)
        for device, size_bytes in _sizes(spec, home).items():
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
