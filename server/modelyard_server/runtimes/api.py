"""What a runtime is: the only place that knows a framework.

The server asks a runtime three things, in this order:

    price   How many bytes will a load need? Answered from file headers, without reading weights.
            Asked once, when the model is registered; the yard reserves the answer before a load.
    load    Bring the weights onto one device, or in parts onto several. Runs in a thread of the
            engine, one load a home device at a time, but several devices at once: what a library
            cannot do from two threads, its runtime does under a lock of its own.
    run     Answer a request, or several that came at the same time and may share a run. Runs on the
            home device's lane, one at a time.

A runtime is stateless but for caches it can rebuild. A loaded model owns its weights and nothing
else owns them: after close() and when the caller has dropped the object, the memory is back. The
engine checks that, by the witnesses.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from modelyard_server.runtimes.signature import Signature
from modelyard_server.runtimes.targets import Place, Structure
from modelyard_server.runtimes.tensors import TensorValue
from modelyard_server.weights.activation_model import ActivationPoint, RunEstimate

__all__ = [
    "JsonValue",
    "KeptWeights",
    "LoadCancelled",
    "LoadSource",
    "LoadedModel",
    "ModelFilesError",
    "ModelSpec",
    "OptionError",
    "Prepared",
    "Price",
    "Runtime",
    "StopCheck",
    "Witness",
]

JsonValue = Any
"""A value of JSON or TOML: None, bool, int, float, str, list or dict of those."""

StopCheck = Callable[[], bool]
"""True once the load is no longer wanted. A load asks between steps and raises LoadCancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What to load. Plain data: it crosses the engine seam.

    Attributes:
        name: id of the model.
        runtime: name of the runtime that executes it.
        task: what the runtime does with it; empty for runtimes that do one thing.
        folder: where its files are; None for runtimes that have none. Already checked to be named
            below a configured root.
        root: that root. What lies between it and the folder is written by others and is checked
            whenever a file is opened; see weights/model_files.py. None if only the folder is known.
        options: options of the runtime, as written in the configuration.
    """

    name: str
    runtime: str
    task: str = ""
    folder: Path | None = None
    root: Path | None = None
    options: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model costs in bytes, known before its weights are read.

    Attributes:
        resting_bytes: unique storages once it is loaded: parameters (tied ones once) and buffers.
        peak_bytes: most that loading it holds at one time; at least resting_bytes. An upper bound.
            What is above resting_bytes is held on the home device.
        structure: what it is made of, for placements in parts; its size_bytes are resting_bytes.
            None for a model that cannot be cut.
        shared: the tensors that models hold together: bytes by TensorHeader.identity. A part of
            resting_bytes. A load of the whole model onto one device holds each of them there, by
            itself or with others who have the same one; a load in parts holds copies of its own.
        activation_bytes: most that a run takes beside the weights, on the home device; predicted.
            0 if nobody knows.
        runs: what runs of all batches take, for measurements to correct; None for a runtime that
            measures none.
        input_names: of the inputs that the model cannot do without, where its files or code say
            them; empty where they do not, or the runtime knows without them.
    """

    resting_bytes: int
    peak_bytes: int
    structure: Structure | None = None
    shared: Mapping[str, int] = field(default_factory=dict)
    activation_bytes: int = 0
    runs: RunEstimate | None = None
    input_names: tuple[str, ...] = ()


class OptionError(ValueError):
    """A task, option or run parameter that the runtime does not know or cannot use.

    Attributes:
        option: its name; "task" for the task.
        text: what is wrong and what is expected; shown to the client.
    """

    def __init__(self, option: str, text: str) -> None:
        super().__init__(f"{option}: {text}")
        self.option = option
        self.text = text


class ModelFilesError(Exception):
    """The model's files are not what they should be.

    Attributes:
        text: what is wrong; shown to clients, so it holds file names relative to the model's folder
            and no other path.
        transient: True when the same files may load another time (an I/O error), False when
            somebody must change them.
    """

    def __init__(self, text: str, *, transient: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.transient = transient


class LoadCancelled(Exception):
    """The load was asked to stop and did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """Something that lives as long as some of a model's memory is held.

    Attributes:
        device: position of the device whose memory it is.
        reference: to it, weak: called it answers with what there is, and with None once that has
            gone.
    """

    device: int
    reference: Callable[[], Any]


class LoadSource(enum.Enum):
    """Where a load had the weights from: each has a price of its own."""

    STORAGE = "storage"
    """Files, some of which the machine had to read."""
    PAGE_CACHE = "page cache"
    """Files that the machine had in memory."""
    COPY = "copy"
    """A copy that was kept in host memory when the model left its device; what little such a copy
    does not have may have come from files."""


class KeptWeights(ABC):
    """A copy of a model's weights in host memory, from which it can be loaded again.

    Loads that want the same tensors find it by themselves. What copies have in common they hold
    once. Thread-safe.
    """

    @property
    @abstractmethod
    def own_bytes(self) -> int:
        """What it holds beside `shared`, with what is lost between tensors."""

    @property
    @abstractmethod
    def shared(self) -> Mapping[str, int]:
        """The tensors that it may hold together with other copies: bytes by identity.

        The same ones as in LoadedModel.shared_bytes of its model.
        """

    @abstractmethod
    def release(self) -> None:
        """Lets go of it; a second call does nothing. No load begins to use it after that."""

    @property
    @abstractmethod
    def is_held(self) -> bool:
        """True while any of its memory that is not another copy's is there.

        Always before release, and after it as long as a load reads from it.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that was checked and can share a run with others: what is known before it runs.

    Attributes:
        key: requests of one model share a run only if these are equal.
        rows: of its inputs, at least 1.
        width: length of its longest row, in tokens or what else shorter rows are padded by; 1 where
            nothing is padded.
        row_bytes: of the inputs of a row of that width.
        most_rows: most rows of a run that others share; more of its own it may have.
        pass_cost: rows times width that take as long to compute as a pass takes beside its rows.
            Padding that costs more than that is worth a pass of its own.
        content: what the model has made of it; nobody else's business.

    Raises:
        ValueError: no rows, or none that are allowed.
    """

    key: Hashable
    rows: int
    width: int = 1
    row_bytes: int = 0
    most_rows: int
    pass_cost: int = 0
    content: Any

    def __post_init__(self) -> None:
        if self.rows < 1 or self.most_rows < 1:
            raise ValueError("a request that can share a run has at least 1 row")


class LoadedModel(ABC):
    """A model whose weights are in memory."""

    brief: ClassVar[bool] = False
    """True if a run takes microseconds whatever the input, and never blocks. Its lane then need not
    hand it to a thread, which alone takes longer."""

    @abstractmethod
    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        """Answers one request.

        Args:
            inputs: at least one tensor, names distinct.
            parameters: parameters of this run.

        Returns:
            The outputs in the model's own order, rows in the order of the inputs.

        Raises:
            TensorError: an input does not fit the model; raised before the model runs.
            OptionError: an unknown or unusable parameter; raised before the model runs.
            Exception: anything else is the model's failure.
        """

    def prepare(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> Prepared | None:
        """Checks a request and makes it ready to share a run with others.

        Called on the lane, where runs are. Whatever it raises is the outcome of this request alone.

        Args:
            inputs: as for run.
            parameters: as for run.

        Returns:
            None if it cannot share one: it is to be answered by run.

        Raises:
            TensorError: as for run.
            OptionError: as for run.
        """
        return None

    def run_batch(self, requests: Sequence[Prepared]) -> Sequence[tuple[TensorValue, ...]]:
        """Answers several requests in one run.

        If it raises, each of them is run alone: what is wrong with one of them is no matter of the
        others. So it must be possible to run a request again.

        Args:
            requests: at least one that prepare has returned, with equal keys.

        Returns:
            The outputs of each, in order, as run would have answered but for rounding.

        Raises:
            Exception: the model's failure.
        """
        raise NotImplementedError

    def take_measured(self) -> Sequence[ActivationPoint]:
        """What runs took beside the weights, on the home device, as far as they were measured.

        Only of runs that gave an answer, and each is told once. Mostly there is nothing: one run
        stands for all that are alike. May be called while the model runs.
        """
        return ()

    @abstractmethod
    def measured_bytes(self) -> Mapping[int, int]:
        """Bytes the model holds now, by position of the device.

        Unique storages of parameters and buffers. What lies on the disk counts there, and what is
        kept free for using it (targets.staging_bytes) counts on the home device.
        """

    def shared_bytes(self) -> Mapping[int, Mapping[str, int]]:
        """What of measured_bytes it holds together with others: by position, then by identity.

        All of its price's `shared` on one device if the whole model is there, else nothing.
        """
        return {}

    @property
    def source(self) -> LoadSource:
        """Where its weights came from when it was loaded."""
        return LoadSource.STORAGE

    def keep(self) -> KeptWeights | None:
        """Copies its weights to host memory, for loads to come. Changes nothing about the model.

        Called before close, when nothing runs on it any more.

        Returns:
            The copy; None if none of its weights could be loaded from one.

        Raises:
            MemoryError: there is no memory. Nothing is held then.
        """
        return None

    @abstractmethod
    def witnesses(self) -> tuple[Witness, ...]:
        """Weak references to what holds the weights; all dead once the memory can be back."""

    @abstractmethod
    def close(self) -> None:
        """Drops every reference to the weights. The model is not run again."""


class Runtime(ABC):
    """Loads and runs one kind of model. Methods may be called from several threads."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the configuration calls it."""

    def warm_up(self) -> None:  # noqa: B027 - nothing to do is a fine answer
        """Pays in advance for what the first load would pay: imports, thread pools."""

    @abstractmethod
    def check(self, spec: ModelSpec) -> None:
        """Checks task and options. Touches no files.

        Raises:
            OptionError: an unknown task or option, or a value it cannot use.
        """

    @abstractmethod
    def price(self, spec: ModelSpec) -> Price:
        """Says what the model costs, from headers and configuration files.

        Raises:
            ModelFilesError: files that can be seen to be no model of this runtime.
        """

    def signature(self, spec: ModelSpec, input_names: Sequence[str] = ()) -> Signature:
        """Says what a model takes and gives, as far as that is known without it. Touches no files.

        Args:
            spec: of the model; has passed check.
            input_names: of its price.
        """
        return Signature(inputs=(), outputs=(), is_exact=False)

    def check_request(  # noqa: B027 - nothing can be said of most requests without the model
        self,
        spec: ModelSpec,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        """Checks what can be checked of a request before its model is loaded for it.

        Not called for every request: `run` of the loaded model checks all of it again. Touches no
        files and imports nothing: it is called where nothing may take long.

        Args:
            spec: of the model; has passed check.
            inputs: as `run` would get them.
            parameters: as `run` would get them.

        Raises:
            TensorError: an input that no model of this spec takes.
            OptionError: an unknown or unusable parameter.
        """

    @abstractmethod
    def load(self, spec: ModelSpec, *, place: Place, stop: StopCheck) -> LoadedModel:
        """Brings the weights onto their devices.

        Args:
            spec: what to load; has passed check.
            place: which part goes where. In parts only if price gave a structure.
            stop: asked between steps.

        Raises:
            ModelFilesError: the files are damaged, unsafe or not of this runtime.
            LoadCancelled: stop said so. Nothing is held then.
        """
