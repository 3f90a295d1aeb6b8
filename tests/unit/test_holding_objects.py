"""Whose objects the tensors of a holding are, and that none of them outlives it by itself."""

from __future__ import annotations

from pathlib import Path
from weakref import ref

import pytest
import torch
from tests.support.stored_models import stored_model

from modelyard_server.weights.holding import Holding, ReadMode, WeightPool
from modelyard_server.weights.stored import StoredModel

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def take(pool: WeightPool, stored: StoredModel, mode: ReadMode) -> Holding:
    return pool.take(stored, position=0, torch_device="cpu", mode=mode, stop=lambda: False)


@pytest.mark.parametrize("mode", ReadMode)
def test_bases_are_the_pools_and_tensors_the_holdings(tmp_path: Path, mode: ReadMode) -> None:
    pool, stored = WeightPool(), stored_model(tmp_path, {"a": torch.arange(6.0).view(2, 3)})
    one, other = take(pool, stored, mode), take(pool, stored, mode)
    assert one.bases()["a"] is other.bases()["a"]
    assert one.tensors["a"] is one.tensors["a"]
    assert one.tensors["a"] is not other.tensors["a"]
    addresses = {each.tensors["a"].data_ptr() for each in (one, other)}
    assert addresses == {one.bases()["a"].data_ptr()}


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("mode", ReadMode)
def test_a_released_holding_has_nothing(tmp_path: Path, mode: ReadMode, looks: bool) -> None:
    pool, stored = WeightPool(), stored_model(tmp_path, {"a": torch.ones(5_000)})
    holding = take(pool, stored, mode)
    base = ref(holding.bases()["a"])
    if looks:
        assert holding.tensors.keys() == {"a"}
        assert holding.extents.keys() == ({"a"} if mode is ReadMode.MAP else set())
    holding.release()
    assert base() is None
    assert not (holding.tensors or holding.extents or holding.bases())


@pytest.mark.parametrize("mode", ReadMode)
def test_unsigned_numbers_of_several_bytes_are_read(tmp_path: Path, mode: ReadMode) -> None:
    numbers = torch.tensor([0, 1, 40_000])
    written = {str(dtype): numbers.to(dtype) for dtype in UNSIGNED}
    holding = take(WeightPool(), stored_model(tmp_path, written), mode)
    for name, tensor in holding.tensors.items():
        assert tensor.dtype == written[name].dtype
        assert tensor.tolist() == numbers.tolist()
