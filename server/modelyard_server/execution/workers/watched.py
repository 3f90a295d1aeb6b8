"""Runtimes and models as a worker has them: what they are doing stands on the board.

A call's number comes along with what the engine passes on anyway: a spec, or the inputs of a run.
So the engine of threads need not know that it is in a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from modelyard_server.execution.workers.board import BoardWriter
from modelyard_server.runtimes.api import (
    JsonValue,
    KeptWeights,
    LoadedModel,
    LoadSource,
    ModelSpec,
    Prepared,
    Price,
    Runtime,
    StopCheck,
    Witness,
)
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import TensorValue
from modelyard_server.weights.activation_model import ActivationPoint

__all__ = ["CalledInputs", "CalledSpec", "WatchedRuntime"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalledSpec(ModelSpec):
    """A spec, and the call it came with.

    Attributes:
        call: number of the call.
        plain: the spec alone.
    """

    call: int
    plain: ModelSpec

    @staticmethod
    def of(spec: ModelSpec, call: int) -> CalledSpec:
        """The spec with a call's number."""
        return CalledSpec(
            name=spec.name,
            runtime=spec.runtime,
            task=spec.task,
            folder=spec.folder,
            root=spec.root,
            options=spec.options,
            call=call,
            plain=spec,
        )


class CalledInputs(tuple[TensorValue, ...]):
    """Inputs of a run, and the call they came with.

    Attributes:
        call: number of the call.
    """

    call: int

    def __new__(cls, inputs: Iterable[TensorValue], call: int) -> CalledInputs:
        """The inputs with a call's number."""
        made = super().__new__(cls, inputs)
        made.call = call
        return made


class WatchedRuntime(Runtime):
    """A runtime that says on the board what it is doing. All else is the runtime's own.

    Args:
        runtime: that is to be watched.
        board: of the worker.
        held: gets the bytes that each model it loaded holds, by number of the load's call.
        keeps: says of which call a model's weights are kept, by number of the load's call.
    """

    def __init__(
        self,
        runtime: Runtime,
        board: BoardWriter,
        held: dict[int, Mapping[int, int]],
        keeps: Mapping[int, int],
    ) -> None:
        self._runtime = runtime
        self._board = board
        self._held = held
        self._keeps = keeps

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        return self._runtime.name

    def warm_up(self) -> None:
        """See Runtime."""
        self._runtime.warm_up()

    def check(self, spec: ModelSpec) -> None:
        """See Runtime."""
        self._runtime.check(spec)

    def check_request(
        self,
        spec: ModelSpec,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        """See Runtime."""
        self._runtime.check_request(spec, inputs, parameters)

    def price(self, spec: ModelSpec) -> Price:
        """See Runtime."""
        call, plain = _parts(spec)
        before = self._board.begin(call, call)
        try:
            return self._runtime.price(plain)
        finally:
            self._board.end(before)

    def load(self, spec: ModelSpec, *, place: Place, stop: StopCheck) -> LoadedModel:
        """See Runtime."""
        call, plain = _parts(spec)
        before = self._board.begin(call, call)
        try:
            loaded = self._runtime.load(plain, place=place, stop=stop)
        finally:
            self._board.end(before)
        kind = _BriefWatchedModel if loaded.brief else _WatchedModel
        return kind(
            loaded,
            self._board,
            owner=call,
            on_measured=partial(self._held.__setitem__, call),
            keep_call=lambda: self._keeps.get(call, 0),
        )


def _parts(spec: ModelSpec) -> tuple[int, ModelSpec]:
    return (spec.call, spec.plain) if isinstance(spec, CalledSpec) else (0, spec)


@dataclass(frozen=True, slots=True)
class _Called:
    """What a model has prepared, and the call it came with."""

    call: int
    prepared: Prepared


class _WatchedModel(LoadedModel):
    def __init__(
        self,
        loaded: LoadedModel,
        board: BoardWriter,
        *,
        owner: int,
        on_measured: Callable[[Mapping[int, int]], None],
        keep_call: Callable[[], int],
    ) -> None:
        self._loaded = loaded
        self._board = board
        # No two models of a worker were loaded by the same call.
        self._owner = owner
        self._on_measured: Callable[[Mapping[int, int]], None] | None = on_measured
        self._keep_call = keep_call

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        board = self._board
        call = inputs.call if isinstance(inputs, CalledInputs) else 0
        before = board.begin(call, self._owner)
        try:
            return self._loaded.run(inputs, parameters)
        finally:
            board.end(before)

    def prepare(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> Prepared | None:
        board = self._board
        call = inputs.call if isinstance(inputs, CalledInputs) else 0
        before = board.begin(call, self._owner)
        try:
            prepared = self._loaded.prepare(inputs, parameters)
        finally:
            board.end(before)
        if prepared is None:
            return None
        return replace(prepared, content=_Called(call, prepared))

    def run_batch(self, requests: Sequence[Prepared]) -> Sequence[tuple[TensorValue, ...]]:
        called: list[_Called] = [request.content for request in requests]
        # All of them, since nobody can tell whose row it is that ends the process.
        batch = self._board.begin_batch([each.call for each in called], self._owner)
        try:
            return self._loaded.run_batch([each.prepared for each in called])
        finally:
            self._board.end_batch(batch)

    def take_measured(self) -> Sequence[ActivationPoint]:
        return self._loaded.take_measured()

    def measured_bytes(self) -> Mapping[int, int]:
        sizes = self._loaded.measured_bytes()
        # The engine measures once, at the end of the load.
        tell, self._on_measured = self._on_measured, None
        if tell is not None:
            tell(dict(sizes))
        return sizes

    def shared_bytes(self) -> Mapping[int, Mapping[str, int]]:
        return self._loaded.shared_bytes()

    @property
    def source(self) -> LoadSource:
        return self._loaded.source

    def keep(self) -> KeptWeights | None:
        call = self._keep_call()
        before = self._board.begin(call, call)
        try:
            return self._loaded.keep()
        finally:
            self._board.end(before)

    def witnesses(self) -> tuple[Witness, ...]:
        return self._loaded.witnesses()

    def close(self) -> None:
        try:
            self._loaded.close()
        finally:
            del self._loaded


class _BriefWatchedModel(_WatchedModel):
    brief = True
