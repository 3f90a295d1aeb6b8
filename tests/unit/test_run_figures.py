"""What is said of models' runs: predicted, then corrected upwards, for all that are alike."""

from __future__ import annotations

from fractions import Fraction

from modelyard_server.catalog.run_figures import RunFigure, RunFigures
from modelyard_server.runtimes.api import Price
from modelyard_server.weights.activation_model import ActivationModel, ActivationPoint, RunEstimate


def estimate(key: str = "k", per_token: int = 10) -> RunEstimate:
    model = ActivationModel(base=Fraction(0), per_token=Fraction(per_token), per_pair=Fraction(0))
    return RunEstimate(key=key, model=model, largest_batch=8, largest_length=64)


def price(runs: RunEstimate | None) -> Price:
    size_bytes = 0 if runs is None else runs.size_bytes
    return Price(resting_bytes=1, peak_bytes=1, activation_bytes=size_bytes, runs=runs)


def test_a_run_that_takes_less_changes_nothing() -> None:
    figure = RunFigure(5_120, estimate())
    figure.observe([ActivationPoint(8, 64, 1), ActivationPoint(1, 1, 10)])
    assert figure.size_bytes == 5_120
    # Of a runtime that predicts the largest batch alone.
    figure = RunFigure(5_120)
    figure.observe([ActivationPoint(8, 64, 1)])
    assert figure.size_bytes == 5_120


def test_a_run_that_takes_more_than_predicted_raises_the_largest_batch_by_as_much() -> None:
    figure = RunFigure(5_120, estimate())
    figure.observe([ActivationPoint(2, 8, 480)])
    assert figure.size_bytes == 3 * 5_120
    figure.observe([ActivationPoint(2, 8, 160)])
    assert figure.size_bytes == 3 * 5_120


def test_no_run_that_was_measured_takes_more_than_is_said() -> None:
    figure = RunFigure(5_120, estimate())
    figure.observe([ActivationPoint(8, 1_024, 10**9)])  # Longer than the longest was thought to be.
    assert figure.size_bytes == 10**9


def test_of_what_nothing_was_predicted_the_most_that_was_measured_is_said() -> None:
    figure = RunFigure()
    assert figure.size_bytes == 0
    figure.observe([ActivationPoint(64, 3, 700), ActivationPoint(1, 3, 40)])
    assert figure.size_bytes == 700


def test_it_fits_into_the_field_of_the_answer() -> None:
    assert RunFigure(2**70).size_bytes == 2**63 - 1
    figure = RunFigure(5_120, estimate())
    figure.observe([ActivationPoint(8, 64, 2**62), ActivationPoint(8, 64, 2**62)])
    assert figure.size_bytes == 2**62


def test_models_whose_runs_take_the_same_have_one_figure() -> None:
    figures = RunFigures()
    first, second = figures.of(price(estimate())), figures.of(price(estimate()))
    first.observe([ActivationPoint(8, 64, 9_999)])
    assert second.size_bytes == 9_999
    # Also one that comes after the measurement, from another look at the same files.
    assert figures.of(price(estimate())).size_bytes == 9_999
    assert figures.of(price(estimate(key="other"))).size_bytes == 5_120


def test_models_that_are_like_no_other_have_figures_of_their_own() -> None:
    figures = RunFigures()
    for runs in (estimate(key=""), None):
        first, second = figures.of(price(runs)), figures.of(price(runs))
        first.observe([ActivationPoint(8, 64, 9_999)])
        assert second.size_bytes == price(runs).activation_bytes
    assert figures.of(None).size_bytes == 0
