"""Random models with random tensors in common: all bytes come back, and none is stored twice."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.weight_folders import (
    Tensor,
    damage_of,
    data_bytes,
    numbers,
    read_back,
    write_model,
)

from modelyard_server.weights.safetensors_files import ITEM_SIZES, read_checkpoint
from modelyard_server.weights.store import WeightStore
from modelyard_server.weights.stored import StoredModel

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple) | st.sampled_from([(512, 2), (33, 31)])
# Few seeds, so that tensors meet.
TENSORS = st.builds(
    numbers,
    st.integers(0, 2),
    SHAPES,
    st.sampled_from(sorted(ITEM_SIZES)),
)
NAMES = st.sampled_from(["a", "b", "c.0", "c.1", "d/é", "weight"])


@st.composite
def model_sets(draw: st.DrawFn) -> list[list[dict[str, Tensor]]]:
    """Models of one to three shards, over a pool of tensors."""
    pool = draw(st.lists(TENSORS, min_size=1, max_size=6))
    models = []
    for _ in range(draw(st.integers(1, 4))):
        tensors = draw(st.dictionaries(NAMES, st.sampled_from(pool), min_size=1))
        names = draw(st.permutations(sorted(tensors)))
        cuts = min(draw(st.integers(1, 3)), len(names))
        models.append([{name: tensors[name] for name in names[n::cuts]} for n in range(cuts)])
    return models


@pytest.fixture(autouse=True, scope="module")
def without_the_disk() -> Iterator[None]:
    """What is on the disk after a power cut is not the point here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def joined(shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def distinct_bytes(models: list[list[dict[str, Tensor]]]) -> int:
    """Bytes of the distinct tensors; each as often as the model has it that has it most often."""
    most: dict[Tensor, int] = {}
    for shards in models:
        tensors = list(joined(shards).values())
        for tensor in tensors:
            most[tensor] = max(most.get(tensor, 0), tensors.count(tensor))
    return sum(count * len(tensor.data) for tensor, count in most.items())


def take_all(store: Path, folders: list[Path]) -> dict[Path, StoredModel]:
    opened = WeightStore.open(store)
    taken = {folder: opened.take(folder) for folder in folders}
    opened.close()
    return taken


@settings(max_examples=40, deadline=None)
@given(models=model_sets())
def test_all_bytes_come_back_and_none_is_stored_twice(
    models: list[list[dict[str, Tensor]]],
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = [write_model(root / f"m{n}", *shards) for n, shards in enumerate(models)]
        taken = take_all(root / "store", folders)
        for folder, shards in zip(folders, models, strict=True):
            stored, source = taken[folder], read_checkpoint(folder)
            assert read_back(stored) == joined(shards)
            assert stored.checkpoint.size_bytes == source.size_bytes
            identities = [t.identity for t in stored.checkpoint.tensors.values()]
            assert len(set(identities)) == len(identities) == len(source.tensors)
        assert data_bytes(root / "store") == distinct_bytes(models)
        assert damage_of(root / "store") == []
        # The next server, and one that meets the models the other way round, find the same.
        assert take_all(root / "store", folders) == taken
        backwards = take_all(root / "other", folders[::-1])
        assert data_bytes(root / "other") == distinct_bytes(models)
        for folder, stored in taken.items():
            other = backwards[folder]
            assert other.digest == stored.digest
            assert {n: t.identity for n, t in other.checkpoint.tensors.items()} == {
                n: t.identity for n, t in stored.checkpoint.tensors.items()
            }


@settings(max_examples=25, deadline=None)
@given(models=model_sets(), data=st.data())
def test_what_is_kept_is_whole_after_a_collection(
    models: list[list[dict[str, Tensor]]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = [write_model(root / f"m{n}", *shards) for n, shards in enumerate(models)]
        store = WeightStore.open(root / "store")
        taken = [store.take(folder) for folder in folders]
        kept = data.draw(st.sets(st.sampled_from(range(len(models)))))
        keep = {taken[n].digest for n in kept}
        before = store.usage()
        assert store.collect(keep) == before.stored_bytes - store.usage().stored_bytes
        assert store.usage().model_count == len(keep)
        if not keep:
            assert data_bytes(root / "store") == 0
        for stored, shards in zip(taken, models, strict=True):
            if stored.digest in keep:
                assert read_back(stored) == joined(shards)
        assert damage_of(root / "store") == []
        for folder, shards in zip(folders, models, strict=True):
            assert read_back(store.take(folder)) == joined(shards)
        store.close()
