"""Runtime "torch": a module from a function the operator allows, and a safetensors state dict."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
)
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.model_weights import ModelWeights, content_key
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.signature import ANY, Signature, TensorKind
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.template_cache import TemplateCache, tensors_digest
from modelyard_server.runtimes.tensors import DType, TensorValue
from modelyard_server.runtimes.torch_model import TorchModel, check_parameters, input_names
from modelyard_server.weights.activation_model import RunEstimate
from modelyard_server.weights.first_runs import FirstRuns
from modelyard_server.weights.model_files import shown
from modelyard_server.weights.origin import NOWHERE
from modelyard_server.weights.store.recent import Recent

if TYPE_CHECKING:
    import torch

    from modelyard_server.runtimes.filling import Filling
    from modelyard_server.runtimes.model_weights import HeldWeights, PoolSource
    from modelyard_server.runtimes.torch_layouts import Layout
    from modelyard_server.weights.holding import WeightPool
    from modelyard_server.weights.storages import Spread
    from modelyard_server.weights.store import WeightStore
    from modelyard_server.weights.stored import StoredModel
    from modelyard_server.weights.templates import ModuleTemplate

__all__ = ["TorchRuntime"]

logger = logging.getLogger(__name__)

_MAX_NAMES = 64
_CACHED = 64
_MAX_PLANS = 512
_DEFAULT_BATCH_SIZE = 32
_MAX_BATCH_SIZE = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    factory: str
    factory_options: dict[str, JsonValue]
    inputs: tuple[str, ...] | None
    outputs: tuple[str, ...] | None
    most_rows: int | None

    @property
    def key(self) -> str:
        """The same for all options that make the same module."""
        return json.dumps([self.factory, self.factory_options], sort_keys=True, default=repr)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is known of a load before the first weight is read.

    Attributes:
        layout: what the factory makes.
        filling: what it is filled with.
        price: of the model.
        key: what decides the module.
    """

    layout: Layout
    filling: Filling
    price: Price
    key: Hashable


class TorchRuntime(Runtime):
    """Loads modules whose code the operator has installed and allowed.

    The factory is called with factory_options and returns a torch.nn.Module. If it can be built on
    the meta device it is, and no weight is initialised only to be overwritten. The weights are
    model.safetensors (or shards) in the model's folder, with exactly the names of the state dict;
    of tied names one is enough. Each is used in the type the file has it in.

    What a factory and its options make is built once. Later models of it are clones of that, if it
    can be cloned; see weights/templates.py. A factory must make the same module every time.

    Options:
        factory: "module:function", one of the allowed ones. Required.
        factory_options: table of its keyword arguments.
        inputs: names of the inputs; default: what forward takes.
        outputs: names of the outputs; default: the keys of a dict, else output_0, output_1, ...
            Of a dict they choose and order.
        batch: true if requests may share a run. Then the module must do with each row of its
            inputs, the first dimension of all of them, what it would do without the others, and
            give each output a row for each. Default false.
        batch_size: most rows of such a run, default 32.

    Args:
        allowed_factories: "module:function" of what may be called.
        construction_lock: of all runtimes whose models are built from this process's classes.
        store: has the models; None: they are read where they lie.
        pool: holds what models share, or gives it; None: one of its own.
        measures_runs: the first runs of each module are measured. Nothing is predicted: what a
            factory's module takes for inputs is not known before they come.
    """

    def __init__(
        self,
        *,
        allowed_factories: frozenset[str],
        construction_lock: threading.Lock | None = None,
        store: WeightStore | None = None,
        pool: WeightPool | PoolSource | None = None,
        measures_runs: bool = False,
    ) -> None:
        self._allowed_factories = allowed_factories
        self._construction_lock = construction_lock or threading.Lock()
        self._weights = ModelWeights(store, pool)
        self._layouts: Recent[str, Layout] = Recent(_CACHED)
        self._plans: Recent[Hashable, _Plan] = Recent(_MAX_PLANS)
        self._templates = TemplateCache()
        self._measures_runs = measures_runs
        self._first_runs: Recent[Hashable, FirstRuns] = Recent(_MAX_PLANS)

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        return "torch"

    def warm_up(self) -> None:
        """Imports torch and what the weights are mapped with."""
        import modelyard_server.runtimes.filling
        import modelyard_server.runtimes.torch_layouts
        import modelyard_server.weights.dispatch
        import modelyard_server.weights.holding  # noqa: F401

    def check(self, spec: ModelSpec) -> None:
        """Checks the options; imports nothing and touches no files."""
        if spec.task:
            raise OptionError("task", "must be left out: the factory decides what the model does")
        if spec.folder is None:
            raise OptionError("folder", "is required: it holds the model's weights")
        self._read_options(spec)

    def price(self, spec: ModelSpec) -> Price:
        """Says what a load takes: the weights as they are filed, and computed buffers."""
        try:
            options = self._read_options(spec)
            with self._weights.found(spec) as stored:
                return self._plan(stored, options).price
        except BaseException as error:
            forget_frames(error)
            raise

    def signature(self, spec: ModelSpec, input_names: Sequence[str] = ()) -> Signature:
        """Names, as far as options or the module say them; types and shapes are an example."""
        options = self._read_options(spec)
        return Signature(
            inputs=_examples(options.inputs or tuple(input_names) or ("input",)),
            outputs=_examples(options.outputs or ("output_0",)),
            is_exact=False,
            shares_runs=options.most_rows is not None,
        )

    def check_request(
        self,
        spec: ModelSpec,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        """Checks that there are no parameters, and the inputs' names as far as options say them."""
        check_parameters(parameters)
        input_names(inputs, self._read_options(spec).inputs)

    def load(self, spec: ModelSpec, *, place: Place, stop: StopCheck) -> LoadedModel:
        """Maps the weights, builds the module, binds them to it and moves it to its devices."""
        try:
            options = self._read_options(spec)
            with self._weights.found(spec, stop=stop) as stored:
                return self._load(stored, options, place, stop)
        except BaseException as error:
            forget_frames(error)
            raise

    def _read_options(self, spec: ModelSpec) -> _Options:
        reader = OptionReader(spec.options)
        factory = reader.text("factory")
        factory_options = reader.table("factory_options")
        inputs = reader.texts("inputs", limit=_MAX_NAMES)
        outputs = reader.texts("outputs", limit=_MAX_NAMES)
        batch = reader.flag("batch", False)
        batch_size = reader.integer("batch_size", None, low=1, high=_MAX_BATCH_SIZE)
        reader.finish()
        if batch_size is not None and not batch:
            raise OptionError("batch_size", "is of no use without batch = true")
        if factory is None:
            raise OptionError("factory", 'is required, for instance "package.module:function"')
        if factory not in self._allowed_factories:
            raise OptionError("factory", "is not among the factories that the configuration allows")
        return _Options(
            factory=factory,
            factory_options=factory_options,
            inputs=inputs,
            outputs=outputs,
            most_rows=(batch_size or _DEFAULT_BATCH_SIZE) if batch else None,
        )

    def _plan(self, stored: StoredModel, options: _Options) -> _Plan:
        from modelyard_server.runtimes.filling import Filling, shared_of
        from modelyard_server.runtimes.torch_layouts import compare, structure_of

        content = (content_key(stored), options.key)
        plan = self._plans.get(content)
        if plan is not None and (not stored.digest or plan.filling.stored is stored):
            return plan
        layout = self._layout(options)
        compare(layout, stored.checkpoint)
        structure, filed = structure_of(layout, stored.checkpoint)
        resting = structure.size_bytes
        shared = shared_of(structure, filed, stored)
        key = (options.key, tensors_digest(stored.checkpoint))
        plan = _Plan(
            layout=layout,
            filling=Filling(stored=stored, structure=structure, filed=filed, shared=shared),
            price=Price(
                resting_bytes=resting,
                peak_bytes=resting + layout.built_bytes,
                structure=structure,
                shared=shared,
                runs=RunEstimate(key=_key_of_runs(key)) if self._measures_runs else None,
                input_names=layout.input_names,
            ),
            key=key,
        )
        self._plans.put(content, plan)
        return plan

    def _layout(self, options: _Options) -> Layout:
        from modelyard_server.runtimes.torch_layouts import layout_of

        layout = self._layouts.get(options.key)
        if layout is None:
            with self._construction_lock:
                layout = layout_of(*_construct(options))
            self._layouts.put(options.key, layout)
        return layout

    def _load(
        self, stored: StoredModel, options: _Options, place: Place, stop: StopCheck
    ) -> LoadedModel:
        from modelyard_server.runtimes.filling import clone, map_filling, settle

        plan = self._plan(stored, options)
        filling, origin = plan.filling, NOWHERE
        _check_stop(stop)
        known, template = self._templates.find(plan.key)
        if template is None or not place.target.is_whole:
            mapped = map_filling(filling, place, stop)
            module = None
            if template is None:
                module = self._built(plan, options, mapped.tensors, stop)
                if not known:
                    template = _template_of(module, mapped.tensors, filling)
                    self._templates.put(plan.key, template)
            if template is None or not place.target.is_whole:
                if template is not None:
                    module = template.make(mapped.tensors, mapped.tensors)
                assert module is not None
                spread, held = settle(
                    module,
                    mapped,
                    filling,
                    self._weights,
                    place=place,
                    lists_are_chains=False,
                    stop=stop,
                )
                return self._made(plan, options, module, spread, held)
            origin = mapped.origin
            # What was loaded to learn from makes room for what is loaded to stay.
            del module, mapped
        _check_stop(stop)
        module, spread, held = clone(
            template, filling, self._weights, place=place, stop=stop, origin=origin
        )
        return self._made(plan, options, module, spread, held)

    def _made(
        self,
        plan: _Plan,
        options: _Options,
        module: torch.nn.Module,
        spread: Spread,
        held: HeldWeights | None,
    ) -> TorchModel:
        made = TorchModel(
            module, spread, options.inputs, options.outputs, held, most_rows=options.most_rows
        )
        if self._measures_runs:
            made.measure(self._first_runs.setdefault(plan.key, FirstRuns()))
        return made

    def _built(
        self,
        plan: _Plan,
        options: _Options,
        tensors: Mapping[str, torch.Tensor],
        stop: StopCheck,
    ) -> torch.nn.Module:
        """The factory's module over weights."""
        weights = dict(tensors)
        for names in plan.layout.aliases:
            held = next(name for name in names if name in weights)
            for name in names:
                weights.setdefault(name, weights[held])
        with self._construction_lock:
            _check_stop(stop)
            module, _ = _construct(options)
        _check_stop(stop)
        # Before, not after: integers that take the place of a parameter cannot require gradients.
        module.eval()
        module.requires_grad_(False)
        try:
            module.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            raise ModelFilesError("the weights do not fit the factory's module") from error
        return module


def _examples(names: Sequence[str]) -> tuple[TensorKind, ...]:
    return tuple(TensorKind(name, DType.FLOAT32, (ANY,)) for name in names)


def _key_of_runs(key: Hashable) -> str:
    return f"torch:{hashlib.sha256(repr(key).encode()).hexdigest()}"


def _template_of(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], filling: Filling
) -> ModuleTemplate | None:
    from modelyard_server.weights.templates import Refusal, make_template

    try:
        template = make_template(module, tensors, sources={})
    except Refusal as refusal:
        logger.info("a %s is always built by its factory: %s", type(module).__name__, refusal)
        return None
    return template if filling.suits(template) else None


def _check_stop(stop: StopCheck) -> None:
    if stop():
        raise LoadCancelled


def _construct(options: _Options) -> tuple[torch.nn.Module, bool]:
    """Builds the module: without memory if that can be done, which the second value says."""
    import torch

    module_name, _, function_name = options.factory.partition(":")
    try:
        factory: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise ModelFilesError(
            f"factory {shown(options.factory)} cannot be imported; is its package installed?"
        ) from error
    module: Any
    try:
        with torch.device("meta"):
            module = factory(**options.factory_options)
        if isinstance(module, torch.nn.Module) and _is_complete_without_data(module):
            return module, True
    except Exception as error:
        # Constructors that look at values cannot be built there. If it is broken, it is so below.
        forget_frames(error)
    try:
        module = factory(**options.factory_options)
    except Exception as error:
        raise ModelFilesError(
            f"factory {shown(options.factory)} fails with its factory_options "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise ModelFilesError(f"factory {shown(options.factory)} returns no torch.nn.Module")
    return module, False


def _is_complete_without_data(module: torch.nn.Module) -> bool:
    """True if the state dict fills every tensor of a module that was built on meta."""
    import torch

    filled = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    for part in module.modules():
        # Buffers that are not saved, and tensors that somebody just hung on a module.
        plain = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        for tensor in (*part.parameters(False), *part.buffers(False), *plain):
            if tensor.is_meta and id(tensor) not in filled:
                return False
    return True
