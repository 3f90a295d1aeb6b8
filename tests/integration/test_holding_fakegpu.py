"""The pool of tensors on devices that count every byte and run out of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.fakegpu import FakeGpu
from tests.support.fakegpu import load as load_fakegpu
from tests.support.stored_models import identity_of, model_over, stored_model, write_pack

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError
from modelyard_server.weights.holding import Holding, WeightPool
from modelyard_server.weights.reading import slab
from modelyard_server.weights.storages import unique_storage_bytes
from modelyard_server.weights.stored import StoredModel

# Whoever comes first builds the library.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = load_fakegpu()
    gpu.reset()
    yield gpu
    gpu.reset()
    gc.collect()
    assert used(gpu) == [0, 0, 0, 0]


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


def after(count: int) -> Callable[[], bool]:
    answers = iter([False] * count)
    return lambda: next(answers, True)


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {
        "matrix": torch.randn(64, 48),
        "half": torch.randn(33, 3).half(),
        "odd": torch.randint(0, 9, (7,), dtype=torch.int8),
        "flag": torch.tensor([True, False, True]),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 5),
    }


def assert_holds(holding: Holding, expected: dict[str, torch.Tensor]) -> None:
    assert holding.tensors.keys() == expected.keys()
    for name, tensor in holding.tensors.items():
        assert tensor.device.type == "fakegpu"
        assert torch.equal(tensor.cpu(), expected[name]), name


def test_a_model_takes_one_allocation_and_is_counted_for_its_own_bytes(
    tmp_path: Path, gpu: FakeGpu
) -> None:
    expected = weights()
    stored = stored_model(tmp_path, expected)
    pool = WeightPool()
    holding = take(pool, stored)
    assert_holds(holding, expected)
    size_bytes = sum(tensor.nbytes for tensor in expected.values())
    assert pool.bytes(2) == sum(holding.shared.values()) == size_bytes
    assert used(gpu) == [0, size_bytes, 0, 0]
    assert gpu.peak_bytes(1) == size_bytes
    assert holding.padding_bytes == 0
    module = torch.nn.Module()
    for name, tensor in holding.tensors.items():
        module.register_buffer(f"its_{name}", tensor)
    assert unique_storage_bytes(module) == size_bytes
    del module, tensor
    holding.release()
    assert used(gpu) == [0, 0, 0, 0]
    assert pool.bytes(2) == 0


def test_models_share_what_they_have_in_common_on_each_device(tmp_path: Path, gpu: FakeGpu) -> None:
    body = write_pack(tmp_path, "body", {"body": torch.arange(512.0)})
    heads = [write_pack(tmp_path, str(i), {"head": torch.full((128,), i + 0.5)}) for i in (0, 1)]
    first, second = (model_over(tmp_path, body, head) for head in heads)
    pool = WeightPool()
    one, other, elsewhere = take(pool, first), take(pool, second), take(pool, second, 3)
    assert used(gpu) == [0, 2048 + 2 * 512, 0, 2048 + 512]
    assert one.tensors["body"].data_ptr() == other.tensors["body"].data_ptr()
    assert one.tensors["body"] is not other.tensors["body"]
    assert pool.holders(2, identity_of(torch.arange(512.0))) == 2
    one.release()
    # An allocation goes as a whole: the head that nobody has is still there, and that is said.
    assert pool.bytes(2) == 2048 + 512
    assert pool.stranded_bytes(2) == 512
    assert used(gpu)[1] == pool.bytes(2) + pool.stranded_bytes(2)
    assert_holds(other, {"body": torch.arange(512.0), "head": torch.full((128,), 1.5)})
    other.release()
    assert pool.stranded_bytes(2) == 0
    assert used(gpu) == [0, 0, 0, 2048 + 512]
    elsewhere.release()
    assert used(gpu) == [0, 0, 0, 0]


def test_a_device_without_room_holds_nothing_and_one_with_room_for_all_is_enough(
    tmp_path: Path, gpu: FakeGpu
) -> None:
    stored = stored_model(tmp_path, weights())
    pool = WeightPool()
    holding = take(pool, stored)
    size_bytes = used(gpu)[1]
    holding.release()
    gpu.set_budget(1, size_bytes - 1)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        take(pool, stored)
    assert used(gpu) == [0, 0, 0, 0]
    assert pool.bytes(2) == 0
    assert caught.value is not None
    gpu.set_budget(1, size_bytes)
    assert_holds(take(pool, stored), weights())


def test_reading_can_be_stopped_at_every_step_and_holds_nothing(
    tmp_path: Path, gpu: FakeGpu
) -> None:
    stored = stored_model(tmp_path, weights())
    pool = WeightPool(staging_bytes=4 * 4096)
    errors: list[LoadCancelled] = []
    holding: Holding | None = None
    while holding is None:
        try:
            holding = take(pool, stored, stop=after(len(errors)))
        except LoadCancelled as error:
            # Kept, as a future or a log record may keep it.
            errors.append(error)
            assert used(gpu) == [0, 0, 0, 0]
    assert len(errors) >= len(weights())
    assert_holds(holding, weights())


def test_a_file_that_is_gone_is_an_error_and_holds_nothing(tmp_path: Path, gpu: FakeGpu) -> None:
    stored = stored_model(tmp_path, weights())
    (tmp_path / "pack.safetensors").unlink()
    with pytest.raises(ModelFilesError, match="is missing"):
        take(WeightPool(), stored)
    assert used(gpu) == [0, 0, 0, 0]


def test_tensors_without_identity_are_the_holdings_own(tmp_path: Path, gpu: FakeGpu) -> None:
    stored = stored_model(tmp_path, weights(), identified=False)
    pool = WeightPool()
    one, other = take(pool, stored), take(pool, stored)
    one.tensors["matrix"].zero_()
    assert_holds(other, weights())
    assert pool.bytes(2) == 0
    del one
    assert used(gpu)[1] == sum(tensor.nbytes for tensor in weights().values())


class RecordedEvent:
    """An event whose recording and waiting is seen."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        log.append("made")

    def record(self, stream: torch.Stream) -> None:
        assert stream.device == torch.device("fakegpu", 1)
        self._log.append("recorded")

    def synchronize(self) -> None:
        self._log.append("waited for")


@pytest.mark.parametrize("pinned", [True, False])
def test_a_staging_buffer_is_waited_for_before_it_is_used_again(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    # The fake devices have no pinned memory: what is said to be is not.
    def memory(size_bytes: int, device: torch.device) -> tuple[torch.Tensor, bool]:
        assert device == torch.device("fakegpu", 1)
        return torch.empty(size_bytes, dtype=torch.uint8), pinned

    log: list[str] = []
    monkeypatch.setattr(slab, "_staging_memory", memory)
    monkeypatch.setattr(torch, "Event", lambda device: RecordedEvent(log))
    monkeypatch.setattr(
        torch.accelerator, "synchronize", lambda device: log.append(f"synchronized {device}")
    )
    expected = {"a": torch.arange(10 * 256 + 100, dtype=torch.float32)}
    holding = take(WeightPool(staging_bytes=4 * 1024), stored_model(tmp_path, expected))
    assert_holds(holding, expected)
    sends = 11
    if pinned:
        assert log.count("recorded") == sends
        assert log.count("waited for") == sends - 4
        assert log.index("waited for") == 2 * 4, "the fifth is the first that has to wait"
    assert log[-1] == "synchronized fakegpu:1"
    assert len(log) == (3 * sends - 4 if pinned else 0) + 1


def test_events_of_the_backend_do_for_waiting(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        slab, "_staging_memory", lambda size, device: (torch.empty(size, dtype=torch.uint8), True)
    )
    pool = WeightPool(staging_bytes=4 * 512)
    stored = stored_model(tmp_path, weights())
    holding = take(pool, stored)
    assert_holds(holding, weights())
    pool.trim()
    assert_holds(take(pool, stored, 2), weights())


def test_a_backend_that_cannot_cut_storages_gives_the_same_tensors(
    tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(tensor: torch.Tensor) -> Any:
        raise BufferError("not on this device")

    monkeypatch.setattr(slab, "to_dlpack", refuse)
    holding = take(WeightPool(), stored_model(tmp_path, weights()))
    assert_holds(holding, weights())
    holding.release()
    assert used(gpu) == [0, 0, 0, 0]
