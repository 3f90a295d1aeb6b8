"""Whether a load says truly where it had the weights from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.support.stored_models import model_over, resident_pages, stored_model, write_pack

from modelyard_server.runtimes.api import LoadSource
from modelyard_server.weights import pages
from modelyard_server.weights.holding import Holding, ReadMode, WeightPool
from modelyard_server.weights.mapping import map_checkpoint
from modelyard_server.weights.origin import Origin
from modelyard_server.weights.pages import are_cached, joined_ranges, uncached
from modelyard_server.weights.stored import StoredModel

MIB = 1 << 20
HOST_MODES = tuple(ReadMode)


def take(
    pool: WeightPool, stored: StoredModel, mode: ReadMode, names: Sequence[str] | None = None
) -> Holding:
    return pool.take(
        stored, position=0, torch_device="cpu", mode=mode, names=names, stop=lambda: False
    )


def drop(path: Path, start: int = 0, size_bytes: int = 0) -> None:
    """Throws a file, or a part of it, out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, start, size_bytes, os.POSIX_FADV_DONTNEED)
        if are_cached(descriptor, start, size_bytes or path.stat().st_size):
            pytest.skip("this file system keeps its pages in memory")
    finally:
        os.close(descriptor)


def warm(path: Path) -> None:
    """Reads a file."""
    path.read_bytes()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not are_cached(descriptor, 0, path.stat().st_size):
            pytest.skip("this system cannot be asked what it has in memory")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("mode", HOST_MODES)
def test_a_load_is_from_storage_or_from_the_page_cache_as_the_file_was_before(
    tmp_path: Path, mode: ReadMode
) -> None:
    stored = stored_model(tmp_path, {"a": torch.ones(MIB), "b": torch.zeros(3 * MIB)})
    path = tmp_path / "pack.safetensors"
    for _ in range(2):
        drop(path)
        cold = take(WeightPool(), stored, mode)
        assert cold.source is LoadSource.STORAGE
        cold.release()
        warm(path)
        hot = take(WeightPool(), stored, mode)
        assert hot.source is LoadSource.PAGE_CACHE
        hot.release()


@pytest.mark.parametrize("mode", HOST_MODES)
def test_a_few_pages_that_have_to_be_read_are_no_load_from_storage(
    tmp_path: Path, mode: ReadMode
) -> None:
    stored = stored_model(tmp_path, {"a": torch.ones(16 * MIB)})
    path = tmp_path / "pack.safetensors"
    warm(path)
    size_bytes = path.stat().st_size
    # The last page is one that is looked at.
    drop(path, size_bytes - MIB, MIB)
    nearly = take(WeightPool(), stored, mode)
    assert nearly.source is LoadSource.PAGE_CACHE
    nearly.release()
    drop(path, size_bytes // 2, size_bytes // 2)
    half = take(WeightPool(), stored, mode)
    assert half.source is LoadSource.STORAGE


@pytest.mark.parametrize("mode", HOST_MODES)
def test_what_is_joined_says_nothing(tmp_path: Path, mode: ReadMode) -> None:
    body = write_pack(tmp_path, "body", {"body": torch.ones(MIB)})
    head = write_pack(tmp_path, "head", {"head": torch.zeros(MIB)})
    stored = model_over(tmp_path, body, head)
    for name in ("body", "head"):
        drop(tmp_path / name)
    pool = WeightPool()
    first = take(pool, stored, mode, ["body"])
    assert first.source is LoadSource.STORAGE
    again = take(pool, stored, mode, ["body"])
    assert again.source is LoadSource.PAGE_CACHE
    rest = take(pool, stored, mode)
    assert rest.source is LoadSource.STORAGE, "its head was nowhere"
    assert take(pool, stored, mode).source is LoadSource.PAGE_CACHE


def test_asking_touches_no_page(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": torch.ones(4 * MIB)})
    warm(tmp_path / "pack.safetensors")
    holding = take(WeightPool(), stored, ReadMode.MAP)
    assert holding.source is LoadSource.PAGE_CACHE
    assert resident_pages(holding.tensors["a"].data_ptr(), 4096) == 0


def test_what_cannot_be_known_is_from_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_model(tmp_path, {"a": torch.ones(4 * MIB)})
    warm(tmp_path / "pack.safetensors")
    # A system without the call says -1.
    monkeypatch.setattr(pages, "_cachestat", lambda: lambda *arguments: -1)
    for mode in HOST_MODES:
        assert take(WeightPool(), stored, mode).source is LoadSource.STORAGE


def test_a_checkpoint_that_is_mapped_as_a_whole_says_it_too(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": torch.ones(MIB), "b": torch.ones(4 * MIB)})
    path = tmp_path / "pack.safetensors"
    for on_disk, kept in ((frozenset[str](), 5), (frozenset({"b"}), 1)):
        drop(path)
        mapped = map_checkpoint(tmp_path, stored.checkpoint, stop=lambda: False, on_disk=on_disk)
        assert mapped.origin.source is LoadSource.STORAGE
        assert mapped.origin.file_bytes == kept * 4 * MIB
        del mapped
    warm(path)
    mapped = map_checkpoint(tmp_path, stored.checkpoint, stop=lambda: False)
    assert mapped.origin == Origin(file_bytes=20 * MIB)


def test_origins_add_up() -> None:
    file = Origin(file_bytes=160, missing_bytes=10)
    assert Origin().source is file.source is LoadSource.PAGE_CACHE
    assert (file + Origin(file_bytes=100, missing_bytes=100)).source is LoadSource.STORAGE
    assert (file + Origin(missing_bytes=5, file_bytes=5)).source is LoadSource.STORAGE
    copied = file + Origin(copied_bytes=2560)
    assert copied == Origin(file_bytes=160, missing_bytes=10, copied_bytes=2560)
    assert copied.source is LoadSource.PAGE_CACHE, "a part of it came from files"
    assert (copied + Origin(copied_bytes=1)).source is LoadSource.COPY
    assert Origin(copied_bytes=1).source is LoadSource.COPY


def test_ranges_that_touch_are_one() -> None:
    assert joined_ranges([(8, 12), (0, 4), (4, 8), (20, 20), (30, 31)]) == [(0, 12), (30, 31)]
    assert joined_ranges([(0, 9), (2, 4), (9, 9)]) == [(0, 9)]
    assert joined_ranges([]) == []


def test_missing_pieces_are_within_the_range_and_cover_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = range(5 * MIB, 6 * MIB)

    def cached(descriptor: int, start: int, size_bytes: int) -> bool:
        assert descriptor == 7
        return start >= missing.stop or start + size_bytes <= missing.start

    monkeypatch.setattr(pages, "are_cached", cached)
    monkeypatch.setattr(pages, "seem_cached", cached)
    assert list(uncached(7, 6 * MIB, 11 * MIB)) == []
    assert list(uncached(7, 0, 12 * MIB)) == [(4 * MIB, 2 * MIB)]
    assert list(uncached(7, MIB + 5, 11 * MIB)) == [
        (3 * MIB + 5, 2 * MIB),
        (5 * MIB + 5, 2 * MIB),
    ]
    assert list(uncached(7, 5 * MIB + 100, 1000)) == [(5 * MIB + 100, 1000)]
