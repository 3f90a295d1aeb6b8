"""Where modelyard means to differ from Haystack, as rules over a case's ``op`` and ``input``.

A rule says what has to happen instead of the recorded result. It is written from the documented
grammar and precedence, not with modelyard's code: it is what that code is judged by. Rules are
asked only where a difference is allowed (stance ``improve`` or ``deviate``, or a differential
test); a ``match`` case has to give its record, whatever they say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.conformance.cases import Outcome
from tests.conformance.operations import (
    Operation,
    is_serialised,
    pair,
    part,
    read_described,
    read_torch_device,
    split_switches,
)

GRAMMAR = re.compile(r"(cpu|cuda|disk|mps|xpu)(?::0*([0-9]|[1-9][0-9]|1[01][0-9]|12[0-7]))?")
SWITCHED_OFF = {"false", "0", "no"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One documented difference, and the outcome it asks for."""

    name: str
    outcome: Outcome
    operation: Operation | None = None
    """Where the difference is not in what this call does: what is done instead of it."""


# From ``op`` and ``input`` to the difference, if the rule applies.
Rule = Callable[[str, Any], Difference | None]
# From a single value that stands for a device to the difference, if it is refused.
Reader = Callable[[Any], Difference | None]


def refusal(error: str, text: str = "") -> Outcome:
    return {"error": {"type": error, "message_has": text}}


# Reading an input the way the documentation says it is read.


def read_text(text: str) -> tuple[str, int | None]:
    """Type and id of a string that is in the grammar."""
    found = GRAMMAR.fullmatch(text)
    assert found is not None, text
    kind, number = found.groups()
    return kind, None if number is None else int(number)


def written(text: str) -> str:
    kind, number = read_text(text)
    return kind if number is None else f"{kind}:{number}"


def refused_text(text: Any) -> Difference | None:
    if not isinstance(text, str):
        return Difference(name="another type than text", outcome=refusal("TypeError", "string"))
    if GRAMMAR.fullmatch(text):
        return None
    kind, _, number = text.partition(":")
    if kind not in {"cpu", "cuda", "disk", "mps", "xpu"}:
        return Difference(name="no device", outcome=refusal("ValueError", "device type"))
    if re.fullmatch("[0-9]+", number):
        return Difference(name="id over 127", outcome=refusal("ValueError", "must be <= 127"))
    return Difference(name="id outside the grammar", outcome=refusal("ValueError", "evice"))


def refused_number(number: Any) -> Difference | None:
    if type(number) is not int:
        return Difference(name="id of another type", outcome=refusal("TypeError", "evice"))
    if number > 127:
        return Difference(name="id over 127", outcome=refusal("ValueError", "must be <= 127"))
    if number < 0:
        return Difference(name="negative id", outcome=refusal("ValueError", "must be >= 0"))
    return None


def refused_hf(value: Any) -> Difference | None:
    value = read_torch_device(value)
    if isinstance(value, str):
        return refused_text(value)
    if hasattr(value, "index") and hasattr(value, "type"):
        return refused_text(value.type) or (
            None if value.index is None else refused_number(value.index)
        )
    return refused_number(value)


def read_values(op: str, given: Any) -> Iterator[tuple[Reader, Any]]:
    """What an operation reads as a device, in its order, each with the rule that it is read by."""
    match op:
        case "device_from_str" | "single_convert":
            yield refused_text, given
        case "device_gpu":
            if given is not None:
                yield refused_number, given
        case "device_equal":
            yield from ((refused_text, text) for text in pair(given))
        case "map_from_hf" | "map_from_hf_torch_device":
            yield from entries(given, refused_hf)
        case "map_get_missing":
            yield from entries(pair(given)[0], refused_text)
        case "map_equal_any_order":
            yield from (
                value for devices in pair(given) for value in entries(devices, refused_text)
            )
        case "component_from_dict":
            yield from component_values(given) if is_serialised(given) else ()
            if not isinstance(given, Mapping):
                yield no_mapping, given
        case "first_device":
            yield from component_values(given)
        case "update_hf_kwargs":
            yield from component_values(part(given, "component"))
        case "pipeline_kwargs" | "model_kwargs_device_map":
            if part(given, "device") is not None:
                yield from component_values(part(given, "device"))
        case "resolve_invalid":
            kind, content = read_described(given)
            if kind in ("text", "device"):
                yield refused_text, content
            elif kind == "map":
                yield from entries(content, refused_text)
        case _ if op.startswith(("map_", "multi_")):
            yield from entries(given, refused_text)


def component_values(given: Any) -> Iterator[tuple[Reader, Any]]:
    if is_serialised(given):
        if given["type"] == "single":
            yield refused_text, given["device"]
        else:
            yield from entries(given["device_map"], refused_text)
    elif isinstance(given, dict):
        yield from entries(given, refused_text)
    else:
        yield refused_text, given


def no_mapping(given: Any) -> Difference | None:
    return Difference(name="no mapping", outcome=refusal("TypeError", "mapping"))


def entries(devices: Any, rule: Reader) -> Iterator[tuple[Reader, Any]]:
    if not isinstance(devices, Mapping):
        yield no_mapping, devices
        return
    yield from ((rule, value) for value in devices.values())


def content_of(component: Any) -> str | dict[str, str]:
    """The device string or map of a component whose values are all in the grammar."""
    if is_serialised(component):
        component = component["device" if component["type"] == "single" else "device_map"]
    if isinstance(component, dict):
        return {key: written(text) for key, text in component.items()}
    return written(component)


def to_hf(content: str | dict[str, str]) -> object:
    """What Hugging Face gets, or None where a GPU of a map has no number."""
    if isinstance(content, str):
        return content
    converted: dict[str, object] = {}
    for key, text in content.items():
        kind, number = read_text(text)
        if kind == "cuda" and number is None:
            return None
        converted[key] = number if kind == "cuda" else text
    return converted


def has_choice(kwargs: Any) -> bool:
    """Whether pipeline arguments say where to run: by presence, not by value."""
    return isinstance(kwargs, dict) and bool(kwargs.keys() & {"device", "device_map"})


def is_first_gpu(device_map: Any) -> bool:
    return type(device_map) is int and device_map == 0


# The rules.


def refused_value(op: str, given: Any) -> Difference | None:
    """Text outside the grammar, ids over 127, bools and floats as ids, what is no mapping."""
    for rule, value in read_values(op, given):
        if (difference := rule(value)) is not None:
            return difference
    return None


def invalid_union(op: str, given: Any) -> Difference | None:
    """A component device that is empty or holds both cannot be built at all."""
    if op not in ("empty_component", "both_component"):
        return None
    text = "can neither be empty nor contain both"
    return Difference(name="invalid union", outcome=refusal("ValueError", text))


def gpu_without_number(op: str, given: Any) -> Difference | None:
    """Where a GPU is written by its number, one that has none is a ValueError, not an assertion."""
    difference = Difference(
        name="GPU without number", outcome=refusal("ValueError", "write the id")
    )
    match op:
        case "single_convert":
            return difference if read_text(given) == ("cuda", None) else None
        case "multi_to_hf":
            needed = content_of(given)
        case "update_hf_kwargs":
            unused = not part(given, "overwrite") and has_choice(part(given, "kwargs"))
            needed = {} if unused else content_of(part(given, "component"))
        case "pipeline_kwargs" if part(given, "device") is not None:
            unused = has_choice(part(given, "kwargs"))
            needed = {} if unused else content_of(part(given, "device"))
        case "model_kwargs_device_map" if part(given, "device") is not None:
            given_map = (part(given, "kwargs") or {}).get("device_map")
            unused = bool(given_map) or is_first_gpu(given_map)
            needed = {} if unused else content_of(part(given, "device"))
        case _:
            return None
    return difference if to_hf(needed) is None else None


def one_device_key(op: str, given: Any) -> Difference | None:
    """Overwriting removes the other of ``device`` and ``device_map``."""
    if op != "update_hf_kwargs" or not part(given, "overwrite"):
        return None
    content = content_of(part(given, "component"))
    own, sibling = (
        ("device", "device_map") if isinstance(content, str) else ("device_map", "device")
    )
    kwargs = part(given, "kwargs")
    if not isinstance(kwargs, dict) or sibling not in kwargs:
        return None
    others = {key: value for key, value in kwargs.items() if key != sibling}
    return Difference(name="one device key", outcome={"ok": {**others, own: to_hf(content)}})


def first_gpu_by_number(op: str, given: Any) -> Difference | None:
    """``device_map=0`` in model arguments is GPU 0, and beats the device beside it."""
    if op != "model_kwargs_device_map":
        return None
    kwargs = part(given, "kwargs") or {}
    if not is_first_gpu(kwargs.get("device_map")):
        return None
    return Difference(name="GPU 0 by its number", outcome={"ok": kwargs})


def callers_dict_kept(op: str, given: Any) -> Difference | None:
    """Nobody's arguments are changed."""
    if op != "generator_mutates_caller_kwargs":
        return None
    return Difference(name="the caller's dict is kept", outcome={"ok": sorted(given)})


def switch_words(op: str, given: Any) -> Difference | None:
    """``false``, ``0`` and ``no`` in any case turn an accelerator off, not one spelling."""
    if op not in ("resolve_none", "resolve_none_env"):
        return None
    available, switches = split_switches(given)
    off = {
        name.removesuffix("_ENABLED").removeprefix("HAYSTACK_").lower()
        for name, text in switches.items()
        if text.lower() in SWITCHED_OFF
    }
    usable = [
        spelled
        for kind, spelled in (("cuda", "cuda:0"), ("xpu", "xpu"), ("mps", "mps"))
        if available.get(kind) and (kind == "cuda" or kind not in off)
    ]
    return Difference(name="switch words", outcome={"ok": [*usable, "cpu"][0]})


def other_values_resolved(op: str, given: Any) -> Difference | None:
    """Strings, devices and maps are taken where a component device is."""
    if op != "resolve_invalid":
        return None
    kind, content = read_described(given)
    if kind == "other":
        return None
    if kind != "map" and read_text(content)[0] == "disk":
        return Difference(name="single disk", outcome=refusal("ValueError", "device maps"))
    return Difference(name="other values resolved", outcome={"ok": content_of(content)})


# In the order in which they are asked: what cannot be read comes first.
RULES: tuple[Rule, ...] = (
    refused_value,
    invalid_union,
    gpu_without_number,
    one_device_key,
    first_gpu_by_number,
    callers_dict_kept,
    switch_words,
    other_values_resolved,
)


def documented_difference(op: str, given: Any) -> Difference | None:
    """Return the first rule's difference that applies to this call, or None."""
    return next((found for rule in RULES if (found := rule(op, given)) is not None), None)
