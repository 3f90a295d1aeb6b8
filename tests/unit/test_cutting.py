"""Where models are cut: between which pieces, and how they are shared out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from modelyard.placements import PlacementStrategy
from modelyard_server.devices.cutting import CannotCut, Piece, cut, pieces_of
from modelyard_server.runtimes.api import Price
from modelyard_server.runtimes.targets import Structure, Target, TensorPart

BALANCED, SEQUENTIAL = PlacementStrategy.BALANCED, PlacementStrategy.SEQUENTIAL
DISK = 9


def part(*names: str, size: int = 1, buffer: bool = False, filed: bool = True) -> TensorPart:
    return TensorPart(names=names, size_bytes=size, is_buffer=buffer, as_filed=filed)


def names(structure: Structure) -> list[tuple[str, ...]]:
    return [piece.names for piece in pieces_of(structure)]


def chain(*sizes: int, filed: bool = True) -> Structure:
    """Modules in a row, named "0", "1", ..., each of one tensor."""
    return Structure(
        tensors=tuple(part(f"{i}.weight", size=size, filed=filed) for i, size in enumerate(sizes)),
        units=tuple(str(i) for i in range(len(sizes))),
    )


def devices_of(
    structure: Structure,
    strategy: PlacementStrategy,
    budgets: Sequence[int],
    *,
    extra: int = 0,
    disk: int | None = None,
) -> list[int]:
    """On which device each tensor of a structure comes to be."""
    price = Price(
        resting_bytes=structure.size_bytes,
        peak_bytes=structure.size_bytes + extra,
        structure=structure,
    )
    padded = [*budgets, *[0] * (DISK - len(budgets)), disk or 0]
    target = cut(
        strategy,
        price=price,
        devices=range(len(budgets)),
        budgets=padded,
        disk=None if disk is None else DISK,
    )
    return [target.device_of(tensor.names[0]) for tensor in structure.tensors]


class TestPieces:
    def test_blocks_stay_whole_and_the_rest_is_by_modules(self) -> None:
        structure = Structure(
            tensors=(
                part("embed.word.weight"),
                part("embed.position.weight"),
                part("layer.0.query.weight"),
                part("layer.0.query.bias"),
                part("layer.0.out.weight"),
                part("layer.1.query.weight"),
                part("norm.weight"),
                part("norm.bias"),
            ),
            blocks=("layer.0", "layer.1"),
            units=("embed.word", "embed.position", "layer.0.query", "layer.0.out", "norm"),
        )
        assert names(structure) == [
            ("embed.word.weight",),
            ("embed.position.weight",),
            ("layer.0.query.weight", "layer.0.query.bias", "layer.0.out.weight"),
            ("layer.1.query.weight",),
            ("norm.weight", "norm.bias"),
        ]

    def test_blocks_inside_of_blocks_are_not_cut_out(self) -> None:
        structure = Structure(
            tensors=(part("a.0.weight"), part("a.1.weight")), blocks=("a", "a.0", "a.1")
        )
        assert names(structure) == [("a.0.weight", "a.1.weight")]

    def test_a_block_whose_name_begins_like_another_is_another(self) -> None:
        structure = Structure(
            tensors=(part("layer.1.w"), part("layer.10.w")), blocks=("layer.1", "layer.10")
        )
        assert names(structure) == [("layer.1.w",), ("layer.10.w",)]

    def test_units_stay_whole_outside_of_blocks(self) -> None:
        structure = Structure(tensors=(part("a.x.w"), part("a.y.w")), units=("a",))
        assert names(structure) == [("a.x.w", "a.y.w")]

    def test_tied_tensors_join_their_pieces_at_the_place_of_the_first(self) -> None:
        structure = Structure(
            tensors=(
                part("embed.weight", "head.weight", size=5),
                part("layer.w", size=2),
                part("head.bias", size=3),
            )
        )
        assert pieces_of(structure) == (
            Piece(names=("embed.weight", "head.weight", "head.bias"), size_bytes=8),
            Piece(names=("layer.w",), size_bytes=2),
        )

    def test_ties_join_through_others(self) -> None:
        structure = Structure(
            tensors=(part("c.w"), part("b.w", "d.v"), part("a.w", "d.w"), part("b.v", "c.v"))
        )
        assert len(pieces_of(structure)) == 1

    def test_a_parameter_that_is_not_filed_is_named_and_a_buffer_is_not(self) -> None:
        structure = Structure(
            tensors=(part("a.b", buffer=True, filed=False), part("b.w", filed=False))
        )
        assert [piece.fixed for piece in pieces_of(structure)] == [None, "b.w"]


class TestBalanced:
    def test_equal_devices_get_equal_shares(self) -> None:
        assert devices_of(chain(1, 1, 1, 1), BALANCED, [10, 10]) == [0, 0, 1, 1]

    def test_shares_follow_the_budgets(self) -> None:
        assert devices_of(chain(*[1] * 8), BALANCED, [30, 10]) == [0] * 6 + [1] * 2

    def test_the_home_device_gets_less_for_what_loading_needs(self) -> None:
        assert devices_of(chain(*[1] * 8), BALANCED, [10, 10], extra=4) == [0] * 2 + [1] * 6

    def test_a_device_that_would_only_make_it_worse_takes_no_part(self) -> None:
        assert devices_of(chain(5, 5), BALANCED, [1, 10, 10]) == [1, 2]
        assert devices_of(chain(5, 5), BALANCED, [10, 0, 10]) == [0, 2]

    def test_the_home_device_need_not_be_the_first(self) -> None:
        structure = chain(4, 4)
        price = Price(resting_bytes=8, peak_bytes=12, structure=structure)
        target = cut(BALANCED, price=price, devices=[0, 1], budgets=[5, 20])
        assert target == Target.whole(1)

    def test_bytes_beyond_any_float_are_told_apart(self) -> None:
        big = 2**60
        structure = chain(big, 1, big, 1)
        # 1/2 and a little more against a little more than that.
        assert devices_of(structure, BALANCED, [2**61, 2**61 + 3]) == [0, 1, 1, 1]

    def test_with_a_disk_it_balances_while_all_of_it_fits_elsewhere(self) -> None:
        assert devices_of(chain(1, 1, 1, 1), BALANCED, [10, 10], disk=10) == [0, 0, 1, 1]
        found = devices_of(chain(1, 1, 1, 1, 1, 1), BALANCED, [3, 2], disk=10)
        # One byte of the home device is for what visits from the disk.
        assert found == [0, 0, 1, 1, DISK, DISK]


class TestSequential:
    def test_each_device_is_filled_before_the_next(self) -> None:
        assert devices_of(chain(1, 1, 1, 1), SEQUENTIAL, [3, 10]) == [0, 0, 0, 1]

    def test_a_first_piece_that_does_not_fit_goes_further(self) -> None:
        assert devices_of(chain(5, 1), SEQUENTIAL, [4, 10]) == [1, 1]

    def test_a_model_without_tensors_is_on_the_first_device(self) -> None:
        price = Price(resting_bytes=0, peak_bytes=0, structure=Structure(tensors=()))
        assert cut(SEQUENTIAL, price=price, devices=[2, 1], budgets=[0, 5, 5]) == Target.whole(2)

    def test_tensors_without_bytes_cost_nothing(self) -> None:
        assert devices_of(chain(0, 2, 0, 0, 1), SEQUENTIAL, [2, 1]) == [0, 0, 0, 0, 1]

    def test_all_of_it_may_be_on_the_disk_and_run_on_the_home_device(self) -> None:
        found = devices_of(chain(3, 3), SEQUENTIAL, [3], disk=6)
        assert found == [DISK, DISK]

    def test_room_for_what_visits_is_part_of_the_budget(self) -> None:
        with pytest.raises(CannotCut) as caught:
            devices_of(chain(3, 3), SEQUENTIAL, [2], disk=6)
        assert caught.value.needed[0] == 3

    def test_the_disk_has_a_budget_as_well(self) -> None:
        with pytest.raises(CannotCut):
            devices_of(chain(1, 1, 1, 1), SEQUENTIAL, [2], disk=2)
        assert devices_of(chain(1, 1, 1, 1), SEQUENTIAL, [2], disk=3) == [0, DISK, DISK, DISK]

    def test_what_the_files_do_not_hold_cannot_be_on_the_disk(self) -> None:
        with pytest.raises(CannotCut) as caught:
            devices_of(chain(1, 1, 1, filed=False), SEQUENTIAL, [2], disk=9)
        assert caught.value.fixed is not None

    def test_without_room_the_last_device_has_the_rest_of_the_numbers(self) -> None:
        with pytest.raises(CannotCut) as caught:
            devices_of(chain(2, 2, 2, 2), SEQUENTIAL, [4, 2])
        assert caught.value.needed == {0: 4, 1: 4}


def test_a_large_model_is_spread_over_many_devices() -> None:
    structure = chain(*[(i * 7919) % 1000 + 1 for i in range(600)])
    budgets = [structure.size_bytes // 7] * 8
    for strategy in (BALANCED, SEQUENTIAL):
        found = devices_of(structure, strategy, budgets, extra=1000)
        assert found == sorted(found)
        assert len(set(found)) == 8
