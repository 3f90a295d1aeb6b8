"""Weights that are damaged, lie, change or go, on a server with worker processes and a store.

Whatever is done to one model: the reason is specific, what was reserved is back, and its neighbours
on the same and on another device go on answering as they did.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support import faulty_models, tiny_models
from tests.support.attacked_yard import (
    Attacked,
    X,
    attacked,
    check_text,
    is_stopped,
    neighbours,
    peak_growth,
    slow_file,
    stopped_after,
)
from tests.support.odd_modules import LYING
from tests.support.server import eventually, refusal_of

from modelyard import LoadFailed, ModelyardError, ResidencyState
from modelyard_server.weights.model_config import MAX_LAYERS

MIB = 2**20
MOST_GROWTH = 64 * MIB


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A file of the format, whatever the header is."""
    return struct.pack("<Q", len(header)) + header + data


def described(**tensors: dict[str, Any]) -> bytes:
    return with_header(json.dumps(tensors).encode(), bytes(8192))


def entry(begin: int, end: int, *, dtype: str = "F32", shape: list[int] | None = None) -> Any:
    size = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": size, "data_offsets": [begin, end]}


def many(count: int) -> bytes:
    """A header of so many empty tensors."""
    one = '"{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    return with_header(("{" + ",".join(one.format(f"{i:x}") for i in range(count)) + "}").encode())


def bombs() -> Iterator[tuple[str, bytes, str]]:
    """What is wrong, contents of a model.safetensors, and what the client is told."""
    yield "header of 2^63 bytes", b"\xff" * 7 + b"\x7f" + b"{" * 100, "it promises a header of"
    sparse = struct.pack("<Q", 2**30)
    yield "header of a gigabyte", sparse, "has a header of 1073741824 bytes; at most"
    yield "10^6 tensors", many(10**6), "has a header of"
    yield "100,001 tensors", many(100_001), "names more than 100000 tensors"
    yield "deep objects", with_header(b'{"a":' * 90_000 + b"1" + b"}" * 90_000), "not JSON"
    yield "deep lists", with_header(b'{"a":' + b"[" * 150_000 + b"]" * 150_000 + b"}"), "not JSON"
    yield "a number of 10^6 digits", with_header(b'{"a":' + b"1" * 10**6 + b"}"), "not JSON"
    weight = entry(0, 4096)
    yield "overlap", described(weight=weight, other=entry(4092, 8192)), "not where the tensor"
    yield "gap", described(weight=weight, other=entry(4100, 8192)), "not where the tensor"
    twice = json.dumps(weight)
    both = f'{{"weight":{twice},"weight":{twice}}}'.encode()
    yield "a name twice", with_header(both, bytes(4096)), "says a name twice"
    yield "data left over", described(weight=weight), "but 8192 follow the header"
    yield "short data", described(weight=entry(0, 4 * 4096)), "but 8192 follow the header"
    yield "backwards", described(weight=entry(8192, 0, shape=[2048])), "its shape contradicts"
    huge = [2**40, 2**40]
    yield "a shape beyond its bytes", described(weight=entry(0, 8192, shape=huge)), "contradicts"
    yield "an unknown type", described(weight=entry(0, 8192, dtype="F7")), "not served"
    yield "a tensor is missing", described(other=entry(0, 8192)), "'weight'"
    other = {"weight": weight, "other": entry(4096, 8192)}
    yield "a tensor is left over", described(**other), "'other'"
    yield "another shape", described(weight=entry(0, 8192)), "'weight'"


async def refused(under: Attacked, name: str) -> LoadFailed:
    """Registers a model that cannot be loaded; what the client is told of it."""
    error = await refusal_of(under.create(name))
    assert isinstance(error, LoadFailed), error
    check_text(str(error), under.base)
    return error


async def test_bombs_and_contradictions_cost_no_memory_and_disturb_nobody(tmp_path: Path) -> None:
    cases = list(bombs())
    for index, (_, content, _) in enumerate(cases):
        folder = tmp_path / "store" / f"bad-{index}"
        folder.mkdir(parents=True)
        file = folder / "model.safetensors"
        file.write_bytes(content)
        if len(content) == 8:
            os.truncate(file, 2**30 + 100)
    async with attacked(tmp_path) as under:
        ledger, pids = await under.ledger(), dict(under.engine.pids)

        async def attack() -> None:
            for index, (what, _, text) in enumerate(cases):
                error = await refused(under, f"bad-{index}")
                assert text in str(error), (what, error)
                assert not error.transient, what

        async with neighbours(under) as seen:
            growth = await peak_growth([*pids.values(), os.getpid()], attack)
        seen.check()
        assert growth < MOST_GROWTH
        assert await under.ledger() == ledger
        assert under.engine.pids == pids


async def test_configurations_of_the_impossible_are_refused_before_anything_is_built(
    tmp_path: Path,
) -> None:
    changes: dict[str, tuple[dict[str, object], str]] = {
        "wide": ({"hidden_size": 10**9}, "parameters, but the weights hold 21698"),
        "wider": ({"hidden_size": 2**31}, "'hidden_size' is beyond"),
        "long": ({"vocab_size": 10**9}, "parameters, but the weights hold 21698"),
        "deep": ({"num_hidden_layers": 10**6}, "'num_hidden_layers' is beyond"),
        "heads": ({"num_attention_heads": 10**9}, "no BertForSequenceClassification can be built"),
        "positions": ({"max_position_embeddings": 10**9}, "but the weights hold 21698"),
        "map": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        "remote": ({"trust_remote_code": True}, "trust_remote_code"),
        "pipelines": ({"custom_pipelines": {"x": {"impl": "evil.P"}}}, "custom_pipelines"),
        "inside": ({"text_config": {"auto_map": {"AutoConfig": "evil.C"}}}, "auto_map"),
        "all-layers": ({"num_hidden_layers": MAX_LAYERS}, "256 layers, but the weights hold only"),
    }
    for name, (change, _) in changes.items():
        folder = tiny_models.make_tiny_bert(tmp_path / "store" / name, seed=1, num_labels=2)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    less = tiny_models.make_tiny_bert(tmp_path / "store" / "less", seed=1, num_labels=2)
    tensors = load_file(less / "model.safetensors")
    tensors["bert.other"] = tensors.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(tensors, less / "model.safetensors")
    more = tiny_models.make_tiny_bert(tmp_path / "store" / "more", seed=1, num_labels=2)
    tensors = load_file(more / "model.safetensors") | {"bert.surplus": torch.ones(64)}
    save_file(tensors, more / "model.safetensors")
    nested = tiny_models.make_tiny_bert(tmp_path / "store" / "nested", seed=1, num_labels=2)
    (nested / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    good = tiny_models.make_tiny_bert(tmp_path / "store" / "good", seed=1, num_labels=2)
    assert good.is_dir()
    cases = {name: text for name, (_, text) in changes.items()}
    cases |= {"nested": "nested deeper than 32 levels"}
    async with attacked(tmp_path) as under:
        # Whatever the library needs for its first model is not the fault of those to come.
        await under.create_text("good")
        await under.client.predict("good", "the dog")
        await under.has_warm_zygote()
        ledger, pids = await under.ledger(), dict(under.engine.pids)

        async def attack() -> None:
            for name, text in cases.items():
                error = await refusal_of(under.create_text(name))
                assert isinstance(error, LoadFailed), (name, error)
                assert not error.transient, name
                assert text in str(error), (name, error)
                check_text(str(error), tmp_path)
            # Names are compared when it is loaded.
            await under.create_text("less")
            error = await refusal_of(under.client.predict("less", "the dog"))
            assert isinstance(error, LoadFailed)
            assert not error.transient
            assert "the weights lack 1 parameters" in str(error)
            assert "bert.encoder.layer.1.output.dense.weight" in str(error)
            check_text(str(error), tmp_path)

        async with neighbours(under) as seen:
            growth = await peak_growth([*pids.values(), os.getpid()], attack)
            # What the library leaves out is left out here as well.
            await under.create_text("more")
            answers = [await under.client.predict(name, "the dog") for name in ("good", "more")]
            first, second = (np.asarray(answer["probabilities"]) for answer in answers)
            np.testing.assert_array_equal(first, second)
            await under.unload("more")
        seen.check()
        assert growth < MOST_GROWTH
        assert await under.ledger() == ledger
        assert under.engine.pids == pids
        assert not (tmp_path / "executed").exists()


# --- Files that change ----------------------------------------------------------------------------


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def replace_file(file: Path) -> None:
    (file.parent / "new").write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    (file.parent / "new").replace(file)


def scribble(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\1\2\3\4")


@pytest.mark.parametrize("passes", [0, 1])
async def test_a_source_that_changes_during_its_import_is_refused_and_leaves_nothing(
    tmp_path: Path, passes: int
) -> None:
    changed = "model.safetensors changed while it was being imported"
    changes: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
        "cut": (cut, ("model.safetensors became shorter", changed)),
        "scribbled": (scribble, (changed,)),
        "replaced": (replace_file, ("the model's files changed", changed)),
    }
    async with attacked(tmp_path) as under:
        ledger, packs = await under.ledger(), under.packs
        for name, (change, texts) in changes.items():
            file = slow_file(under.folder(name))
            size = file.stat().st_size
            async with neighbours(under) as seen:
                error = await changed_during_import(under, file, size // 4, change, passes * size)
            seen.check()
            assert isinstance(error, LoadFailed), (name, error)
            assert error.transient, name
            assert any(text in str(error) for text in texts), (name, error)
            check_text(str(error), tmp_path)
            assert not list((tmp_path / "weights" / "tmp").iterdir())
            assert under.packs == packs
            assert await under.ledger() == ledger


async def changed_during_import(
    under: Attacked, file: Path, rows: int, change: Callable[[Path], object], after_bytes: int
) -> ModelyardError | None:
    """Changes a source once so many bytes of it, and some more, have been read."""
    size, pid = rows * 4, under.pid("files")
    async with stopped_after(pid, after_bytes + size // 8) as read:
        name = file.parent.name
        creating = asyncio.create_task(outcome(under.create(name, rows=rows)))
        await eventually("the import is held up", partial(is_stopped, pid))
        assert size // 8 <= read() - after_bytes < size
        change(file)
    return await creating


async def outcome(call: Awaitable[object]) -> ModelyardError | None:
    """What a call was refused for, if it was."""
    try:
        await call
    except ModelyardError as error:
        return error
    return None


async def test_a_source_that_changes_between_registration_and_load_is_looked_at_again(
    tmp_path: Path,
) -> None:
    names = ("cut", "scribbled", "header", "emptied", "removed", "folder")
    for name in names:
        faulty_models.make_weights(tmp_path / "store" / name, value=7.0)
    async with attacked(tmp_path) as under:
        for name in names:
            await under.create(name)
        ledger = await under.ledger()
        cut(under.folder("cut") / "model.safetensors")
        scribble(under.folder("scribbled") / "model.safetensors")
        with (under.folder("header") / "model.safetensors").open("r+b") as file:
            file.seek(20)
            file.write(b"\xff" * 10)
        (under.folder("emptied") / "model.safetensors").write_bytes(b"")
        (under.folder("removed") / "model.safetensors").unlink()
        (under.folder("folder") / "model.safetensors").unlink()
        under.folder("folder").rmdir()
        async with neighbours(under) as seen:
            for name, text in (
                ("cut", "model.safetensors is damaged: its tensors take 4096 bytes, but"),
                ("header", "model.safetensors is damaged: its header is not JSON"),
                ("emptied", "model.safetensors has 0 bytes"),
                ("removed", "model.safetensors"),
                ("folder", "the model's folder"),
            ):
                error = await refusal_of(under.client.predict(name, X))
                assert isinstance(error, LoadFailed), (name, error)
                assert text in str(error), (name, error)
                check_text(str(error), tmp_path)
            # Nothing is wrong with other content of the same shape.
            assert await under.value("scribbled") == 7.0
            await under.unload("scribbled")
        seen.check()
        assert await under.ledger() == ledger
        # Whoever is put right is served.
        async with neighbours(under) as seen:
            for name in names:
                faulty_models.make_weights(under.folder(name), value=8.0)
                await under.recovers(name, 8.0)
        seen.check()


async def test_what_is_done_to_the_source_of_a_resident_model_reaches_it_only_with_a_new_load(
    tmp_path: Path,
) -> None:
    names = ("cut", "overwritten", "removed")
    for name in names:
        faulty_models.make_weights(tmp_path / "store" / name, value=7.0, rows=MIB)
    async with attacked(tmp_path) as under:
        for name in names:
            await under.create(name, rows=MIB)
            assert await under.value(name) == 7.0
        pids = dict(under.engine.pids)
        async with neighbours(under) as seen:
            cut(under.folder("cut") / "model.safetensors")
            overwritten = under.folder("overwritten") / "model.safetensors"
            with overwritten.open("r+b") as file:
                start = 8 + struct.unpack("<Q", file.read(8))[0]
                file.seek(start)
                file.write(struct.pack("<f", 9.0) * MIB)
            (under.folder("removed") / "model.safetensors").unlink()
            for _ in range(20):
                for name in names:
                    assert await under.value(name) == 7.0
            for name in names:
                await under.unload(name)
            assert await under.value("overwritten") == 9.0
            for name, text in (("cut", "is damaged"), ("removed", "model.safetensors")):
                error = await refusal_of(under.client.predict(name, X))
                assert isinstance(error, LoadFailed), (name, error)
                assert text in str(error), (name, error)
                check_text(str(error), tmp_path)
        seen.check()
        assert under.engine.pids == pids


# --- Estimates ------------------------------------------------------------------------------------


UNIT = 225_000
"""Elements: 0.9 MB."""
OTHERS = 500_000
"""Elements: 2 MB."""
TIGHT = 12_000_000
"""A budget, for three others and one of up to 9 MB."""


@pytest.mark.parametrize(("declared", "real", "evictions"), [(1, 10, 2), (1, 4, 0), (10, 1, 2)])
async def test_an_estimate_that_is_far_off_evicts_what_is_needed_and_no_more(
    tmp_path: Path, declared: int, real: int, evictions: int
) -> None:
    flag = tmp_path / "flag"
    names = ("a", "b", "c")
    for name in (*names, "liar"):
        faulty_models.make_weights(tmp_path / "store" / name, value=7.0)
    async with attacked(tmp_path, budget=TIGHT) as under:
        for name in names:
            await under.create(name, LYING, flag=str(flag), there=OTHERS, gone=OTHERS)
            assert await under.value(name) == 7.0
        sizes = {"there": real * UNIT, "gone": declared * UNIT}
        await under.create("liar", LYING, flag=str(flag), **sizes)
        before = await under.yard.device("cuda:0")
        flag.touch()
        async with neighbours(under) as seen:
            assert await under.value("liar") == 7.0
            await under.yard.at_rest()
            after = await under.yard.device("cuda:0")
            assert after.resident_bytes <= TIGHT
            assert after.eviction_count - before.eviction_count == evictions
        # The near neighbour is small and always in use: it does not have to go for anybody.
        seen.check()
        assert (await under.yard.residency("liar")).state is ResidencyState.RESIDENT
        if real < declared:
            # What was kept free for nothing is free again: all of them fit.
            for name in names:
                assert await under.value(name) == 7.0
            assert (await under.yard.residency("liar")).state is ResidencyState.RESIDENT
        else:
            # What was learned counts: room is made before it is loaded, not after.
            await under.unload("liar")
            assert await under.value("a") == await under.value("b") == 7.0
            await under.value("liar")
        at_last = await under.yard.device("cuda:0")
        assert at_last.resident_bytes <= TIGHT
        assert at_last.peak_accounted_bytes == after.peak_accounted_bytes
