"""What a sequence can do between models: transformations, registered by name. Pure.

A transformation makes other tensors out of tensors. What it takes is bounded by what it is given,
and none runs code that came over the wire. Thread-safe: large tensors are worked on beside the
event loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelyard_server.routing.arrays import FLOATS, INTEGERS, array_of, text_of, value_of
from modelyard_server.routing.targets import Transform
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = ["Transformation", "check_transform", "register", "registered", "transformed"]

Tensors = tuple[TensorValue, ...]


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


@dataclass(frozen=True, slots=True)
class Transformation:
    """A registered transformation.

    Attributes:
        name: what sequences call it.
        parameters: what it can be told.
        apply: makes the outputs; raises TensorError for tensors it cannot use.
        takes: element types of what it works on, for checks before anything runs; empty for any.
        gives: element type of what it makes; None if that depends.
    """

    name: str
    parameters: type[BaseModel]
    apply: Callable[[Any, Tensors], Tensors]
    takes: frozenset[DType] = frozenset()
    gives: DType | None = None


_REGISTERED: dict[str, Transformation] = {}


def register(transformation: Transformation) -> None:
    """Makes a transformation known under its name.

    Raises:
        ValueError: the name is taken.
    """
    if transformation.name in _REGISTERED:
        raise ValueError(f"there is a transformation {transformation.name!r} already")
    _REGISTERED[transformation.name] = transformation


def registered() -> Mapping[str, Transformation]:
    """The transformations there are, by name."""
    return dict(_REGISTERED)


def check_transform(transform: Transform) -> list[tuple[str, str]]:
    """What is wrong with a transformation: the path of each field and a text; empty if nothing."""
    known = _REGISTERED.get(transform.name)
    if known is None:
        names = ", ".join(sorted(_REGISTERED))
        return [("name", f"there is no transformation {transform.name!r}; there are {names}")]
    try:
        known.parameters.model_validate(_plain(transform.parameters))
    except ValidationError as error:
        return [
            (
                ".".join(["parameters", *map(str, each["loc"])]),
                each["msg"][:1].lower() + each["msg"][1:],
            )
            for each in error.errors()
        ]
    return []


def transformed(transform: Transform, tensors: Tensors) -> Tensors:
    """The outputs of a transformation.

    Args:
        transform: has passed check_transform.
        tensors: what it gets.

    Raises:
        TensorError: it cannot use these tensors.
    """
    known = _REGISTERED[transform.name]
    return known.apply(known.parameters.model_validate(_plain(transform.parameters)), tensors)


def _plain(value: Any) -> Any:
    """Numbers of a Struct are floats: those that are whole are made whole again."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _picked(
    tensors: Sequence[TensorValue], name: str, fits: Callable[[TensorValue], bool], what: str
) -> TensorValue:
    """The tensor of a name, or the first that fits.

    Raises:
        TensorError: there is none, or the named one does not fit.
    """
    for tensor in tensors:
        if tensor.name == name if name else fits(tensor):
            if fits(tensor):
                return tensor
            raise TensorError(
                name, f"is {tensor.dtype.value} {list(tensor.shape)}; {what} is needed"
            )
    there = ", ".join(f"{t.name!r} {t.dtype.value} {list(t.shape)}" for t in tensors)
    wanted = f"no tensor {name!r}" if name else f"no tensor that is {what}"
    raise TensorError(name, f"there is {wanted}; there are {there}")


# --- pooling --------------------------------------------------------------------------------------


class _Pooling(_Parameters):
    input: str = ""
    mask: str = ""
    mode: Literal["mean", "max", "first"] = "mean"
    normalize: bool = False
    output: str = "embedding"


def _pool(how: _Pooling, tensors: Tensors) -> Tensors:
    hidden = _picked(
        tensors,
        how.input,
        lambda t: t.dtype in FLOATS and len(t.shape) == 3 and t.shape[1] > 0,
        "floating, of shape [rows, tokens, width] with at least one token",
    )
    array = array_of(hidden).astype(np.float64)
    if how.mask:
        mask = _picked(
            tensors,
            how.mask,
            lambda t: t.dtype in {*INTEGERS, DType.BOOL} and t.shape == hidden.shape[:2],
            f"integers of shape {list(hidden.shape[:2])}",
        )
        kept = array_of(mask) != 0
        if not kept.any(axis=1).all():
            raise TensorError(mask.name, "masks every token of a row")
    else:
        kept = np.ones(hidden.shape[:2], bool)
    if how.mode == "first":
        pooled = array[np.arange(len(array)), kept.argmax(axis=1)]
    elif how.mode == "max":
        pooled = np.where(kept[:, :, None], array, -np.inf).max(axis=1)
    else:
        pooled = np.where(kept[:, :, None], array, 0.0).sum(axis=1) / kept.sum(axis=1)[:, None]
    if how.normalize:
        norm = np.linalg.norm(pooled, axis=1, keepdims=True)
        pooled = pooled / np.where(norm == 0, 1.0, norm)
    return (value_of(how.output, hidden.dtype, pooled),)


# --- top_k ----------------------------------------------------------------------------------------


class _TopK(_Parameters):
    k: int = Field(ge=1, le=10_000)
    input: str = ""
    labels: list[str] | None = None


def _top_k(how: _TopK, tensors: Tensors) -> Tensors:
    scores = _picked(
        tensors,
        how.input,
        lambda t: t.dtype in {*FLOATS, *INTEGERS} and len(t.shape) >= 1 and t.shape[-1] > 0,
        "numbers, of shape [..., classes]",
    )
    array = array_of(scores)
    k = min(how.k, array.shape[-1])
    if how.labels is not None and len(how.labels) != array.shape[-1]:
        raise TensorError(
            scores.name, f"has {array.shape[-1]} classes; there are {len(how.labels)} labels"
        )
    # Stable: of equal scores the first class is first. What is no number is last.
    keys = np.where(np.isnan(array), -np.inf, array) if array.dtype.kind == "f" else array
    order = np.argsort(keys[..., ::-1], axis=-1, kind="stable")[..., ::-1]
    indices = array.shape[-1] - 1 - order[..., :k]
    values = np.take_along_axis(array, indices, axis=-1)
    found = (
        value_of("values", scores.dtype, values),
        value_of("indices", DType.INT64, indices),
    )
    if how.labels is None:
        return found
    names = tuple(how.labels[i] for i in indices.reshape(-1).tolist())
    return (*found, TensorValue(name="labels", dtype=DType.TEXT, shape=indices.shape, data=names))


# --- label_to_text --------------------------------------------------------------------------------


class _LabelToText(_Parameters):
    labels: list[str] | dict[str, str]
    input: str = ""
    output: str = "text"
    default: str | None = None

    @model_validator(mode="after")
    def _some(self) -> _LabelToText:
        if not self.labels:
            raise ValueError("at least one label is needed")
        return self


def _label_to_text(how: _LabelToText, tensors: Tensors) -> Tensors:
    labels = _picked(
        tensors,
        how.input,
        lambda t: t.dtype in {*INTEGERS, DType.TEXT},
        "integers or TEXT",
    )
    names: Mapping[str, str] = (
        how.labels
        if isinstance(how.labels, dict)
        else {str(i): label for i, label in enumerate(how.labels)}
    )
    given = (
        text_of(labels)
        if labels.dtype is DType.TEXT
        else tuple(map(str, array_of(labels).reshape(-1).tolist()))
    )
    texts = []
    for label in given:
        text = names.get(label, how.default)
        if text is None:
            raise TensorError(labels.name, f"holds {label[:64]!r}, for which there is no text")
        texts.append(text)
    return (TensorValue(name=how.output, dtype=DType.TEXT, shape=labels.shape, data=tuple(texts)),)


# --- template -------------------------------------------------------------------------------------

_FIELD: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_MOST_TEXT: Final = 1 << 20


class _Template(_Parameters):
    template: str = Field(max_length=65_536)
    output: str = "text"

    @model_validator(mode="after")
    def _readable(self) -> _Template:
        for match in _FIELD.finditer(self.template):
            if match.group() in ("{", "}"):
                raise ValueError(f"a {match.group()!r} that is text is written twice")
        if not any(match.group(1) is not None for match in _FIELD.finditer(self.template)):
            raise ValueError("no {name} of an output is in it")
        return self


def _template(how: _Template, tensors: Tensors) -> Tensors:
    columns: dict[str, tuple[str, ...]] = {}
    shape: tuple[int, ...] | None = None
    for match in _FIELD.finditer(how.template):
        name = match.group(1)
        if name is None or name in columns:
            continue
        tensor = _picked(
            tensors,
            name,
            lambda t: t.dtype is DType.TEXT or t.dtype in {*INTEGERS, *FLOATS, DType.BOOL},
            "TEXT or numbers",
        )
        if shape is not None and tensor.shape != shape:
            raise TensorError(name, f"is of shape {list(tensor.shape)}, others {list(shape)}")
        shape = tensor.shape
        columns[name] = (
            text_of(tensor)
            if tensor.dtype is DType.TEXT
            else tuple(map(str, array_of(tensor).reshape(-1).tolist()))
        )
    assert shape is not None  # A template has a field.
    texts = []
    room = _MOST_TEXT
    for row in range(len(next(iter(columns.values())))):

        def fill(match: re.Match[str], row: int = row) -> str:
            name = match.group(1)
            return match.group()[0] if name is None else columns[name][row]

        texts.append(_FIELD.sub(fill, how.template))
        room -= len(texts[-1])
        if room < 0:
            raise TensorError(how.output, f"would be longer than {_MOST_TEXT} characters")
    return (TensorValue(name=how.output, dtype=DType.TEXT, shape=shape, data=tuple(texts)),)


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """Tensors by other names; those that are not named are left out, unless none is.

    Args:
        tensors: what there is.
        names: what each is called from now on.

    Raises:
        TensorError: there is no tensor of a name, or two get the same.
    """
    if not names:
        return tensors
    there = {tensor.name: tensor for tensor in tensors}
    if len(tensors) == 1 and "" not in there and "" in names:
        there[""] = tensors[0]
    for old in names:
        if old not in there:
            known = ", ".join(repr(tensor.name) for tensor in tensors)
            raise TensorError(old, f"there is no output of this name; there are {known}")
    if len(set(names.values())) != len(names):
        raise TensorError("", "two outputs are given the same name")
    return tuple(replace(there[old], name=new) for old, new in names.items())


register(Transformation("pooling", _Pooling, _pool, takes=FLOATS))
register(Transformation("top_k", _TopK, _top_k, takes=FLOATS | INTEGERS))
register(
    Transformation(
        "label_to_text",
        _LabelToText,
        _label_to_text,
        takes=INTEGERS | {DType.TEXT},
        gives=DType.TEXT,
    )
)
register(Transformation("template", _Template, _template, gives=DType.TEXT))
