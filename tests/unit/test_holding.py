"""The pool of tensors that models hold together."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from tests.support.stored_models import (
    identity_of,
    model_over,
    resident_pages,
    stored_model,
    write_pack,
)

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError
from modelyard_server.weights.holding import Holding, ReadMode, WeightPool
from modelyard_server.weights.reading.api import FilePart, Reader, Reading
from modelyard_server.weights.stored import StoredModel

PAGE = 4096
GENEROUS_S = 60.0
HOST_MODES = tuple(ReadMode)


def take(
    pool: WeightPool,
    stored: StoredModel,
    mode: ReadMode | None = None,
    *,
    position: int = 0,
    stop: Callable[[], bool] = lambda: False,
    **more: Any,
) -> Holding:
    return pool.take(stored, position=position, torch_device="cpu", mode=mode, stop=stop, **more)


def pages(count: int, value: float) -> torch.Tensor:
    """So many pages of a number."""
    return torch.full((count * PAGE // 4,), value)


def relatives(folder: Path) -> tuple[StoredModel, StoredModel]:
    """Two models with one body and a head each."""
    body = write_pack(folder, "body", {"body.1": pages(4, 1.0), "body.2": pages(4, 2.0)})
    heads = [write_pack(folder, f"head{i}", {"head": pages(2, 10.0 + i)}) for i in range(2)]
    first, second = (model_over(folder, body, head) for head in heads)
    return first, second


class RecordingReader:
    """A pool's reader that says which names it is asked for, and can be held up at that."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.asked: list[set[str]] = []
        self.before: Callable[[set[str]], None] = lambda names: None

    def read(self, packs: Any, parts: Sequence[FilePart], **more: Any) -> Reading:
        names = {tensor.name for part in parts for tensor in part.tensors}
        self.asked.append(names)
        self.before(names)
        return self._reader.read(packs, parts, **more)


def recording(pool: WeightPool, mode: ReadMode) -> RecordingReader:
    reader = RecordingReader(pool._readers[mode])
    pool._readers = {**pool._readers, mode: reader}
    return reader


@contextmanager
def no_collector() -> Iterator[None]:
    """What comes back in here comes back by reference counts."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", HOST_MODES)
def test_a_tensor_is_in_memory_once_and_an_object_for_each_holding(
    tmp_path: Path, mode: ReadMode
) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    reader = recording(pool, mode)
    one, other = take(pool, first, mode), take(pool, second, mode)
    assert reader.asked == [{"body.1", "body.2", "head"}, {"head"}]
    for name in ("body.1", "body.2"):
        assert one.tensors[name].data_ptr() == other.tensors[name].data_ptr()
        assert one.tensors[name] is not other.tensors[name]
    assert one.tensors["head"][0] == 10.0
    assert other.tensors["head"][0] == 11.0
    body = [identity_of(pages(4, 1.0)), identity_of(pages(4, 2.0))]
    assert one.shared == {
        **dict.fromkeys(body, 4 * PAGE), identity_of(pages(2, 10.0)): 2 * PAGE
    }  # fmt: skip
    assert pool.bytes(0) == 12 * PAGE
    assert pool.bytes(1) == 0
    assert [pool.holders(0, identity) for identity in [*body, "other"]] == [2, 2, 0]


@pytest.mark.parametrize("mode", HOST_MODES)
def test_memory_is_back_when_the_last_holder_has_left(tmp_path: Path, mode: ReadMode) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    with no_collector():
        one, other = take(pool, first, mode), take(pool, second, mode)
        address = one.tensors["body.1"].data_ptr()
        witness, stays = ref(one.tensors["body.1"]), ref(other.tensors["body.1"])
        one.release()
        assert witness() is None
        assert stays() is not None
        assert (one.tensors, one.extents, one.shared) == ({}, {}, {})
        assert pool.bytes(0) == 10 * PAGE
        one.release()
        assert pool.bytes(0) == 10 * PAGE
        assert pool.holders(0, identity_of(pages(4, 1.0))) == 1
        assert (other.tensors["body.1"] == 1.0).all()
        other.release()
        assert pool.bytes(0) == 0
        assert pool.holders(0, identity_of(pages(4, 1.0))) == 0
        if mode is not ReadMode.SLAB:  # On the host that is malloc's.
            assert resident_pages(address, 4) == 0


@pytest.mark.parametrize("mode", HOST_MODES)
def test_a_holding_that_is_dropped_releases_itself(tmp_path: Path, mode: ReadMode) -> None:
    first, _ = relatives(tmp_path)
    pool = WeightPool()
    with no_collector():
        tensors = dict(take(pool, first, mode).tensors)
        assert pool.bytes(0) == 0
        assert (tensors["body.2"] == 2.0).all()


def test_a_holding_that_is_dropped_while_its_shelf_is_locked_goes_when_that_is_over(
    tmp_path: Path,
) -> None:
    first, _ = relatives(tmp_path)
    pool = WeightPool()
    holding = take(pool, first)
    (shelf,) = pool._shelves_at(0)
    with shelf._locked():
        del holding
        gc.collect()
        assert shelf.size_bytes == 10 * PAGE
    assert pool.bytes(0) == 0


def test_positions_have_tensors_of_their_own(tmp_path: Path) -> None:
    first, _ = relatives(tmp_path)
    pool = WeightPool()
    one = take(pool, first, ReadMode.OWNED)
    other = take(pool, first, ReadMode.OWNED, position=1)
    assert one.tensors["head"].data_ptr() != other.tensors["head"].data_ptr()
    assert (pool.bytes(0), pool.bytes(1)) == (10 * PAGE, 10 * PAGE)


def test_what_is_there_is_joined_however_it_was_read(tmp_path: Path) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    one, other = take(pool, first, ReadMode.OWNED), take(pool, second, ReadMode.MAP)
    assert one.tensors["body.1"].data_ptr() == other.tensors["body.1"].data_ptr()
    assert other.extents.keys() == {"head"}


@pytest.mark.parametrize("mode", HOST_MODES)
def test_tensors_without_identity_are_nobody_elses(tmp_path: Path, mode: ReadMode) -> None:
    stored = stored_model(tmp_path, {"a": pages(4, 1.0)}, identified=False)
    pool = WeightPool()
    one, other = take(pool, stored, mode), take(pool, stored, mode)
    one.tensors["a"].zero_()
    assert (other.tensors["a"] == 1.0).all()
    assert pool.bytes(0) == 0
    assert one.shared == {}
    address = one.tensors["a"].data_ptr()
    one.release()
    if mode is not ReadMode.SLAB:
        assert resident_pages(address, 4) == 0


def test_a_model_may_have_one_tensor_by_two_names(tmp_path: Path) -> None:
    header = write_pack(tmp_path, "p", {"a": pages(1, 1.0)})
    twin = replace(header, tensors=(*header.tensors, replace(header.tensors[0], name="b")))
    pool = WeightPool()
    holding = take(pool, model_over(tmp_path, twin))
    assert holding.tensors["a"].data_ptr() == holding.tensors["b"].data_ptr()
    assert pool.bytes(0) == PAGE
    holding.release()
    assert pool.bytes(0) == 0


def test_only_what_is_named_is_taken(tmp_path: Path) -> None:
    first, _ = relatives(tmp_path)
    pool = WeightPool()
    assert take(pool, first, names=["head"]).tensors.keys() == {"head"}
    assert take(pool, first, names=[]).tensors == {}
    with pytest.raises(ModelFilesError, match=r"the model has no tensor 'body\.3'"):
        take(pool, first, names=["head", "body.3"])
    assert pool.bytes(0) == 0


def test_a_mode_that_does_not_fit_the_device_is_refused(tmp_path: Path) -> None:
    first, _ = relatives(tmp_path)
    for mode in (ReadMode.MAP, ReadMode.OWNED, ReadMode.ARENA):
        with pytest.raises(ValueError, match="meta is not filled in the mode"):
            WeightPool().take(first, position=0, torch_device="meta", mode=mode, stop=lambda: False)


def test_a_failed_take_lets_go_of_what_it_had_joined_and_read(tmp_path: Path) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    held = take(pool, first)
    reader = recording(pool, ReadMode.MAP)

    def fail(names: set[str]) -> None:
        raise ModelFilesError("a disk that fails", transient=True)

    reader.before = fail
    with pytest.raises(ModelFilesError, match="a disk that fails"):
        take(pool, second)
    assert pool.bytes(0) == 10 * PAGE
    assert pool.holders(0, identity_of(pages(4, 1.0))) == 1
    reader.before = lambda names: None
    assert (take(pool, second).tensors["head"] == 11.0).all()
    held.release()


@pytest.mark.parametrize("mode", HOST_MODES)
def test_a_kept_error_keeps_no_memory(tmp_path: Path, mode: ReadMode) -> None:
    stored = stored_model(tmp_path, {"a": pages(64, 1.0), "b": pages(64, 2.0)})
    pool = WeightPool()
    with no_collector():
        held = take(pool, stored, mode, names=["a"])
        address = held.tensors["a"].data_ptr()
        with pytest.raises(LoadCancelled) as caught:
            take(pool, stored, mode, stop=lambda: True)
        held.release()
        if mode is not ReadMode.SLAB:
            assert resident_pages(address, 64) == 0
        assert caught.value.__traceback__ is not None


# Several at once


class HeldUp:
    """A reader's `before`: the first reading waits for `go_on`, and may fail then."""

    def __init__(self, reader: RecordingReader) -> None:
        self.reads, self.go_on = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._first = True
        reader.before = self

    def __call__(self, names: set[str]) -> None:
        if self._first:
            self._first = False
            self.reads.set()
            assert self.go_on.wait(GENEROUS_S)
            if self.error is not None:
                raise self.error


class Asked:
    """A stop check that tells when it has been asked, and says what it is told to."""

    def __init__(self) -> None:
        self.was_asked = threading.Event()
        self.answer = False

    def __call__(self) -> bool:
        self.was_asked.set()
        return self.answer


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("mode", HOST_MODES)
def test_who_comes_while_a_tensor_is_read_waits_for_it(
    tmp_path: Path, mode: ReadMode, threads: ThreadPoolExecutor
) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    reader = recording(pool, mode)
    held_up, waits = HeldUp(reader), Asked()
    one = threads.submit(take, pool, first, mode)
    assert held_up.reads.wait(GENEROUS_S)
    other = threads.submit(take, pool, second, mode, stop=waits)
    # It has read its head, which is nobody else's, before it waits for the body.
    assert waits.was_asked.wait(GENEROUS_S)
    assert not other.done()
    held_up.go_on.set()
    holdings = one.result(GENEROUS_S), other.result(GENEROUS_S)
    assert reader.asked == [{"body.1", "body.2", "head"}, {"head"}]
    assert len({holding.tensors["body.1"].data_ptr() for holding in holdings}) == 1
    assert pool.bytes(0) == 12 * PAGE
    assert pool.holders(0, identity_of(pages(4, 1.0))) == 2


@pytest.mark.parametrize("error", [LoadCancelled(), ModelFilesError("damaged"), MemoryError()])
def test_who_waits_takes_over_from_one_that_failed(
    tmp_path: Path, error: Exception, threads: ThreadPoolExecutor
) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    reader = recording(pool, ReadMode.OWNED)
    held_up, waits = HeldUp(reader), Asked()
    held_up.error = error
    one = threads.submit(take, pool, first, ReadMode.OWNED)
    assert held_up.reads.wait(GENEROUS_S)
    other = threads.submit(take, pool, second, ReadMode.OWNED, stop=waits)
    assert waits.was_asked.wait(GENEROUS_S)
    held_up.go_on.set()
    assert type(one.exception(GENEROUS_S)) is type(error)
    holding = other.result(GENEROUS_S)
    assert reader.asked[1:] == [{"head"}, {"body.1", "body.2"}]
    assert (holding.tensors["body.2"] == 2.0).all()
    assert pool.bytes(0) == 10 * PAGE
    assert pool.holders(0, identity_of(pages(2, 10.0))) == 0
    holding.release()
    assert pool.bytes(0) == 0


def test_who_waits_can_be_stopped_and_holds_nothing_then(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    held_up, waits = HeldUp(recording(pool, ReadMode.OWNED)), Asked()
    one = threads.submit(take, pool, first, ReadMode.OWNED)
    assert held_up.reads.wait(GENEROUS_S)
    waits.answer = False
    names = ["body.1", "body.2"]
    other = threads.submit(take, pool, second, ReadMode.OWNED, names=names, stop=waits)
    assert waits.was_asked.wait(GENEROUS_S)
    waits.answer = True
    assert isinstance(other.exception(GENEROUS_S), LoadCancelled)
    held_up.go_on.set()
    one.result(GENEROUS_S).release()
    assert pool.bytes(0) == 0


def test_takes_that_want_each_others_tensors_both_end(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    headers = {
        name: write_pack(tmp_path, name, {name: pages(1, float(ord(name)))}) for name in "abc"
    }
    one_has = model_over(tmp_path, headers["a"], headers["b"])
    other_has = model_over(tmp_path, headers["b"], headers["c"], headers["a"])
    pool = WeightPool()
    reader = recording(pool, ReadMode.OWNED)
    # One claims "a" and is held up; the other claims "b" and "c", then one wants "b" and "c" too.
    held_up = HeldUp(reader)
    waits = Asked()
    a = threads.submit(take, pool, one_has, ReadMode.OWNED, names=["a"])
    assert held_up.reads.wait(GENEROUS_S)
    b = threads.submit(take, pool, other_has, ReadMode.OWNED, stop=waits)
    assert waits.was_asked.wait(GENEROUS_S)
    c = take(pool, one_has, ReadMode.OWNED, names=["b"])
    assert (c.tensors["b"] == float(ord("b"))).all()
    held_up.go_on.set()
    for future in (a, b):
        future.result(GENEROUS_S).release()
    c.release()
    assert pool.bytes(0) == 0


@pytest.mark.parametrize("seed", range(3))
def test_many_at_once_hold_the_right_bytes_and_leave_none(tmp_path: Path, seed: int) -> None:
    headers = [
        write_pack(
            tmp_path, str(i), {str(j): pages(1, 8.0 * i + j) for j in range(8 * i, 8 * i + 8)}
        )
        for i in range(3)
    ]
    models = [model_over(tmp_path, *headers[:2]), model_over(tmp_path, *headers[1:])]
    models += [model_over(tmp_path, headers[0], headers[2]), model_over(tmp_path, headers[1])]
    pool = WeightPool(arena_bytes=64 * PAGE, staging_bytes=16 * PAGE)
    together = threading.Barrier(4)

    def work(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        chance = 0.0

        def stop() -> bool:
            return rng.random() < chance

        together.wait(GENEROUS_S)
        for _ in range(60):
            stored = rng.choice(models)
            names = sorted(stored.checkpoint.tensors)
            chosen = rng.sample(names, rng.randint(1, len(names)))
            chance = rng.choice([0.0, 0.02])
            position = rng.randrange(2)
            try:
                holding = take(
                    pool,
                    stored,
                    rng.choice(HOST_MODES),
                    position=position,
                    names=chosen,
                    stop=stop,
                )
            except LoadCancelled:
                continue
            for name in chosen:
                assert (holding.tensors[name] == 8.0 * (int(name) // 8) + int(name)).all()
            assert 0 < sum(holding.shared.values()) <= pool.bytes(position)
            if rng.random() < 0.5:
                holding.release()
            del holding

    with ThreadPoolExecutor(4) as workers:
        for future in [workers.submit(work, number) for number in range(4)]:
            future.result(GENEROUS_S)
    gc.collect()
    assert (pool.bytes(0), pool.bytes(1)) == (0, 0)
    for position in range(2):
        assert all(not shelf._entries for shelf in pool._shelves_at(position))
    assert pool.idle_bytes(0) + pool.idle_bytes(1) <= 64 * PAGE
    pool.trim()
    assert pool.idle_bytes(0) + pool.idle_bytes(1) == 0


def test_an_allocation_lives_for_as_long_as_anybody_has_a_tensor_of_it(tmp_path: Path) -> None:
    pool = WeightPool()
    one, two = relatives(tmp_path)
    first = take(pool, one, mode=ReadMode.SLAB)
    second = take(pool, two, mode=ReadMode.SLAB)
    (of_first,), (of_second,) = first.allocations, second.allocations
    first.release()
    assert of_first() is not None  # The other one has tensors in it: it cannot go back.
    second.release()
    assert of_first() is None
    assert of_second() is None


def test_a_mapped_tensor_is_in_no_allocation(tmp_path: Path) -> None:
    one, _ = relatives(tmp_path)
    holding = take(WeightPool(), one, mode=ReadMode.MAP)
    assert holding.allocations == ()
    holding.release()
