"""Clones of a loaded module over other weights, without building or loading anything.

Models of one architecture differ in their weights alone. Building the module is nine tenths of the
usual way to load one, and reading its weights the smaller rest. So a module that its library has
loaded completely is looked at once: where each of its tensors comes from, and what else hangs on
its parts. From then on a model of the same architecture is the same tree of modules, made anew from
that list, with other tensors in it. It is the library's own result by construction.

Where a tensor comes from is told by where it lies in memory: the library was given tensors over the
mapped file, and what it uses as it is lies there still. Of the others the template knows two kinds.
A tensor that equals, byte by byte, what torch makes of the file's tensor of that name in another
type is made the same way again. A buffer that is in no file was computed from the configuration;
the template keeps a copy and every clone gets its own. A parameter of which neither is true may be
the result of anything: such modules have no template.

Clones share nothing that can change. Containers that hang on a module are copied, and so are
objects of the classes that the caller says can be. A module has no template either if

- something on it refers to a module of the tree, or to one of its methods: a clone would reach
  into the original through it (and such a cycle would keep its weights until a collection);
- it has hooks or parametrizations, which do the like;
- there is anything on it of which it is not known that it can be shared or copied.

What is registered for reading and writing state dicts is left out of clones: nobody asks them. See
clone_parts.py for how the modules of a clone are made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch.nn.utils.parametrize import is_parametrized

from modelyard_server.weights.clone_parts import (
    TREE,
    Part,
    Refusal,
    attribute_of_all,
    empty_kind,
    fill_parts,
    with_tree,
)
from modelyard_server.weights.shareable import is_constant, makes_itself

__all__ = ["MAX_CONSTANT_BYTES", "ModuleTemplate", "Refusal", "make_template"]

MAX_CONSTANT_BYTES = 8 << 20
"""Most bytes of computed buffers that a template keeps; causal masks and rotary tables are less."""

_MAX_DEPTH = 16
_LIBRARY_ATTRIBUTES = frozenset({"_is_hf_initialized"})
"""What transformers hangs on parameters while it loads them, and nothing reads afterwards."""


@dataclass(frozen=True, slots=True)
class _Ref:
    """Stands for a value that each clone has its own of: its place in the list of those."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seat:
    """A distinct tensor of the module.

    Attributes:
        is_parameter: it is a parameter, not a buffer.
        source: name in the file; None for a constant.
        is_held: the file's tensor itself is used.
        dtype: what the file's tensor is converted to.
        constant: the value of a constant.
        attributes: what hangs on the tensor.
    """

    is_parameter: bool
    source: str | None
    is_held: bool = False
    dtype: torch.dtype | None = None
    constant: torch.Tensor | None = None
    attributes: Mapping[str, Any] | None = None


_Recipe = Callable[[list[Any]], Any]
"""Makes a clone's own value from those that were made before it."""


class ModuleTemplate:
    """Makes clones of a module over other weights. Thread-safe; see the module's text.

    Attributes:
        held: names in the file of the tensors that clones use themselves, as parameters.
        copied: names in the file of the tensors that clones have copies of: buffers, which a model
            may write to, and parameters that are converted. May overlap with `held`.
        constant_bytes: what the template itself keeps in memory.
    """

    def __init__(
        self,
        seats: Sequence[_Seat],
        recipes: Sequence[_Recipe],
        parts: Sequence[Part],
        constant_bytes: int,
    ) -> None:
        self._seats = tuple(seats)
        self._recipes = tuple(recipes)
        self._parts = tuple(parts)
        self._kinds = tuple(part.kind for part in parts)
        self.held = frozenset(seat.source for seat in seats if seat.is_held and seat.source)
        self.copied = frozenset(seat.source for seat in seats if not seat.is_held and seat.source)
        self.constant_bytes = constant_bytes

    def make(
        self,
        held: Mapping[str, torch.Tensor],
        copied: Mapping[str, torch.Tensor],
        *,
        device: str = "cpu",
    ) -> Any:
        """Makes a clone, in evaluation mode and without gradients.

        Args:
            held: all tensors that `held` names, on the device. They become its parameters.
            copied: all that `copied` names, anywhere. They are copied.
            device: torch's name of where the clone's own tensors go.

        Returns:
            The module. Its class is the original's.
        """
        # What torch.nn.Parameter does with a plain tensor, without what it asks before.
        make_subclass, parameter = torch.Tensor._make_subclass, torch.nn.Parameter
        made: list[Any] = []
        for seat in self._seats:
            tensor = held[seat.source or ""] if seat.is_held else _copied_to(seat, copied, device)
            if seat.is_parameter:
                tensor = make_subclass(parameter, tensor, False)
            if seat.attributes:
                tensor.__dict__.update(seat.attributes)
            made.append(tensor)
        for recipe in self._recipes:
            made.append(recipe(made))
        begin = len(made)
        made += map(object.__new__, self._kinds)
        # Behind the others, where _NOTHING finds it.
        made.append(None)
        fill_parts(self._parts, made, begin)
        return made[begin]


def _copied_to(seat: _Seat, copied: Mapping[str, torch.Tensor], device: str) -> torch.Tensor:
    """A clone's own tensor."""
    if seat.source is not None:
        return copied[seat.source].to(device=device, dtype=seat.dtype, copy=True)
    assert seat.constant is not None
    return _copy(seat.constant).to(device)


def make_template(
    module: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    sources: Mapping[str, str],
    copyable: tuple[type, ...] = (),
    left_out: frozenset[str] = frozenset(),
) -> ModuleTemplate:
    """Makes a template of a module that was just loaded.

    Args:
        module: on host memory, in evaluation mode, never run. It is not changed.
        tensors: what it was loaded from, by name in the file, and lies over.
        sources: by name in the module, the name in the file of a tensor that it may be made of.
        copyable: classes of objects that are copied by copying their attributes.
        left_out: names of attributes of modules that nothing reads any more.

    Raises:
        Refusal: clones would not be what the library makes, or would share what can change.
    """
    return _Maker(module, tensors, sources, copyable, left_out).template()


class _Maker:
    """Looks at one module."""

    def __init__(
        self,
        module: torch.nn.Module,
        tensors: Mapping[str, torch.Tensor],
        sources: Mapping[str, str],
        copyable: tuple[type, ...],
        left_out: frozenset[str],
    ) -> None:
        self._module = module
        self._tensors = tensors
        self._sources = sources
        self._copyable = copyable
        self._left_out = left_out.union(TREE)
        self._addresses = {
            tensor.data_ptr(): name for name, tensor in tensors.items() if tensor.numel()
        }
        self._seats: list[_Seat] = []
        self._recipes: list[_Recipe] = []
        # By id of what is in the tree, which lives as long as this does.
        self._places: dict[int, int] = {}
        self._pending: set[int] = set()
        self._constants: set[int] = set()
        self._constant_bytes = 0

    def template(self) -> ModuleTemplate:
        """Returns it, or raises Refusal."""
        modules = list(self._module.modules())
        paths = dict(self._module.named_modules(remove_duplicate=False))
        for path, module in paths.items():
            self._add_tensors(f"{path}." if path else "", module)
        parts = [self._part(module) for module in modules]
        # Behind everything else that a clone has of its own. Not before: what refers to a module
        # is not to find it.
        begin = len(self._seats) + len(self._recipes)
        self._places.update((id(module), place) for place, module in enumerate(modules, begin))
        parts = [
            with_tree(part, module, self._places)
            for part, module in zip(parts, modules, strict=True)
        ]
        return ModuleTemplate(self._seats, self._recipes, parts, self._constant_bytes)

    def _add_tensors(self, prefix: str, module: torch.nn.Module) -> None:
        for registry, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in registry.items():
                if tensor is not None and id(tensor) not in self._places:
                    seat = self._seat(prefix + name, tensor, is_parameter)
                    self._places[id(tensor)] = len(self._seats)
                    self._seats.append(seat)

    def _seat(self, name: str, tensor: torch.Tensor, is_parameter: bool) -> _Seat:
        if type(tensor) is not (torch.nn.Parameter if is_parameter else torch.Tensor):
            raise Refusal(f"{name} is a {type(tensor).__name__}")
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise Refusal(f"{name} has no memory of its own")
        if tensor.requires_grad or tensor._backward_hooks:
            raise Refusal(f"{name} takes part in training")
        attributes = {
            key: value for key, value in vars(tensor).items() if key not in _LIBRARY_ATTRIBUTES
        }
        if not all(is_constant(value) for value in attributes.values()):
            raise Refusal(f"something hangs on {name}")
        traced = self._source(name, tensor)
        if traced is None:
            if is_parameter:
                raise Refusal(f"{name} is computed")
            return _Seat(
                is_parameter=False,
                source=None,
                constant=self._constant(name, tensor),
                attributes=attributes,
            )
        return _Seat(
            is_parameter=is_parameter,
            source=traced,
            is_held=is_parameter and self._tensors[traced].dtype == tensor.dtype,
            dtype=tensor.dtype,
            attributes=attributes,
        )

    def _source(self, name: str, tensor: torch.Tensor) -> str | None:
        """The name in the file of what a tensor is, or is made of by conversion."""
        at_address = self._addresses.get(tensor.data_ptr()) if tensor.numel() else None
        if at_address is not None:
            filed = self._tensors[at_address]
            if _like(filed) != _like(tensor):
                raise Refusal(f"{name} is a part of {at_address}, or another view of it")
            return at_address
        source = self._sources.get(name)
        filed_or_none = None if source is None else self._tensors.get(source)
        if filed_or_none is None or filed_or_none.shape != tensor.shape:
            return None
        converted = filed_or_none.to(tensor.dtype)
        if not tensor.is_contiguous() or not torch.equal(_raw(converted), _raw(tensor)):
            return None
        return source

    def _constant(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            if storage.data_ptr() in self._constants:
                raise Refusal(f"{name} shares its memory with another buffer")
            self._constants.add(storage.data_ptr())
        if any(_overlaps(storage, filed) for filed in self._tensors.values()):
            raise Refusal(f"{name} is a part of the weights")
        self._constant_bytes += storage.nbytes()
        if self._constant_bytes > MAX_CONSTANT_BYTES:
            raise Refusal(f"more than {MAX_CONSTANT_BYTES} bytes of buffers are computed")
        return _copy(tensor)

    def _part(self, module: torch.nn.Module) -> Part:
        kind = type(module)
        _check_class(kind)
        if is_parametrized(module):
            raise Refusal(f"a {kind.__name__} has parametrizations")
        attributes: dict[str, Any] = dict.fromkeys(TREE)
        own: list[tuple[str, int]] = []
        empty: list[tuple[str, type[Any]]] = []
        for name, value in vars(module).items():
            if name in self._left_out:
                continue
            is_of_all, attributes[name] = attribute_of_all(module, name)
            if is_of_all:
                continue
            if (begun := empty_kind(name, value)) is not None:
                empty.append((name, begun))
                continue
            found = self._value(f"{kind.__name__}.{name}", value, 0)
            if isinstance(found, _Ref):
                own.append((name, found.index))
            else:
                attributes[name] = found
        return Part(kind=kind, attributes=attributes, own=tuple(own), empty=tuple(empty))

    def _value(self, where: str, value: Any, depth: int) -> Any:
        """What stands for a value in the template: itself if it can be shared, or a _Ref."""
        if is_constant(value):
            return value
        if id(value) in self._places:
            return _Ref(self._places[id(value)])
        if depth > _MAX_DEPTH or id(value) in self._pending:
            raise Refusal(f"{where} is nested in itself, or too deep")
        self._pending.add(id(value))
        recipe = self._recipe(where, value, depth + 1)
        self._pending.discard(id(value))
        index = len(self._seats) + len(self._recipes)
        self._recipes.append(recipe)
        self._places[id(value)] = index
        return _Ref(index)

    def _recipe(self, where: str, value: Any, depth: int) -> _Recipe:
        kind = type(value)
        if kind is torch.Tensor:
            if value.is_meta or value.layout is not torch.strided or value.requires_grad:
                raise Refusal(f"{where} is no plain tensor")
            # By the same rules as a buffer that is not registered.
            constant = self._constant(where, value)
            return lambda made: _copy(constant)
        if kind in (list, tuple):
            items = [self._value(where, item, depth) for item in value]
            return _copied(kind, items)
        if kind in (set, frozenset):
            if not all(is_constant(item) for item in value):
                raise Refusal(f"{where} is a set of things that change")
            return lambda made, kept=frozenset(value): kind(kept)  # type: ignore[misc]
        if kind in (dict, OrderedDict):
            if not all(is_constant(key) for key in value):
                raise Refusal(f"{where} is a dict of things that change")
            entries = {key: self._value(where, item, depth) for key, item in value.items()}
            return _mapped(kind, entries)
        if kind is ReferenceType and isinstance(value(), torch.nn.Parameter):
            index = self._places.get(id(value()))
            if index is not None:
                return lambda made: ref(made[index])
        if isinstance(value, self._copyable) and not makes_itself(kind):
            entries = {key: self._value(where, item, depth) for key, item in vars(value).items()}
            fill = _mapped(dict, entries)
            return lambda made: _object(kind, fill(made))
        raise Refusal(f"{where} is a {kind.__module__}.{kind.__qualname__}")


def _object(kind: type[Any], values: dict[str, Any]) -> Any:
    made = object.__new__(kind)
    made.__dict__.update(values)
    return made


def _copied(kind: type[Any], items: list[Any]) -> _Recipe:
    if not any(isinstance(item, _Ref) for item in items):
        return lambda made: kind(items)
    return lambda made: kind([made[i.index] if type(i) is _Ref else i for i in items])


def _mapped(kind: type[Any], entries: dict[Any, Any]) -> _Recipe:
    constants = kind((key, None if type(v) is _Ref else v) for key, v in entries.items())
    refs = [(key, value.index) for key, value in entries.items() if type(value) is _Ref]

    def fill(made: list[Any]) -> Any:
        filled = constants.copy()
        for key, index in refs:
            filled[key] = made[index]
        return filled

    return fill


def _check_class(kind: type[torch.nn.Module]) -> None:
    if makes_itself(kind) or issubclass(kind, torch.jit.ScriptModule):
        raise Refusal(f"a {kind.__name__} is made in its own way")


def _like(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    # As bytes: what is no number does not equal itself.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _overlaps(storage: torch.UntypedStorage, tensor: torch.Tensor) -> bool:
    begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    return begin < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < end


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor with the whole storage behind it: a view keeps its strides."""
    storage: torch.UntypedStorage = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return copy.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
