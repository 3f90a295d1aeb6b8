"""The ways in which a stored model's bytes become tensors, on host memory."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.stored_models import model_over, resident_pages, stored_model, write_pack

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError
from modelyard_server.weights.holding import Holding, ReadMode, WeightPool
from modelyard_server.weights.pages import are_cached
from modelyard_server.weights.reading.api import FilePart, layout
from modelyard_server.weights.reading.mailbox import Mailbox
from modelyard_server.weights.safetensors_files import FileHeader, TensorHeader
from modelyard_server.weights.stored import StoredModel

PAGE = 4096
COPYING = (ReadMode.OWNED, ReadMode.ARENA, ReadMode.SLAB)
REGIONAL = (ReadMode.OWNED, ReadMode.ARENA)


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


def every_type() -> dict[str, torch.Tensor]:
    numbers = torch.arange(30) % 7
    dtypes = (
        torch.float64, torch.int64, torch.float32, torch.int32, torch.float16, torch.bfloat16,
        torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    )  # fmt: skip
    tensors = {str(dtype): numbers.to(dtype).view(5, 6) for dtype in dtypes}
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}


def after(count: int) -> Callable[[], bool]:
    answers = iter([False] * count)
    return lambda: next(answers, True)


@pytest.mark.parametrize("identified", [True, False])
@pytest.mark.parametrize("mode", ReadMode)
def test_tensors_are_those_of_the_file(tmp_path: Path, mode: ReadMode, identified: bool) -> None:
    written = every_type()
    stored = stored_model(tmp_path, written, identified=identified)
    pool = WeightPool(staging_bytes=4 * 256)
    holding = take(pool, stored, mode)
    assert holding.tensors.keys() == written.keys()
    for name, tensor in holding.tensors.items():
        assert tensor.dtype == written[name].dtype
        assert tensor.shape == written[name].shape
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        same = tensor.flatten().view(torch.uint8) == written[name].flatten().view(torch.uint8)
        assert same.all(), name
        assert tensor.data_ptr() % tensor.element_size() == 0
    total = sum(tensor.nbytes for tensor in written.values())
    assert pool.bytes(0) == (total if identified else 0)
    assert sum(holding.shared.values()) == pool.bytes(0)


@pytest.mark.parametrize("mode", ReadMode)
def test_tensors_of_several_files_and_larger_than_a_staging_buffer(
    tmp_path: Path, mode: ReadMode
) -> None:
    torch.manual_seed(3)
    first = {"a": torch.randn(1_000), "b": torch.randn(77)}
    second = {"c": torch.randn(3, 500), "d": torch.randn(9)}
    stored = model_over(
        tmp_path, write_pack(tmp_path, "1", first), write_pack(tmp_path, "2", second)
    )
    holding = take(WeightPool(staging_bytes=4 * 300), stored, mode)
    for name, tensor in (first | second).items():
        assert torch.equal(holding.tensors[name], tensor)


@pytest.mark.parametrize("mode", ReadMode)
def test_reading_can_be_stopped_at_every_step_and_holds_nothing(
    tmp_path: Path, mode: ReadMode
) -> None:
    stored = stored_model(tmp_path, {"a": pages(4, 1.0), "b": pages(3, 2.0), "c": pages(1, 3.0)})
    pool = WeightPool(arena_bytes=1 << 20)
    steps = 0
    holding: Holding | None = None
    while holding is None:
        try:
            holding = take(pool, stored, mode, stop=after(steps))
        except LoadCancelled:
            assert pool.bytes(0) == 0
            steps += 1
    assert steps >= 1
    assert pool.idle_bytes(0) == 0, "the slab that was given up has been taken again"
    assert torch.equal(holding.tensors["c"], pages(1, 3.0))


@pytest.mark.parametrize("mode", ReadMode)
def test_another_file_in_its_place_is_refused(tmp_path: Path, mode: ReadMode) -> None:
    stored = stored_model(tmp_path, {"a": pages(2, 1.0)})
    write_pack(tmp_path, "new", {"a": pages(2, 5.0)})
    (tmp_path / "new").replace(tmp_path / "pack.safetensors")
    pool = WeightPool()
    with pytest.raises(ModelFilesError, match="changed while it was being loaded") as caught:
        take(pool, stored, mode)
    assert caught.value.transient
    assert pool.bytes(0) == 0


@pytest.mark.parametrize("mode", COPYING)
def test_a_file_that_is_written_to_meanwhile_is_refused(tmp_path: Path, mode: ReadMode) -> None:
    stored = stored_model(tmp_path, {"a": pages(2, 1.0), "b": pages(2, 2.0)})
    path = tmp_path / "pack.safetensors"

    def write() -> bool:
        os.utime(path, ns=(1, 1))
        return False

    pool = WeightPool()
    with pytest.raises(ModelFilesError, match="changed while it was being loaded"):
        take(pool, stored, mode, stop=write)
    assert pool.bytes(0) == 0


@pytest.mark.parametrize("mode", COPYING)
def test_a_failing_disk_is_an_error_of_the_files(
    tmp_path: Path, mode: ReadMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_model(tmp_path, {"a": pages(2, 1.0), "b": pages(2, 2.0)})
    pool = WeightPool()
    real = os.preadv
    calls = 0

    def fail(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, "input/output error")
        return real(*args)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(
        ModelFilesError, match=r"pack\.safetensors cannot be read to its end"
    ) as one:
        take(pool, stored, mode)
    assert one.value.transient
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    with pytest.raises(ModelFilesError, match="became shorter"):
        take(pool, stored, mode)
    assert pool.bytes(0) == 0
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: real(fd, [into[0][:1000]], at))
    assert torch.equal(take(pool, stored, mode).tensors["b"], pages(2, 2.0))


def test_a_mapped_file_that_ends_early_is_an_error_and_no_signal(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": pages(4, 1.0), "b": pages(4, 2.0)})
    pool = WeightPool()
    held = take(pool, stored, names=["a"])
    os.truncate(tmp_path / "pack.safetensors", 5 * PAGE)
    with pytest.raises(ModelFilesError, match=r"changed while|cannot be read to its end"):
        take(pool, stored, names=["b"])
    assert torch.equal(held.tensors["a"], pages(4, 1.0))
    assert pool.bytes(0) == 4 * PAGE


def test_a_host_without_memory_is_told_so(tmp_path: Path) -> None:
    header = write_pack(tmp_path, "1", {"a": pages(1, 1.0)})
    # More address space than there is.
    huge = replace(header.tensors[0], shape=(2**58,), end=2**60)
    stored = model_over(tmp_path, replace(header, tensors=(huge,)))
    for mode in REGIONAL:
        pool = WeightPool()
        with pytest.raises(MemoryError):
            take(pool, stored, mode)
        assert pool.bytes(0) == 0


# Mapped


def test_what_is_mapped_by_several_lies_in_one_mapping(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": pages(2, 1.0), "b": pages(2, 2.0)})
    pool = WeightPool()
    one, other = take(pool, stored, names=["a"]), take(pool, stored, position=1)
    assert one.extents["a"].mapping is other.extents["b"].mapping
    assert one.tensors["a"].data_ptr() == other.tensors["a"].data_ptr()
    for name, extent in other.extents.items():
        assert extent.address == other.tensors[name].data_ptr()
        assert extent.size_bytes == 2 * PAGE


def test_pages_in_use_at_another_position_stay(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": pages(4, 1.0), "b": pages(4, 2.0)})
    pool = WeightPool()
    one, other = take(pool, stored), take(pool, stored, position=1, names=["a"])
    # A write makes pages this process's own: giving them back would lose it.
    one.tensors["a"].fill_(5.0)
    one.tensors["b"].fill_(6.0)
    address = other.tensors["a"].data_ptr()
    neighbour = one.tensors["b"].data_ptr()
    assert resident_pages(neighbour, 4) == 4
    one.release()
    assert (other.tensors["a"] == 5.0).all()
    # But for the ones at its edges.
    assert resident_pages(neighbour, 4) <= 1
    again = take(pool, stored, names=["b"])
    assert (again.tensors["b"][PAGE // 4 : -PAGE // 4] == 2.0).all()
    again.release()
    other.release()
    assert resident_pages(address, 8) == 0


def test_pages_that_the_system_has_are_left_to_the_first_use(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": pages(64, 1.0)})
    with (tmp_path / "pack.safetensors").open("rb") as file:
        size_bytes = len(file.read())
        assert are_cached(file.fileno(), 0, size_bytes)
        assert are_cached(file.fileno(), 5, size_bytes - 5)
        assert not are_cached(file.fileno(), 0, size_bytes + 2 * PAGE)  # There is no such page.
    holding = take(WeightPool(), stored)
    assert resident_pages(holding.tensors["a"].data_ptr(), 64) == 0
    assert torch.equal(holding.tensors["a"], pages(64, 1.0))


def test_pages_of_a_cold_file_are_in_memory_before_anybody_touches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("are_cached", "seem_cached"):
        monkeypatch.setattr(f"modelyard_server.weights.pages.{name}", lambda *_: False)
    stored = stored_model(tmp_path, {"a": pages(64, 1.0), "b": pages(64, 2.0)})
    pool = WeightPool()
    stays = take(pool, stored, names=["a"])
    for _ in range(2):
        holding = take(pool, stored)
        address = holding.tensors["b"].data_ptr()
        assert resident_pages(address, 64) == 64
        holding.release()
        # The next take finds them gone and brings them again.
        assert resident_pages(address, 64) <= 2
    assert stays.tensors


def test_tensors_without_identity_have_a_mapping_of_their_own(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": pages(2, 1.0)}, identified=False)
    pool = WeightPool()
    one, other = take(pool, stored), take(pool, stored)
    one.tensors["a"].fill_(5.0)
    assert torch.equal(other.tensors["a"], pages(2, 1.0))


def shifted(folder: Path) -> StoredModel:
    """A model none of whose tensors is aligned in its file."""
    header = write_pack(folder, "p", {"a": torch.arange(9.0), "b": torch.arange(5.0)})
    content = (folder / "p").read_bytes()
    start = header.data_start
    # One more space in the header: the data begins at an odd place.
    head = (start - 8 + 1).to_bytes(8, "little") + content[8:start] + b" "
    (folder / "p").write_bytes(head + content[start:])
    status = (folder / "p").stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return model_over(folder, replace(header, data_start=start + 1, identity=identity))


def test_misaligned_tensors_are_copied_and_not_shared(tmp_path: Path) -> None:
    stored = shifted(tmp_path)
    pool = WeightPool()
    one, other = take(pool, stored), take(pool, stored)
    assert torch.equal(one.tensors["a"], torch.arange(9.0))
    assert torch.equal(one.tensors["b"], torch.arange(5.0))
    assert one.tensors["a"].data_ptr() % 4 == 0
    assert one.tensors["a"].data_ptr() != other.tensors["a"].data_ptr()
    assert not one.extents
    assert not one.shared
    assert pool.bytes(0) == 0


@pytest.mark.parametrize("mode", COPYING)
def test_where_it_lies_in_the_file_does_not_matter_to_a_copy(
    tmp_path: Path, mode: ReadMode
) -> None:
    pool = WeightPool()
    stored = shifted(tmp_path)
    holding = take(pool, stored, mode)
    assert torch.equal(holding.tensors["b"], torch.arange(5.0))
    assert len(holding.shared) == 2


WRITER = """
import sys
from pathlib import Path
import torch
from tests.support.stored_models import stored_model
from modelyard_server.weights.holding import WeightPool
protected, identified, number = (int(value) for value in sys.argv[2:])
stored = stored_model(Path(sys.argv[1]), {"a": torch.ones(5000)}, identified=bool(identified))
pool = WeightPool(write_protected=bool(protected))
holding = pool.take(stored, position=0, torch_device="cpu", stop=lambda: False)
assert holding.tensors["a"].sum() == 5000
print("reads", flush=True)
holding.tensors["a"].fill_(number)
assert holding.tensors["a"].sum() == 5000 * number
"""


@pytest.mark.parametrize(
    ("protected", "identified", "status"),
    [(1, 1, -signal.SIGSEGV), (0, 1, 0), (1, 0, 0)],
    ids=["protected", "not protected", "its own"],
)
def test_a_write_to_protected_tensors_ends_the_process(
    tmp_path: Path, protected: int, identified: int, status: int
) -> None:
    arguments = [str(tmp_path), str(protected), str(identified), "3"]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", WRITER, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=100,
    )
    assert (done.stdout, done.returncode) == ("reads\n", status), done.stderr


# Regions


@pytest.mark.parametrize("mode", REGIONAL)
def test_whole_pages_go_with_their_tensor_and_the_region_with_the_last(
    tmp_path: Path, mode: ReadMode
) -> None:
    stored = stored_model(tmp_path, {"a": pages(8, 1.0), "b": pages(8, 2.0)})
    pool = WeightPool(arena_bytes=0)
    both = take(pool, stored, mode)
    one = take(pool, stored, mode, names=["a"])
    address = min(tensor.data_ptr() for tensor in both.tensors.values())
    assert resident_pages(address, 16) == 16
    both.release()
    assert torch.equal(one.tensors["a"], pages(8, 1.0))
    assert resident_pages(address, 16) == 8
    one.release()
    assert resident_pages(address, 16) == 0


@pytest.mark.parametrize("mode", REGIONAL)
def test_memory_is_never_freed_under_a_tensor_that_leaked(tmp_path: Path, mode: ReadMode) -> None:
    stored = stored_model(tmp_path, {"a": pages(8, 1.0), "b": pages(8, 2.0)})
    pool = WeightPool(arena_bytes=1 << 20)
    holding = take(pool, stored, mode)
    address = min(tensor.data_ptr() for tensor in holding.tensors.values())
    leaked = holding.tensors["b"][5:]
    holding.release()
    assert pool.bytes(0) == 0
    again = take(pool, stored, mode, names=["a"])
    assert (leaked == 2.0).all()
    assert leaked.data_ptr() - 5 * 4 != again.tensors["a"].data_ptr()
    # Of the region that it keeps, only its own pages.
    assert resident_pages(address, 16) == 8
    del leaked
    assert resident_pages(address, 16) == 0


def test_padding_is_the_end_of_a_region_s_last_page(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": torch.ones(3), "b": torch.ones(2 * PAGE // 4)})
    # Two pages, then 12 bytes and the end of their page.
    for mode in REGIONAL:
        holding = take(WeightPool(), stored, mode)
        assert holding.padding_bytes == PAGE - 12
    for mode in (ReadMode.MAP, ReadMode.SLAB):
        assert take(WeightPool(), stored, mode).padding_bytes == 0


def headers_of(sizes: list[int], name: str = "f") -> FileHeader:
    """A file with tensors of so many bytes."""
    tensors: list[TensorHeader] = []
    end = 0
    for index, size in enumerate(sizes):
        tensors.append(
            TensorHeader(
                name=f"{name}{index}", dtype="U8", shape=(size,), begin=end, end=end + size
            )
        )
        end += size
    return FileHeader(name=name, tensors=tuple(tensors), data_start=8, identity=(0, 0, 0, 0))


@pytest.mark.parametrize("alignment", [64, 256])
@pytest.mark.parametrize("seed", range(5))
def test_tensors_lie_aligned_without_a_gap(alignment: int, seed: int) -> None:
    rng = random.Random(seed)
    chosen = [0, 1, 2, 12, 128, 768, 3072, 3 * 64, 8192, 30522 * 4, 100514]
    headers = [headers_of([rng.choice(chosen) for _ in range(40)], name) for name in "ab"]
    files, total = layout(
        [FilePart(header=header, tensors=header.tensors) for header in headers], alignment=alignment
    )
    pieces = [piece for _, group in files for piece in group]
    assert {piece.tensor.name for piece in pieces} == {
        tensor.name for header in headers for tensor in header.tensors if tensor.size_bytes
    }
    end = 0
    for piece in pieces:
        assert piece.begin == end
        factor = piece.tensor.size_bytes & -piece.tensor.size_bytes
        assert piece.begin % min(factor, alignment) == 0
        end = piece.end
    assert total == end
    assert all(group[0].tensor.name.startswith(header.name) for header, group in files)


# The arena


def test_a_slab_is_used_again_and_its_pages_with_it(tmp_path: Path) -> None:
    large = stored_model(tmp_path / "l", {"a": pages(200, 1.0)})
    small = stored_model(tmp_path / "s", {"a": pages(150, 2.0)})
    pool = WeightPool(arena_bytes=1 << 20)
    holding = take(pool, large, ReadMode.ARENA)
    address = holding.tensors["a"].data_ptr()
    assert pool.idle_bytes(0) == 0
    holding.release()
    assert pool.idle_bytes(0) == 200 * PAGE
    assert resident_pages(address, 200) == 200
    assert pool.idle_bytes(1) == 0
    elsewhere = take(pool, small, ReadMode.ARENA, position=1)
    assert elsewhere.tensors["a"].data_ptr() != address
    holding = take(pool, small, ReadMode.ARENA)
    assert holding.tensors["a"].data_ptr() == address
    assert torch.equal(holding.tensors["a"], pages(150, 2.0))
    # What it does not need has gone back.
    assert resident_pages(address, 200) == 150
    assert pool.idle_bytes(0) == 0
    holding.release()
    assert pool.idle_bytes(0) == 150 * PAGE
    pool.trim()
    assert pool.idle_bytes(0) == 0
    assert resident_pages(address, 200) == 0


def test_idle_slabs_keep_no_more_than_allowed_and_the_oldest_go_first(tmp_path: Path) -> None:
    models = [stored_model(tmp_path / str(i), {"a": pages(100, float(i))}) for i in range(3)]
    pool = WeightPool(arena_bytes=250 * PAGE)
    holdings = [take(pool, stored, ReadMode.ARENA) for stored in models]
    addresses = [holding.tensors["a"].data_ptr() for holding in holdings]
    for holding in holdings:
        holding.release()
    assert pool.idle_bytes(0) == 200 * PAGE
    assert [resident_pages(address, 100) for address in addresses] == [0, 100, 100]


def test_a_slab_too_large_to_be_kept_goes_and_the_others_stay(tmp_path: Path) -> None:
    small = stored_model(tmp_path / "s", {"a": pages(10, 1.0)})
    large = stored_model(tmp_path / "l", {"a": pages(300, 1.0)})
    pool = WeightPool(arena_bytes=50 * PAGE)
    for stored in (small, large):
        take(pool, stored, ReadMode.ARENA).release()
    assert pool.idle_bytes(0) == 10 * PAGE


def test_a_slab_with_holes_is_not_used_again(tmp_path: Path) -> None:
    stored = stored_model(tmp_path, {"a": pages(8, 1.0), "b": pages(8, 2.0)})
    pool = WeightPool(arena_bytes=1 << 20)
    both = take(pool, stored, ReadMode.ARENA)
    one = take(pool, stored, ReadMode.ARENA, names=["b"])
    both.release()
    one.release()
    assert pool.idle_bytes(0) == 0


def test_a_slab_outlives_its_pool_and_then_goes(tmp_path: Path) -> None:
    pool = WeightPool(arena_bytes=1 << 20)
    tensors = take(pool, stored_model(tmp_path, {"a": pages(8, 1.0)}), ReadMode.ARENA).tensors
    address = tensors["a"].data_ptr()
    del pool
    gc.collect()
    assert (tensors["a"] == 1.0).all()
    tensors.clear()
    assert resident_pages(address, 8) == 0


# Staging


def test_what_waits_for_the_staging_buffers_can_be_stopped(tmp_path: Path) -> None:
    pool = WeightPool()
    one = stored_model(tmp_path / "1", {"a": pages(1, 1.0)})
    two = stored_model(tmp_path / "2", {"a": pages(1, 2.0)})
    has_turn, go_on = threading.Event(), threading.Event()

    def block() -> bool:
        has_turn.set()
        assert go_on.wait(60)
        return False

    thread = threading.Thread(target=take, args=(pool, one, ReadMode.SLAB), kwargs={"stop": block})
    thread.start()
    try:
        assert has_turn.wait(60)
        with pytest.raises(LoadCancelled):
            take(pool, two, ReadMode.SLAB, stop=lambda: True)
        # Neither are buffers in use given back.
        pool.trim()
    finally:
        go_on.set()
        thread.join(60)
    assert torch.equal(take(pool, two, ReadMode.SLAB).tensors["a"], pages(1, 2.0))


# The mailbox


def test_what_is_posted_while_the_lock_is_held_is_done_when_it_is_left() -> None:
    done: list[int] = []
    mailbox: Mailbox[int] = Mailbox(done.append)
    mailbox.post(1)
    assert done == [1]
    with mailbox.locked():
        mailbox.post(2)
        assert done == [1]
    assert done == [1, 2]


def test_what_is_posted_by_what_is_being_done_is_done_too() -> None:
    done: list[int] = []

    def handle(item: int) -> None:
        done.append(item)
        if item < 3:
            mailbox.post(item + 1)

    mailbox = Mailbox(handle)
    mailbox.post(1)
    assert done == [1, 2, 3]
