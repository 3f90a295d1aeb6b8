"""The modules of a clone: what of their attributes all clones share, and how the rest is made.

A clone is made of some hundred modules with a dozen attributes each, and making them takes a large
part of the time of a load. So whatever does not have to be a clone's own object is not made for it:

- Clones take no hooks for their state dict, and none for gradients, which they have not. All have
  one registry for those, which stays empty.
- Hooks of calls they take. torch gives no hook the number of another one, so where it looks only
  for numbers one registry serves all modules of a clone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["TREE", "Part", "Refusal", "attribute_of_all", "empty_kind", "fill_parts", "with_tree"]

TREE = ("_parameters", "_buffers", "_modules")
"""The attributes of a module that hold its part of the tree."""

_STATE_DICT_HOOKS = frozenset(
    {
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
    }
)
_GRADIENT_HOOKS = frozenset({"_backward_hooks", "_backward_pre_hooks"})
_CALL_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks"})
_HOOK_OPTIONS = (
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
"""Registries of numbers of hooks."""

_HELD_HOOKS = frozenset({*_GRADIENT_HOOKS, *_CALL_HOOKS, *_HOOK_OPTIONS})
_BUFFER_NAMES = "_non_persistent_buffers_set"

_NOTHING = -1
"""The place of None: the last one."""

Places = tuple[tuple[str, int], ...]
"""Names, and each one's place in the list of what a clone has of its own."""


class Refusal(Exception):
    """A module has no template; the text says why, for the log."""


class _NoHooks(OrderedDict[int, Any]):
    """An empty registry that stays empty."""

    def __setitem__(self, key: int, value: Any) -> None:
        raise TypeError("a clone takes no hooks for its state dict or its gradients")


_NO_HOOKS = _NoHooks()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A module of the tree.

    Attributes:
        kind: its class.
        attributes: all of them by name. Clones share the values, but for those named below.
        own: attributes that each clone has its own of.
        empty: attributes that begin as an empty container: name and kind.
        filled: dicts with something in them: name, kind, and what.
    """

    kind: type[torch.nn.Module]
    attributes: dict[str, Any]
    own: Places
    empty: tuple[tuple[str, type[Any]], ...]
    filled: tuple[tuple[str, type[Any], Places], ...] = ()


def attribute_of_all(module: torch.nn.Module, name: str) -> tuple[bool, Any]:
    """Whether an attribute is a registry that is not the module's own in a clone; and what it is.

    Raises:
        Refusal: there are hooks in it that a clone would have to have.
    """
    if name in _STATE_DICT_HOOKS:
        return True, _NO_HOOKS
    if name in _HELD_HOOKS and getattr(module, name):
        raise Refusal(f"a {type(module).__name__} has hooks")
    if name in _GRADIENT_HOOKS:
        return True, _NO_HOOKS
    return name in _HOOK_OPTIONS, None


def empty_kind(name: str, value: Any) -> type[Any] | None:
    """The kind of an attribute of torch's own that begins empty in a clone; None for others."""
    if name in _CALL_HOOKS:
        return OrderedDict
    return set if name == _BUFFER_NAMES and type(value) is set and not value else None


def with_tree(part: Part, module: torch.nn.Module, places: Mapping[int, int]) -> Part:
    """Adds the dicts of a module's part of the tree.

    Args:
        part: of the module, with everything else.
        module: the original.
        places: by id of what is in the tree, its place in the list of a clone's own.

    Raises:
        Refusal: they are none that torch makes.
    """
    empty: list[tuple[str, type[Any]]] = []
    filled: list[tuple[str, type[Any], Places]] = []
    for name in TREE:
        values = getattr(module, name)
        kind = type(values)
        if kind not in (dict, OrderedDict):
            raise Refusal(f"parts are kept in a {kind.__name__}")
        if not values:
            empty.append((name, kind))
            continue
        entries = (
            (key, _NOTHING if value is None else places[id(value)]) for key, value in values.items()
        )
        filled.append((name, kind, tuple(entries)))
    return replace(part, empty=(*part.empty, *empty), filled=tuple(filled))


def fill_parts(parts: Sequence[Part], made: Sequence[Any], begin: int) -> None:
    """Gives the modules of a clone their attributes.

    Args:
        parts: what they are to be.
        made: what the clone has of its own, in the order of the places; None behind it.
        begin: place of the first module, without attributes, among it.
    """
    options: dict[str, Any] = {name: OrderedDict() for name in _HOOK_OPTIONS}
    # Past the module's own __setattr__, which looks for parameters.
    set_attribute = object.__setattr__
    for place, part in enumerate(parts, begin):
        # With all names in it: what follows replaces values, which takes less than adding them.
        values = part.attributes.copy()
        values.update(options)
        for name, kind in part.empty:
            values[name] = kind()
        for name, index in part.own:
            values[name] = made[index]
        for name, kind, entries in part.filled:
            values[name] = filled = kind()
            for key, index in entries:
                filled[key] = made[index]
        set_attribute(made[place], "__dict__", values)
