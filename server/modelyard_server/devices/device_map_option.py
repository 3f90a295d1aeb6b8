"""The rule for a model's options ``device_map`` and ``device``: they beat its placement.

A placement can be written twice: as such, and among the options that the backend is told. Then the
option wins, because who writes it speaks to the backend itself. One rule decides which it is: the
option is there or it is not. A null is there: it leaves the choice to the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from modelyard.devices import MAX_DEVICE_ID, ComponentDevice, Device, DeviceMap
from modelyard.placements import (
    AutomaticPlacement,
    Placement,
    PlacementStrategy,
    placement_text,
)
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.runtimes.api import JsonValue

__all__ = ["effective_placement"]

_OPTIONS: Final = ("device_map", "device")
_QUOTE_LIMIT: Final = 60
_FOREIGN_STRATEGIES: Final = frozenset({"balanced_low_0"})
"""Words that Hugging Face libraries take and this server does not."""


def effective_placement(
    placement: Placement | None, options: Mapping[str, JsonValue]
) -> tuple[Placement | None, dict[str, JsonValue], tuple[str, ...]]:
    """Where a model lives when its placement and its options have both been heard.

    Args:
        placement: the explicit one; None leaves the choice to the server.
        options: of the model's runtime. ``device_map`` or ``device`` may be null, an ordinal (of
            cuda), a device's text, ``"auto"``, ``"balanced"``, ``"sequential"``, or a table from
            module-path prefixes to ordinals and texts, as Hugging Face has it.

    Returns:
        The placement in force, the options without the two, and what to warn of.

    Raises:
        Refusal: INVALID_FIELD. Both options are there, or one that says no placement.
    """
    given = [name for name in _OPTIONS if name in options]
    rest = {name: value for name, value in options.items() if name not in _OPTIONS}
    if not given:
        return placement, rest, ()
    if len(given) > 1:
        raise _refused("device_map", "device is there as well: give one of them")
    (name,) = given
    try:
        chosen = _read(options[name])
    except (TypeError, ValueError) as error:
        raise _refused(name, str(error)) from None
    if placement is None:
        return chosen, rest, ()
    warning = (
        f"option {name} beats the model's placement: it lives where the option says, "
        f"{_text(chosen)}, not {_text(placement)}"
    )
    return chosen, rest, (warning,)


def _read(value: JsonValue) -> Placement | None:
    match value:
        case None:
            return None
        case str():
            if value in _FOREIGN_STRATEGIES:
                raise ValueError(f"{value} is not supported: use balanced or sequential")
            strategies = {str(strategy): strategy for strategy in PlacementStrategy}
            if value in strategies:
                return AutomaticPlacement(strategy=strategies[value])
            return ComponentDevice.from_str(value)
        case Mapping():
            if not value:
                raise ValueError("must name a device for at least one part of the model")
            return ComponentDevice.from_multiple(
                DeviceMap.from_hf({key: _whole_number(device) for key, device in value.items()})
            )
        case bool():
            pass
        case int() | float():
            ordinal = _whole_number(value)
            if isinstance(ordinal, int):
                if not 0 <= ordinal <= MAX_DEVICE_ID:
                    raise ValueError(
                        f"a number is the id of a cuda device, 0 to {MAX_DEVICE_ID}, got "
                        f'{_quoted(ordinal)}; the processor is "cpu"'
                    )
                return ComponentDevice.from_single(Device.gpu(ordinal))
    raise TypeError(
        "must be null, the number of a cuda device, a device, auto, balanced, sequential, or a "
        f"table of parts and devices, got {_quoted(value)}"
    )


def _whole_number(value: JsonValue) -> JsonValue:
    """Numbers of google.protobuf.Struct are doubles; 1.0 is the 1 that was written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(placement: Placement | None) -> str:
    if placement is None:
        return "where the server chooses"
    return _cut(placement_text(placement))


def _quoted(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _QUOTE_LIMIT else f"{text[:_QUOTE_LIMIT]}..."


def _refused(name: str, text: str) -> Refusal:
    field = f"model.options.{name}"
    return Refusal(Reason.INVALID_FIELD, f"{field}: {text}", violations=(Violation(field, text),))
