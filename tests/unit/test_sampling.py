"""How a token is chosen, by the definitions of temperature, top_k and top_p."""

from __future__ import annotations

import math

import pytest
import torch

from modelyard_server.runtimes.hf.sampling import TokenSampler, probabilities

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 3.0])


def by_hand(scores: list[float]) -> list[float]:
    parts = [math.exp(score) for score in scores]
    return [part / sum(parts) for part in parts]


def chances(
    logits: torch.Tensor = LOGITS, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> dict[int, float]:
    ids, found = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return dict(zip(ids.tolist(), found.tolist(), strict=True))


class TestProbabilities:
    def test_they_are_the_softmax_the_likeliest_first(self) -> None:
        found = chances()
        # Of equal ones that with the lower id.
        assert list(found) == [1, 4, 2, 0, 3]
        expected = by_hand([1.0, 3.0, 2.0, -1.0, 3.0])
        assert [found[token] for token in range(5)] == pytest.approx(expected)

    @pytest.mark.parametrize("temperature", [0.1, 0.7, 2.0, 10.0])
    def test_the_logits_are_divided_by_the_temperature(self, temperature: float) -> None:
        found = chances(temperature=temperature)
        expected = by_hand([score / temperature for score in LOGITS.tolist()])
        assert [found[token] for token in range(5)] == pytest.approx(expected)

    def test_no_temperature_is_too_low(self) -> None:
        found = chances(torch.tensor([1e4, -1e4, 9e3]), temperature=1e-300)
        assert found == {0: 1.0, 2: 0.0, 1: 0.0}

    def test_top_k_keeps_so_many(self) -> None:
        found = chances(top_k=3)
        assert list(found) == [1, 4, 2]
        assert list(found.values()) == pytest.approx(by_hand([3.0, 3.0, 2.0]))
        assert list(chances(top_k=1)) == [1]
        assert list(chances(top_k=99)) == [1, 4, 2, 0, 3]

    def test_top_p_keeps_the_fewest_that_have_so_much_together(self) -> None:
        logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
        assert list(chances(logits, top_p=0.4)) == [0]
        assert list(chances(logits, top_p=0.6)) == [0, 1]
        assert chances(logits, top_p=0.7) == pytest.approx({0: 0.625, 1: 0.375})
        assert list(chances(logits, top_p=0.9)) == [0, 1, 2]
        assert list(chances(logits, top_p=1e-9)) == [0]

    def test_top_p_is_of_what_top_k_has_left(self) -> None:
        logits = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
        # 4/7 and 3/7.
        assert list(chances(logits, top_k=2, top_p=0.55)) == [0]
        assert list(chances(logits, top_p=0.55)) == [0, 1]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_scores_that_are_no_numbers_are_an_error(self, bad: float) -> None:
        with pytest.raises(ValueError, match="no numbers"):
            chances(torch.tensor([0.0, bad]))

    def test_a_token_that_is_ruled_out_is_none(self) -> None:
        found = chances(torch.tensor([0.0, -math.inf]))
        assert found == {0: 1.0, 1: 0.0}


def sampler(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1
) -> TokenSampler:
    return TokenSampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


class TestTokenSampler:
    def test_without_a_temperature_the_likeliest_is_taken(self) -> None:
        greedy = sampler(temperature=0.0)
        assert greedy.is_greedy
        assert {greedy.choose(torch.tensor([1.0, 3.0, 2.0])) for _ in range(20)} == {1}

    def test_tokens_come_as_often_as_they_are_likely(self) -> None:
        drawing = sampler(seed=3)
        count = 4_000
        drawn = [drawing.choose(LOGITS) for _ in range(count)]
        expected = by_hand(LOGITS.tolist())
        for token, chance in enumerate(expected):
            # Four standard deviations; with this seed it is the same each time.
            spread = 4 * math.sqrt(chance * (1 - chance) / count)
            assert abs(drawn.count(token) / count - chance) < spread

    def test_what_is_not_kept_is_never_drawn(self) -> None:
        drawing = sampler(temperature=10.0, top_k=2)
        assert {drawing.choose(LOGITS) for _ in range(200)} == {1, 4}
        drawing = sampler(temperature=10.0, top_p=0.3)
        assert {drawing.choose(LOGITS) for _ in range(200)} == {1, 4}

    @pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, -(2**63)])
    def test_a_seed_tells_what_is_drawn(self, seed: int) -> None:
        one, other = sampler(seed=seed), sampler(seed=seed)
        drawn = [one.choose(LOGITS) for _ in range(30)]
        assert drawn == [other.choose(LOGITS) for _ in range(30)]
        different = sampler(seed=12345)
        assert drawn != [different.choose(LOGITS) for _ in range(30)]

    def test_others_draws_make_no_difference(self) -> None:
        alone = sampler(seed=5)
        expected = [alone.choose(LOGITS) for _ in range(20)]
        one, other = sampler(seed=5), sampler(seed=6)
        found = []
        for _ in range(20):
            torch.rand(3)
            found.append(one.choose(LOGITS))
            other.choose(LOGITS)
        assert found == expected
