"""The keeper of a server's store: on the loop, with the work in threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.server import eventually
from tests.support.weight_folders import numbers, write_model

from modelyard_server.runtimes.api import ModelFilesError, StopCheck
from modelyard_server.weights import store_keeper
from modelyard_server.weights.store import Collected, Collector, WeightStore
from modelyard_server.weights.store_keeper import StoreKeeper


class Kept:
    """A store with one model in it, its keeper, and another server that shares it."""

    def __init__(self, folder: Path) -> None:
        self.model = write_model(folder / "model", {"a": numbers(1, (3_000,))})
        self.loader = WeightStore.open(folder / "store", leasing=True)
        self.loader.take(self.model)
        self.used: list[Path] = [self.model]
        self.keeper = StoreKeeper(folder / "store", keep_s=100, folders=lambda: self.used)
        self.other = Collector.open(folder / "store")
        self.other.publish([])

    def would_come_back(self) -> int:
        """What another server would give back now."""
        return self.other.preview(keep_s=0).freed_count


@pytest_asyncio.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    made = Kept(tmp_path)
    await made.keeper.open()
    yield made
    await made.keeper.stop()
    made.other.close()
    made.loader.close()
    assert list((tmp_path / "store/servers").iterdir()) == []


async def test_nobody_removes_anything_before_it_begins(kept: Kept) -> None:
    assert kept.other.collect(keep_s=0, stop=lambda: False).obstacle
    kept.keeper.start()
    await eventually("it is said", lambda: not kept.other.preview(keep_s=0).obstacle)
    assert kept.would_come_back() == 0


async def test_what_is_used_is_said_when_it_changes(kept: Kept) -> None:
    kept.keeper.start()
    await eventually("it is said", lambda: not kept.other.preview(keep_s=0).obstacle)
    kept.used = []
    kept.keeper.note_change()
    await eventually("it is not used any more", kept.would_come_back)
    kept.used = [kept.model]
    kept.keeper.note_change()
    await eventually("it is used again", lambda: not kept.would_come_back())


async def test_figures_are_of_all_collections(kept: Kept) -> None:
    assert (await kept.keeper.collect()).model_count == 1
    kept.used = []
    assert (await kept.keeper.collect(validate_only=True, keep_s=0)).freed_count == 1
    assert kept.keeper.figures.freed_count == 0
    assert (await kept.keeper.collect()).freed_count == 0
    assert kept.keeper.figures.last.unused_count == 1
    done = await kept.keeper.collect(keep_s=0)
    assert done.freed_count == 1
    assert (await kept.keeper.collect(keep_s=0)).freed_count == 0
    figures = kept.keeper.figures
    assert (figures.freed_bytes, figures.freed_count) == (done.freed_bytes, 1)
    assert figures.last.model_count == 0


async def test_a_collection_goes_on_when_its_caller_has_gone(kept: Kept) -> None:
    kept.used = []
    with kept.loader._locks.writing(lambda: False):
        asked = asyncio.create_task(kept.keeper.collect(keep_s=0))
        # It waits for the import, and nothing else does.
        assert (await kept.keeper.collect(keep_s=0, validate_only=True)).freed_count == 1
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    await eventually("it is done", lambda: kept.keeper.figures.freed_count == 1)


async def test_the_end_waits_for_no_import(kept: Kept) -> None:
    kept.used = []
    with kept.loader._locks.writing(lambda: False):
        asked = asyncio.create_task(kept.keeper.collect(keep_s=0))
        assert (await kept.keeper.collect(keep_s=0, validate_only=True)).freed_count == 1
        await kept.keeper.stop()
        with pytest.raises(ModelFilesError, match="stopping"):
            await asked
    with pytest.raises(ModelFilesError, match="not open"):
        await kept.keeper.collect()


async def test_what_goes_wrong_ends_nothing(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_keeper, "_REST_S", 0)
    failures: list[Exception] = [
        ModelFilesError("the disk is broken"),
        RuntimeError("a defect"),
    ]
    real, loop = Collector.collect, asyncio.get_running_loop()

    def collect(self: Collector, *, keep_s: float, stop: StopCheck) -> Collected:
        if failures:
            loop.call_soon_threadsafe(kept.keeper.note_change)
            raise failures.pop(0)
        return real(self, keep_s=keep_s, stop=stop)

    monkeypatch.setattr(Collector, "collect", collect)
    kept.used = []
    kept.keeper.start()
    await eventually("it looked again", lambda: kept.keeper.figures.last.unused_count == 1)
    assert "the disk is broken" in caplog.text and "a defect" in caplog.text


async def test_an_obstacle_is_told_once(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    older = WeightStore.open(kept.other._layout.root)
    for _ in range(2):
        assert (await kept.keeper.collect(keep_s=0)).obstacle
    assert caplog.text.count("does not say") == 1
    older.close()
    assert not (await kept.keeper.collect(keep_s=0)).obstacle
