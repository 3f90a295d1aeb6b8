"""Made-up traces: each family is what its name says, by its seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from modelyard_server.simulation.families import FAMILIES, family_trace, is_family


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_same_seed_makes_the_same_trace(family: str) -> None:
    one, other, third = (
        family_trace(family, requests=700, models=20, seed=seed) for seed in (1, 1, 2)
    )
    assert one.model.tolist() == other.model.tolist()
    assert one.arrival_s.tolist() == other.arrival_s.tolist()
    assert one.models == other.models
    assert one.models != third.models
    assert len(one) == 700
    assert one.run_s.min() > 0


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_shortest_trace_of_a_family_can_be_made(family: str) -> None:
    assert len(family_trace(family, requests=1, models=2)) == 1


def top_share(text: str, models: int = 50) -> float:
    counts = np.bincount(family_trace(text, requests=5000, models=models).model)
    return float(np.sort(counts)[-5:].sum() / counts.sum())


def test_a_larger_exponent_wants_fewer_models() -> None:
    assert top_share("zipf:0") < 0.15 < top_share("zipf:0.6") < top_share("zipf:1.2")


def test_a_shift_wants_others_in_each_phase() -> None:
    model = family_trace("shift:2", requests=4000, models=50).model
    first, second = (
        set(np.argsort(-np.bincount(half, minlength=50))[:5].tolist())
        for half in np.array_split(model, 2)
    )
    assert first != second


def test_a_loop_goes_over_its_share_in_turn() -> None:
    model = family_trace("loop:0.5", requests=3000, models=40).model.tolist()
    assert set(model) == set(range(20))
    in_turn = sum((after - before) % 20 == 1 for before, after in pairwise(model))
    assert in_turn / len(model) > 0.99


def test_a_scan_walks_over_all_models() -> None:
    model = family_trace("scan", requests=2000, models=50, seed=5).model.tolist()
    assert any(model[i : i + 50] == list(range(50)) for i in range(1950))


def test_bursts_repeat_a_model() -> None:
    trace = family_trace("burst:20", requests=5000, models=50)
    repeats = sum(before == after for before, after in pairwise(trace.model.tolist()))
    assert repeats / 5000 > 0.9
    gaps = np.diff(trace.arrival_s)
    # A Poisson process would have one.
    assert gaps.std() / gaps.mean() > 2


def test_tenants_sleep() -> None:
    model = family_trace("tenants:5", requests=10_000, models=50).model
    counts = [len(set(part.tolist())) for part in np.array_split(model, 100)]
    assert min(counts) < 25


@pytest.mark.parametrize(("share", "length"), [(0, 2), (1, 3)])
def test_a_chain_is_always_followed_by_the_same_ones(share: int, length: int) -> None:
    model = family_trace(f"chain:{share}", requests=3000, models=40, seed=3).model
    followers: dict[int, set[tuple[int, ...]]] = {}
    for first, *others in model.reshape(-1, length).tolist():
        assert first not in others
        followers.setdefault(first, set()).add(tuple(others))
    assert len(followers) > 30
    assert all(len(ways) == 1 for ways in followers.values())


def test_some_chains_are_longer() -> None:
    def mean_length(share: float) -> float:
        # Chains begin as Zipf's law says, so the first model begins as many a request.
        firsts = family_trace(f"chain:{share}", requests=9000, models=9000, seed=3).model
        counts = np.bincount(firsts)
        return float(9000 / counts.max())

    assert mean_length(0) < mean_length(0.5) < mean_length(1)


def test_one_hit_models_are_wanted_once() -> None:
    model = family_trace("onehit:0.3", requests=5000, models=50).model
    counts = np.bincount(model)
    assert set(counts[50:].tolist()) == {1}
    assert 0.25 < (len(counts) - 50) / 5000 < 0.35


@pytest.mark.parametrize(
    ("text", "changed", "error"),
    [
        ("zipfel", {}, "no family 'zipfel'; there are zipf, shift, loop"),
        ("zipf:x", {}, "the number behind the colon is 0 to 3"),
        ("zipf:", {}, "the number behind the colon is 0 to 3"),
        ("zipf:nan", {}, "the number behind the colon is 0 to 3"),
        ("zipf:9", {}, "the number behind the colon is 0 to 3"),
        ("zipf", {"requests": 0}, "requests are 1 to"),
        ("zipf", {"models": 1}, "models are 2 to"),
        ("zipf", {"seed": -1}, "the seed is 0 or more"),
    ],
)
def test_what_is_no_family_is_refused(text: str, changed: dict[str, int], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        family_trace(text, **changed)


def test_families_are_told_from_files() -> None:
    assert is_family("zipf:0.9")
    assert is_family("loop")
    assert not is_family("loop.csv")
    assert not is_family("servegen")
