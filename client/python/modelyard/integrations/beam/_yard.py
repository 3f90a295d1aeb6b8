"""A yard inside the worker's process: what it is made of, and the one that runs.

A yard is a value that travels with the pipeline, and equal values are one yard: however many steps,
handlers and threads of a process name it, it is started once there, and its budgets are those of
the process. With ``large_model`` it is one for all processes of the machine that share a temporary
folder; then it runs in that one which needed it first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self

from modelyard._struct_messages import struct_from, struct_to_dict
from modelyard.admin import Admin
from modelyard.client import Client
from modelyard.errors import AlreadyExists
from modelyard.integrations.beam._local import Call, LocalAdmin, LocalClient
from modelyard.placements import PlacementLike, placement_to_json, read_placement

if TYPE_CHECKING:
    from modelyard_server.config import Config
    from modelyard_server.embedding import EmbeddedServer

__all__ = ["EmbeddedYard", "RunningYard", "YardAccess", "YardModel", "server_package"]

logger = logging.getLogger(__name__)

_ROOT: Final = "files"
_IN_ID: Final = re.compile(r"[^a-z0-9]+")
_MOST_NAME: Final = 60
_LOAD_S: Final = 300.0
"""How long a load may take that is asked for before keys mean its model."""


def server_package(what: str) -> Any:
    """Import a module of the server.

    Raises:
        ImportError: it is not installed; the text says what to do.
    """
    from importlib import import_module

    try:
        return import_module(f"modelyard_server.{what}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "modelyard_server":
            raise
        raise ImportError(
            "an embedded yard is the server itself, and the package modelyard_server is not "
            "installed here: pip install 'modelyard[beam]' where the pipeline is built and in its "
            "workers, or use ServerModelHandler, which needs the client alone"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class YardModel:
    """A model as a yard is told of it.

    Args:
        folder: its folder in the workers: safetensors, and what its runtime reads beside them.
        runtime: what executes it: ``transformers``, ``torch`` or ``identity`` (no folder).
        task: what the runtime does with it, for instance ``text-classification``.
        options: of the runtime.
        device: where it shall live, in any form of ``modelyard.read_placement``; None: the yard
            chooses.
        name: what ``PredictionResult.model_id`` calls it; "": a name made of the folder's.

    Raises:
        TypeError, ValueError: an argument of no use.
    """

    folder: str = ""
    runtime: str = "transformers"
    task: str = ""
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    device: PlacementLike = field(default=None, hash=False)
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", str(self.folder))
        # Plain values, as they are sent: what cannot be is refused here.
        object.__setattr__(self, "options", struct_to_dict(struct_from(self.options, "options")))
        read_placement(self.device)
        if not self.folder and self.runtime != "identity":
            raise ValueError(f"the {self.runtime} runtime reads weights: give a folder")

    @classmethod
    def torch(
        cls,
        folder: str | Path,
        factory: Callable[..., Any] | str,
        factory_options: Mapping[str, object] | None = None,
        **settings: Any,
    ) -> Self:
        """Return a model of the torch runtime.

        Args:
            folder: with ``model.safetensors``, the module's state dict.
            factory: what makes the module: a class or function that workers can import, or its
                name ``module:function``.
            factory_options: its keyword arguments.
            settings: others of the class; ``options`` beside those two.

        Raises:
            TypeError, ValueError: an argument of no use, as a factory that has no name.
        """
        if not isinstance(factory, str):
            name = getattr(factory, "__qualname__", "<none>")
            if "<" in name:
                raise ValueError(
                    f"{factory!r} has no name to import it by: use a module's function"
                )
            factory = f"{factory.__module__}:{name}"
        options = {"factory": factory, **settings.pop("options", {})}
        if factory_options:
            options["factory_options"] = dict(factory_options)
        return cls(folder=str(folder), runtime="torch", options=options, **settings)

    @property
    def id(self) -> str:
        """Its id in a yard: its name, or the folder's and a digest of all that is said of it."""
        if self.name:
            return self.name
        stem = _IN_ID.sub("-", Path(self.folder).name.lower()).strip("-") or self.runtime
        return f"{stem[:_MOST_NAME]}-{self.digest[:12]}"

    @property
    def digest(self) -> str:
        """The same exactly for models of which the same is said."""
        said = [
            *(self.folder, self.runtime, self.task, self.options, self.name),
            placement_to_json(read_placement(self.device)),
        ]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def at(self, folder: str) -> Self:
        """Return the same model from another folder, under a name of its own."""
        name = ""
        if self.name:
            # Two of one name cannot be in one yard, and the old one is while the new one is loaded.
            stem, _, _ = self.name.partition("--")
            name = f"{stem}--{hashlib.sha256(folder.encode()).hexdigest()[:12]}"
        return replace(self, folder=folder, name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedYard:
    """A yard that runs in the workers of a pipeline. A value: equal ones are the same yard.

    Args:
        budgets: most bytes that models may hold on each device: ``{"cpu": "4GiB"}``,
            ``{"cuda:0": "80%", "cuda:1": "80%"}``. In place of a size a mapping of what a server's
            configuration takes in ``[[devices]]``: ``{"budget": "1GB", "logical": True}``.
        policy: who leaves for whom; as ``yard.policy`` of a server.
        engine: "thread": models run in the worker's process; "process": in processes of their own,
            so that one that crashes takes nothing with it.
        store: folder of the yard's own copies of weights; None reads models where they lie.
        factories: "module:function" of what the torch runtime may call; None: what handlers name.
            An engine of processes has to be told.
        name: yards of different names are different yards.

    Raises:
        ValueError: there is no device, or the engine is not one of the two.
    """

    budgets: Mapping[str, object] = field(
        default_factory=lambda: MappingProxyType({"cpu": "50%"}), hash=False
    )
    policy: str = "ensemble"
    engine: str = "thread"
    store: str | None = None
    factories: tuple[str, ...] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.budgets:
            raise ValueError('budgets is empty: give at least one device, for example "cpu"')
        if self.engine not in ("thread", "process"):
            raise ValueError(f"engine is {self.engine!r}: 'thread' or 'process'")
        # Plain dicts: a view of one cannot be pickled.
        object.__setattr__(
            self,
            "budgets",
            {
                str(device): dict(said) if isinstance(said, Mapping) else said
                for device, said in self.budgets.items()
            },
        )
        if self.factories is not None:
            object.__setattr__(self, "factories", tuple(self.factories))

    @property
    def id(self) -> str:
        """The same exactly for yards that are the same."""
        said = [
            *(self.budgets, self.policy, self.engine, self.store, self.factories, self.name),
        ]
        text = json.dumps(said, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def running(self) -> RunningYard:
        """Return the yard of this process; started if there is none.

        Raises:
            ImportError: the server's package is not installed.
            ValueError: it cannot be what it is to be; the text names the setting.
            OSError, RuntimeError, ...: it cannot start on this machine.
        """
        with _starting:
            found = _running.get(self.id)
            if found is None or found.is_closed:
                found = RunningYard(self)
                _running[self.id] = found
            return found

    def stop(self) -> bool:
        """Stop the yard of this process, if there is one; the next use starts another.

        Returns:
            False if a model or a load still runs in it.
        """
        with _starting:
            found = _running.pop(self.id, None)
        return found is None or found.close()

    def config(self) -> Config:
        """Return it as a server's configuration.

        Raises:
            ImportError: the server's package is not installed.
            ValueError: a setting is not right; the text names it.
        """
        config = server_package("config")
        devices = tuple(
            config.DeviceConfig(
                device=device, **(said if isinstance(said, Mapping) else {"budget": said})
            )
            for device, said in self.budgets.items()
        )
        found: Config = config.Config(
            server=config.ServerConfig(max_message_bytes=2**31 - 1),
            yard=config.YardConfig(policy=self.policy),
            weights=config.WeightsConfig(store=None if self.store is None else Path(self.store)),
            engine=config.EngineConfig(kind=self.engine),
            devices=devices,
            roots={_ROOT: Path("/")},
            allowed_factories=(
                _AnyFactory()
                if self.factories is None and self.engine == "thread"
                else frozenset(self.factories or ())
            ),
        )
        return found


class _AnyFactory(frozenset[str]):
    """Factories of a yard in a process whose own code names them: a list would keep out nobody."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)


# One of each in a process is the point, and whoever needs it first starts it.
_running: weakref.WeakValueDictionary[str, RunningYard] = weakref.WeakValueDictionary()
_starting = threading.Lock()


class RunningYard:
    """A yard that runs in this process. May be shared between threads.

    Ends when nobody has it any more, and when it is closed.

    Args:
        yard: what it is.

    Raises: as `EmbeddedYard.running`.
    """

    def __init__(self, yard: EmbeddedYard) -> None:
        server: EmbeddedServer = server_package("embedding").EmbeddedServer(yard.config())
        self._server = server
        self._end = weakref.finalize(self, _end, server)
        self._end.atexit = False
        _watch_the_end()

    @property
    def is_closed(self) -> bool:
        """True once it has ended."""
        return not self._end.alive

    def call(
        self,
        path: str,
        body: bytes,
        timeout_s: float | None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> bytes | tuple[int, str, bytes]:
        """Make a call, in bytes; see `EmbeddedServer.call`."""
        return self._server.call(path, body, timeout_s, metadata)

    def close(self) -> bool:
        """End it. Returns False if a model or a load still runs."""
        settled = self._end()  # None if it has ended before.
        return settled is None or bool(settled)


@cache
def _watch_the_end() -> None:
    """Sees to it that yards end before the interpreter does.

    What ``atexit`` has comes too late: by then executors take no more work, and a yard ends with
    the help of some. The hook that they use themselves has no public name. Without it yards end as
    they would if the process were killed, which they are made for.
    """
    register: Callable[[Callable[[], None]], None] | None = getattr(
        threading, "_register_atexit", None
    )
    if register is not None:
        with contextlib.suppress(RuntimeError):  # It is the end already.
            register(_end_all)


def _end_all() -> None:
    for yard in list(_running.values()):
        yard.close()


def _end(server: EmbeddedServer) -> bool:
    if threading.current_thread() is server.thread:
        # The collector may find it on any thread; its own cannot wait for itself.
        threading.Thread(target=server.close, name="end of a yard", daemon=True).start()
        return True
    return server.close()


class YardAccess:
    """A yard as handlers use it, whichever process it runs in. May be shared between threads.

    Args:
        call: makes a call of it.
        keep: what has to live as long as it is used.
    """

    def __init__(self, call: Call, keep: object = None) -> None:
        self._keep = keep
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()
        self.client: Client = LocalClient(call)
        self.admin: Admin = LocalAdmin(call)

    @classmethod
    def to(cls, yard: EmbeddedYard, *, shared_by_machine: bool = False) -> Self:
        """Return the access to a yard, which is started if it does not run.

        Args:
            yard: which one.
            shared_by_machine: one for all processes of the machine.

        Raises: as `EmbeddedYard.running`.
        """
        if not shared_by_machine:
            running = yard.running()
            return cls(running.call, running)
        from apache_beam.utils.multi_process_shared import MultiProcessShared

        shared = MultiProcessShared(yard.running, tag=f"modelyard-{yard.id}", always_proxy=True)
        proxy: Any = shared.acquire()
        return cls(proxy.call, (shared, proxy))

    def register(self, model: YardModel) -> str:
        """Make a model known, if it is not, and return its id. Nothing is loaded.

        Raises:
            ValueError: another model has its name.
            ModelyardError: it is none, or fits nowhere.
        """
        with self._lock:
            if (known := self._known.get(model.id)) is not None:
                if known != model.digest:
                    raise ValueError(f"two different models have the name {model.id!r}")
                return model.id
            folder = None
            if model.folder:
                # The server follows no symbolic link below its roots; whoever named this may.
                folder = str(Path(model.folder).resolve().relative_to("/"))
            with contextlib.suppress(AlreadyExists):  # By another process, or another step.
                self.admin.create_model(
                    model.id,
                    runtime=model.runtime,
                    task=model.task,
                    root=None if folder is None else _ROOT,
                    folder=folder,
                    options=model.options or None,
                    placement=model.device,
                )
            if model.name:
                self._check_same(model, folder)
            self._known[model.id] = model.digest
            return model.id

    def _check_same(self, model: YardModel, folder: str | None) -> None:
        there = self.admin.get_model(model.id)
        said = (folder, model.runtime, model.task, dict(model.options))
        if (there.folder, there.runtime, there.task, dict(there.options)) != said:
            raise ValueError(f"the yard has another model of the name {model.id!r}")

    def stage(self, old: str, new: str) -> None:
        """Load a model that is to take the place of another, if that one is in memory.

        Both are kept meanwhile. Where there is no room for both nothing is loaded, as a route of a
        server does it; it is a route's change that is used here.

        Raises:
            ModelyardError: it cannot be loaded.
        """
        route = f"stage-{uuid.uuid4().hex}"
        self.admin.create_route(route, [f"stage/{route}"], model=old)
        try:
            self.admin.update_route(route, model=new, timeout_s=_LOAD_S)
        finally:
            self.admin.delete_route(route)

    def bound_models(self, count: int, model_ids: Sequence[str]) -> None:
        """Lower each device's budget to what the largest of some models hold there together.

        Args:
            count: of models that have to fit.
            model_ids: of which.
        """
        models = [self.admin.get_model(model_id) for model_id in model_ids]
        largest = sorted((model.estimated_bytes or 0 for model in models), reverse=True)
        room = sum(largest[:count])
        for device in self.admin.list_devices():
            if room and device.budget_bytes > room:
                self.admin.update_budget(device.name, room)
