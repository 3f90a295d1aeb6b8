"""Handlers whose models live in a yard inside the worker: bytes bound them, not a count."""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import grpc

from modelyard.errors import KeyNotFound, ModelyardError
from modelyard.integrations.beam._asking import AskingSettings, Figures
from modelyard.integrations.beam._base import YardHandler
from modelyard.integrations.beam._server import keys_and_examples
from modelyard.integrations.beam._stacking import ask_for_rows
from modelyard.integrations.beam._yard import EmbeddedYard, YardAccess, YardModel, server_package
from modelyard.prediction import BatchItem, Prediction

if TYPE_CHECKING:
    from apache_beam.ml.inference.base import KeyModelMapping, KeyModelPathMapping

    from modelyard_server.routing.key_table import KeyMapping, KeyTable
else:
    from apache_beam.ml.inference.base import KeyModelMapping

__all__ = ["KeyModelUpdate", "KeyedModelHandler", "YardModelHandler"]

logger = logging.getLogger(__name__)

_KEYED_NAMESPACE: Final = "BeamML_KeyedModels"

_UPDATE_AGAIN_S: Final = 30.0
"""When an update that failed is tried again."""

# How settings of a mapping's handlers become one for their common batches: nobody's batch is made
# smaller, or kept longer, than it asked for.
_COMBINED: Final[Mapping[str, Callable[[Iterable[int]], int]]] = {
    "min_batch_size": max,
    "max_batch_size": max,
    "max_batch_duration_secs": min,
}

T = TypeVar("T")

_Answers = tuple[list[Prediction | ModelyardError], Figures]


class _Once(Generic[T]):
    """A value that is made when it is first asked for, by whichever thread; again if that failed.

    Beam holds a lock of the whole process while it makes what processes share, so nothing that is
    shared itself can be made then.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


class _OneModel:
    """What a worker loads for one model: the yard, and which model it is there."""

    def __init__(self, handler: YardModelHandler) -> None:
        self._handler = handler
        self._ready = _Once(self._begin)

    def begin(self) -> None:
        """Starts the yard, if it does not run, and makes the model known to it."""
        self._ready()

    def answer(self, items: list[BatchItem], settings: AskingSettings) -> _Answers:
        """Asks for items of whatever keys; their model is this one."""
        access, model_id = self._ready()
        figures = Figures()
        mine = [replace(item, key=model_id) for item in items]
        return ask_for_rows(access.client, mine, settings, figures=figures), figures

    def _begin(self) -> tuple[YardAccess, str]:
        handler = self._handler
        access = YardAccess.to(handler._yard, shared_by_machine=handler._large_model)
        model, before = handler._model, handler._before
        try:
            model_id = access.register(model)
            if before is not None:
                access.stage(access.register(before), model_id)
        except ModelyardError:
            if before is None:
                raise
            logger.exception("%s cannot take the place of %s", model, before)
            model_id = access.register(before)
        return access, model_id


class YardModelHandler(YardHandler):
    """Runs one model in a yard inside the worker.

    ::

        examples | RunInference(YardModelHandler(YardModel(folder="...", task="fill-mask"), yard))

    In place of one of Beam's handlers: alone, as one of the branches or steps of a pipeline, or in
    a ``KeyModelMapping``. Handlers that name equal yards share one, with one budget: the models of
    all steps of a worker's process stay in memory as far as it goes, each once, and those that do
    not fit are swapped.

    ``update_model_path`` (Beam's automatic model refresh) loads the new folder's model before it
    answers, where the old one is in memory. If it cannot be loaded, the old one goes on, and an
    error is logged.

    Args:
        model: what to run.
        yard: where; None: a yard of half of the machine's memory, the same for all that say None.
        large_model: one yard for all worker processes of the machine, instead of one for each.
        settings: the others of ``ServerModelHandler``, but for its connection's. ``model_copies``
            is a number of accesses: of each model a yard has one copy.

    Raises:
        TypeError, ValueError: an argument of no use.
    """

    def __init__(self, model: YardModel, yard: EmbeddedYard | None = None, **settings: Any) -> None:
        if not isinstance(model, YardModel):
            raise TypeError(f"model must be a YardModel, got {type(model).__name__}")
        super().__init__(**settings)
        self._yard = yard or EmbeddedYard()
        self._model = model
        self._before: YardModel | None = None

    @property
    def model(self) -> YardModel:
        """What it runs."""
        return self._model

    def load_model(self) -> _OneModel:
        """Start the yard, if it does not run, and make the model known to it. Called by Beam.

        Where one yard is shared by the machine, that is done when the first batch comes.
        """
        # What is said here is what is served, whatever this handler is told afterwards.
        model = _OneModel(copy.copy(self))
        if not self._large_model:
            model.begin()
        return model

    def run_inference(
        self,
        batch: Sequence[Any],
        model: _OneModel,
        inference_args: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Return the batch's results, in its order. See ``ServerModelHandler``."""
        examples = list(batch)
        return self._results(examples, [""] * len(examples), model.answer, inference_args)

    def update_model_path(self, model_path: str | None = None) -> None:
        """Take the model of another folder from the next load on. None or "" changes nothing."""
        if model_path and model_path != self._model.folder:
            self._before, self._model = self._model, self._model.at(model_path)


@dataclass(frozen=True, slots=True)
class KeyModelUpdate:
    """Keys, and the model that they are to mean from now on.

    Goes where Beam's ``KeyModelPathMapping`` goes: into the list that the side input
    ``model_metadata_pcoll`` has. That one changes the folder of what keys mean; this one gives them
    any model, new keys too, or takes keys away.

    Args:
        keys: which; those that there are not are added.
        model: what they shall mean; None: nothing.
    """

    keys: Sequence[Hashable]
    model: YardModel | None


class _KeyedModels:
    """What a worker loads for many keys: the yard, and what keys mean. Thread-safe."""

    def __init__(
        self,
        connect: Callable[[], YardAccess],
        table: KeyTable[str],
        models: Mapping[str, YardModel],
    ) -> None:
        self._connect = _Once(connect)
        self._table = table
        self._models = dict(models)
        self._changing = threading.Lock()
        self._last: list[Any] = []
        self._again_at_s = 0.0

    def begin(self) -> None:
        """Starts the yard, if it does not run, and makes the models known to it."""
        self._connect()

    def answer(self, keys: list[Any], items: list[BatchItem], settings: AskingSettings) -> _Answers:
        """Asks for items of keys; an item of a key that means nothing gets that as its error."""
        table = self._table
        figures = Figures()
        results: list[Any] = [None] * len(items)
        known: list[int] = []
        wanted: list[BatchItem] = []
        for position, (key, item) in enumerate(zip(keys, items, strict=True)):
            target = table.get(key)
            if target is None:
                results[position] = KeyNotFound(
                    f"no model goes by the key {key!r}",
                    code=grpc.StatusCode.NOT_FOUND,
                    reason="KEY_NOT_FOUND",
                )
            else:
                known.append(position)
                wanted.append(replace(item, key=target))
        client = self._connect().client
        answers = ask_for_rows(client, wanted, settings, figures=figures) if wanted else []
        for position, answer in zip(known, answers, strict=True):
            results[position] = answer
        return results, figures

    def update(self, updates: Sequence[KeyModelPathMapping | KeyModelUpdate]) -> None:
        """Changes what keys mean, all of it or nothing.

        The same updates as the last time are done already: Beam tells them with every batch. If
        they failed, they are tried again after a while.

        Raises:
            ValueError, TypeError, KeyError: the updates are wrong in themselves.
            ModelyardError: a new model cannot be loaded.
        """
        with self._changing:
            wanted = list(updates)
            if self._last == wanted and time.monotonic() < self._again_at_s:
                return
            table, models = self._changed(wanted)
            self._last, self._again_at_s = wanted, time.monotonic() + _UPDATE_AGAIN_S
            self._switch(table, models)
            self._again_at_s = math.inf

    def meanings(self) -> dict[Any, str]:
        """What each key means, by the model's id."""
        return dict(self._table.targets())

    def _changed(
        self, updates: Sequence[KeyModelPathMapping | KeyModelUpdate]
    ) -> tuple[KeyTable[str], dict[str, YardModel]]:
        tables = server_package("routing.key_table")
        models = dict(self._models)
        paths: list[KeyMapping[str]] = []
        fresh: list[KeyMapping[str]] = []
        gone: list[Hashable] = []
        for update in updates:
            if isinstance(update, KeyModelUpdate):
                if update.model is None:
                    gone += update.keys
                    continue
                models[update.model.id] = update.model
                for is_new in (False, True):
                    keys = [key for key in update.keys if (self._table.get(key) is None) is is_new]
                    if keys:
                        mapping = tables.KeyMapping(keys, update.model.id)
                        (fresh if is_new else paths).append(mapping)
                continue
            by_model: dict[str, list[Hashable]] = {}
            for key in update.keys:
                now = self._table.get(key)
                target = update.update_path
                if now is not None and target:
                    model = models[now].at(target) if target != models[now].folder else models[now]
                    models[target := model.id] = model
                by_model.setdefault(target, []).append(key)
            paths += [tables.KeyMapping(keys, target) for target, keys in by_model.items()]
        table = self._table.updated(paths).table
        if fresh:
            table = table.added(fresh).table
        if gone:
            table = table.without(gone).table
        return table, models

    def _switch(self, table: KeyTable[str], models: dict[str, YardModel]) -> None:
        """Loads what keys are to mean where what they mean is in memory, and then points them."""
        access = self._connect()
        staged: set[str] = set()
        for key, target in table.targets().items():
            before = self._table.get(key)
            if before == target:
                continue
            access.register(models[target])
            if before is not None and target not in staged:
                access.stage(before, target)
                staged.add(target)
        used = set(table.targets().values())
        # One assignment: a batch sees the old table or the new one.
        self._models = {model_id: model for model_id, model in models.items() if model_id in used}
        self._table = table


class KeyedModelHandler(YardHandler):
    """Runs the models that many keys mean in a yard inside the worker.

    Takes the place of Beam's class of this name, with the same arguments::

        KeyedModelHandler(
            [
                KeyModelMapping(["KEY_1"], YardModelHandler(CONFIG_1)),
                KeyModelMapping(["KEY_2", "KEY_3"], YardModelHandler(CONFIG_2)),
            ],
            yard=EmbeddedYard(budgets={"cpu": "4GiB"}),
        )

    Elements are ``(key, example)`` and results ``(key, PredictionResult)``, in the order of the
    batch, which may mix keys: the yard groups them by model. What is different from Beam's:

    * Memory is bounded in bytes, for each device, however many threads and steps there are, and
      never exceeded by models in use. ``max_models_per_worker_hint`` becomes bytes too: room for
      that many of the largest models.
    * A key that means nothing is a ``KeyNotFound`` of its element alone (see ``on_error``).
    * A key that is given twice in one mapping counts once, and a warning says so.
    * An update (``KeyModelPathMapping``, ``KeyModelUpdate``) need not name every key, loads the new
      model before keys mean it where the old one is in memory, and leaves everything as it is if
      that fails. Keys can be added and taken away.
    * The batch settings and ``env_vars`` of the mappings' handlers count: see
      ``batch_elements_kwargs``.

    Args:
        unkeyed: mappings of keys to handlers, or one ``YardModelHandler`` for all keys. A
            ``YardModel`` may stand for its handler.
        max_models_per_worker_hint: see above; None for no such bound. With one the yard is this
            handler's own.
        yard: where the models live; None: that of the mappings' handlers, which has to be one.
        settings: those of ``YardModelHandler``.

    Raises:
        ValueError: no mapping, a mapping without keys, a key in two mappings, handlers of different
            yards, a handler with pre- or postprocessing functions (give them to this one), or a
            hint that is no number above 0.
        TypeError: something else than what is named above.
        ImportError: the server's package is not installed.
    """

    def __init__(
        self,
        unkeyed: YardModelHandler | YardModel | Sequence[KeyModelMapping],
        max_models_per_worker_hint: int | None = None,
        *,
        yard: EmbeddedYard | None = None,
        **settings: Any,
    ) -> None:
        hint = max_models_per_worker_hint
        if hint is not None and (type(hint) is not int or hint < 1):
            raise ValueError(f"max_models_per_worker_hint is {hint!r}: give a number above 0")
        tables = server_package("routing.key_table")
        if isinstance(unkeyed, Sequence):
            if not unkeyed:
                raise ValueError("there are no mappings: no key would mean anything")
            handlers = [_handler_of(mapping) for mapping in unkeyed]
            pairs = list(zip(unkeyed, handlers, strict=True))
            self._table: KeyTable[str] = tables.KeyTable.of(
                [tables.KeyMapping(mapping.keys, handler.model.id) for mapping, handler in pairs]
            )
            self._is_single = False
        else:
            handlers = [_handler_of(KeyModelMapping([None], unkeyed))]
            self._table = tables.KeyTable.single(handlers[0].model.id)
            self._is_single = True
        for warning in self._table.warnings:
            logger.warning("%s", warning)
        super().__init__(**_with_those_of(handlers, settings))
        self._handlers = handlers
        self._models: dict[str, YardModel] = {}
        for model in [handler.model for handler in handlers]:
            if self._models.setdefault(model.id, model) != model:
                raise ValueError(f"two different models have the name {model.id!r}")
        self._hint = hint
        self._yard = yard or _only_yard(handlers)
        if hint is not None:
            self._yard = replace(self._yard, name=f"{self._yard.name}+{uuid.uuid4().hex}")

    def load_model(self) -> _KeyedModels:
        """Start the yard, if it does not run, and make the models known to it. Called by Beam.

        Where one yard is shared by the machine, that is done when the first batch comes.
        """
        yard, models, hint, shared = self._yard, self._models, self._hint, self._large_model

        def connect() -> YardAccess:
            access = YardAccess.to(yard, shared_by_machine=shared)
            ids = [access.register(model) for model in models.values()]
            if hint is not None:
                access.bound_models(hint, ids)
            return access

        loaded = _KeyedModels(connect, self._table, models)
        if not shared:
            loaded.begin()
        return loaded

    def run_inference(
        self,
        batch: Sequence[tuple[Hashable, Any]],
        model: _KeyedModels,
        inference_args: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Return the batch's results with their keys, in its order. See the class.

        Raises:
            TypeError: an element that is no pair.
        """
        keys, examples = keys_and_examples(batch)
        # Where each asked item was in the batch travels as its key.
        numbers = [str(position) for position in range(len(keys))]

        def asked(items: list[BatchItem], settings: AskingSettings) -> _Answers:
            return model.answer([keys[int(item.key)] for item in items], items, settings)

        results = self._results(examples, numbers, asked, inference_args)
        return list(zip(keys, results, strict=True))

    def get_metrics_namespace(self) -> str:
        """Return the namespace of the step's metrics."""
        return super().get_metrics_namespace() if self._is_single else _KEYED_NAMESPACE

    def model_copies(self) -> int:
        """Return how many accesses there are.

        Raises:
            ValueError: a mapping's handler wants more than one.
        """
        if self._is_single:
            return int(self._handlers[0].model_copies())
        if any(handler.model_copies() != 1 for handler in self._handlers):
            raise ValueError(
                "KeyedModelHandler cannot map records to multiple models if one or more of its "
                "handlers ask for several copies (model_copies): leave that out"
            )
        return int(super().model_copies())

    def update_model_path(self, model_path: str | None = None) -> None:
        """Give all keys the model of another folder, where they mean one.

        Raises:
            RuntimeError: keys mean several models; see ``update_model_paths``.
        """
        if not model_path:
            return
        if not self._is_single:
            raise RuntimeError(
                "Model updates are currently not supported for KeyedModelHandlers with several "
                "models by one path alone: say which keys it is for"
            )
        (model,) = self._models.values()
        self._models = {(new := model.at(model_path)).id: new}
        self._table = self._table.retargeted(new.id)

    def update_model_paths(
        self,
        model: _KeyedModels | None,
        model_paths: Sequence[KeyModelPathMapping | KeyModelUpdate] | None = None,
    ) -> None:
        """Change what keys mean. See the class; all of the updates are done or none.

        If a new model cannot be loaded, keys go on meaning what they do, an error is logged, and
        the same updates are tried again after half a minute.

        Raises:
            ValueError: a key is named twice, is not there, or gets an empty path.
            KeyError: a key that is to be taken away is not there.
            RuntimeError: all keys mean one model; see ``update_model_path``.
        """
        if not model_paths or model is None:
            return
        if self._is_single:
            raise RuntimeError(
                "Invalid model update: sent many model paths to update, but KeyedModelHandlers "
                "whose keys all mean one model take one path"
            )
        try:
            model.update(list(model_paths))
        except ModelyardError:
            logger.exception("keys keep the models they have: the update cannot be done now")


def _handler_of(mapping: Any) -> YardModelHandler:
    """The handler of a mapping. Raises as `KeyedModelHandler`."""
    if not isinstance(mapping, KeyModelMapping):
        raise TypeError(f"must be mappings of keys (KeyModelMapping), got {type(mapping).__name__}")
    handler: Any = mapping.mh
    if isinstance(handler, YardModel):
        return YardModelHandler(handler)
    if isinstance(handler, YardModelHandler):
        return handler
    if getattr(handler, "get_preprocess_fns", list)() or (
        getattr(handler, "get_postprocess_fns", list)()
    ):
        raise ValueError(
            "Cannot use an unkeyed model handler with pre or postprocessing functions in a keyed "
            "one: give them to the keyed handler"
        )
    raise TypeError(
        f"keys {mapping.keys!r} need a YardModelHandler or a YardModel, got a "
        f"{type(handler).__name__}: the yard loads models itself, from their folders"
    )


def _only_yard(handlers: Sequence[YardModelHandler]) -> EmbeddedYard:
    yards = {handler._yard.id: handler._yard for handler in handlers}
    if len(yards) > 1:
        raise ValueError("the mappings' handlers are of different yards: give yard")
    return next(iter(yards.values()))


def _with_those_of(
    handlers: Sequence[YardModelHandler], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a keyed handler with those that its mappings' handlers bring.

    Raises:
        ValueError: two of them set a variable to different values.
    """
    combined: dict[str, Any] = {}
    for name, combine in _COMBINED.items():
        found = [
            handler.batch_elements_kwargs()[name]
            for handler in handlers
            if name in handler.batch_elements_kwargs()
        ]
        if found:
            combined[name] = combine(found)
    variables: dict[str, Any] = {}
    for handler in handlers:
        for name, value in handler._env_vars.items():
            if variables.setdefault(name, value) != value:
                raise ValueError(f"the mappings' handlers set {name} to different values")
    if variables:
        combined["env_vars"] = variables
    if any(handler._large_model for handler in handlers):
        combined["large_model"] = True
    return {**combined, **settings}
