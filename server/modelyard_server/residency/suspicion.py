"""Who is to blame when a worker dies: the rule, without a clock and without doing anything.

Each death is one strike, and goes to those that were running or being loaded at that moment: the
suspects. A sole suspect gets all of it. Of several, each gets a part as it is suspicious:

    weight = d * d / (1 + d + n)

d is how many deaths of the window it was a suspect of, n how many runs it has finished. d / (d + n)
is the part of its runs that ended in a death; once more d, because who was there more often
explains more deaths alone; and the 1 keeps a first run from saying too much. Who weighs at most a
quarter of the heaviest suspect of a death is cleared of it. Of n, runs before a model's first death
of the window count as at most PROVEN_RUNS: whatever ails it may have begun then.

Weights are worked out anew at each death, for all deaths of the window. A model that brings workers
down beside ever different ones is so found out, and what the others had got of earlier deaths is
taken off them. Two things end that for a death. A suspect reaches the limit: then the deaths that
it had a part in are put down to it (to them, if several reach it at once), and are not held against
the others any more. An operator forgives a suspect: its part is forgotten, and the others keep what
they have.

What it cannot do. Who is guilty is not seen, only who was there. Certain is this much: who was a
suspect of fewer than `limit` deaths is not barred; and D deaths within the window bar at most
D / limit models, because a death is one strike, and none of it is counted twice. An innocent that
was a suspect of as many deaths as the culprit, and has a record no better, gets as much as it: two
that have always run together and finished as little are barred together, after twice as many deaths
as one alone, k of them after k times as many. No rule can tell them apart from what is seen. It can
even be barred before the culprit, if it has finished next to nothing where the culprit was good for
many runs before it went bad. Safe from any number of deaths is who was a suspect of no more of them
than the culprit's d, and has finished (counted as above) 4 * m + 3 * (d + 1) runs where the culprit
finished m. For a culprit that dies in every run that is 12 when the third strike falls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

__all__ = ["MOST_DEATHS", "PROVEN_RUNS", "Death", "Suspicion", "blame"]

PROVEN_RUNS = 100
"""As how many runs at most those count that a model had finished before it became a suspect."""

MOST_DEATHS = 1024
"""Deaths that are remembered; the oldest of more are forgotten before their time."""

T = TypeVar("T")

_CLEARED = 4
"""Who weighs no more than this part of the heaviest suspect is cleared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """The death of a worker in which something was running or being loaded.

    Attributes:
        at_s: when it was.
        finished: of each suspect, how many runs it had finished by then; without those for whom it
            does not count any more.
        settled: what each gets of the strike, once that does not change any more; else None.
    """

    at_s: float
    finished: Mapping[int, int]
    settled: Mapping[int, Fraction] | None = None


def blame(
    deaths: Sequence[Death], finished: Mapping[int, int]
) -> tuple[Mapping[int, Fraction], ...]:
    """What each suspect gets of each strike.

    Args:
        deaths: the oldest first.
        finished: how many runs models have finished by now; of those that are missing, and of those
            it has too few of, what the deaths say counts.

    Returns:
        One mapping a death, of those that get something; its values are 1 together unless somebody
        was forgiven.
    """
    weights = _weights(deaths, finished)
    return tuple(
        _divided({model: weights[model] for model in death.finished})
        if death.settled is None
        else death.settled
        for death in deaths
    )


def _weights(deaths: Sequence[Death], finished: Mapping[int, int]) -> dict[int, Fraction]:
    counts: dict[int, int] = {}
    before: dict[int, int] = {}
    by_now: dict[int, int] = {}
    for death in deaths:
        for model, runs in death.finished.items():
            counts[model] = counts.get(model, 0) + 1
            before.setdefault(model, runs)
            by_now[model] = max(runs, by_now.get(model, 0), finished.get(model, 0))
    weights = {}
    for model, count in counts.items():
        runs = min(before[model], PROVEN_RUNS) + by_now[model] - before[model]
        weights[model] = Fraction(count * count, 1 + count + runs)
    return weights


def _divided(weights: Mapping[int, Fraction]) -> dict[int, Fraction]:
    """One strike among those with these weights."""
    heaviest = max(weights.values())
    kept = {model: weight for model, weight in weights.items() if weight * _CLEARED > heaviest}
    total = sum(kept.values())
    return {model: weight / total for model, weight in kept.items()}


def _without(mapping: Mapping[int, T], model: int) -> dict[int, T]:
    return {one: value for one, value in mapping.items() if one != model}


class Suspicion:
    """The deaths of the last while, and whose fault they are. Not thread-safe.

    Invariants: each death is one strike, less what was forgiven of it; no model that was not a
    suspect of a death has a part in it.

    Args:
        limit: how many strikes are too many.
        window_s: how long a death counts, in seconds.
        most_deaths: how many are remembered.
    """

    def __init__(self, *, limit: int, window_s: float, most_deaths: int = MOST_DEATHS) -> None:
        self._limit = limit
        self._window_s = window_s
        self._deaths: deque[Death] = deque(maxlen=most_deaths)
        self._finished: dict[int, int] = {}

    @property
    def models(self) -> frozenset[int]:
        """The suspects of the deaths that are remembered."""
        return frozenset(model for death in self._deaths for model in death.finished)

    def died(
        self, now_s: float, suspects: Iterable[int], finished: Mapping[int, int]
    ) -> tuple[int, ...]:
        """A worker has died.

        Args:
            now_s: when; not before the last one did.
            suspects: what was running or being loaded in it. Without any, nothing is remembered.
            finished: runs that each has finished since it is known, the one that died not counted;
                of the suspects, and of the other `models` as far as they are still there.

        Returns:
            The suspects that have reached the limit.
        """
        there = dict.fromkeys(suspects)
        self._forget_before(now_s - self._window_s)
        if not there:
            return ()
        self._deaths.append(Death(at_s=now_s, finished={one: finished[one] for one in there}))
        self._finished = {
            model: finished.get(model, self._finished.get(model, 0)) for model in self.models
        }
        shares = self.blame()
        barred = tuple(
            model
            for model in there
            if sum(share.get(model, Fraction()) for share in shares) >= self._limit
        )
        self._put_down_to(barred, shares)
        return barred

    def forgive(self, model: int) -> None:
        """Forgets what a model has got. The others keep what they have of the same deaths."""
        kept: list[Death] = []
        for death, share in zip(self._deaths, self.blame(), strict=True):
            if model not in death.finished:
                kept.append(death)
            elif others := _without(death.finished, model):
                kept.append(replace(death, finished=others, settled=_without(share, model)))
        self._deaths = deque(kept, maxlen=self._deaths.maxlen)

    def blame(self) -> tuple[Mapping[int, Fraction], ...]:
        """What each model has got of the strike of each death that is remembered; see blame."""
        return blame(self._deaths, self._finished)

    def parts(self, model: int) -> tuple[Fraction, ...]:
        """What a model has got of each death it has a part in, the oldest first."""
        return tuple(share[model] for share in self.blame() if model in share)

    def _put_down_to(self, barred: Sequence[int], shares: Sequence[Mapping[int, Fraction]]) -> None:
        for i, (death, share) in enumerate(zip(self._deaths, shares, strict=True)):
            guilty = {model: share[model] for model in barred if model in share}
            if guilty and death.settled is None:
                total = sum(guilty.values())
                parts = {model: part / total for model, part in guilty.items()}
                suspects = {model: death.finished[model] for model in guilty}
                self._deaths[i] = replace(death, finished=suspects, settled=parts)

    def _forget_before(self, first_s: float) -> None:
        while self._deaths and self._deaths[0].at_s < first_s:
            self._deaths.popleft()
