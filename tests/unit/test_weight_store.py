from __future__ import annotations

import errno
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.support.weight_folders import (
    Tensor,
    damage_of,
    data_bytes,
    numbers,
    read_back,
    write_model,
)

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError
from modelyard_server.weights.mapping import map_checkpoint
from modelyard_server.weights.model_files import ModelFolder, opened_folder
from modelyard_server.weights.safetensors_files import ITEM_SIZES, read_checkpoint
from modelyard_server.weights.store import StoreError, WeightStore, in_place, packs, sources

BODY = {"body.0": numbers(1, (64, 32)), "body.1": numbers(2, (32,)), "odd": numbers(3, (3,), "U8")}
WEIGHTS = "model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WeightStore]:
    opened = WeightStore.open(tmp_path / "store")
    yield opened
    opened.close()
    assert not list((tmp_path / "store/tmp").iterdir())
    assert damage_of(tmp_path / "store") == []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", BODY, config="{}", tokenizer='{"a": 1}')


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of weights that were read for digests or copies, one number a read."""
    counts: list[int] = []
    read = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int) -> int:
        count = read(descriptor, buffers, offset)
        counts.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    return counts


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(take: Callable[[], object], tmp_path: Path) -> ModelFilesError:
    """The error of a take that leaves the store as it was and names no path."""
    before = tree(tmp_path / "store")
    with pytest.raises(ModelFilesError) as caught:
        take()
    assert tree(tmp_path / "store") == before
    assert str(tmp_path) not in caught.value.text
    return caught.value


# --- what is taken ------------------------------------------------------------------------------


def test_a_stored_model_has_the_tensors_of_its_folder(store: WeightStore, model: Path) -> None:
    stored = store.take(model)
    source = read_checkpoint(model)
    assert stored.checkpoint.size_bytes == source.size_bytes
    assert {n: (t.dtype, t.shape) for n, t in stored.checkpoint.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in source.tensors.items()
    }
    assert read_back(stored) == BODY


def test_a_stored_model_is_mapped_as_its_folder_is(store: WeightStore, model: Path) -> None:
    stored = store.take(model)
    mapped = map_checkpoint(stored.packs, stored.checkpoint, stop=lambda: False).tensors
    plain = map_checkpoint(model, read_checkpoint(model), stop=lambda: False).tensors
    assert mapped.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(mapped[name].view(torch.uint8), tensor.view(torch.uint8))


def test_every_served_type_and_shape_is_kept(store: WeightStore, tmp_path: Path) -> None:
    tensors = {f"t.{dtype}": numbers(7, (3, 1), dtype) for dtype in ITEM_SIZES}
    tensors |= {"empty": Tensor("F32", (0, 4), b""), "scalar": numbers(5, (), "F64")}
    assert read_back(store.take(write_model(tmp_path / "types", tensors))) == tensors


def test_packs_are_safetensors_files_whose_tensors_are_aligned(
    store: WeightStore, tmp_path: Path
) -> None:
    tensors = {
        f"{dtype}.{size}": numbers(size, (size,), dtype)
        for dtype in ("U8", "F16", "F32", "F64")
        for size in (1, 3, 64, 1024, 3000)
    }
    stored = store.take(write_model(tmp_path / "odd", tensors))
    (header,) = stored.checkpoint.files
    with safe_open(tmp_path / "store/packs" / header.name, framework="pt") as file:
        assert set(file.keys()) == {t.identity for t in header.tensors}
    for tensor in header.tensors:
        start = header.data_start + tensor.begin
        assert start % ITEM_SIZES[tensor.dtype] == 0
        if tensor.size_bytes % 4096 == 0:
            assert start % 4096 == 0
    assert (tmp_path / "store/packs" / header.name).stat().st_mode & 0o222 == 0


def test_data_files_are_copied_and_code_is_not(store: WeightStore, model: Path) -> None:
    for name in ("modeling.py", "optimizer.bin", "pytorch_model.bin", "other.safetensors"):
        (model / name).write_bytes(b"x")
    (model / "vocab.txt").write_text("a\nb\n")
    folder = store.take(model).folder
    assert isinstance(folder, Path)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "weights.json",
    }
    assert (folder / "tokenizer.json").read_text() == '{"a": 1}'


def test_weights_alone_are_a_model(store: WeightStore, tmp_path: Path) -> None:
    assert read_back(store.take(write_model(tmp_path / "bare", BODY))) == BODY


def test_shards_are_the_same_model_as_one_file(
    store: WeightStore, tmp_path: Path, model: Path
) -> None:
    names = list(BODY)
    shards = write_model(
        tmp_path / "shards",
        {names[2]: BODY[names[2]]},
        {name: BODY[name] for name in names[:2]},
        config="{}",
        tokenizer='{"a": 1}',
    )
    assert store.take(shards) == store.take(model)


def test_fine_tunes_are_stored_as_one_body_and_their_heads(
    store: WeightStore, tmp_path: Path
) -> None:
    heads = [numbers(100 + n, (5, 7)) for n in range(10)]
    models = [
        store.take(write_model(tmp_path / f"m{n}", BODY | {"head": head}))
        for n, head in enumerate(heads)
    ]
    body = sum(len(tensor.data) for tensor in BODY.values())
    assert data_bytes(tmp_path / "store") == body + 10 * len(heads[0].data)
    for stored, head in zip(models, heads, strict=True):
        assert read_back(stored) == BODY | {"head": head}
        for name in BODY:
            ours, first = stored.checkpoint.tensors[name], models[0].checkpoint.tensors[name]
            assert (ours.identity, ours.begin) == (first.identity, first.begin)


def test_equal_tensors_of_one_model_are_stored_apart(store: WeightStore, tmp_path: Path) -> None:
    same = numbers(9, (6,))
    stored = store.take(write_model(tmp_path / "twins", {"b": same, "a": same, "c": same}))
    other = store.take(write_model(tmp_path / "single", {"z": same}))
    identities = {n: t.identity for n, t in stored.checkpoint.tensors.items()}
    plain = other.checkpoint.tensors["z"].identity
    assert identities == {"a": plain, "b": f"{plain}.2", "c": f"{plain}.3"}
    assert data_bytes(tmp_path / "store") == 3 * len(same.data)


def test_type_and_shape_are_part_of_an_identity(store: WeightStore, tmp_path: Path) -> None:
    data = bytes(range(16))
    tensors = {
        "a": Tensor("F32", (4,), data),
        "b": Tensor("I32", (4,), data),
        "c": Tensor("F32", (2, 2), data),
        "d": Tensor("F32", (1, 4), data),
    }
    stored = store.take(write_model(tmp_path / "m", tensors))
    digests = {t.identity.partition(".")[0] for t in stored.checkpoint.tensors.values()}
    assert len(digests) == 4


def test_a_long_header_is_cut_into_several_packs(
    store: WeightStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "_HEADER_BUDGET_BYTES", 500)
    tensors = {f"t{n}": numbers(n, (n + 1,)) for n in range(12)}
    stored = store.take(write_model(tmp_path / "many", tensors))
    assert len(stored.checkpoint.files) > 2
    assert read_back(stored) == tensors


def test_a_folder_is_read_in_place_without_identities(model: Path) -> None:
    stored = in_place(model)
    assert (stored.digest, stored.folder, stored.packs) == ("", model, model)
    assert stored.checkpoint == read_checkpoint(model)
    assert {t.identity for t in stored.checkpoint.tensors.values()} == {""}


def test_a_checkpoint_survives_pickling_with_its_cache(store: WeightStore, model: Path) -> None:
    checkpoint = store.take(model).checkpoint
    tensors = checkpoint.tensors
    assert checkpoint.tensors is tensors
    copy = pickle.loads(pickle.dumps(checkpoint))
    assert (copy, copy.tensors) == (checkpoint, tensors)


# --- when it is taken again ---------------------------------------------------------------------


def test_a_known_folder_is_not_read_again(
    store: WeightStore, model: Path, reads: list[int]
) -> None:
    first = store.take(model)
    assert sum(reads) == 2 * first.checkpoint.size_bytes
    reads.clear()
    assert store.take(model) is first
    assert reads == []


def test_a_known_folder_is_not_read_again_by_the_next_server(
    tmp_path: Path, model: Path, reads: list[int]
) -> None:
    store = WeightStore.open(tmp_path / "store")
    first = store.take(model)
    store.close()
    reads.clear()
    store = WeightStore.open(tmp_path / "store")
    assert store.take(model) == first
    assert reads == []
    store.close()


def test_known_tensors_are_read_once_and_not_written(
    store: WeightStore, tmp_path: Path, model: Path, reads: list[int]
) -> None:
    first = store.take(model)
    reads.clear()
    second = store.take(write_model(tmp_path / "copy", BODY, config="{}", tokenizer='{"a": 1}'))
    assert second is first
    assert sum(reads) == first.checkpoint.size_bytes


def test_an_unrelated_file_changes_nothing(
    store: WeightStore, model: Path, reads: list[int]
) -> None:
    first = store.take(model)
    reads.clear()
    (model / "README.md").write_text("x")
    assert store.take(model) is first
    assert reads == []


@pytest.mark.parametrize("restart", [False, True])
def test_a_tokenizer_that_comes_changes_and_goes_is_noticed(
    tmp_path: Path, reads: list[int], restart: bool
) -> None:
    model = write_model(tmp_path / "model", BODY)
    store = WeightStore.open(tmp_path / "store")

    def tokenizer() -> str | None:
        nonlocal store
        if restart:
            store.close()
            store = WeightStore.open(tmp_path / "store")
        folder = store.take(model).folder
        assert isinstance(folder, Path)
        path = folder / "tokenizer.json"
        return path.read_text() if path.exists() else None

    assert tokenizer() is None
    reads.clear()
    (model / "tokenizer.json").write_text("1")
    assert tokenizer() == "1"
    (model / "tokenizer.json").write_text("2")
    assert tokenizer() == "2"
    (model / "tokenizer.json").unlink()
    assert tokenizer() is None
    # The weights were known all the time.
    assert reads == []
    store.close()


def test_weights_overwritten_in_place_are_noticed_even_if_their_time_is_set_back(
    store: WeightStore, model: Path
) -> None:
    store.take(model)
    path = model / WEIGHTS
    status = path.stat()
    other = BODY | {"body.0": numbers(55, (64, 32))}
    write_model(model, other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert read_back(store.take(model)) == other


def test_weights_that_replace_shards_are_noticed(store: WeightStore, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {"a": numbers(1)}, {"b": numbers(2)})
    assert store.take(model).checkpoint.tensors.keys() == {"a", "b"}
    write_model(model, {"c": numbers(3)})
    assert store.take(model).checkpoint.tensors.keys() == {"c"}


def test_a_folder_that_goes_is_missing(store: WeightStore, tmp_path: Path, model: Path) -> None:
    store.take(model)
    model.rename(tmp_path / "elsewhere")
    assert "missing" in refused(lambda: store.take(model), tmp_path).text


def test_a_folder_below_a_root_is_not_followed_through_a_link(
    store: WeightStore, tmp_path: Path, model: Path
) -> None:
    folder = ModelFolder(root=tmp_path, parts=("model",))
    assert read_back(store.take(folder)) == BODY
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in refused(lambda: store.take(folder), tmp_path).text
    model.unlink()


# --- what is refused ----------------------------------------------------------------------------


def test_damaged_weights_are_refused(store: WeightStore, tmp_path: Path, model: Path) -> None:
    with (model / WEIGHTS).open("r+b") as file:
        file.truncate(200)
    assert WEIGHTS in refused(lambda: store.take(model), tmp_path).text


def test_a_tokenizer_beyond_the_limit_is_refused_by_name(
    store: WeightStore, tmp_path: Path, model: Path
) -> None:
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate((128 << 20) + 1)
    text = refused(lambda: store.take(model), tmp_path).text
    assert text == f"tokenizer.json has {(128 << 20) + 1} bytes; at most {128 << 20} are read"


def test_a_linked_configuration_is_refused_and_a_linked_vocabulary_left_out(
    store: WeightStore, tmp_path: Path, model: Path
) -> None:
    (model / "vocab.txt").symlink_to("config.json")
    folder = store.take(model).folder
    assert isinstance(folder, Path)
    assert not (folder / "vocab.txt").exists()
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("tokenizer.json")
    assert "symbolic link" in refused(lambda: store.take(model), tmp_path).text


def change_while_read(model: Path, change: Callable[[], object], at: int) -> Callable[[], bool]:
    """A stop check that never stops, but changes something when it is asked for the n-th time."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == at:
            change()
        return False

    return stop


@pytest.mark.parametrize("at", range(1, 7))
def test_a_source_that_changes_while_it_is_read_is_refused(
    store: WeightStore, tmp_path: Path, model: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelyard_server.weights.store.imports.settle", lambda *_: None)
    other = BODY | {"body.0": numbers(77, (64, 32))}
    stop = change_while_read(model, lambda: write_model(model, other), at)
    assert refused(lambda: store.take(model, stop=stop), tmp_path).transient
    assert read_back(store.take(model)) == other


@pytest.mark.parametrize("at", range(1, 7))
def test_a_source_that_shrinks_while_it_is_read_is_refused(
    store: WeightStore, tmp_path: Path, model: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelyard_server.weights.store.imports.settle", lambda *_: None)
    stop = change_while_read(model, lambda: os.truncate(model / WEIGHTS, 300), at)
    assert refused(lambda: store.take(model, stop=stop), tmp_path).transient


def test_bytes_that_change_unseen_between_digest_and_copy_are_refused(
    store: WeightStore, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, count = os.preadv, 0

    def lying(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal count
        count += 1
        size = read(descriptor, buffers, offset)
        if count > len(BODY):
            buffers[0][0] ^= 1
        return size

    monkeypatch.setattr(os, "preadv", lying)
    assert "changed" in refused(lambda: store.take(model), tmp_path).text


def test_a_source_that_cannot_be_read_is_refused(
    store: WeightStore, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(os, "preadv", failing)
    error = refused(lambda: store.take(model), tmp_path)
    assert error.transient
    assert error.text == f"{WEIGHTS} cannot be read: input/output error"


@pytest.mark.parametrize("at", range(1, 7))
def test_a_cancelled_import_leaves_nothing(
    store: WeightStore, tmp_path: Path, model: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelyard_server.weights.store.imports.settle", lambda *_: None)
    before = tree(tmp_path / "store")
    answers = iter([False] * (at - 1) + [True] * 100)
    with pytest.raises(LoadCancelled):
        store.take(model, stop=lambda: next(answers))
    assert tree(tmp_path / "store") == before


def test_a_file_written_this_moment_is_looked_at_again_later(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened_folder(model) as directory:
        snapshot = sources.take_snapshot(directory, read_checkpoint(model))
    newest = max(identity[4] for _, identity in snapshot.files)
    clock = newest
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal clock
        slept.append(seconds)
        clock += int(seconds * 1e9)

    monkeypatch.setattr("time.time_ns", lambda: clock)
    monkeypatch.setattr("time.sleep", sleep)
    sources.settle(snapshot, lambda: False)
    assert sum(slept) == pytest.approx(0.02)
    slept.clear()
    sources.settle(snapshot, lambda: False)
    clock = newest - 1
    sources.settle(snapshot, lambda: False)
    assert slept == []


# --- the store's own disk -----------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(
    store: WeightStore, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.statvfs(tmp_path)
    fields = [*status]
    fields[1], fields[4] = 1, 5000  # fragment size, available fragments
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    error = refused(lambda: store.take(model), tmp_path)
    assert error.transient
    assert error.text.endswith("bytes for this model, and its disk has 5000 free")
    needed = int(error.text.split("needs ")[1].split(" ")[0])
    assert needed > read_checkpoint(model).size_bytes


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("function", ["fsync", "replace", "rename", "mkdir"])
def test_a_disk_that_fails_leaves_nothing(
    store: WeightStore,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    code: int,
) -> None:
    calls = 0
    real = getattr(os, function)

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(code, "")
        return real(*arguments, **named)

    fails_at = -1
    head: dict[str, Tensor] = {}
    write_model(tmp_path / "probe", {"p": numbers(8)}, config="[]", tokenizer="[]")
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing)
        store.take(tmp_path / "probe")
    count = calls
    assert count >= 1
    for fails_at in range(1, count + 1):
        calls = 0
        head = {"head": numbers(1000 + fails_at)}
        write_model(model, BODY | head)
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing)
            if function == "replace" and fails_at == count:
                # The entry of the index, which costs reading the model again, no more.
                store.take(model)
            else:
                error = refused(partial(store.take, model), tmp_path)
                assert error.transient
                assert error.text.endswith(os.strerror(code).lower())
        assert list((tmp_path / "store/tmp").iterdir()) == []
        assert damage_of(tmp_path / "store") == []
    assert read_back(store.take(model)) == BODY | head


def cut(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size - 1)


def overwrite_start(path: Path) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"\x00" * 40)


@pytest.mark.parametrize("damage", [Path.unlink, cut, overwrite_start])
@pytest.mark.parametrize(
    "pattern", ["packs/*", "models/*/weights.json", "models/*/tokenizer.json", "index/*"]
)
def test_a_damaged_store_takes_the_model_again(
    tmp_path: Path, model: Path, damage: Callable[[Path], None], pattern: str
) -> None:
    root = tmp_path / "store"
    store = WeightStore.open(root)
    first = store.take(model)
    store.close()
    (path,) = root.glob(pattern)
    damage(path)
    store = WeightStore.open(root)
    again = store.take(model)
    assert again.digest == first.digest
    assert read_back(again) == BODY
    assert damage_of(root) == []
    store.close()


@pytest.mark.parametrize("what", ["pack", "companion", "manifest"])
def test_verify_finds_a_flipped_bit_and_the_next_take_heals(
    store: WeightStore, tmp_path: Path, model: Path, what: str
) -> None:
    stored = store.take(model)
    sibling = write_model(tmp_path / "sibling", BODY | {"head": numbers(4)})
    store.take(sibling)
    assert store.verify(stored) == ()
    assert isinstance(stored.folder, Path)
    place = {
        "pack": tmp_path / "store/packs" / stored.checkpoint.files[0].name,
        "companion": stored.folder / "tokenizer.json",
        "manifest": stored.folder / "weights.json",
    }[what]
    place.chmod(0o600)
    with place.open("r+b") as file:
        tensor = stored.checkpoint.tensors["body.0"]
        offset = stored.checkpoint.files[0].data_start + tensor.begin if what == "pack" else 3
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    expected = {"pack": "body.0", "companion": "tokenizer.json", "manifest": "weights.json"}[what]
    assert store.verify(stored) == (expected,)
    assert read_back(store.take(model)) == BODY
    assert read_back(store.take(sibling)) == BODY | {"head": numbers(4)}
    assert store.verify(store.take(model)) == ()


# --- many at once -------------------------------------------------------------------------------


def test_threads_that_want_the_same_import_it_once(
    store: WeightStore, model: Path, reads: list[int]
) -> None:
    gate = threading.Barrier(8)

    def take() -> object:
        gate.wait()
        return store.take(model)

    with ThreadPoolExecutor(8) as pool:
        taken = [future.result() for future in [pool.submit(take) for _ in range(8)]]
    assert all(stored == taken[0] for stored in taken)
    assert sum(reads) == 2 * read_checkpoint(model).size_bytes


def test_equal_models_imported_at_once_are_stored_once(store: WeightStore, tmp_path: Path) -> None:
    folders = [write_model(tmp_path / f"m{n}", BODY, config="{}") for n in range(6)]
    gate = threading.Barrier(len(folders))

    def take(folder: Path) -> object:
        gate.wait()
        return store.take(folder)

    with ThreadPoolExecutor(len(folders)) as pool:
        taken = list(pool.map(take, folders))
    assert all(stored == taken[0] for stored in taken)
    assert data_bytes(tmp_path / "store") == sum(len(tensor.data) for tensor in BODY.values())
    assert store.usage().model_count == 1


def test_who_waited_for_a_cancelled_import_makes_its_own(store: WeightStore, model: Path) -> None:
    reading, cancel = threading.Event(), threading.Event()

    def first_stop() -> bool:
        reading.set()
        assert cancel.wait(60)
        return True

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.take, model, stop=first_stop)
        assert reading.wait(60)
        waiting = threading.Event()

        def second_stop() -> bool:
            waiting.set()
            return False

        second = pool.submit(store.take, model, stop=second_stop)
        assert waiting.wait(60)
        cancel.set()
        with pytest.raises(LoadCancelled):
            first.result()
        assert read_back(second.result()) == BODY


def test_who_waits_for_an_import_gets_its_error_or_can_be_cancelled(
    store: WeightStore, model: Path
) -> None:
    reading, proceed = threading.Event(), threading.Event()

    def first_stop() -> bool:
        reading.set()
        assert proceed.wait(60)
        os.truncate(model / WEIGHTS, 10)
        return False

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.take, model, stop=first_stop)
        assert reading.wait(60)
        with pytest.raises(LoadCancelled):
            store.take(model, stop=lambda: True)
        waiting = threading.Event()

        def second_stop() -> bool:
            waiting.set()
            return False

        second = pool.submit(store.take, model, stop=second_stop)
        assert waiting.wait(60)
        proceed.set()
        for future in (first, second):
            with pytest.raises(ModelFilesError):
                future.result()


# --- several servers, and removing --------------------------------------------------------------


def test_two_servers_share_a_store(tmp_path: Path, model: Path, reads: list[int]) -> None:
    one, two = WeightStore.open(tmp_path / "store"), WeightStore.open(tmp_path / "store")
    first = one.take(model)
    reads.clear()
    assert two.take(model) == first
    assert reads == []
    tuned = write_model(tmp_path / "tuned", BODY | {"head": numbers(4)})
    assert read_back(two.take(tuned)) == BODY | {"head": numbers(4)}
    assert data_bytes(tmp_path / "store") == read_checkpoint(tuned).size_bytes
    # Neither removes what the other may be using.
    assert one.collect([]) == 0
    two.close()
    assert one.collect([]) > 0
    assert one.usage().model_count == 0
    one.close()


def test_a_server_does_not_sweep_what_another_is_writing(tmp_path: Path, model: Path) -> None:
    one = WeightStore.open(tmp_path / "store")
    writing, proceed = threading.Event(), threading.Event()

    def stop() -> bool:
        if any((tmp_path / "store/tmp").iterdir()):
            writing.set()
            assert proceed.wait(60)
        return False

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(one.take, model, stop=stop)
        assert writing.wait(60)
        two = WeightStore.open(tmp_path / "store")
        proceed.set()
        assert read_back(future.result()) == BODY
    two.close()
    one.close()


def test_what_a_dead_import_left_is_swept(tmp_path: Path) -> None:
    WeightStore.open(tmp_path / "store").close()
    (tmp_path / "store/tmp/half").mkdir()
    (tmp_path / "store/tmp/half/config.json").write_text("{")
    (tmp_path / "store/tmp/pack").write_bytes(b"x")
    WeightStore.open(tmp_path / "store").close()
    assert list((tmp_path / "store/tmp").iterdir()) == []


def test_collect_removes_what_nobody_needs_and_nothing_else(
    store: WeightStore, tmp_path: Path, model: Path
) -> None:
    first = store.take(model)
    tuned = write_model(tmp_path / "tuned", BODY | {"head": numbers(4)})
    second = store.take(tuned)
    alone = store.take(write_model(tmp_path / "alone", {"x": numbers(50, (1000,))}))
    before = store.usage()
    assert (before.model_count, before.pack_count) == (3, 3)
    # The tuned one needs the pack that came with the first.
    freed = store.collect([second.digest])
    after = store.usage()
    assert (after.model_count, after.pack_count) == (1, 2)
    assert freed == before.stored_bytes - after.stored_bytes > alone.checkpoint.size_bytes
    assert after.source_bytes == (tuned / WEIGHTS).stat().st_size
    assert store.take(tuned) is second
    assert read_back(second) == BODY | {"head": numbers(4)}
    assert store.take(model) == first
    assert store.collect([first.digest, second.digest]) == 0


def test_what_is_removed_before_it_is_remembered_is_taken_again(
    store: WeightStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store._known.put
    removed: list[int] = []

    def late(*arguments: Any) -> None:
        if not removed:
            removed.append(store.collect([]))
        put(*arguments)

    monkeypatch.setattr(store._known, "put", late)
    stored = store.take(model)
    assert removed[0] > stored.checkpoint.size_bytes
    assert read_back(stored) == BODY
    assert store.take(model) is stored


def test_a_damaged_pack_that_an_import_replaces_is_noticed_by_all_models(
    store: WeightStore, tmp_path: Path, model: Path
) -> None:
    stored = store.take(model)
    overwrite_start(tmp_path / "store/packs" / stored.checkpoint.files[0].name)
    twin = store.take(write_model(tmp_path / "twin", BODY))
    again = store.take(model)
    assert again.checkpoint == twin.checkpoint != stored.checkpoint
    map_checkpoint(again.packs, again.checkpoint, stop=lambda: False)


def test_collect_removes_packs_that_cannot_be_read(
    store: WeightStore, tmp_path: Path, model: Path
) -> None:
    stored = store.take(model)
    (tmp_path / "store/packs/damaged.safetensors").write_bytes(b"x" * 100)
    assert store.collect([stored.digest]) == 100
    assert read_back(stored) == BODY


def test_a_pack_that_another_server_replaced_is_found_by_verify(
    store: WeightStore, tmp_path: Path, model: Path
) -> None:
    stored = store.take(model)
    pack = tmp_path / "store/packs" / stored.checkpoint.files[0].name
    (tmp_path / "new").write_bytes(pack.read_bytes())
    (tmp_path / "new").replace(pack)
    assert store.verify(stored) == ()
    again = store.take(model)
    assert again.checkpoint.files[0].identity != stored.checkpoint.files[0].identity
    map_checkpoint(again.packs, again.checkpoint, stop=lambda: False)


def test_usage_counts_what_the_sources_take(store: WeightStore, tmp_path: Path) -> None:
    folders = [write_model(tmp_path / f"m{n}", BODY, config="{}") for n in range(3)]
    for folder in folders:
        store.take(folder)
    usage = store.usage()
    assert (usage.model_count, usage.pack_count) == (1, 1)
    assert usage.source_bytes == sum(
        path.stat().st_size for folder in folders for path in folder.iterdir()
    )
    assert usage.stored_bytes == sum(
        path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file()
    )


# --- folders that are no store ------------------------------------------------------------------


def make_file(folder: Path) -> None:
    folder.write_text("x")


def make_other_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "precious.txt").write_text("x")


def make_future_store(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "store.json").write_text('{"format": 2}')


def make_torn_store(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "store.json").write_text("{")


def make_open_folder(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def make_blocked(folder: Path) -> None:
    make_future_store(folder)
    (folder / "store.json").write_text('{"format": 1}')
    (folder / "packs").write_text("x")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (make_file, "not a folder"),
        (make_other_folder, "holds other files"),
        (make_future_store, "has format 2; this version reads format 1"),
        (make_torn_store, "has format unknown"),
        (make_open_folder, "written to by others"),
        (make_blocked, "not a folder"),
    ],
)
def test_an_unusable_folder_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], None], text: str
) -> None:
    folder = tmp_path / "store"
    make(folder)
    before = tree(tmp_path)
    with pytest.raises(StoreError, match=text) as caught:
        WeightStore.open(folder)
    assert str(tmp_path) not in caught.value.text
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WeightStore.open(tmp_path / "store").close()

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "")

    monkeypatch.setattr(Path, "touch", failing)
    with pytest.raises(StoreError, match="read-only file system"):
        WeightStore.open(tmp_path / "store")


def test_a_store_is_for_its_owner_alone(tmp_path: Path) -> None:
    WeightStore.open(tmp_path / "a/store").close()
    assert (tmp_path / "a/store").stat().st_mode & 0o777 == 0o700
