"""Shares of the core follow the tensors that models have in common."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server import _core
from modelyard_server.residency.shared import SharedTensors

BUDGET = 10**6
ENCODER = {f"encoder-{i}": 100 + i for i in range(10)}
ENCODER_BYTES = sum(ENCODER.values())


class Yard:
    """A yard and its shared tensors; models are on device 0 and own 7 bytes each."""

    def __init__(self) -> None:
        self.core = _core.Yard(budgets=[BUDGET])
        self.shared = SharedTensors(self.core)
        self.now_ns = 0

    def add(self, tensors: Mapping[str, int]) -> int:
        shares = self.shared.claim(tensors)
        model = self.core.add_model("", [{0: 7}], 1.0, 0, shares, [0])
        self.shared.assign(model, tensors)
        return model

    def change(self, model: int, tensors: Mapping[str, int]) -> None:
        shares = self.shared.claim(tensors)
        self.core.update_placements(model, [{0: 7}], self.now_ns, shares, [0])
        self.shared.assign(model, tensors)
        self.core.audit()

    def load(self, model: int) -> None:
        _, actions = self.core.request(model, self.now_ns, _core.NEVER_NS)
        assert [type(action) for action in actions or ()] == [_core.Load]
        for action in self.core.load_done(model, self.now_ns, {0: 7}, 1.0) or ():
            if isinstance(action, _core.Grant):
                self.core.release(action.lease, self.now_ns)
        self.core.audit()

    def leave(self, model: int) -> int:
        """Unloads a model and returns the bytes that come back."""
        before = self.used
        self.core.unload(model, self.now_ns)
        self.core.unload_done(model, self.now_ns, self.core.exclusive(model))
        self.core.audit()
        return before - self.used

    def remove(self, model: int) -> None:
        self.core.remove_model(model, self.now_ns)
        if self.core.entry(model) is not None:
            self.core.unload_done(model, self.now_ns, self.core.exclusive(model))
        self.shared.drop(model)
        self.core.audit()

    @property
    def used(self) -> int:
        return self.core.account(0).used


def head(number: int) -> dict[str, int]:
    return ENCODER | {f"head-{number}": 50}


def test_fifty_fine_tunes_cost_one_encoder_and_fifty_heads() -> None:
    yard = Yard()
    models = [yard.add(head(i)) for i in range(50)]
    for model in models:
        yard.load(model)
    assert yard.used == ENCODER_BYTES + 50 * (50 + 7)
    assert yard.core.share_count == 51
    assert yard.core.saved(0) == 49 * ENCODER_BYTES
    assert [yard.leave(model) for model in models[:-1]] == [57] * 49
    assert yard.leave(models[-1]) == ENCODER_BYTES + 57
    assert yard.used == 0


def test_a_model_with_a_part_of_a_resident_one_shares_that_part() -> None:
    yard = Yard()
    yard.load(yard.add(ENCODER))
    half = dict(list(ENCODER.items())[:5])
    other = yard.add(half)
    yard.load(other)
    assert yard.used == ENCODER_BYTES + 2 * 7
    assert yard.leave(other) == 7


def test_changed_tensors_are_charged_beside_those_that_are_still_held() -> None:
    yard = Yard()
    model, stays = yard.add(head(1)), yard.add(head(2))
    yard.load(model)
    yard.load(stays)
    yard.change(model, {"other": 1000})
    assert yard.used == ENCODER_BYTES + 2 * 57  # What it holds stays as it is.
    assert yard.leave(model) == 57
    yard.load(model)
    assert yard.used == ENCODER_BYTES + 57 + 1007


def test_shares_are_forgotten_with_their_last_model() -> None:
    yard = Yard()
    models = [yard.add(head(i)) for i in range(3)]
    yard.load(models[1])
    for model in models:
        yard.remove(model)
    assert (yard.core.share_count, yard.used) == (0, 0)
    yard.load(yard.add(head(1)))
    assert yard.used == ENCODER_BYTES + 57


def test_what_is_claimed_and_not_used_is_given_up() -> None:
    yard = Yard()
    kept = yard.add(ENCODER)
    shares = yard.shared.claim(dict(list(ENCODER.items())[:3]) | {"new": 5})
    yard.shared.forget_unused(shares)
    assert yard.shared.known({"new": 5}) == ([], 0)
    yard.load(kept)
    assert yard.used == ENCODER_BYTES + 7


def test_tensors_without_bytes_are_left_out() -> None:
    yard = Yard()
    yard.load(yard.add({"empty": 0}))
    assert (yard.used, yard.core.share_count) == (7, 0)


def test_a_forecast_takes_a_part_of_a_share_for_its_own() -> None:
    yard = Yard()
    yard.add(ENCODER)
    whole, known_bytes = yard.shared.known(ENCODER | {"new": 5})
    assert len(whole) == 1
    assert known_bytes == ENCODER_BYTES
    assert yard.shared.known(dict(list(ENCODER.items())[1:])) == ([], 0)


@given(seed=st.integers(min_value=0, max_value=2**32))
@pytest.mark.parametrize("kinds", [8, 30])
def test_a_device_is_charged_for_each_distinct_tensor_once(kinds: int, seed: int) -> None:
    source = random.Random(seed)
    sizes = {f"t{i}": source.randrange(1, 100) for i in range(kinds)}
    yard = Yard()
    made: dict[int, dict[str, int]] = {}
    held: dict[int, dict[str, int]] = {}

    def drawn() -> dict[str, int]:
        return dict(source.sample(sorted(sizes.items()), source.randrange(kinds)))

    for _ in range(40):
        what = source.randrange(6)
        if what < 2 or not made:
            tensors = drawn()
            made[yard.add(tensors)] = tensors
        elif what == 2:
            model = source.choice(list(made))
            made[model] = drawn()
            yard.change(model, made[model])
        elif what == 3:
            model = source.choice(list(made))
            del made[model]
            held.pop(model, None)
            yard.remove(model)
        elif what == 4 and (cold := sorted(made.keys() - held.keys())):
            model = source.choice(cold)
            yard.load(model)
            held[model] = made[model]
        elif held:
            model = source.choice(list(held))
            del held[model]
            yard.leave(model)
        distinct: dict[str, int] = {}
        for tensors in held.values():
            distinct |= tensors
        assert yard.used == sum(distinct.values()) + 7 * len(held)
    # As few shares as can be: tensors that are in the same models are in one.
    signatures = {
        frozenset(model for model, tensors in made.items() if identity in tensors)
        for identity in sizes
    } - {frozenset()}
    assert len(signatures) <= yard.core.share_count
