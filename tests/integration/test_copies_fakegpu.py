"""Copies of weights that leave accelerators, which count every byte and run out of memory."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from tests.support.fakegpu import FakeGpu
from tests.support.fakegpu import load as load_fakegpu
from tests.support.stored_models import identity_of, model_over, stored_model, write_pack

from modelyard_server.runtimes.api import KeptWeights, LoadCancelled, LoadSource, ModelFilesError
from modelyard_server.weights.holding import Holding, WeightPool
from modelyard_server.weights.reading import copied
from modelyard_server.weights.reading.copied import CopyMemory, Room
from modelyard_server.weights.stored import StoredModel

# Whoever comes first builds the library.
pytestmark = pytest.mark.timeout(900)

PAGE = 4096
GENEROUS_S = 60.0


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = load_fakegpu()
    gpu.reset()
    yield gpu
    gpu.reset()
    gc.collect()
    assert used(gpu) == [0, 0, 0, 0]


class Pinned:
    """Memory that is said to be pinned; the fake devices have none.

    Attributes:
        chunks: all that was asked for.
        emptied: how often torch was asked to give back what it keeps.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks: list[tuple[int, ref[torch.Tensor]]] = []
        self.limit_bytes: int | None = None
        self.emptied = 0
        monkeypatch.setattr(copied, "pinned_memory", self._make)
        monkeypatch.setattr(torch.accelerator.memory, "empty_host_cache", self._empty)

    def _make(self, size_bytes: int, device: torch.device) -> torch.Tensor | None:
        assert device.type == "fakegpu"
        if self.limit_bytes is not None and self.held_bytes + size_bytes > self.limit_bytes:
            return None
        chunk = torch.empty(size_bytes, dtype=torch.uint8)
        self.chunks.append((size_bytes, ref(chunk)))
        return chunk

    def _empty(self) -> None:
        self.emptied += 1

    @property
    def held_bytes(self) -> int:
        """Bytes of those that are there."""
        return sum(size for size, chunk in self.chunks if chunk() is not None)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Pinned:
    return Pinned(monkeypatch)


@pytest.fixture(params=[False, True], ids=["pageable", "pinned"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Pinned | None:
    """Both kinds of memory, one after the other."""
    return Pinned(monkeypatch) if request.param else None


def used(gpu: FakeGpu) -> list[int]:
    return [gpu.used_bytes(device) for device in range(gpu.device_count)]


def take(
    pool: WeightPool,
    stored: StoredModel,
    device: int = 1,
    *,
    stop: Callable[[], bool] = lambda: False,
    **more: Any,
) -> Holding:
    return pool.take(
        stored, position=device + 1, torch_device=f"fakegpu:{device}", stop=stop, **more
    )


def keep(holding: Holding) -> KeptWeights:
    copy = holding.keep(holding.shared)
    assert copy is not None
    return copy


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {
        "matrix": torch.randn(64, 48),
        "half": torch.randn(33, 3).half(),
        "odd": torch.randint(0, 9, (7,), dtype=torch.int8),
        "flag": torch.tensor([True, False, True]),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 5),
        "large": torch.randn(3_000_001),
    }


def assert_holds(holding: Holding, expected: dict[str, torch.Tensor]) -> None:
    assert holding.tensors.keys() == expected.keys()
    for name, tensor in holding.tensors.items():
        assert torch.equal(tensor.cpu(), expected[name]), name


def remove_files(folder: Path) -> None:
    """From here on nothing can be read."""
    for file in folder.iterdir():
        file.unlink()


def test_a_model_comes_back_to_any_device_from_its_copy_in_one_allocation(
    tmp_path: Path, gpu: FakeGpu, either: Pinned | None
) -> None:
    expected = weights()
    stored = stored_model(tmp_path, expected)
    size_bytes = sum(tensor.nbytes for tensor in expected.values())
    pool = WeightPool()
    holding = take(pool, stored)
    copy = keep(holding)
    assert used(gpu) == [0, size_bytes, 0, 0]
    holding.release()
    assert used(gpu) == [0, 0, 0, 0]
    assert copy.own_bytes == -size_bytes % PAGE
    assert pool.copies_bytes == size_bytes + copy.own_bytes
    if either:
        assert either.held_bytes == pool.copies_bytes
    remove_files(tmp_path)
    gpu.set_budget(2, size_bytes)
    gpu.reset_peak(2)
    back = take(pool, stored, 2)
    assert back.source is LoadSource.COPY
    assert gpu.peak_bytes(2) == size_bytes
    assert len(back.allocations) == 1
    on_host = pool.take(stored, position=0, torch_device="cpu", stop=lambda: False)
    copy.release()
    assert (copy.is_held, pool.copies_bytes) == (False, 0)
    assert_holds(back, expected)
    assert_holds(on_host, expected)
    if either:
        assert (either.held_bytes, either.emptied) == (0, 1)
    back.release()
    assert used(gpu) == [0, 0, 0, 0]


def test_what_comes_from_copies_and_what_comes_from_files_is_one_allocation(
    tmp_path: Path, gpu: FakeGpu, either: Pinned | None
) -> None:
    tensors = {str(i): torch.full((100 + 333 * i,), float(i)) for i in range(8)}
    headers = {name: write_pack(tmp_path, name, {name: t}) for name, t in tensors.items()}
    pack = write_pack(tmp_path, "pack", {"x" + name: t + 0.5 for name, t in tensors.items()})
    pool = WeightPool(staging_bytes=4 * 1000)
    first = take(pool, model_over(tmp_path, *(headers[name] for name in "1357")))
    second = take(pool, model_over(tmp_path, pack), names=["x2", "x3", "x6"])
    copies = keep(first), keep(second)
    first.release()
    second.release()
    for name in "1357":
        (tmp_path / name).unlink()
    whole = take(pool, model_over(tmp_path, *headers.values(), pack))
    assert whole.origin.copied_bytes and whole.origin.file_bytes
    expected = tensors | {"x" + name: t + 0.5 for name, t in tensors.items()}
    assert_holds(whole, expected)
    assert used(gpu)[1] == gpu.peak_bytes(1) == sum(t.nbytes for t in expected.values())
    assert len(whole.allocations) == 1
    for copy in copies:
        copy.release()
    assert pool.copies_bytes == 0


def test_a_device_without_room_holds_nothing_and_the_copy_stays(
    tmp_path: Path, gpu: FakeGpu, either: Pinned | None
) -> None:
    expected = weights()
    stored = stored_model(tmp_path, expected)
    pool = WeightPool()
    holding = take(pool, stored)
    copy = keep(holding)
    size_bytes = used(gpu)[1]
    holding.release()
    remove_files(tmp_path)
    gpu.set_budget(1, size_bytes - 1)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        take(pool, stored)
    assert used(gpu) == [0, 0, 0, 0]
    assert pool.bytes(2) == 0
    gpu.set_budget(1, size_bytes)
    back = take(pool, stored)
    assert_holds(back, expected)
    # The device is full: to copy out of it takes none of it.
    copy.release()
    again = keep(back)
    assert gpu.peak_bytes(1) == size_bytes
    back.release()
    again.release()
    assert (copy.is_held, again.is_held, pool.copies_bytes) == (False, False, 0)
    assert caught.value is not None


def test_loading_from_a_copy_can_be_stopped_at_every_step(
    tmp_path: Path, gpu: FakeGpu, either: Pinned | None
) -> None:
    stored = stored_model(tmp_path, weights())
    pool = WeightPool()
    copy = keep(take(pool, stored))
    errors: list[LoadCancelled] = []
    holding: Holding | None = None
    while holding is None:
        answers = iter([False] * len(errors))
        try:
            holding = take(pool, stored, stop=lambda: next(answers, True))  # noqa: B023
        except LoadCancelled as error:
            # Kept, as a future or a log record may keep it.
            errors.append(error)
            assert used(gpu) == [0, 0, 0, 0]
    assert len(errors) > len(weights()) - 1, "one tensor takes two steps"
    assert_holds(holding, weights())
    copy.release()
    assert (copy.is_held, pool.copies_bytes) == (False, 0)
    if either:
        assert either.held_bytes == 0


def test_a_device_is_waited_for_before_memory_on_either_side_is_given_up(
    tmp_path: Path, gpu: FakeGpu, pinned: Pinned, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_model(tmp_path, weights())
    pool = WeightPool()
    holding = take(pool, stored)
    log: list[str] = []
    blocking: list[bool] = []
    copy_ = torch.Tensor.copy_

    def copying(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        log.append("copied")
        blocking.append(not non_blocking)
        return copy_(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", copying)
    monkeypatch.setattr(
        torch.accelerator, "synchronize", lambda device: log.append(f"synchronized {device}")
    )
    copy = keep(holding)
    assert log[-1] == "synchronized fakegpu:1"
    assert log.count("copied") >= len(weights()) - 1
    holding.release()
    log.clear()
    back = take(pool, stored, 3)
    assert log[-1] == "synchronized fakegpu:3"
    assert log.count("copied") >= len(weights()) - 1
    assert not any(blocking)
    log.clear()
    back.release()
    with pytest.raises(LoadCancelled):
        take(pool, stored, 3, stop=iter([False, True]).__next__)
    assert log[-1] == "synchronized fakegpu:3"

    def fail(self: Room, tensor: torch.Tensor) -> None:
        log.append("failed")
        raise RuntimeError("a device that fails")

    copy.release()
    monkeypatch.setattr(Room, "fill", fail)
    again = take(pool, stored)
    with pytest.raises(RuntimeError, match="a device that fails"):
        again.keep(again.shared)
    assert log[-2:] == ["failed", "synchronized fakegpu:1"]
    assert (pool.copies_bytes, pinned.held_bytes) == (0, 0)


def test_pinned_memory_is_asked_for_as_torch_gives_it(
    tmp_path: Path, gpu: FakeGpu, pinned: Pinned
) -> None:
    pool = WeightPool()
    holding = take(pool, stored_model(tmp_path, {"a": torch.randn(5 * 1024 + 3, 4)}))
    copy = keep(holding)
    assert [size for size, _ in pinned.chunks] == [16 * PAGE, 4 * PAGE, PAGE]
    assert pool.copies_bytes == 21 * PAGE
    back = take(pool, stored_model(tmp_path, {"a": torch.randn(5 * 1024 + 3, 4)}), 2)
    assert back.source is not LoadSource.COPY, "other numbers"
    copy.release()


def test_without_room_to_pin_the_copy_is_in_pageable_memory(
    tmp_path: Path, gpu: FakeGpu, pinned: Pinned
) -> None:
    expected = weights()
    stored = stored_model(tmp_path, expected)
    pool = WeightPool()
    pinned.limit_bytes = 9 << 20
    holding = take(pool, stored)
    copy = keep(holding)
    assert pinned.chunks
    assert pinned.held_bytes == 0
    assert pool.copies_bytes == sum(t.nbytes for t in expected.values()) + copy.own_bytes
    holding.release()
    assert_holds(take(pool, stored), expected)
    copy.release()


def test_pinned_memory_that_another_copy_keeps_is_not_told_to_be_back(
    tmp_path: Path, gpu: FakeGpu, pinned: Pinned
) -> None:
    body = write_pack(tmp_path, "body", {"body": torch.arange(2048.0)})
    heads = [write_pack(tmp_path, str(i), {"head": torch.full((1024,), i + 0.5)}) for i in (0, 1)]
    models = [model_over(tmp_path, body, head) for head in heads]
    pool = WeightPool()
    one, other = (keep(take(pool, model)) for model in models)
    assert pool.copies_bytes == pinned.held_bytes == 4 * PAGE
    one.release()
    # The body is the other's, the head is nobody's, and pinned memory goes as a whole.
    stays = one.is_held
    assert stays
    assert pool.copies_bytes == pinned.held_bytes == 4 * PAGE
    (tmp_path / "0").rename(tmp_path / "away")
    with pytest.raises(ModelFilesError):
        take(pool, models[0])
    (tmp_path / "away").rename(tmp_path / "0")
    # Who copies the head again gets what is there.
    heir = keep(take(pool, models[0]))
    assert len(pinned.chunks) == 3
    assert not one.is_held
    heir.release()
    other.release()
    assert [copy.is_held for copy in (one, other, heir)] == [False] * 3
    assert pool.copies_bytes == pinned.held_bytes == 0


def test_pinned_memory_that_nobody_needs_any_more_is_back_for_who_left_first(
    tmp_path: Path, gpu: FakeGpu, pinned: Pinned
) -> None:
    body = write_pack(tmp_path, "body", {"body": torch.arange(1000.0)})
    head = write_pack(tmp_path, "head", {"head": torch.ones(1000)})
    pool = WeightPool()
    whole = keep(take(pool, model_over(tmp_path, body, head)))
    part = keep(take(pool, model_over(tmp_path, body)))
    assert part.shared == {identity_of(torch.arange(1000.0)): 4000}
    # What is lost in the memory is charged to both: each may be the one that stays.
    assert whole.own_bytes == part.own_bytes == 2 * PAGE - 8000
    whole.release()
    held = whole.is_held
    part.release()
    assert (held, whole.is_held, part.is_held) == (True, False, False)
    assert pinned.held_bytes == 0


@pytest.mark.parametrize("seed", range(4))
def test_threads_that_take_keep_and_drop_see_their_own_bytes_and_leave_nothing(
    tmp_path: Path, gpu: FakeGpu, either: Pinned | None, seed: int
) -> None:
    tensors = {str(i): torch.full((700 + 900 * i,), float(i)) for i in range(6)}
    headers = {name: write_pack(tmp_path, name, {name: t}) for name, t in tensors.items()}
    pool = WeightPool(staging_bytes=4 * 2048)
    for device in range(4):
        gpu.set_budget(device, 60_000)
    problems: list[BaseException] = []

    def work(device: int, chance: random.Random) -> None:
        kept: list[KeptWeights] = []
        held: list[Holding] = []
        try:
            for _ in range(40):
                names = chance.sample(list(headers), 3)
                try:
                    stored = model_over(tmp_path, *(headers[name] for name in names))
                    held.append(take(pool, stored, device))
                except torch.OutOfMemoryError:
                    held.pop(0).release()
                    continue
                assert_holds(held[-1], {name: tensors[name] for name in names})
                if chance.random() < 0.5:
                    kept.append(keep(chance.choice(held)))
                while len(held) > chance.randrange(3):
                    held.pop(0).release()
                while len(kept) > chance.randrange(4):
                    kept.pop(chance.randrange(len(kept))).release()
        except BaseException as error:
            problems.append(error)
        finally:
            for copy in kept:
                copy.release()
            for holding in held:
                holding.release()

    workers = [
        threading.Thread(target=work, args=(device, random.Random(f"{seed} {device}")))
        for device in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(GENEROUS_S)
        assert not worker.is_alive()
    assert not problems, problems
    assert (pool.copies_bytes, pool._copies._entries) == (0, {})
    if either:
        assert either.held_bytes == 0


def test_the_memory_of_a_copy_is_a_multiple_of_a_page(gpu: FakeGpu, pinned: Pinned) -> None:
    memory = CopyMemory(3 * PAGE + 1, torch.device("fakegpu", 0))
    assert memory.is_pinned
    assert (memory.size_bytes, memory.padding_bytes) == (4 * PAGE, PAGE - 1)
    pieces = list(memory.pieces(PAGE - 1, 3 * PAGE + 1))
    assert sum(piece.numel() for piece in pieces) == 2 * PAGE + 2
