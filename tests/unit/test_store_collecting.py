"""Giving back what nobody uses of a weight store, by whatever and whoever uses it."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support.weight_folders import Tensor, damage_of, numbers, read_back, write_model

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError
from modelyard_server.weights.mapping import map_checkpoint
from modelyard_server.weights.model_files import ModelFolder
from modelyard_server.weights.store import Collected, Collector, WeightStore
from modelyard_server.weights.store.locks import try_lock

BODY = {"a": numbers(1, (5_000,)), "b": numbers(2, (30, 7))}
HEAD = {"head": numbers(3, (1_000,))}
TUNED = BODY | HEAD


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


class Store:
    """A store with a server that has registered something, and one that loads for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.loader = WeightStore.open(folder, leasing=True)
        self.server = Collector.open(folder, now_s=self.clock)
        self.server.publish([])

    def collect(self, keep_s: float = 0) -> Collected:
        return self.server.collect(keep_s=keep_s, stop=lambda: False)

    def close(self) -> None:
        assert damage_of(self.folder) == []
        assert list((self.folder / "tmp").iterdir()) == []
        self.server.close()
        assert list((self.folder / "servers").iterdir()) == []
        self.loader.close()

    @property
    def digests(self) -> set[str]:
        return {path.name for path in (self.folder / "models").iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store")
    yield made
    made.close()


@pytest.fixture
def body(tmp_path: Path) -> Path:
    return write_model(tmp_path / "body", BODY, config="{}")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tuned", TUNED, config="{}")


def change(folder: Path, *shards: dict[str, Tensor]) -> Path:
    """Writes other weights in a model's folder."""
    (folder / "model.safetensors").unlink()
    return write_model(folder, *shards)


# --- what is used ---------------------------------------------------------------------------------


def test_what_is_registered_stays_and_the_rest_comes_back(
    store: Store, body: Path, tuned: Path
) -> None:
    kept = store.loader.take(tuned)
    alone = store.loader.take(write_model(body.parent / "alone", {"x": numbers(9, (9_000,))}))
    before = store.loader.usage().stored_bytes
    store.server.publish([tuned])
    found = store.collect()
    assert store.digests == {kept.digest}
    assert found.freed_count == 1
    assert found.freed_bytes > alone.checkpoint.size_bytes
    # What the index and the memory of what is unused took is no model's.
    assert before - found.freed_bytes - 2_000 < found.stored_bytes < before - found.freed_bytes
    assert found.stored_bytes == store.loader.usage().stored_bytes
    assert (found.model_count, found.unused_count, found.unused_bytes) == (1, 0, 0)
    assert found.due_at_s is None
    assert read_back(store.loader.take(tuned)) == TUNED


def test_a_pack_that_one_tensor_is_used_of_stays(store: Store, body: Path, tuned: Path) -> None:
    whole = store.loader.take(body)
    store.loader.take(tuned)
    store.server.publish([tuned])
    found = store.collect()
    assert found.freed_count == 1
    assert found.freed_bytes < whole.checkpoint.size_bytes
    assert read_back(store.loader.take(tuned)) == TUNED


def test_the_version_before_a_change_of_the_files_comes_back(store: Store, body: Path) -> None:
    store.server.publish([body])
    first = store.loader.take(body)
    assert store.collect().freed_count == 0
    change(body, {"a": numbers(8, (5_000,))})
    # Nobody has looked at the files yet: this is what the next load would find, if they came back.
    assert store.collect().freed_count == 0
    second = store.loader.take(body)
    assert store.collect().freed_bytes > first.checkpoint.size_bytes
    assert store.digests == {second.digest}


def test_folders_below_a_root_count_by_their_way_from_it(store: Store, body: Path) -> None:
    folder = ModelFolder(root=body.parent, parts=(body.name,))
    store.loader.take(folder)
    store.server.publish([folder])
    assert store.collect().freed_count == 0
    store.server.publish([ModelFolder(root=body.parent, parts=("other",))])
    assert store.collect().freed_count == 1


def test_what_was_removed_too_early_is_taken_again(store: Store, body: Path) -> None:
    first = store.loader.take(body)
    assert store.collect().freed_count == 1
    assert read_back(store.loader.take(body)) == BODY
    assert store.digests == {first.digest}


def test_what_is_mapped_stays_mapped(store: Store, body: Path) -> None:
    with store.loader.leased(body) as stored:
        mapped = map_checkpoint(stored.packs, stored.checkpoint, stop=lambda: False)
    assert store.collect().freed_count == 1
    assert store.digests == set()
    data = {name: bytes(tensor.numpy().tobytes()) for name, tensor in mapped.tensors.items()}
    assert data == {name: tensor.data for name, tensor in BODY.items()}


# --- for a while ----------------------------------------------------------------------------------


def test_what_was_used_is_kept_for_a_while(store: Store, body: Path) -> None:
    store.loader.take(body)
    store.server.publish([body])
    assert store.collect(keep_s=100).unused_count == 0
    store.server.publish([])
    store.clock.now_s += 1_000
    # It is seen only now that nobody uses it.
    found = store.collect(keep_s=100)
    assert (found.freed_count, found.unused_count) == (0, 1)
    assert found.unused_bytes > sum(len(tensor.data) for tensor in BODY.values())
    assert found.due_at_s == store.clock.now_s + 100
    store.clock.now_s += 99
    assert store.collect(keep_s=100).freed_count == 0
    store.clock.now_s += 1
    assert store.collect(keep_s=100).freed_bytes == found.unused_bytes


def test_an_update_that_is_taken_back_finds_its_model(store: Store, body: Path) -> None:
    store.server.publish([body])
    first = store.loader.take(body)
    change(body, {"a": numbers(8, (5_000,))})
    store.loader.take(body)
    assert store.collect(keep_s=100).unused_count == 1
    store.clock.now_s += 99
    change(body, BODY)
    assert store.loader.take(body) == first
    # And begins anew, should it be taken back once more.
    assert store.collect(keep_s=100).unused_count == 1
    assert first.digest in store.digests
    store.clock.now_s += 100
    assert store.collect(keep_s=100).freed_count == 1
    assert store.digests == {first.digest}


def test_the_end_of_a_server_does_not_begin_the_while_anew(store: Store, body: Path) -> None:
    store.loader.take(body)
    store.collect(keep_s=100)
    store.server.close()
    store.clock.now_s += 100
    store.server = Collector.open(store.folder, now_s=store.clock)
    store.server.publish([])
    assert store.collect(keep_s=100).freed_count == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"x": "y"}', b'{"x": null}'])
def test_a_memory_that_cannot_be_read_begins_anew(store: Store, body: Path, content: bytes) -> None:
    store.loader.take(body)
    (store.folder / "unused.json").write_bytes(content)
    assert store.collect(keep_s=100).due_at_s == store.clock.now_s + 100


def test_a_clock_that_was_set_back_keeps_nothing_for_longer(store: Store, body: Path) -> None:
    store.loader.take(body)
    store.collect(keep_s=100)
    store.clock.now_s -= 1e6
    store.collect(keep_s=100)
    store.clock.now_s += 100
    assert store.collect(keep_s=100).freed_count == 1


def test_a_full_disk_gives_back_what_is_due(
    store: Store, body: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.loader.take(body)
    store.loader.take(tuned)
    store.server.publish([body])
    store.collect(keep_s=100)
    store.clock.now_s += 100
    real = os.pwrite

    def full(descriptor: int, content: bytes, begin: int) -> int:
        if begin + len(content) > os.fstat(descriptor).st_size:
            raise OSError(errno.ENOSPC, "no space")
        return real(descriptor, content, begin)

    def nothing(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        patch.setattr(Path, "write_text", nothing)
        with pytest.raises(ModelFilesError, match="space"):
            store.server.publish([body, tuned])
        # What it said before still counts; and less than that can be said.
        assert store.collect(keep_s=100).freed_count == 1
        store.server.publish([])
        assert store.collect(keep_s=100).unused_count == 1
        assert store.collect(keep_s=0).freed_count == 1
    store.server.publish([body, tuned])
    assert store.collect().obstacle == ""


@pytest.mark.parametrize("since", ["NaN", "Infinity", "1e999", "1" + 400 * "0"])
def test_a_time_that_is_none_begins_anew(store: Store, body: Path, since: str) -> None:
    stored = store.loader.take(body)
    (store.folder / "unused.json").write_text(f'{{"{stored.digest}": {since}}}')
    store.collect(keep_s=100)
    store.clock.now_s += 100
    assert store.collect(keep_s=100).freed_count == 1


# --- said before ----------------------------------------------------------------------------------


def test_a_preview_says_what_would_come_back_and_removes_nothing(
    store: Store, body: Path, tuned: Path
) -> None:
    store.loader.take(body)
    store.loader.take(tuned)
    store.loader.take(write_model(body.parent / "alone", {"x": numbers(9, (9_000,))}))
    store.server.publish([body])
    said = store.server.preview(keep_s=0)
    assert len(store.digests) == 3
    assert said.unused_count == said.freed_count == 2
    assert not (store.folder / "unused.json").exists()
    done = store.collect()
    assert (done.freed_bytes, done.freed_count) == (said.freed_bytes, said.freed_count)


def test_a_preview_waits_for_no_import(store: Store, body: Path) -> None:
    store.loader.take(body)
    with store.loader._locks.writing(lambda: False):
        assert store.server.preview(keep_s=0).freed_count == 1
    assert store.server.preview(keep_s=1).freed_count == 0


# --- several who use it ---------------------------------------------------------------------------


def test_what_another_server_has_registered_stays(store: Store, body: Path, tuned: Path) -> None:
    other = Collector.open(store.folder, now_s=store.clock)
    mine, theirs = store.loader.take(body), store.loader.take(tuned)
    # Until it has said what it uses, it may be anything.
    found = store.collect()
    assert (found.freed_count, store.digests) == (0, {mine.digest, theirs.digest})
    assert "not said" in found.obstacle
    assert store.server.preview(keep_s=0).obstacle == found.obstacle
    other.publish([tuned])
    assert store.collect().obstacle == ""
    assert store.digests == {theirs.digest}
    # Either collects what neither uses.
    other.publish([])
    assert other.collect(keep_s=0, stop=lambda: False).freed_count == 1
    other.close()


@pytest.mark.parametrize("content", ["", "[", '["x"', "{]", "1", "[[]]"])
def test_what_a_server_has_said_in_part_is_not_believed(
    store: Store, body: Path, content: str
) -> None:
    store.loader.take(body)
    other = Collector.open(store.folder, now_s=store.clock)
    os.pwrite(other._own, content.encode(), 0)
    assert store.collect().obstacle
    assert len(store.digests) == 1
    other.close()
    assert store.collect().freed_count == 1


def test_a_server_that_died_uses_nothing(store: Store, body: Path) -> None:
    store.loader.take(body)
    child = os.fork()
    if child == 0:
        Collector.open(store.folder).publish([body])
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list((store.folder / "servers").iterdir())) == 2
    assert store.collect().freed_count == 1
    assert len(list((store.folder / "servers").iterdir())) == 1


def test_who_does_not_say_what_he_uses_keeps_all_of_it(store: Store, body: Path) -> None:
    older = WeightStore.open(store.folder)
    older.take(body)
    found = store.collect()
    assert "does not say" in found.obstacle
    assert len(store.digests) == 1
    older.close()
    assert store.collect().freed_count == 1


def test_who_keeps_what_he_names_removes_nothing_beside_a_server(store: Store, body: Path) -> None:
    alone = WeightStore.open(store.folder)
    alone.take(body)
    assert alone.collect([]) == 0
    store.server.close()
    assert alone.collect([]) > 0
    alone.close()
    store.server = Collector.open(store.folder, now_s=store.clock)


def test_a_server_that_begins_is_not_taken_for_dead(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another one looks at its file before it has locked it.
    real = try_lock
    looks: list[Any] = []

    def late(descriptor: int, operation: int) -> bool:
        if not looks:
            looks.append(None)
            store.collect()
        return real(descriptor, operation)

    monkeypatch.setattr("modelyard_server.weights.store.collecting.try_lock", late)
    other = Collector.open(store.folder, now_s=store.clock)
    assert looks
    assert other._path.exists()
    assert "not said" in store.collect().obstacle
    other.close()


# --- loads and imports beside it ------------------------------------------------------------------


def test_what_is_being_read_stays(store: Store, body: Path, tuned: Path) -> None:
    store.loader.take(body)
    reader = WeightStore.open(store.folder, leasing=True)
    with reader.leased(tuned) as stored, reader.leased(tuned) as again:
        assert stored == again
        assert store.collect().freed_count == 1
        assert store.digests == {stored.digest}
        assert read_back(stored) == TUNED
    assert store.collect().freed_count == 1
    reader.close()


def test_a_reader_that_dies_reads_nothing(store: Store, body: Path) -> None:
    store.loader.take(body)
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        with WeightStore.open(store.folder, leasing=True).leased(body):
            os.write(go, b"x")
            threading.Event().wait()
    os.read(ready, 1)
    assert store.collect().freed_count == 0
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert store.collect().freed_count == 1
    os.close(ready)
    os.close(go)


def test_what_is_removed_before_it_is_held_is_taken_again(
    store: Store, body: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.loader._locks.reading
    removed: list[Collected] = []

    def late(*arguments: Any) -> Any:
        if not removed:
            removed.append(store.collect())
        return real(*arguments)

    monkeypatch.setattr(store.loader._locks, "reading", late)
    with store.loader.leased(body) as stored:
        assert removed[0].freed_count == 1
        assert read_back(stored) == BODY
        assert store.collect().freed_count == 0


def test_loads_and_imports_beside_collections_lose_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that load, and so import, beside others that remove all that is not held."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folders = [
        write_model(tmp_path / str(n), BODY | {"head": numbers(20 + n)}, config="{}")
        for n in range(3)
    ]
    rounds, done = 6, threading.Event()
    collected: list[Collected] = []
    another, wanted = threading.Condition(), threading.Semaphore(0)

    def collect() -> None:
        server = Collector.open(store.folder, now_s=store.clock)
        server.publish([])
        while wanted.acquire() and not done.is_set():
            found = server.collect(keep_s=0, stop=lambda: False)
            with another:
                collected.append(found)
                another.notify_all()
        server.close()

    def load(number: int) -> int:
        own = WeightStore.open(store.folder, leasing=True)
        for turn in range(rounds):
            folder = folders[(number + turn) % len(folders)]
            with own.leased(folder) as stored:
                # Of three one has begun since: there are two who collect.
                with another:
                    seen = len(collected)
                    wanted.release(3)
                    assert another.wait_for(lambda: len(collected) >= seen + 3, 60)  # noqa: B023
                assert read_back(stored).keys() == {"a", "b", "head"}
                mapped = map_checkpoint(stored.packs, stored.checkpoint, stop=lambda: False)
                assert mapped.tensors["a"].numpy().tobytes() == BODY["a"].data
        own.close()
        return rounds

    with ThreadPoolExecutor(5) as pool:
        collectors = [pool.submit(collect) for _ in range(2)]
        loaders = [pool.submit(load, number) for number in range(3)]
        try:
            assert [loader.result() for loader in loaders] == [rounds] * 3
        finally:
            done.set()
            wanted.release(2)
        for each in collectors:
            each.result()
    store.collect()
    assert sum(found.freed_count for found in collected) > 0
    assert store.digests == set()
    assert list((store.folder / "packs").iterdir()) == []


def test_a_collection_waits_for_an_import_until_it_is_stopped(store: Store, body: Path) -> None:
    store.loader.take(body)
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 1

    with store.loader._locks.writing(lambda: False), pytest.raises(LoadCancelled):
        store.server.collect(keep_s=0, stop=stop)
    assert store.collect().freed_count == 1


def test_a_collection_that_is_stopped_leaves_what_the_next_one_finds(
    store: Store, body: Path, tmp_path: Path
) -> None:
    store.loader.take(body)
    store.loader.take(write_model(tmp_path / "alone", {"x": numbers(9, (9_000,))}))
    with pytest.raises(LoadCancelled):
        store.server.collect(keep_s=0, stop=lambda: len(store.digests) == 1)
    assert len(store.digests) == 1
    assert store.collect().freed_count == 1
    assert list((store.folder / "packs").iterdir()) == []


# --- damage ---------------------------------------------------------------------------------------


def test_packs_that_an_import_left_when_it_died_come_back(store: Store, body: Path) -> None:
    store.loader.take(body)
    store.server.publish([body])
    store.collect()
    (store.folder / "packs" / ("0" * 64 + ".safetensors")).write_bytes(b"x" * 100)
    server = Collector.open(store.folder, now_s=store.clock)
    server.publish([body])
    assert server.collect(keep_s=100, stop=lambda: False).freed_bytes == 100
    server.close()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"packs": 1}'])
def test_a_model_that_cannot_be_read_goes_though_it_is_used(
    store: Store, body: Path, tuned: Path, content: bytes | None
) -> None:
    stored = store.loader.take(body)
    store.loader.take(tuned)
    store.server.publish([body])
    manifest = store.folder / "models" / stored.digest / "weights.json"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    store.collect()
    assert store.digests == set()
    # It would have been imported again anyway.
    assert read_back(store.loader.take(body)) == BODY


def test_what_is_no_model_is_left_alone(store: Store, body: Path) -> None:
    store.loader.take(body)
    (store.folder / "models" / "note.txt").write_text("x")
    assert store.collect().freed_count == 1
    (store.folder / "models" / "note.txt").unlink()


def test_unused_models_are_remembered_by_name_and_time(store: Store, body: Path) -> None:
    stored = store.loader.take(body)
    store.collect(keep_s=100)
    content = json.loads((store.folder / "unused.json").read_bytes())
    assert content == {stored.digest: store.clock.now_s}
