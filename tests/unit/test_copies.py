"""Copies of weights in host memory: what they hold, what comes from them, what comes back."""

from __future__ import annotations

import gc
import mmap
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
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

from modelyard_server.runtimes.api import (
    KeptWeights,
    LoadCancelled,
    LoadSource,
    ModelFilesError,
    StopCheck,
)
from modelyard_server.weights.holding import Holding, ReadMode, WeightPool
from modelyard_server.weights.reading import copied
from modelyard_server.weights.reading.copied import CopyMemory, Room, make_rooms
from modelyard_server.weights.safetensors_files import FileHeader
from modelyard_server.weights.stored import StoredModel

PAGE = mmap.PAGESIZE
GENEROUS_S = 60.0
HOST_MODES = tuple(ReadMode)


def take(
    pool: WeightPool,
    stored: StoredModel,
    mode: ReadMode | None = None,
    *,
    position: int = 0,
    stop: StopCheck = lambda: False,
    **more: Any,
) -> Holding:
    return pool.take(stored, position=position, torch_device="cpu", mode=mode, stop=stop, **more)


def keep(holding: Holding, *, own: frozenset[str] = frozenset()) -> KeptWeights:
    """A copy that says it may share everything but `own`."""
    shared = {identity: size for identity, size in holding.shared.items() if identity not in own}
    copy = holding.keep(shared)
    assert copy is not None
    return copy


def pages(count: int, value: float) -> torch.Tensor:
    """So many pages of a number."""
    return torch.full((count * PAGE // 4,), value)


def every_type() -> dict[str, torch.Tensor]:
    numbers = torch.arange(30) % 7
    dtypes = (
        torch.float64, torch.int64, torch.float32, torch.int32, torch.float16, torch.bfloat16,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    )  # fmt: skip
    tensors = {str(dtype): numbers.to(dtype).view(5, 6) for dtype in dtypes}
    large = torch.randn(3_000_001, generator=torch.Generator().manual_seed(1))
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "large": large}


def assert_same(holding: Holding, written: dict[str, torch.Tensor]) -> None:
    assert holding.tensors.keys() == written.keys()
    for name, tensor in holding.tensors.items():
        expected = written[name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() % tensor.element_size() == 0
        same = tensor.flatten().view(torch.uint8) == expected.flatten().view(torch.uint8)
        assert same.all(), name


def relatives(folder: Path) -> tuple[StoredModel, StoredModel]:
    """Two models with one body and a head each."""
    body = write_pack(folder, "body", {"body.1": pages(4, 1.0), "body.2": pages(4, 2.0)})
    heads = [write_pack(folder, f"head{i}", {"head": pages(2, 10.0 + i)}) for i in range(2)]
    first, second = (model_over(folder, body, head) for head in heads)
    return first, second


def memories(pool: WeightPool) -> list[CopyMemory]:
    """The memory of all copies."""
    entries = [entry for entry in pool._copies._entries.values() if entry.room is not None]
    return list({id(e.room.memory): e.room.memory for e in entries if e.room}.values())


def page_bytes(pool: WeightPool) -> int:
    """What the system says that copies take."""
    found = 0
    for memory in memories(pool):
        address = memory._chunks[0].data_ptr()
        found += resident_pages(address, memory.size_bytes // PAGE) * PAGE
    return found


@contextmanager
def no_collector() -> Iterator[None]:
    """What comes back in here comes back by reference counts."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def remove_files(folder: Path) -> None:
    """From here on nothing can be read."""
    for file in folder.iterdir():
        file.unlink()


# One copy


@pytest.mark.parametrize("mode", HOST_MODES)
def test_a_model_comes_back_from_its_copy_bit_for_bit_without_its_files(
    tmp_path: Path, mode: ReadMode
) -> None:
    written = every_type()
    stored = stored_model(tmp_path, written)
    pool = WeightPool()
    with no_collector():
        holding = take(pool, stored, mode)
        copy = keep(holding)
        assert_same(holding, written)
        holding.release()
        remove_files(tmp_path)
        for _ in range(2):
            back = take(pool, stored, mode, position=3)
            assert_same(back, written)
            assert back.source is LoadSource.COPY
            joined = take(pool, stored, mode, position=3)
            assert joined.tensors["large"].data_ptr() == back.tensors["large"].data_ptr()
            assert pool.bytes(3) == sum(tensor.nbytes for tensor in written.values())
            back.release()
            joined.release()
        back = take(pool, stored, mode)
        copy.release()
        assert not copy.is_held
        assert pool.copies_bytes == 0
        assert_same(back, written)
        back.release()
        with pytest.raises(ModelFilesError):
            take(pool, stored, mode)


def test_a_copy_says_what_it_holds_to_the_byte(tmp_path: Path) -> None:
    ragged = {
        "a": torch.ones(5, 3),
        "b": torch.ones(PAGE + 1, dtype=torch.int8),
        "c": pages(2, 1.0),
    }
    stored = stored_model(tmp_path, ragged)
    pool = WeightPool()
    holding = take(pool, stored)
    total = 60 + PAGE + 1 + 2 * PAGE
    padding = -total % PAGE
    copy = keep(holding)
    assert copy.shared == holding.shared
    assert copy.own_bytes == padding
    assert pool.copies_bytes == page_bytes(pool) == total + padding
    other = keep(holding, own=frozenset({identity_of(ragged["a"])}))
    assert other.own_bytes == padding + 60
    assert other.shared.keys() == {identity_of(ragged["b"]), identity_of(ragged["c"])}
    assert pool.copies_bytes == total + padding
    nothing_shared = holding.keep({})
    assert nothing_shared is not None
    assert (nothing_shared.own_bytes, nothing_shared.shared) == (total + padding, {})


def test_what_holds_nothing_or_not_all_that_is_shared_is_no_copy(tmp_path: Path) -> None:
    pool = WeightPool()
    unknown = stored_model(tmp_path / "unknown", {"a": pages(1, 1.0)}, identified=False)
    empty = stored_model(tmp_path / "empty", {"a": torch.empty(0, 3)})
    full = stored_model(tmp_path / "full", {"a": pages(1, 1.0)})
    assert take(pool, unknown).keep({}) is None
    assert take(pool, empty).keep({identity_of(torch.empty(0, 3)): 0}) is None
    holding = take(pool, full)
    assert holding.keep({**holding.shared, "another": 4}) is None
    holding.release()
    assert holding.keep({}) is None
    assert (pool.copies_bytes, pool._copies._entries) == (0, {})


def test_memory_is_back_when_a_copy_is_released(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": pages(64, 1.0), "b": pages(64, 2.0)})
    pool = WeightPool()
    with no_collector():
        copy = keep(take(pool, stored))
        (memory,) = memories(pool)
        address, witness = memory._chunks[0].data_ptr(), ref(memory._chunks[0])
        assert resident_pages(address, 128) == 128
        del memory
        before = copy.is_held
        copy.release()
        assert (before, copy.is_held) == (True, False)
        assert witness() is None
        assert resident_pages(address, 128) == 0
        assert not copy.is_held
        copy.release()
        assert not copy.is_held
        assert pool.copies_bytes == 0


def test_a_copy_that_is_dropped_releases_itself(tmp_path: Path) -> None:
    pool = WeightPool()
    with no_collector():
        copy = keep(take(pool, stored_model(tmp_path, {"a": pages(64, 1.0)})))
        witness = ref(memories(pool)[0]._chunks[0])
        with pool._copies._mailbox.locked():
            del copy
            assert witness() is not None
        assert witness() is None
        assert pool.copies_bytes == 0


def test_a_misaligned_tensor_of_a_mapped_file_stays_out_of_the_copy(tmp_path: Path) -> None:
    written = {"byte": torch.ones(3, dtype=torch.int8), "wide": torch.arange(8.0)}
    header = write_pack(tmp_path, "p", written)
    raw = (tmp_path / "p").read_bytes()
    data = raw[header.data_start :]
    shift = b"\0" if header.data_start % 4 == 0 else b""
    (tmp_path / "p").write_bytes(raw[: header.data_start] + shift + data)
    status = (tmp_path / "p").stat()
    moved = replace(
        header,
        tensors=tuple(
            replace(t, begin=t.begin + len(shift), end=t.end + len(shift)) for t in header.tensors
        ),
        identity=(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns),
    )
    assert isinstance(moved, FileHeader)
    pool = WeightPool()
    holding = take(pool, model_over(tmp_path, moved))
    assert_same(holding, written)
    wide = identity_of(written["wide"])
    assert wide not in holding.shared
    assert holding.keep({wide: 32}) is None
    copy = keep(holding)
    holding.release()
    again = take(pool, model_over(tmp_path, moved))
    assert_same(again, written)
    assert again.origin.copied_bytes == 3
    copy.release()


# Copies together


def test_what_copies_have_in_common_they_hold_once(tmp_path: Path) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    with no_collector():
        one, other = keep(take(pool, first)), keep(take(pool, second))
        assert pool.copies_bytes == page_bytes(pool) == 12 * PAGE
        one.release()
        # Its head is back, and nothing else of it is its own.
        assert not one.is_held
        assert pool.copies_bytes == page_bytes(pool) == 10 * PAGE
        remove_files(tmp_path)
        assert take(pool, second).source is LoadSource.COPY
        with pytest.raises(ModelFilesError):
            take(pool, first)
        assert take(pool, first, names=["body.2"]).tensors["body.2"][7] == 2.0
        held = [ref(memory._chunks[0]) for memory in memories(pool)]
        other.release()
        assert not other.is_held
        assert [witness() for witness in held] == [None, None]
        assert pool.copies_bytes == 0


def test_a_model_is_filled_from_the_copy_of_another_and_the_rest_from_files(
    tmp_path: Path,
) -> None:
    first, second = relatives(tmp_path)
    for mode in HOST_MODES:
        pool = WeightPool(staging_bytes=4 * 3000)
        copy = keep(take(pool, first, mode))
        (tmp_path / "body").rename(tmp_path / "away")
        holding = take(pool, second, mode)
        assert_same(
            holding, {"body.1": pages(4, 1.0), "body.2": pages(4, 2.0), "head": pages(2, 11.0)}
        )
        assert holding.origin.copied_bytes == 8 * PAGE
        assert holding.source is not LoadSource.COPY, "a fifth of it came from a file"
        (tmp_path / "away").rename(tmp_path / "body")
        copy.release()


@pytest.mark.parametrize("seed", range(12))
def test_charges_cover_the_pages_whatever_copies_come_and_go(tmp_path: Path, seed: int) -> None:
    """Sizes that fill no page: what copies say they take is never less than what they take."""
    chance = random.Random(seed)
    tensors = {
        str(i): torch.full((chance.choice((1, 7, 300, 1024, 1500, 5000)),), float(i))
        for i in range(9)
    }
    headers = {name: write_pack(tmp_path, name, {name: t}) for name, t in tensors.items()}
    pool = WeightPool()
    kept: list[KeptWeights] = []
    for _ in range(40):
        if kept and chance.random() < 0.5:
            copy = kept.pop(chance.randrange(len(kept)))
            copy.release()
            assert not copy.is_held
        else:
            names = chance.sample(list(headers), chance.randint(1, 6))
            holding = take(pool, model_over(tmp_path, *(headers[name] for name in names)))
            own = frozenset(chance.sample(list(holding.shared), chance.randint(0, 1)))
            kept.append(keep(holding, own=own))
            holding.release()
        unique: dict[str, int] = {}
        for copy in kept:
            unique.update(copy.shared)
        charged = sum(unique.values()) + sum(copy.own_bytes for copy in kept)
        assert page_bytes(pool) == pool.copies_bytes <= charged
        assert all(copy.is_held for copy in kept)
        for copy in kept:
            model = [name for name, t in tensors.items() if identity_of(t) in copy.shared]
            if model:
                some = take(pool, model_over(tmp_path, *(headers[name] for name in model)))
                assert some.source is LoadSource.COPY
                assert_same(some, {name: tensors[name] for name in model})
                some.release()
    for copy in kept:
        copy.release()
    assert (pool.copies_bytes, pool._copies._entries) == (0, {})


# Reading


class Between:
    """A stop check that does something the n-th time it is asked."""

    def __init__(self, at: int, does: Callable[[], object]) -> None:
        self._at = at
        self._does = does
        self.count = 0

    def __call__(self) -> bool:
        self.count += 1
        if self.count == self._at:
            self._does()
        return False


@pytest.mark.parametrize("mode", HOST_MODES)
def test_a_copy_that_is_released_while_a_take_reads_stays_until_that_has_ended(
    tmp_path: Path, mode: ReadMode
) -> None:
    written = {"a": pages(3, 1.0), "b": pages(3, 2.0), "c": pages(3, 3.0)}
    stored = stored_model(tmp_path, written)
    pool = WeightPool()
    holding = take(pool, stored, mode)
    copy = keep(holding)
    holding.release()
    remove_files(tmp_path)
    seen = []

    def release() -> None:
        copy.release()
        seen.append((copy.is_held, pool.copies_bytes))
        with pytest.raises(ModelFilesError):
            take(pool, stored, mode, position=1)  # Nobody begins with it any more.

    with no_collector():
        back = take(pool, stored, mode, stop=Between(2, release))
        assert seen == [(True, 9 * PAGE)]
        assert not copy.is_held
        assert pool.copies_bytes == 0
        assert_same(back, written)


def test_a_copy_whose_tensors_another_one_takes_over_is_not_held_any_more(tmp_path: Path) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    holding = take(pool, first)
    copy, heir = keep(holding), take(pool, second, position=1)
    holding.release()
    heirs: list[KeptWeights] = []
    seen = []

    def replace_it() -> None:
        copy.release()
        seen.append(copy.is_held)
        heirs.append(keep(heir))
        # The head is still being read from, and is this copy's alone.
        seen.append(copy.is_held)
        seen.append(pool.copies_bytes == 12 * PAGE)

    take(pool, first, position=2, stop=Between(2, replace_it)).release()
    assert seen == [True, True, True]
    assert not copy.is_held
    assert pool.copies_bytes == 10 * PAGE
    (other,) = heirs
    other.release()
    assert (copy.is_held, other.is_held, pool.copies_bytes) == (False, False, 0)


@pytest.mark.parametrize("mode", HOST_MODES)
def test_loading_from_a_copy_can_be_stopped_at_every_step(tmp_path: Path, mode: ReadMode) -> None:
    written = {"a": pages(3, 1.0), "b": torch.ones(9 << 18), "c": pages(1, 3.0)}
    stored = stored_model(tmp_path, written)
    pool = WeightPool()
    copy = keep(take(pool, stored, mode))
    remove_files(tmp_path)
    errors: list[LoadCancelled] = []
    holding: Holding | None = None
    with no_collector():
        while holding is None:
            answers = iter([False] * len(errors))
            try:
                holding = take(pool, stored, mode, stop=lambda: next(answers, True))  # noqa: B023
            except LoadCancelled as error:
                errors.append(error)
                assert pool.bytes(0) == 0
        assert len(errors) >= 4, "one tensor takes two steps"
        assert_same(holding, written)
        copy.release()
        assert (copy.is_held, pool.copies_bytes) == (False, 0)


def test_a_file_that_fails_beside_a_copy_is_an_error_and_holds_nothing(tmp_path: Path) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    copy = keep(take(pool, first))
    (tmp_path / "head1").unlink()
    with no_collector():
        for mode in HOST_MODES:
            with pytest.raises(ModelFilesError) as caught:
                take(pool, second, mode)
            assert caught.value.__traceback__ is not None
            assert pool.bytes(0) == 0
        copy.release()
        assert (copy.is_held, pool.copies_bytes) == (False, 0)


WRITER = """
import sys, torch
from pathlib import Path
from tests.support.stored_models import stored_model
from modelyard_server.weights.holding import WeightPool
stored = stored_model(Path(sys.argv[1]), {"a": torch.ones(5000)})
pool = WeightPool(write_protected=bool(int(sys.argv[2])))
holding = pool.take(stored, position=0, torch_device="cpu", stop=lambda: False)
copy = holding.keep(holding.shared)
holding.release()
holding = pool.take(stored, position=0, torch_device="cpu", stop=lambda: False)
assert holding.source.name == "COPY"
assert holding.tensors["a"].sum() == 5000
print("reads", flush=True)
holding.tensors["a"].fill_(3)
assert holding.tensors["a"].sum() == 15000
holding.release()
holding = pool.take(stored, position=0, torch_device="cpu", stop=lambda: False)
assert holding.tensors["a"].sum() == 5000, "the copy is nobody's"
"""


@pytest.mark.parametrize(("protected", "status"), [(1, -signal.SIGSEGV), (0, 0)])
def test_what_comes_from_a_copy_is_as_protected_as_what_is_mapped(
    tmp_path: Path, protected: int, status: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", WRITER, str(tmp_path), str(protected)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=100,
    )
    assert (done.stdout, done.returncode) == ("reads\n", status), done.stderr


def test_pages_of_protected_tensors_come_back(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": pages(8, 1.0), "b": pages(8, 2.0)})
    pool = WeightPool(write_protected=True)
    copy = keep(take(pool, stored))
    with no_collector():
        both = take(pool, stored)
        assert both.source is LoadSource.COPY
        one = take(pool, stored, names=["b"])
        address = both.tensors["a"].data_ptr()
        assert resident_pages(address, 8) == 8
        both.release()
        assert resident_pages(address, 8) == 0
        assert (one.tensors["b"] == 2.0).all()
    copy.release()


# Errors


def test_no_memory_for_a_copy_is_an_error_and_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    one, other = take(pool, first), take(pool, second)
    copy = keep(one)

    def refuse(size_bytes: int) -> mmap.mmap:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(copied, "anonymous_mapping", refuse)
        with pytest.raises(MemoryError):
            other.keep(other.shared)
        # What is there already needs none.
        keep(one).release()
        with pytest.raises(MemoryError):
            take(pool, first, position=1)
        assert pool.bytes(1) == 0
    assert pool.copies_bytes == 10 * PAGE
    copy.release()
    assert (pool.copies_bytes, pool._copies._entries) == (0, {})
    assert_same(other, {"body.1": pages(4, 1.0), "body.2": pages(4, 2.0), "head": pages(2, 11.0)})


def test_a_copy_that_fails_half_way_holds_nothing_though_the_error_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_model(tmp_path, {"a": pages(4, 1.0), "b": pages(4, 2.0)})
    pool = WeightPool()
    holding = take(pool, stored, ReadMode.OWNED)
    fill = Room.fill
    made: list[Any] = []

    def fail_second(self: Room, tensor: torch.Tensor) -> None:
        if made:
            raise RuntimeError("a device that fails")
        made.append(ref(self.memory._chunks[0]))
        fill(self, tensor)

    with no_collector():
        tensor = ref(holding.tensors["a"])
        address = holding.tensors["a"].data_ptr()
        with monkeypatch.context() as patch:
            patch.setattr(Room, "fill", fail_second)
            with pytest.raises(RuntimeError, match="a device that fails") as caught:
                holding.keep(holding.shared)
        assert made[0]() is None
        assert (pool.copies_bytes, pool._copies._entries) == (0, {})
        holding.release()
        assert tensor() is None
        assert resident_pages(address, 4) == 0
        assert caught.value is not None


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.mark.parametrize("fails", [False, True])
def test_who_wants_what_another_is_copying_waits_and_takes_over_if_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor, fails: bool
) -> None:
    first, second = relatives(tmp_path)
    pool = WeightPool()
    one, other = take(pool, first), take(pool, second)
    fill, began, waits, go_on = Room.fill, threading.Event(), threading.Event(), threading.Event()
    copied_sizes: list[int] = []

    def held_up(self: Room, tensor: torch.Tensor) -> None:
        if not began.is_set():
            began.set()
            assert go_on.wait(GENEROUS_S)
            if fails:
                raise MemoryError
        copied_sizes.append(tensor.nbytes)
        fill(self, tensor)

    wait = pool._copies._wait

    def waiting(pending: Any) -> None:
        waits.set()
        wait(pending)

    monkeypatch.setattr(Room, "fill", held_up)
    monkeypatch.setattr(pool._copies, "_wait", waiting)
    slow = threads.submit(keep, one)
    assert began.wait(GENEROUS_S)
    quick = threads.submit(keep, other)
    assert waits.wait(GENEROUS_S)
    assert copied_sizes == [2 * PAGE], "its own head, before it waits"
    # Who loads meanwhile does not wait: the files are there.
    assert take(pool, first, position=5).source is not LoadSource.COPY
    go_on.set()
    copy = quick.result(GENEROUS_S)
    if fails:
        with pytest.raises(MemoryError):
            slow.result(GENEROUS_S)
        assert pool.copies_bytes == 10 * PAGE
    else:
        assert sorted(copied_sizes) == [2 * PAGE, 2 * PAGE, 4 * PAGE, 4 * PAGE]
        assert pool.copies_bytes == 12 * PAGE
        slow.result(GENEROUS_S).release()
    assert pool.copies_bytes == page_bytes(pool) == 10 * PAGE
    copy.release()
    assert pool.copies_bytes == 0


@pytest.mark.parametrize("seed", range(10))
def test_threads_that_take_keep_and_drop_see_their_own_bytes_and_leave_nothing(
    tmp_path: Path, seed: int
) -> None:
    tensors = {str(i): torch.full((700 + 900 * i,), float(i)) for i in range(6)}
    headers = {name: write_pack(tmp_path, name, {name: t}) for name, t in tensors.items()}
    pool = WeightPool()
    problems: list[BaseException] = []

    def work(chance: random.Random) -> None:
        kept: list[KeptWeights] = []
        try:
            for _ in range(60):
                names = chance.sample(list(headers), 3)
                mode = chance.choice(HOST_MODES)
                stored = model_over(tmp_path, *(headers[name] for name in names))
                position = chance.randrange(2)
                stops = chance.random() < 0.2
                answers = iter([False] * chance.randrange(4))
                try:
                    holding = take(
                        pool,
                        stored,
                        mode,
                        position=position,
                        stop=lambda: stops and next(answers, True),  # noqa: B023
                    )
                except LoadCancelled:
                    continue
                assert_same(holding, {name: tensors[name] for name in names})
                if chance.random() < 0.5:
                    kept.append(keep(holding))
                holding.release()
                while len(kept) > chance.randrange(4):
                    kept.pop(chance.randrange(len(kept))).release()
        except BaseException as error:
            problems.append(error)
        finally:
            for copy in kept:
                copy.release()

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [
            threading.Thread(target=work, args=(random.Random(f"{seed} {i}"),)) for i in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(GENEROUS_S)
            assert not worker.is_alive()
    finally:
        sys.setswitchinterval(switching)
    assert not problems, problems
    assert (pool.copies_bytes, pool._copies._entries) == (0, {})
    assert (pool.bytes(0), pool.bytes(1)) == (0, 0)


# The memory


def test_rooms_lie_without_a_gap_and_full_pages_come_first() -> None:
    sizes = [1, 3 * PAGE, 700, PAGE, 2 * PAGE + 512]
    memory, rooms = make_rooms(sizes, torch.device("cpu"))
    assert [room.size_bytes for room in rooms] == sizes
    order = sorted(rooms, key=lambda room: room.begin)
    assert [room.begin for room in order] == [0, *(room.end for room in order[:-1])]
    assert rooms[1].begin % PAGE == rooms[3].begin % PAGE == 0
    assert memory.size_bytes == -(-sum(sizes) // PAGE) * PAGE
    assert memory.charged_bytes(rooms) == memory.size_bytes
    assert memory.padding_bytes == memory.size_bytes - sum(sizes)
    for room in rooms:
        first, last = room.begin // PAGE, (room.end - 1) // PAGE
        assert memory.charged_bytes([room]) == (last - first + 1) * PAGE
