"""Blame for workers' deaths, whatever runs, dies and is forgiven."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from hypothesis import event, given
from hypothesis import strategies as st

from modelyard_server.residency.suspicion import PROVEN_RUNS, Suspicion

WINDOW_S = 600.0
models = st.integers(0, 4)
limits = st.integers(1, 4)
runs = st.integers(0, 3) | st.integers(0, 5000)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Time passes, models finish runs, and something happens."""

    passed_s: float = 0.0
    finished: dict[int, int] = field(default_factory=dict)
    suspects: tuple[int, ...] = ()
    forgiven: int | None = None


def steps(passed: st.SearchStrategy[float], *, forgiving: bool) -> st.SearchStrategy[list[Step]]:
    deaths = st.builds(
        Step,
        passed_s=passed,
        finished=st.dictionaries(models, runs, max_size=3),
        suspects=st.lists(models, max_size=4, unique=True).map(tuple),
    )
    forgiven = st.builds(Step, forgiven=models)
    return st.lists(deaths | forgiven if forgiving else deaths, max_size=25)


class Told:
    """A suspicion that was told of steps.

    Attributes:
        barred: who reached the limit, by the step.
    """

    def __init__(self, limit: int) -> None:
        self.suspicion = Suspicion(limit=limit, window_s=WINDOW_S)
        self.finished = dict.fromkeys(range(5), 0)
        self.now_s = 0.0
        self.barred: list[tuple[int, ...]] = []

    def tell(self, step: Step) -> None:
        self.now_s += step.passed_s
        for model, count in step.finished.items():
            self.finished[model] += count
        if step.forgiven is None:
            self.barred.append(self.suspicion.died(self.now_s, step.suspects, self.finished))
        else:
            self.suspicion.forgive(step.forgiven)
            self.barred.append(())


@given(limit=limits, history=steps(st.floats(0, 400), forgiving=True))
def test_every_death_is_one_strike_less_what_was_forgiven_and_only_suspects_have_part(
    limit: int, history: list[Step]
) -> None:
    told = Told(limit)
    forgiven_any = False
    for step in history:
        told.tell(step)
        forgiven_any |= step.forgiven is not None
        for parts, death in zip(told.suspicion.blame(), told.suspicion._deaths, strict=True):
            assert parts.keys() <= death.finished.keys()
            assert all(part > 0 for part in parts.values())
            assert sum(parts.values()) == 1 or (forgiven_any and sum(parts.values()) < 1)
            assert death.at_s >= told.now_s - WINDOW_S or step.forgiven is not None


@given(limit=limits, history=steps(st.floats(0, 400), forgiving=True))
def test_a_forgiven_model_has_nothing_and_nobody_else_has_more_or_less(
    limit: int, history: list[Step]
) -> None:
    told = Told(limit)
    for step in history:
        before = {model: told.suspicion.parts(model) for model in range(5)}
        told.tell(step)
        if step.forgiven is not None:
            after = {model: told.suspicion.parts(model) for model in range(5)}
            event(f"it had something: {before[step.forgiven] != ()}")
            assert after == before | {step.forgiven: ()}
            assert step.forgiven not in told.suspicion.models


@given(limit=limits, history=steps(st.floats(0, 400), forgiving=True))
def test_only_suspects_of_a_death_with_as_many_parts_as_the_limit_are_barred_by_it(
    limit: int, history: list[Step]
) -> None:
    told = Told(limit)
    for step in history:
        told.tell(step)
        assert set(told.barred[-1]) <= set(step.suspects)
        for model in told.barred[-1]:
            parts = told.suspicion.parts(model)
            assert sum(parts) >= limit
            assert len(parts) >= limit


@given(limit=limits, history=steps(st.floats(0, 20), forgiving=False))
def test_as_many_deaths_bar_as_many_models_as_the_limit_divides_them(
    limit: int, history: list[Step]
) -> None:
    told = Told(limit)
    for step in history:
        told.tell(step)
        deaths = len(told.suspicion.blame())
        barred = {model for models in told.barred for model in models}
        event(f"{len(barred)} barred")
        assert len(barred) * limit <= deaths


@given(
    limit=limits,
    history=steps(st.floats(0, 400), forgiving=True),
    names=st.permutations(range(5)),
)
def test_what_models_are_called_does_not_matter(
    limit: int, history: list[Step], names: list[int]
) -> None:
    one, other = Told(limit), Told(limit)
    for step in history:
        one.tell(step)
        other.tell(
            Step(
                passed_s=step.passed_s,
                finished={names[model]: count for model, count in step.finished.items()},
                suspects=tuple(names[model] for model in step.suspects),
                forgiven=None if step.forgiven is None else names[step.forgiven],
            )
        )
        assert [names[model] for model in one.barred[-1]] == list(other.barred[-1])
        for model in range(5):
            assert one.suspicion.parts(model) == other.suspicion.parts(names[model])


@given(
    deaths=st.lists(st.lists(runs, max_size=3), min_size=3, max_size=3),
    between=st.lists(runs, min_size=9, max_size=9),
)
def test_a_model_that_always_kills_is_barred_by_its_third_death_beside_ever_different_ones(
    deaths: list[list[int]], between: list[int]
) -> None:
    suspicion = Suspicion(limit=3, window_s=WINDOW_S)
    culprit, finished = 0, {0: 0}
    barred: tuple[int, ...] = ()
    for proven in deaths:
        beside = [len(finished) + i for i in range(len(proven))]
        finished |= dict(zip(beside, proven, strict=True))
        barred = suspicion.died(1.0, [*beside, culprit], finished)
        for model, count in zip(list(finished)[1:], between, strict=False):
            finished[model] += count
    assert barred == (culprit,)
    assert suspicion.parts(culprit) == (Fraction(1),) * 3


@given(
    bad=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    more=st.lists(st.integers(0, 50), min_size=12, max_size=12),
    before=st.integers(0, PROVEN_RUNS),
    absent=st.sets(st.integers(0, 11)),
)
def test_who_has_finished_so_much_more_than_the_culprit_gets_nothing(
    bad: list[int], more: list[int], before: int, absent: set[int]
) -> None:
    suspicion = Suspicion(limit=1000, window_s=WINDOW_S)
    culprit, innocent = 0, 1
    finished = {culprit: 0, innocent: before}
    for death, (killed_after, extra) in enumerate(zip(bad, more, strict=False), 1):
        finished[culprit] += killed_after
        needed = 4 * finished[culprit] + 3 * (death + 1)
        if death > 1:
            finished[innocent] = max(finished[innocent], needed) + extra
        suspects = [culprit] if death - 1 in absent and death > 1 else [innocent, culprit]
        suspicion.died(1.0, suspects, finished)
        if finished[innocent] >= needed:
            assert suspicion.parts(innocent) == ()
            assert sum(suspicion.parts(culprit), Fraction()) == death
