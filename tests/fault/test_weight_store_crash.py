"""Imports that are killed before every call to the system that they make.

A kill loses nothing that was written, so the order in which an import writes down to the disk is
checked apart: by what it synchronises before it gives a name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.store_killer import Order, killer
from tests.support.weight_folders import damage_of, numbers, read_back, write_model

from modelyard_server.weights.store import Collector, WeightStore

BODY = {"a": numbers(1, (300_000,)), "b": numbers(2, (100, 7)), "c": numbers(3, (5,), "U8")}
TUNED = BODY | {"head": numbers(4, (33, 3))}
MOST_CALLS = 1_000


def models(tmp_path: Path) -> tuple[Path, Path]:
    return (
        write_model(tmp_path / "body", BODY, config="{}", tokenizer="{}"),
        write_model(tmp_path / "tuned", TUNED, config="{}"),
    )


@pytest.fixture
def without_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process's own look at a store quick; the one that is killed is another."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def everything_works(store: Path, body: Path, tuned: Path) -> None:
    opened = WeightStore.open(store)
    assert list((store / "tmp").iterdir()) == []
    taken = []
    for folder, tensors in ((tuned, TUNED), (body, BODY)):
        stored = opened.take(folder)
        assert read_back(stored) == tensors
        assert opened.verify(stored) == ()
        taken.append(stored.digest)
    assert opened.usage().model_count == 2
    # What no model needs may be damaged. It is nobody's loss, and goes with the next collection.
    opened.collect(taken)
    assert damage_of(store) == []
    opened.close()


@pytest.mark.usefixtures("without_the_disk")
def test_a_kill_at_any_moment_leaves_a_store_that_works(tmp_path: Path) -> None:
    body, tuned = models(tmp_path)
    store = tmp_path / "store"
    kills = 0
    with killer() as process:
        for kill_at in range(1, MOST_CALLS):
            shutil.rmtree(store, ignore_errors=True)
            order = Order(
                store=str(store), take=[str(body), str(tuned)], kill_at=kill_at, collect=True
            )
            if not process.run(order):
                break
            kills += 1
            assert damage_of(store) == [], kill_at
            everything_works(store, body, tuned)
    # Both imports, and the removal of one of them.
    assert 60 < kills < MOST_CALLS - 1


@pytest.mark.usefixtures("without_the_disk")
def test_a_kill_while_a_damaged_model_is_replaced_leaves_a_store_that_works(
    tmp_path: Path,
) -> None:
    body, tuned = models(tmp_path)
    store = tmp_path / "store"
    kills = 0
    with killer() as process:
        for kill_at in range(1, MOST_CALLS):
            shutil.rmtree(store, ignore_errors=True)
            opened = WeightStore.open(store)
            opened.take(tuned)
            opened.close()
            for path in [*store.glob("packs/*"), *store.glob("models/*/weights.json")]:
                path.chmod(0o600)
                os.truncate(path, 100)
            if not process.run(Order(store=str(store), take=[str(tuned)], kill_at=kill_at)):
                break
            kills += 1
            everything_works(store, body, tuned)
    assert 20 < kills < MOST_CALLS - 1


@pytest.mark.usefixtures("without_the_disk")
def test_a_kill_at_any_moment_of_a_collection_leaves_what_is_used(tmp_path: Path) -> None:
    body, tuned = models(tmp_path)
    store = tmp_path / "store"
    kills, removed = 0, 0
    with killer() as process:
        for kill_at in range(1, MOST_CALLS):
            shutil.rmtree(store, ignore_errors=True)
            opened = WeightStore.open(store, leasing=True)
            opened.take(body)
            used = opened.take(tuned)
            opened.take(write_model(tmp_path / "alone", {"x": numbers(9, (9_000,))}))
            order = Order(store=str(store), take=[str(tuned)], kill_at=kill_at, give_back=True)
            if not process.run(order):
                break
            kills += 1
            assert damage_of(store) == [], kill_at
            left = len(list((store / "models").iterdir()))
            removed += left == 2
            assert opened.take(tuned) == used
            assert read_back(used) == TUNED
            # The next one ends what this one began.
            server = Collector.open(store)
            server.publish([tuned])
            assert server.collect(keep_s=0, stop=lambda: False).freed_count == left - 1
            assert [path.name for path in (store / "models").iterdir()] == [used.digest]
            assert len(list((store / "packs").iterdir())) == len(used.checkpoint.files)
            assert [path.name for path in (store / "servers").iterdir()] == [server._path.name]
            server.close()
            everything_works(store, body, tuned)
    # Some of them between the removals of two models.
    assert removed > 0
    assert 20 < kills < MOST_CALLS - 1


@pytest.mark.usefixtures("without_the_disk")
@pytest.mark.parametrize("fault", ["copied_packs", "late_packs", "moved_files"])
def test_the_inspection_notices_a_broken_order(tmp_path: Path, fault: str) -> None:
    body, tuned = models(tmp_path)
    store = tmp_path / "store"
    noticed = 0
    with killer() as process:
        for kill_at in range(1, MOST_CALLS):
            shutil.rmtree(store, ignore_errors=True)
            order = Order(
                store=str(store), take=[str(body), str(tuned)], kill_at=kill_at, fault=fault
            )
            if not process.run(order):
                break
            if damage_of(store):
                noticed += 1
                # Not that it matters to the store: it reads what it finds.
                everything_works(store, body, tuned)
            if noticed == 2:
                return
    pytest.fail(f"noticed {noticed} times")


# --- down to the disk ---------------------------------------------------------------------------


class Journal:
    """What was synchronised before it got a name that the store trusts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: set[int] = set()
        self.unsynced_folders: set[Path] = set()
        self.named = 0
        self.mistakes: list[str] = []
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name)))
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)

    def _sync(self, descriptor: int) -> None:
        self.synced.add(os.fstat(descriptor).st_ino)
        self.unsynced_folders.discard(Path(f"/proc/self/fd/{descriptor}").readlink())
        self._fsync(descriptor)

    def _naming(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            folder = Path(target).parent
            if folder.name in ("packs", "models"):
                # The folder of the packs has to be down before a model says that they are there.
                if self.unsynced_folders - {folder}:
                    self.mistakes.append(f"{folder.name} before {self.unsynced_folders}")
                for path in (Path(source), *Path(source).rglob("*")):
                    if path.stat().st_ino not in self.synced:
                        self.mistakes.append(f"{path.name} gets its name before it is down")
                self.unsynced_folders.add(folder)
                self.named += 1
            real(source, target)

        return call


def test_what_gets_a_name_is_on_the_disk_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = WeightStore.open(tmp_path / "store")
    body, tuned = models(tmp_path)
    journal = Journal(monkeypatch)
    store.take(body)
    store.take(tuned)
    assert journal.named == 4
    assert journal.mistakes == []
    assert journal.unsynced_folders == set()
    store.close()


@pytest.mark.parametrize("forgotten", ["sync", "write_new_file", "write_pack"])
def test_the_journal_notices_a_sync_that_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    store = WeightStore.open(tmp_path / "store")
    body, _ = models(tmp_path)
    journal = Journal(monkeypatch)
    real = os.fsync

    def without(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", lambda _: None)
                return function(*arguments, **named)

        return call

    place = "modelyard_server.weights.store.imports." + forgotten
    module = __import__("modelyard_server.weights.store.imports", fromlist=[forgotten])
    monkeypatch.setattr(place, without(getattr(module, forgotten)))
    store.take(body)
    assert os.fsync is real
    assert journal.mistakes or journal.unsynced_folders
    store.close()
