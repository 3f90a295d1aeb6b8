"""Where models may be: what a trace says of it, what is asked for, and what devices are called.

A trace says it by names of devices, which mean something where the devices have names: those of a
server's file. Then each model is where the server had it. ``anywhere`` lets every model be on any
device, and ``dealt`` gives each one devices of its own for good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from modelyard.devices import Device, DeviceType
from modelyard_server.simulation.machine import MOST_PLACES, Machine
from modelyard_server.simulation.trace import PlaceNames, Trace, TracedModel, TraceError

__all__ = [
    "Places",
    "Placing",
    "dealt_out",
    "parse_places",
    "place_models",
    "read_place_cell",
    "read_places",
]

_QUOTE_LIMIT: Final = 40


class Places(Enum):
    """Who says where a model may be."""

    TRACE = "trace"
    ANYWHERE = "anywhere"
    DEALT = "dealt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """What came of it.

    Args:
        places: who said where the models of a trace may be.
        note: why what the trace says of it is not used; empty if it is, or says nothing.
    """

    places: Places
    note: str = ""

    @staticmethod
    def of(trace: Trace) -> Placing:
        """Return what a trace says by itself, with places as positions of devices."""
        told = any(trace.models[m].places for m in trace.used())
        return Placing(places=Places.TRACE if told else Places.ANYWHERE)


def parse_places(text: str) -> Places:
    """Read what may be asked for: ``anywhere`` or ``dealt``.

    Raises:
        ValueError: it is neither.
    """
    if text not in (Places.ANYWHERE.value, Places.DEALT.value):
        raise ValueError(
            f"--places is anywhere or dealt, got {text[:_QUOTE_LIMIT]!r}; without it models are "
            "where the trace says"
        )
    return Places(text)


def read_place_cell(text: str, where: str) -> PlaceNames:
    """Read places from one text, such as ``cuda:0|cuda:1`` or ``cuda:0+cuda:1``.

    ``|`` is between places, ``+`` between the devices that a model is on at once.

    Raises:
        TraceError: see ``read_places``.
    """
    if not text:
        return ()
    return read_places((place.split("+") for place in text.split("|")), where)


def read_places(told: Iterable[Iterable[str]], where: str) -> PlaceNames:
    """Read where a model may be, and make names of devices alike.

    Args:
        told: for each place the names of the devices that the model is on at once: ``cuda:1``, or
            as a resource ``devices/cuda-1``. The disk is passed over: what is there is in no
            memory.
        where: the line, for errors.

    Raises:
        TraceError: a name is no device's, a place has none or one twice, or there are too many; or
            the places are of different numbers of devices. The text begins with ``where``.
    """
    places: dict[tuple[str, ...], None] = {}
    for names in told:
        devices = [_device(name.strip(), where) for name in names]
        place = tuple(str(d) for d in devices if d.type is not DeviceType.DISK)
        if not place:
            raise TraceError(f"{where}: places: one of them names no device")
        if len(set(place)) < len(place):
            raise TraceError(f"{where}: places: {'+'.join(place)} names a device twice")
        places[place] = None
        if len(places) > MOST_PLACES:
            raise TraceError(f"{where}: places: at most {MOST_PLACES} may be")
    if len({len(place) for place in places}) > 1:
        raise TraceError(
            f"{where}: places: {_told(tuple(places))}: a model is on as many devices in each"
        )
    return tuple(places)


def place_models(
    trace: Trace, machine: Machine, wanted: Places | None = None
) -> tuple[Trace, Placing]:
    """Say of each model of a trace where on a machine it may be.

    Args:
        trace: what was wanted, and perhaps where its models were.
        machine: its devices, perhaps with names.
        wanted: ``ANYWHERE`` or ``DEALT``, whatever the trace says; None for what the trace says,
            and anywhere if it says nothing.

    Returns:
        The trace, with places as positions of the machine's devices, and who said so.

    Raises:
        TraceError: the trace names a device that the machine does not have.
    """
    if wanted is None and any(trace.models[m].place_names for m in trace.used()):
        if machine.device_names:
            return _at_named(trace, machine.device_names), Placing(places=Places.TRACE)
        return _anywhere(trace), Placing(
            places=Places.ANYWHERE,
            note="the trace names the devices of its models, and none here has a name, so any "
            "model may be on any device: --devices FILE gives names",
        )
    match wanted:
        case None:
            return trace, Placing.of(trace)
        case Places.DEALT:
            return _dealt(trace, machine), Placing(places=Places.DEALT)
        case Places.ANYWHERE:
            return _anywhere(trace), Placing(places=Places.ANYWHERE)
        case Places.TRACE:
            return place_models(trace, machine)


def dealt_out(models: Sequence[TracedModel], budgets: Sequence[int]) -> tuple[TracedModel, ...]:
    """Give each model devices for good, so that all are as full.

    The largest first, where the fewest bytes are so far: in proportion to the budgets, where they
    differ, and among the devices on which it fits.

    Args:
        models: to be dealt out; one that spans several devices gets as many.
        budgets: bytes of each device.
    """
    common = math.lcm(*budgets)
    weights = [common // budget for budget in budgets]
    held = [0] * len(budgets)
    placed: dict[int, TracedModel] = {}
    for i in sorted(range(len(models)), key=lambda i: (-models[i].size_bytes, i)):
        count, part_bytes = models[i].parts(len(budgets))
        fitting = [d for d, budget in enumerate(budgets) if part_bytes <= budget]
        # Of a model that fits nowhere Trace.check_fits tells, if it is wanted.
        among = fitting if len(fitting) >= count else range(len(budgets))
        fullest_last = sorted(among, key=lambda d: (held[d] * weights[d], d))
        place = tuple(sorted(fullest_last[:count]))
        for device in place:
            held[device] += part_bytes
        placed[i] = replace(models[i], places=(place,), place_names=())
    return tuple(placed[i] for i in range(len(models)))


def _device(name: str, where: str) -> Device:
    text = name
    if name.startswith("devices/"):
        text = name.removeprefix("devices/").replace("-", ":")
    try:
        device = Device.from_str(text)
    except ValueError as error:
        raise TraceError(f"{where}: places: {error}") from None
    # One place, and called so in a server's file too.
    return Device.cpu() if device == Device(DeviceType.CPU, 0) else device.canonical()


def _told(places: PlaceNames) -> str:
    return "|".join("+".join(place) for place in places)


def _anywhere(trace: Trace) -> Trace:
    models = tuple(replace(model, places=(), place_names=()) for model in trace.models)
    return replace(trace, models=models)


def _dealt(trace: Trace, machine: Machine) -> Trace:
    dealt = dealt_out(trace.models, machine.budgets)
    if names := machine.device_names:
        dealt = tuple(
            replace(m, place_names=tuple(tuple(names[d] for d in place) for place in m.places))
            for m in dealt
        )
    return replace(trace, models=dealt)


def _at_named(trace: Trace, device_names: Sequence[str]) -> Trace:
    positions = {name: i for i, name in enumerate(device_names)}
    models = list(trace.models)
    for m in trace.used():
        model = models[m]
        for name in (name for place in model.place_names for name in place):
            if name not in positions:
                raise TraceError(
                    f"{model.origin}: model {model.name[:_QUOTE_LIMIT]!r} is on {name}, and there "
                    f"are {', '.join(device_names)}; --places anywhere or dealt passes over it"
                )
        places = tuple(tuple(positions[name] for name in place) for place in model.place_names)
        models[m] = replace(model, places=places)
    return replace(trace, models=tuple(models))
