"""Made-up traces: families of request patterns, each by its seed.

Sizes are lognormal about 1.5 GiB (100 MiB to 16 GiB), a load takes 0.3 s and 1.2 to 2 s for each
GiB, one from host memory 0.1 s and an eighth of that, and a run is lognormal about 0.2 s. Requests
arrive four a second unless a family says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from modelyard_server.simulation.trace import (
    MOST_MODELS,
    MOST_REQUESTS,
    Floats,
    Integers,
    Table,
    Trace,
    make_trace,
)

__all__ = ["FAMILIES", "family_trace", "is_family"]

_MEBIBYTE: Final = 1 << 20
_RATE: Final = 4.0
_Pattern = Callable[[np.random.Generator, int, int, float], Integers]


def is_family(text: str) -> bool:
    """Return True if a text is written like a family, whether there is that family or not."""
    name, _, _ = text.partition(":")
    return name in FAMILIES


def family_trace(text: str, *, requests: int = 20_000, models: int = 300, seed: int = 1) -> Trace:
    """Make a trace of a family.

    Args:
        text: name of the family and perhaps its number, such as ``zipf:0.9``; see ``FAMILIES``.
        requests: how many; at least 1.
        models: how many; at least 2. ``onehit`` has one more for each of its odd requests.
        seed: at least 0. The same seed makes the same trace.

    Raises:
        ValueError: there is no such family, or a number is out of range.
    """
    name, colon, number = text.partition(":")
    if name not in FAMILIES:
        raise ValueError(f"no family {name[:40]!r}; there are {', '.join(FAMILIES)}")
    if not 1 <= requests <= MOST_REQUESTS:
        raise ValueError(f"requests are 1 to {MOST_REQUESTS}, got {requests}")
    if not 2 <= models <= MOST_MODELS // 2:
        raise ValueError(f"models are 2 to {MOST_MODELS // 2}, got {models}")
    if seed < 0:
        raise ValueError(f"the seed is 0 or more, got {seed}")
    pattern, default, least, most = FAMILIES[name]
    value = _value(text, number, least, most) if colon else default
    chance = np.random.default_rng(seed)
    which = pattern(chance, requests, models, value)
    arrival = _bursts_in_time(chance, requests) if name == "burst" else _poisson(chance, requests)
    return _with_models(text, chance, which, arrival)


def _value(text: str, number: str, least: float, most: float) -> float:
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise ValueError(f"{text[:40]!r}: the number behind the colon is {least:g} to {most:g}")
    return value


def _with_models(name: str, chance: np.random.Generator, which: Integers, arrival: Floats) -> Trace:
    count = int(which.max()) + 1
    sizes = np.clip(np.exp(chance.normal(np.log(1536), 0.9, count)), 100, 16384).astype(np.int64)
    per_gib = chance.uniform(1.2, 2.0, count)
    gib = sizes / 1024

    def locate(table: Table, index: int) -> str:
        return f"{name}: {table} {index}"

    return make_trace(
        name,
        names=[str(i) for i in range(count)],
        size_bytes=[size * _MEBIBYTE for size in sizes.tolist()],
        load_s=(0.3 + per_gib * gib).tolist(),
        host_load_s=(0.1 + per_gib * gib / 8).tolist(),
        arrival_s=arrival,
        model=which,
        run_s=np.clip(np.exp(chance.normal(np.log(0.2), 0.6, len(which))), 0.01, 10.0),
        locate=locate,
    )


def _poisson(chance: np.random.Generator, requests: int) -> Floats:
    return np.cumsum(chance.exponential(1 / _RATE, requests))


def _bursts_in_time(chance: np.random.Generator, requests: int) -> Floats:
    """Arrivals of the same mean rate in bursts of fifty at ten times the rate."""
    gaps = chance.exponential(1 / (10 * _RATE), requests)
    gaps[::50] += chance.exponential(45 / _RATE, len(gaps[::50]))
    return np.cumsum(gaps)


# --- The patterns: which model each request is for


def _zipf_weights(models: int, alpha: float) -> Floats:
    weights = np.arange(1, models + 1, dtype=np.float64) ** -alpha
    return np.asarray(weights / weights.sum())


def _draw(chance: np.random.Generator, models: int, alpha: float, count: int) -> Integers:
    return chance.choice(models, size=count, p=_zipf_weights(models, alpha)).astype(np.int64)


def _zipf(chance: np.random.Generator, requests: int, models: int, alpha: float) -> Integers:
    return chance.permutation(models)[_draw(chance, models, alpha, requests)]


def _shift(chance: np.random.Generator, requests: int, models: int, phases: float) -> Integers:
    """Zipf 0.9, and in each phase other models are the wanted ones."""
    which = _draw(chance, models, 0.9, requests)
    for part in np.array_split(np.arange(requests), int(phases)):
        which[part] = chance.permutation(models)[which[part]]
    return which


def _loop(chance: np.random.Generator, requests: int, models: int, share: float) -> Integers:
    """Round and round over the same models, out of step now and then."""
    length = max(2, int(models * share))
    return (np.arange(requests) + np.cumsum(chance.random(requests) < 0.001)) % length


def _scan(chance: np.random.Generator, requests: int, models: int, share: float) -> Integers:
    """Zipf 0.9, and now and then a walk over all models in turn."""
    which = _zipf(chance, requests, models, 0.9)
    walks = max(1, int(requests * share / models)) if share > 0 else 0
    for begin in np.sort(chance.integers(0, max(1, requests - models), walks)).tolist():
        walk = which[begin : begin + models]
        walk[:] = np.arange(len(walk))
    return which


def _burst(chance: np.random.Generator, requests: int, models: int, length: float) -> Integers:
    """A model is wanted many times at once, and then not for long."""
    lengths = chance.geometric(1 / length, requests)
    who = chance.integers(0, models, requests)
    return np.repeat(who, lengths)[:requests].astype(np.int64)


def _tenants(chance: np.random.Generator, requests: int, models: int, count: float) -> Integers:
    """Tenants with models of their own, each awake for a while and then asleep."""
    tenants = min(int(count), models)
    owned: list[NDArray[np.intp]] = np.array_split(chance.permutation(models), tenants)
    which = np.empty(requests, dtype=np.int64)
    awake = np.zeros(tenants, dtype=np.bool_)
    spell = max(1, requests // 100)
    for begin in range(0, requests, spell):
        awake ^= chance.random(tenants) < 0.2
        choices = np.flatnonzero(awake) if awake.any() else np.arange(tenants)
        part = which[begin : begin + spell]
        whose = chance.choice(choices, size=len(part))
        for tenant in np.unique(whose).tolist():
            theirs = whose == tenant
            mine = owned[tenant]
            part[theirs] = mine[_draw(chance, len(mine), 0.9, int(theirs.sum()))]
    return which


def _chain(chance: np.random.Generator, requests: int, models: int, share: float) -> Integers:
    """Zipf 0.9, and each of those draws another model or two after it, always the same ones."""
    first = _zipf(chance, requests, models, 0.9)
    # Steps that are not 0 apart: nobody follows itself.
    second = (np.arange(models) + chance.integers(1, models, models)) % models
    third = (np.arange(models) + chance.integers(1, models, models)) % models
    triples = np.column_stack((first, second[first], third[first]))
    kept = np.column_stack(
        (np.ones((requests, 2), dtype=np.bool_), chance.random(requests) < share)
    )
    return np.asarray(triples[kept][:requests], dtype=np.int64)


def _onehit(chance: np.random.Generator, requests: int, models: int, share: float) -> Integers:
    """Zipf 0.9, and between them models that are wanted once and never again."""
    which = _zipf(chance, requests, models, 0.9)
    odd = np.flatnonzero(chance.random(requests) < share)[: MOST_MODELS - models]
    which[odd] = models + np.arange(len(odd))
    return which


FAMILIES: Final[Mapping[str, tuple[_Pattern, float, float, float]]] = MappingProxyType(
    {
        "zipf": (_zipf, 0.9, 0.0, 3.0),
        "shift": (_shift, 8, 1, 10_000),
        "loop": (_loop, 0.25, 0.0, 1.0),
        "scan": (_scan, 0.2, 0.0, 1.0),
        "burst": (_burst, 20, 1, 10_000),
        "tenants": (_tenants, 10, 1, 1000),
        "onehit": (_onehit, 0.3, 0.0, 1.0),
        "chain": (_chain, 0.5, 0.0, 1.0),
    }
)
"""For each family its pattern, and of its number the default, the least and the most: the exponent
of ``zipf``, the phases of ``shift``, the share of the models that ``loop`` goes over, the shares of
requests in scans and for one-hit models, the mean length of a ``burst``, the number of tenants, the
share of chains that are three long and not two."""
