"""Which values can be shared by clones of a module, because nobody can change them."""

from __future__ import annotations

import enum
import functools
import logging
import re
import types
from typing import Any
from weakref import ReferenceType

import torch

__all__ = ["is_constant", "makes_itself"]

_ATOMS = frozenset(
    {
        type(None),
        type(...),
        type(NotImplemented),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        range,
        re.Pattern,
        torch.Size,
        torch.device,
        torch.dtype,
        torch.layout,
        torch.memory_format,
        types.ModuleType,
        logging.Logger,
    }
)


def makes_itself(kind: type[Any]) -> bool:
    """True if an object of a class is more than what its __dict__ holds."""
    made_by: Any = kind.__new__
    if made_by is not object.__new__:
        return True
    return any(vars(base).get("__slots__") for base in kind.__mro__)


def is_constant(value: Any) -> bool:
    """True if a value never changes, so that all clones can refer to it."""
    if type(value) in _ATOMS or isinstance(value, type | enum.Enum):
        return True
    if isinstance(value, tuple | frozenset):
        return all(is_constant(item) for item in value)
    if isinstance(value, slice):
        return all(is_constant(item) for item in (value.start, value.stop, value.step))
    if isinstance(value, types.FunctionType):
        reached = [_content(cell) for cell in value.__closure__ or ()]
        return all(is_constant(item) for item in (*reached, *vars(value).values()))
    if isinstance(value, types.BuiltinFunctionType | types.MethodType):
        return value.__self__ is None or isinstance(value.__self__, type | types.ModuleType)
    if type(value) is ReferenceType:
        # Of recurrent modules, which look whether it is dead before they use it.
        return value() is None
    if type(value) is functools.partial:
        given = (value.func, *value.args, *value.keywords.values())
        return not vars(value) and all(is_constant(item) for item in given)
    return isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        # An empty one may be filled later.
        return cell
