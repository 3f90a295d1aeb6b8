"""Who is to blame when a worker dies: the rule alone."""

from __future__ import annotations

from fractions import Fraction

import pytest

from modelyard_server.residency.suspicion import PROVEN_RUNS, Suspicion

LIMIT = 3
WINDOW_S = 600.0
K, A, B, C = 1, 2, 3, 4


class Court:
    """A suspicion, the runs that models finish, and who was barred.

    Attributes:
        finished: runs of each model.
        barred: models in the order they reached the limit.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.suspicion = Suspicion(limit=limit, window_s=WINDOW_S)
        self.finished: dict[int, int] = {}
        self.barred: list[int] = []
        self.now_s = 0.0

    def run(self, model: int, times: int = 1) -> None:
        """A model finishes runs."""
        self.finished[model] = self.finished.get(model, 0) + times

    def die(self, *suspects: int) -> None:
        """A worker dies, a second after whatever was before."""
        self.now_s += 1
        for model in suspects:
            self.finished.setdefault(model, 0)
        over = self.suspicion.died(self.now_s, suspects, self.finished)
        self.barred += [model for model in over if model not in self.barred]

    def strikes(self, model: int) -> Fraction:
        """What a model has got in all."""
        return sum(self.suspicion.parts(model), Fraction())


def test_a_sole_suspect_gets_the_whole_strike_however_proven_it_is() -> None:
    court = Court()
    court.run(K, 1_000_000)
    court.die(K)
    assert court.strikes(K) == 1
    court.die(K)
    assert court.barred == []
    court.die(K)
    assert court.barred == [K]


def test_models_that_are_equally_unknown_share_evenly() -> None:
    for suspects in ([A, B], [A, B, C]):
        court = Court()
        for death in range(LIMIT * len(suspects) - 1):
            court.die(*suspects)
            expected = Fraction(death + 1, len(suspects))
            assert [court.strikes(model) for model in suspects] == [expected] * len(suspects)
        assert court.barred == []
        court.die(*suspects)
        # Nobody can tell them apart, and each has its three.
        assert court.barred == suspects


def test_a_suspect_that_is_named_twice_counts_once() -> None:
    court = Court()
    court.die(A, B, A)
    assert court.strikes(A) == court.strikes(B) == Fraction(1, 2)


@pytest.mark.parametrize("before", [0, 5000])
@pytest.mark.parametrize("between", [20, 5000])
def test_a_culprit_of_every_third_run_is_barred_and_the_hot_model_beside_it_is_not(
    before: int, between: int
) -> None:
    court = Court()
    court.run(A, before)
    for _ in range(LIMIT):
        assert court.barred == []
        court.run(K, 2)
        court.run(A, between)
        court.die(A, K)
    assert court.barred == [K]
    assert court.strikes(A) == 0


def test_ten_deaths_of_a_culprit_that_is_forgiven_each_time_do_not_bar_a_hot_model() -> None:
    court = Court()
    for death in range(10):
        court.run(K, 2)
        court.run(A, 3000)
        court.die(K, A)
        if death % LIMIT == LIMIT - 1:
            assert court.barred == [K]
            court.suspicion.forgive(K)
            court.barred.clear()
    assert court.barred == []
    assert court.strikes(A) == 0


def test_ten_deaths_without_a_verdict_do_not_touch_a_hot_model() -> None:
    court = Court(limit=100)
    court.run(A, 5000)
    for _ in range(10):
        court.run(K, 2)
        court.run(A, 10)
        court.die(K, A)
    assert court.strikes(A) == 0
    assert court.strikes(K) == 10


@pytest.mark.parametrize(
    "deaths",
    [
        [(K,), (K,), (K,)],
        [(K, A), (K, B), (K, C)],
        [(A, K), (K,), (K, B)],
        [(K, A, B), (K, C), (K,)],
    ],
)
@pytest.mark.parametrize("proven", [0, 1, 5000])
def test_a_model_that_always_kills_is_barred_after_three_deaths_beside_different_ones(
    deaths: list[tuple[int, ...]], proven: int
) -> None:
    court = Court()
    for model in (A, B, C):
        court.run(model, proven)
    for suspects in deaths:
        assert court.barred == []
        court.die(*suspects)
    assert court.barred == [K]
    assert court.strikes(A) == court.strikes(B) == court.strikes(C) == 0


def test_a_later_death_clears_who_was_beside_the_culprit_before() -> None:
    court = Court()
    court.die(K, A)
    assert court.strikes(A) == Fraction(1, 2)
    court.run(A)
    court.die(K, B)
    # Two deaths and no run, against one death and one run.
    assert court.strikes(A) == 0
    assert court.strikes(K) > 1


def test_runs_that_are_finished_afterwards_speak_for_a_model_at_the_next_death() -> None:
    court = Court()
    court.die(A, K)
    court.run(A, 50)
    court.die(B, K)
    assert court.strikes(A) == 0


@pytest.mark.parametrize("runs", range(9))
def test_more_runs_mean_less_of_the_strike_until_a_model_is_cleared(runs: int) -> None:
    court = Court()
    court.run(A, runs)
    court.die(A, K)
    # 1 / (2 + runs) against 1 / 2, and nothing from a quarter of it down.
    assert court.strikes(A) == (Fraction(2, 4 + runs) if runs < 6 else 0)
    assert court.strikes(K) == 1 - court.strikes(A)


def test_what_was_long_before_the_first_death_proves_only_so_much() -> None:
    court = Court()
    court.run(K, 1_000_000)
    court.run(A, PROVEN_RUNS)
    for death in range(1, 6):
        court.die(A, K)
        assert court.strikes(A) == court.strikes(K) == Fraction(death, 2)
        court.run(A)
        court.run(K)


def test_strikes_age_out_of_the_window() -> None:
    court = Court()
    court.die(K)
    court.die(K)
    court.now_s += WINDOW_S - 1
    court.die(K)  # The second is as old as a death may be; the first is older.
    assert court.strikes(K) == 2
    assert court.barred == []
    court.now_s += WINDOW_S
    court.die(A)
    assert court.strikes(K) == 0
    assert court.suspicion.models == {A}


def test_a_death_at_the_end_of_the_window_still_counts() -> None:
    court = Court()
    court.die(K)
    court.die(K)
    court.now_s += WINDOW_S - 2
    court.die(K)
    assert court.barred == [K]


def test_what_a_barred_model_did_is_not_held_against_those_beside_it() -> None:
    court = Court()
    for other in (A, B, A):
        court.run(A, 2)
        court.die(K, other)
    assert court.barred == [K]
    assert court.strikes(A) == court.strikes(B) == 0
    # Whatever comes now, A begins as if there had been nothing.
    court.die(A, C)
    assert court.strikes(C) >= court.strikes(A)


def test_what_is_forgiven_is_forgotten_and_the_others_keep_their_part() -> None:
    court = Court()
    court.die(A, B)
    court.die(A, B)
    court.die(A)
    court.suspicion.forgive(A)
    assert court.strikes(A) == 0
    kept = court.strikes(B)
    assert 0 < kept < 1
    for _ in range(LIMIT - 1):
        court.die(A)
    assert court.barred == []
    assert court.strikes(B) == kept
    court.die(A)
    assert court.barred == [A]


def test_forgiving_whoever_has_nothing_changes_nothing() -> None:
    court = Court()
    court.die(K)
    court.suspicion.forgive(A)
    assert court.strikes(K) == 1
    assert court.suspicion.blame() == ({K: Fraction(1)},)


def test_a_death_in_which_nothing_ran_is_nobodys() -> None:
    court = Court()
    for _ in range(LIMIT + 1):
        court.die()
    assert court.barred == []
    assert court.suspicion.blame() == ()


def test_models_that_are_gone_keep_what_is_known_of_them() -> None:
    court = Court()
    court.run(A, 50)
    court.die(A, K)
    del court.finished[A]
    court.die(K)
    assert court.strikes(A) == 0
    assert court.strikes(K) == 2


def test_what_a_model_did_after_a_death_is_known_when_it_is_gone() -> None:
    court = Court()
    court.die(A, K)
    court.run(A, 50)
    court.die(B)
    assert court.strikes(A) == 0
    del court.finished[A]
    court.die(B)
    assert court.strikes(A) == 0


def test_what_was_forgiven_is_not_put_down_to_somebody_else() -> None:
    court = Court()
    court.die(A, B)
    court.suspicion.forgive(A)
    for _ in range(LIMIT):
        court.die(B)
    assert court.barred == [B]
    assert court.suspicion.parts(B) == (Fraction(1, 2), *[Fraction(1)] * LIMIT)


def test_no_more_deaths_are_remembered_than_there_may_be() -> None:
    suspicion = Suspicion(limit=20, window_s=WINDOW_S, most_deaths=10)
    for _ in range(15):
        assert suspicion.died(0.0, [K], {K: 0}) == ()
    assert suspicion.parts(K) == (Fraction(1),) * 10
    suspicion.forgive(A)
    suspicion.died(0.0, [K], {K: 0})
    assert suspicion.parts(K) == (Fraction(1),) * 10
