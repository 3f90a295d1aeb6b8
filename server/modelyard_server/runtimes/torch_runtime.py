"""Runtime "torch": a module from a function the operator allows, and a safetensors state dict."""

from __future__ import annotations

import importlib
import inspect
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
    Witness,
)
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import TensorError, TensorValue
from modelyard_server.weights.model_files import folder_of, shown
from modelyard_server.weights.safetensors_files import read_checkpoint

if TYPE_CHECKING:
    import torch

    from modelyard_server.runtimes.torch_layouts import Layout
    from modelyard_server.weights.storages import Spread

__all__ = ["TorchRuntime"]

_MAX_NAMES = 64
_CACHED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    factory: str
    factory_options: dict[str, JsonValue]
    inputs: tuple[str, ...] | None
    outputs: tuple[str, ...] | None


class TorchRuntime(Runtime):
    """Loads modules whose code the operator has installed and allowed.

    The factory is called with factory_options and returns a torch.nn.Module. If it can be built on
    the meta device it is, and no weight is initialised only to be overwritten. The weights are
    model.safetensors (or shards) in the model's folder, with exactly the names of the state dict;
    of tied names one is enough. Each is used in the type the file has it in.

    Options:
        factory: "module:function", one of the allowed ones. Required.
        factory_options: table of its keyword arguments.
        inputs: names of the inputs; default: what forward takes.
        outputs: names of the outputs; default: the keys of a dict, else output_0, output_1, ...
            Of a dict they choose and order.
    """

    def __init__(
        self,
        *,
        allowed_factories: frozenset[str],
        construction_lock: threading.Lock | None = None,
    ) -> None:
        self._allowed_factories = allowed_factories
        self._construction_lock = construction_lock or threading.Lock()
        self._lock = threading.Lock()
        self._layouts: OrderedDict[str, Layout] = OrderedDict()

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        return "torch"

    def warm_up(self) -> None:
        """Imports torch and what the weights are mapped with."""
        import modelyard_server.runtimes.torch_layouts
        import modelyard_server.weights.dispatch  # noqa: F401

    def check(self, spec: ModelSpec) -> None:
        """Checks the options; imports nothing and touches no files."""
        if spec.task:
            raise OptionError("task", "must be left out: the factory decides what the model does")
        if spec.folder is None:
            raise OptionError("folder", "is required: it holds the model's weights")
        self._read_options(spec)

    def price(self, spec: ModelSpec) -> Price:
        """Says what a load takes: the weights as they are filed, and computed buffers."""
        from modelyard_server.runtimes.torch_layouts import compare, structure_of

        try:
            checkpoint = read_checkpoint(folder_of(spec))
            layout = self._layout(self._read_options(spec))
            compare(layout, checkpoint)
            structure, _ = structure_of(layout, checkpoint)
        except BaseException as error:
            forget_frames(error)
            raise
        resting = structure.size_bytes
        return Price(
            resting_bytes=resting, peak_bytes=resting + layout.built_bytes, structure=structure
        )

    def check_request(
        self,
        spec: ModelSpec,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        """Checks that there are no parameters, and the inputs' names as far as options say them."""
        _check_parameters(parameters)
        _input_names(inputs, self._read_options(spec).inputs)

    def load(self, spec: ModelSpec, *, place: Place, stop: StopCheck) -> LoadedModel:
        """Maps the weights, builds the module, binds them to it and moves it to its devices."""
        try:
            return self._load(spec, place, stop)
        except BaseException as error:
            forget_frames(error)
            raise

    def _read_options(self, spec: ModelSpec) -> _Options:
        reader = OptionReader(spec.options)
        factory = reader.text("factory")
        factory_options = reader.table("factory_options")
        inputs = reader.texts("inputs", limit=_MAX_NAMES)
        outputs = reader.texts("outputs", limit=_MAX_NAMES)
        reader.finish()
        if factory is None:
            raise OptionError("factory", 'is required, for instance "package.module:function"')
        if factory not in self._allowed_factories:
            raise OptionError("factory", "is not among the factories that the configuration allows")
        return _Options(
            factory=factory, factory_options=factory_options, inputs=inputs, outputs=outputs
        )

    def _layout(self, options: _Options) -> Layout:
        from modelyard_server.runtimes.torch_layouts import layout_of

        key = json.dumps([options.factory, options.factory_options], sort_keys=True, default=repr)
        with self._lock:
            if key in self._layouts:
                self._layouts.move_to_end(key)
                return self._layouts[key]
        with self._construction_lock:
            layout = layout_of(*_construct(options))
        with self._lock:
            self._layouts[key] = layout
            while len(self._layouts) > _CACHED:
                self._layouts.popitem(last=False)
        return layout

    def _load(self, spec: ModelSpec, place: Place, stop: StopCheck) -> LoadedModel:
        from modelyard_server.runtimes.torch_layouts import compare, structure_of
        from modelyard_server.weights.dispatch import check_disk, dispatch
        from modelyard_server.weights.mapping import map_checkpoint

        options = self._read_options(spec)
        checkpoint = read_checkpoint(folder_of(spec))
        layout = self._layout(options)
        compare(layout, checkpoint)
        structure, filed = structure_of(layout, checkpoint)
        on_disk = frozenset(
            name for index in check_disk(structure, place) if (name := filed[index]) is not None
        )
        _check_stop(stop)
        mapped = map_checkpoint(folder_of(spec), checkpoint, stop=stop, on_disk=on_disk)
        weights = mapped.tensors
        for names in layout.aliases:
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
        weights.clear()
        spread = dispatch(
            module,
            structure,
            place,
            extents={
                index: mapped.extents[name]
                for index, name in enumerate(filed)
                if name in mapped.extents
            },
            lists_are_chains=False,
            stop=stop,
        )
        _check_stop(stop)
        return _TorchModel(module, spread, options)


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


def _check_parameters(parameters: Mapping[str, JsonValue]) -> None:
    for name in parameters:
        raise OptionError(name[:64], "is not known here; a torch model has no parameters")


def _input_names(inputs: Sequence[TensorValue], names: tuple[str, ...] | None) -> list[str]:
    """What each input is for: a name, or "" for the only one if it goes by its place.

    Args:
        inputs: of a request.
        names: of all inputs, if the options say them.

    Raises:
        TensorError: one of several has no name, or the names are not those of the options.
    """
    found = []
    for value in inputs:
        if not value.name and len(inputs) > 1:
            raise TensorError("", "has no name; only a single input may go without")
        found.append(value.name or (names[0] if names else ""))
    if names is not None:
        for name in found:
            if name not in names:
                raise TensorError(name, f"is no input; the model takes {', '.join(names)}")
        for name in names:
            if name not in found:
                raise TensorError(name, "is missing")
    return found


class _TorchModel(LoadedModel):
    def __init__(self, module: torch.nn.Module, spread: Spread, options: _Options) -> None:
        self._module: torch.nn.Module | None = module
        self._spread = spread
        self._inputs = options.inputs
        self._outputs = options.outputs
        self._signature = inspect.signature(module.forward)

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        import torch

        try:
            _check_parameters(parameters)
            with torch.inference_mode():
                return self._answer(inputs)
        except BaseException as error:
            forget_frames(error)
            raise

    def _answer(self, inputs: Sequence[TensorValue]) -> tuple[TensorValue, ...]:
        from modelyard_server.runtimes.conversion import to_torch, to_value

        if self._module is None:
            raise RuntimeError("the model was closed")
        positional: list[torch.Tensor] = []
        named: dict[str, torch.Tensor] = {}
        for name, value in zip(_input_names(inputs, self._inputs), inputs, strict=True):
            tensor = to_torch(value, device=self._spread.home_name, writable=True)
            if name:
                named[name] = tensor
            else:
                positional.append(tensor)
        if self._inputs is None:
            self._check_signature(inputs, positional, named)
        made = self._module(*positional, **named)
        return tuple(to_value(name, tensor) for name, tensor in self._named(made))

    def _check_signature(
        self,
        inputs: Sequence[TensorValue],
        positional: list[torch.Tensor],
        named: dict[str, torch.Tensor],
    ) -> None:
        try:
            self._signature.bind(*positional, **named)
        except TypeError:
            takes = [
                parameter.name
                for parameter in self._signature.parameters.values()
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            ]
            raise TensorError(
                inputs[0].name, f"and the others do not fit; the model takes {', '.join(takes)}"
            ) from None

    def _named(self, made: Any) -> list[tuple[str, torch.Tensor]]:
        import torch

        if isinstance(made, Mapping):
            names = tuple(made) if self._outputs is None else self._outputs
            missing = [name for name in names if name not in made]
            if missing:
                raise TypeError(f"the model made no output {missing[0]!r}")
            values = [made[name] for name in names]
        else:
            values = list(made) if isinstance(made, tuple | list) else [made]
            names = self._outputs or tuple(f"output_{index}" for index in range(len(values)))
            if len(names) != len(values):
                raise TypeError(f"the model made {len(values)} outputs instead of {len(names)}")
        if not values or not all(isinstance(value, torch.Tensor) for value in values):
            raise TypeError("the model made something that is no tensor, tuple or dict of tensors")
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError("the model made a dict whose keys are no names")
        return list(zip(names, values, strict=True))

    def measured_bytes(self) -> Mapping[int, int]:
        return {} if self._module is None else self._spread.measured_bytes(self._module)

    def witnesses(self) -> tuple[Witness, ...]:
        return () if self._module is None else self._spread.witnesses(self._module)

    def close(self) -> None:
        self._module = None
        # The signature was taken from the bound method and does not hold it.
