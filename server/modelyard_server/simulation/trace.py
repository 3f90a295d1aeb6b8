"""Traces: which model was wanted when, for how long, and what the models are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from modelyard_server import _core
from modelyard_server.devices.sizes import format_size

__all__ = [
    "MOST_MODELS",
    "MOST_REQUESTS",
    "Floats",
    "Integers",
    "Locate",
    "PlaceNames",
    "Table",
    "Trace",
    "TraceError",
    "TracedModel",
    "make_trace",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Table = Literal["request", "model"]
Locate = Callable[[Table, int], str]
"""Where in its file the request or model of an index stands, such as ``day.csv:17``."""

PlaceNames = tuple[tuple[str, ...], ...]
"""Places of a model, each as the names of the devices that it is on at once."""

MOST_REQUESTS: Final = 20_000_000
MOST_MODELS: Final = 100_000
_MOST_ARRIVAL_S: Final = 1e11
_MOST_DURATION_S: Final = 1e6
_MOST_TOTAL_S: Final = 8e8
"""Of a whole timed replay. The core counts nanoseconds in 63 bits, 9.2e9 s; disturbances make loads
ten times as long, and a model that is kept as it leaves takes as long again as a load of its."""
_MOST_NAME: Final = 256


class TraceError(Exception):
    """A trace that cannot be replayed. The text names the file and the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """What a replay needs to know of a model.

    Args:
        name: as the trace calls it.
        size_bytes: what it holds while it is loaded.
        load_s: how long a load from the files takes, in seconds.
        host_load_s: how long a load from a copy in host memory takes, in seconds.
        origin: where it was read, such as ``day.csv:17``.
        spans: over how many devices it is split, evenly, where there are so many. A load takes the
            load channel of each, a run a slot of each.
        places: where alone it may be, each as the positions of the devices that it is on at once;
            without any, wherever it fits.
        place_names: the same by names, as the trace has them; ``places.place_models`` finds the
            positions.
    """

    name: str
    size_bytes: int
    load_s: float
    host_load_s: float
    origin: str
    spans: int = 1
    places: tuple[tuple[int, ...], ...] = ()
    place_names: PlaceNames = ()

    def parts(self, device_count: int) -> tuple[int, int]:
        """Return on how many of some devices it is at once, and the bytes that it takes of each."""
        count = min(self.spans, device_count)
        return count, -(-self.size_bytes // count)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in the order of their arrival. Made by ``make_trace``, which checks it.

    Args:
        name: what to call it.
        models: those that occur, and perhaps others.
        arrival_s: float64[requests], seconds from the first request on, not descending.
        model: int64[requests], the position in ``models`` of the model each request is for.
        run_s: float64[requests], how long each one keeps an execution slot, in seconds.
    """

    name: str
    models: tuple[TracedModel, ...]
    arrival_s: Floats
    model: Integers
    run_s: Floats

    def __len__(self) -> int:
        return len(self.model)

    def first(self, count: int) -> Trace:
        """Return a trace of the first ``count`` requests."""
        if count >= len(self):
            return self
        return replace(
            self,
            arrival_s=self.arrival_s[:count],
            model=self.model[:count],
            run_s=self.run_s[:count],
        )

    def used(self) -> list[int]:
        """Return the positions of the models that are wanted at least once, ascending."""
        return [int(m) for m in np.unique(self.model)]

    def footprint_bytes(self) -> int:
        """Return the bytes of all models that are wanted at least once."""
        return sum(self.models[m].size_bytes for m in self.used())

    def compulsory_s(self) -> float:
        """Return the seconds of loading every wanted model once."""
        # fsum: rounded once, so that nobody who loads as much or more comes out below it.
        return math.fsum(self.models[m].load_s for m in self.used())

    def check_fits(self, budgets: Sequence[int]) -> None:
        """Check that every wanted model fits into the largest budgets, or those of its places.

        Raises:
            TraceError: one does not; the text says where it was read.
        """
        largest = sorted(budgets, reverse=True)
        for position in self.used():
            model = self.models[position]
            count, part_bytes = model.parts(len(budgets))
            if model.places:
                _check_places(model, part_bytes, budgets)
            elif part_bytes > largest[count - 1]:
                what = f"{model.origin}: model {model.name!r} of {format_size(model.size_bytes)}"
                budget = format_size(largest[count - 1])
                if count == 1:
                    raise TraceError(f"{what} is larger than the largest budget, {budget}")
                raise TraceError(
                    f"{what} takes {format_size(part_bytes)} of each of {count} devices, and "
                    f"fewer have a budget above {budget}"
                )

    def check_countable(self) -> None:
        """Check that the clock of a timed replay can count as far as one could go.

        A serial replay counts requests, and may be of any trace.

        Raises:
            TraceError: it cannot: with a load for each request, one after the other, it would take
                more than 8e8 seconds of its own time.
        """
        longest_s = np.asarray([max(model.load_s, model.host_load_s) for model in self.models])
        total_s = float(self.arrival_s[-1] + self.run_s.sum() + longest_s[self.model].sum())
        if total_s > _MOST_TOTAL_S:
            raise TraceError(
                f"{self.name}: a timed replay could take {total_s:.3g} seconds of its own time: at "
                f"most {_MOST_TOTAL_S:g} can be counted. Cut it with fewer requests"
            )


def make_trace(
    name: str,
    *,
    names: Sequence[str],
    size_bytes: Sequence[int],
    load_s: Sequence[float],
    host_load_s: Sequence[float],
    arrival_s: Sequence[float] | Floats,
    model: Sequence[int] | Integers,
    run_s: Sequence[float] | Floats,
    locate: Locate,
    place_names: Sequence[PlaceNames] | None = None,
) -> Trace:
    """Check what was read and make a trace of it; its time begins with the first request.

    Raises:
        TraceError: something is not as ``Trace`` and ``TracedModel`` say. The text begins with
            what ``locate`` returns.
    """
    models = tuple(
        _model(names[i], size_bytes[i], load_s[i], host_load_s[i], locate("model", i))
        for i in range(len(names))
    )
    if place_names is not None:
        models = tuple(
            replace(model, place_names=places, spans=len(places[0]) if places else 1)
            for model, places in zip(models, place_names, strict=True)
        )
    arrival = np.asarray(arrival_s, dtype=np.float64)
    which = np.asarray(model, dtype=np.int64)
    run = np.asarray(run_s, dtype=np.float64)
    if len(which) == 0:
        raise TraceError(f"{name}: there are no requests")
    if len(which) > MOST_REQUESTS:
        raise TraceError(f"{name}: {len(which)} requests: at most {MOST_REQUESTS} may be")
    if len(models) > MOST_MODELS:
        raise TraceError(f"{name}: {len(models)} models: at most {MOST_MODELS} may be")
    _check_requests(arrival, which, run, len(models), locate)
    return Trace(name=name, models=models, arrival_s=arrival - arrival[0], model=which, run_s=run)


def _model(name: str, size: int, load_s: float, host_load_s: float, origin: str) -> TracedModel:
    if not name or len(name) > _MOST_NAME:
        raise TraceError(f"{origin}: a model's name has 1 to {_MOST_NAME} characters")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise TraceError(f"{origin}: the model's name {name[:40]!r} has half a character: no text")
    if not 1 <= size <= _core.MAX_BYTES:
        raise TraceError(
            f"{origin}: the size of model {name[:40]!r} is {_told(size)} bytes: 1 to "
            f"{_core.MAX_BYTES} may be"
        )
    for what, seconds in (("load_s", load_s), ("host_load_s", host_load_s)):
        if not 0 < seconds <= _MOST_DURATION_S:
            raise TraceError(
                f"{origin}: {what} of model {name[:40]!r} is {seconds:g}: above 0 and at most "
                f"{_MOST_DURATION_S:g} seconds may be"
            )
    return TracedModel(
        name=name, size_bytes=size, load_s=load_s, host_load_s=host_load_s, origin=origin
    )


def _check_places(model: TracedModel, part_bytes: int, budgets: Sequence[int]) -> None:
    """Check that a model fits in one of its places."""
    largest = max(min(budgets[device] for device in place) for place in model.places)
    if part_bytes > largest:
        named = model.place_names or tuple(
            tuple(f"device {device}" for device in place) for place in model.places
        )
        raise TraceError(
            f"{model.origin}: model {model.name!r} of {format_size(model.size_bytes)} takes "
            f"{format_size(part_bytes)} of {' or '.join(' and '.join(place) for place in named)}: "
            f"the budget there is {format_size(largest)}"
        )


def _told(number: int) -> str:
    """A number that may have thousands of digits."""
    return str(number) if abs(number) < 10**320 else "far too many"


def _check_requests(
    arrival: Floats, which: Integers, run: Floats, model_count: int, locate: Locate
) -> None:
    # Written so that NaN is wrong, too.
    _check(
        (arrival >= 0) & (arrival <= _MOST_ARRIVAL_S),
        lambda i: f"the time is {arrival[i]:g}: 0 to {_MOST_ARRIVAL_S:g} seconds may be",
        locate,
    )
    _check(
        np.concatenate(([True], np.diff(arrival) >= 0)),
        lambda i: (
            f"the time {arrival[i]:.9g} is before that of the request before it, "
            f"{arrival[i - 1]:.9g}: sort the trace"
        ),
        locate,
    )
    _check(
        (run >= 0) & (run <= _MOST_DURATION_S),
        lambda i: f"the execution time is {run[i]:g}: 0 to {_MOST_DURATION_S:g} seconds may be",
        locate,
    )
    _check(
        (which >= 0) & (which < model_count),
        lambda i: f"model {which[i]} is none: there are {model_count}, from 0 on",
        locate,
    )


def _check(fine: NDArray[np.bool_], text: Callable[[int], str], locate: Locate) -> None:
    if not fine.all():
        first = int(np.argmin(fine))
        raise TraceError(f"{locate('request', first)}: {text(first)}")
