"""The engine seam: models live behind it and never cross it.

Everything that goes in or out is plain data (ids, ModelSpec, TensorValue, byte counts), so that an
engine can be threads of this process or processes of its own, and the rest of the server cannot
tell.

Who may call what: all methods from the event loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from modelyard_server.execution.figures import LaneFigures
from modelyard_server.runtimes.api import JsonValue, LoadSource, ModelSpec, Price
from modelyard_server.runtimes.targets import Target
from modelyard_server.runtimes.tensors import TensorValue
from modelyard_server.weights.activation_model import ActivationPoint

__all__ = [
    "DeviceMemory",
    "Engine",
    "EngineDevice",
    "Loaded",
    "ModelFailed",
    "OnLost",
    "OnMeasured",
    "RunOutcome",
    "Unloaded",
    "Work",
    "WorkerDeath",
    "WorkerLost",
    "nobody",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDevice:
    """A device as the engine sees it.

    Attributes:
        name: of its lane.
        torch_device: torch's name of it; "cpu" for logical devices, which are pools of host memory;
            targets.DISK for the disk, which has neither lane nor loader.
        threads: intra-op threads of its lane.
        transfer_bytes_per_s: a logical device's bandwidth: its loads take at least as long as their
            bytes do at this speed. 0 for no limit.
        group: devices of one group share a worker, where the engine has workers; a model in parts
            must be in one. A disk is of every group.
    """

    name: str
    torch_device: str
    threads: int
    transfer_bytes_per_s: int = 0
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What the engine measures in the models it holds on one device.

    Attributes:
        measured_bytes: unique storages now, models being unloaded included.
        peak_measured_bytes: highest value of it since the engine started.
    """

    measured_bytes: int
    peak_measured_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What became of a load.

    Attributes:
        own_bytes: bytes that are really the model's own, by position of the device: what it holds
            without the tensors of LoadedModel.shared_bytes.
        source: where the weights came from.
    """

    own_bytes: Mapping[int, int]
    source: LoadSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """What became of an unload.

    Attributes:
        freed: by position of each device the model was on, the bytes that are measurably back: all
            that it held there, shared tensors included whoever else holds them, or 0 if any of it
            is still held in its name; see recheck.
        kept_bytes: what its copy holds beside its price's shared tensors, all of which the copy
            holds too; None if there is no copy.
        keep_s: how long making the copy took.
        refused_bytes: what a copy would have held beside them, which was more than it was allowed:
            there is none.
    """

    freed: Mapping[int, int]
    kept_bytes: int | None = None
    keep_s: float = 0.0
    refused_bytes: int | None = None


class ModelFailed(Exception):
    """The model raised while it ran.

    Attributes:
        exception_type: name of what it raised.
        log_text: the full story with the traceback, for the server's log and for nobody else.
    """

    def __init__(self, exception_type: str, log_text: str) -> None:
        super().__init__(exception_type)
        self.exception_type = exception_type
        self.log_text = log_text


class WorkerLost(Exception):
    """The model is gone with the process it was in, and did not run; it may run another time.

    Attributes:
        text: what became of the process; shown to the client.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDeath:
    """A worker process has ended without being asked to.

    Attributes:
        worker: what it is called in the log.
        models: the yard's ids of those that were loaded in it; each is still to be unloaded, which
            answers at once.
        copies: the yard's ids of those of whom it kept a copy; these go with it, and there is
            nothing to be dropped: drop_copy waits until its process is over, and answers True.
        suspects: ids of those that were running, or being loaded or copied at that moment; of the
            one that is to blame alone, where that is known.
        cause: why, for people.
    """

    worker: str
    models: frozenset[int]
    copies: frozenset[int]
    suspects: tuple[int, ...]
    cause: str


OnLost = Callable[[WorkerDeath], None]
"""Called on the event loop when a worker has died, before the outcomes of what ran there are."""

OnMeasured = Callable[[int, Sequence[ActivationPoint]], None]
"""Called on the event loop when a run of a model has been measured, before its outcome."""

RunOutcome = tuple[TensorValue, ...] | BaseException
"""Outputs, or TensorError, OptionError, ModelFailed or WorkerLost."""


def nobody() -> str:
    """The client of a request of which that is not known."""
    return ""


class Work(Protocol):
    """A request that was given to the engine."""

    def abandon(self) -> None:
        """Says that nobody wants the answer. Work that runs goes on until it ends."""


class Engine(Protocol):
    """Loads, runs and unloads models. A model is named by the yard's id for it."""

    async def start(self, runtimes: Sequence[str]) -> None:
        """Makes lanes, and pays in advance for what the first load by these runtimes would pay."""

    async def stop(self, timeout_s: float) -> bool:
        """Ends the lanes after what runs, and drops every model.

        Returns:
            False if something still runs after timeout_s: a model or a loader that hangs.
        """

    def check(self, spec: ModelSpec) -> None:
        """Checks task and options. Raises OptionError."""

    def check_request(
        self,
        spec: ModelSpec,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        """Checks what can be checked of a request without its model.

        Raises:
            TensorError: an input that no such model takes.
            OptionError: an unknown or unusable parameter.
        """

    async def price(self, spec: ModelSpec) -> Price:
        """Says what a model costs, from its files' headers. Raises ModelFilesError."""

    async def load(self, model: int, spec: ModelSpec, target: Target) -> Loaded:
        """Brings a model onto its devices, from a copy of its weights where the engine keeps one.

        Returns:
            What it holds, and where that came from.

        Raises:
            ModelFilesError: its files are not what they should be.
            LoadCancelled: cancel_load said so.
            Exception: the loader failed in another way. Nothing is held in any of these cases.
        """

    def cancel_load(self, model: int) -> None:
        """Asks a load to stop. No effect on a model that is not being loaded."""

    async def unload(
        self, model: int, *, keep: bool = False, most_bytes: int | None = None
    ) -> Unloaded:
        """Drops a model and waits until its memory is back.

        Args:
            model: a loaded model that nobody uses.
            keep: copy its weights to host memory before; it is dropped also if that cannot be done.
                The engine keeps at most one copy of a model: an older one must have been dropped.
            most_bytes: what the copy may hold beside its shared tensors; a larger one is not kept.
                Copies are whole pages: no more than that can make one larger than its model.

        Raises:
            ValueError: there is an older copy, or memory of one. Nothing was done.
        """

    async def drop_copy(self, model: int) -> bool:
        """Drops the copy that an unload has kept, and waits for a while until its memory is back.

        Returns:
            True if it is; False if somebody still reads from it, or if an unload is still making
            it. To be asked again then: a copy that there is none of is back.
        """

    async def recheck(self, model: int) -> Mapping[int, int]:
        """Looks again at what unloads could not get back.

        Returns:
            Bytes that are back since, by position of the device; empty if none are. Those that
            others held as well are among them, and of which of its unloads they are is not said.
        """

    def run(
        self,
        model: int,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
        on_done: Callable[[RunOutcome | None], None],
        client: Callable[[], str] = nobody,
        waited_s: float = 0.0,
    ) -> Work:
        """Runs a model on the lane of its home device, alone or with others that wait for it.

        Args:
            model: a loaded model; it must not be unloaded before on_done.
            inputs: as they came, checked in themselves but not against the model.
            parameters: of this run.
            on_done: called on the loop, once, when the work has really ended, with the outputs or
                the error; with None if it was abandoned before it began.
            client: says whose request it is, any text. Requests that wait for the same model take
                turns by it. Asked here and now, or not at all.
            waited_s: for how long the request has waited already, for its model to be loaded: it
                takes its place in the lane before those that have waited for less.
        """

    def set_budget(self, device: int, budget_bytes: int) -> None:
        """A device may hold so much from now on: what holds models to it is to know."""

    def set_copies_budget(self, budget_bytes: int) -> None:
        """All copies may hold so much from now on, 0 before: what holds them to it is to know."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Numbers of the processes that models run in, by what they are called; of this one not."""

    def memory(self, device: int) -> DeviceMemory:
        """What is measured on a device."""

    @property
    def figures(self) -> LaneFigures:
        """What all lanes have run together since the engine was made."""

    @property
    def copies(self) -> DeviceMemory:
        """What is measured in the copies that are kept, in all processes together."""
