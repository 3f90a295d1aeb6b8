"""Copies of weights as an engine keeps them: made, measured, and dropped until they are back."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from weakref import ref

import pytest
from tests.support.worker_engine import odd, odd_devices, running_processes, running_threads

from modelyard_server.execution.copies import Copies, MadeCopy
from modelyard_server.execution.engine import DeviceMemory, Unloaded
from modelyard_server.execution.memory import HeldModel
from modelyard_server.runtimes.api import (
    JsonValue,
    KeptWeights,
    LoadedModel,
    LoadSource,
    Witness,
)
from modelyard_server.runtimes.targets import Target
from modelyard_server.runtimes.tensors import TensorValue

PATIENCE_S = 60
ENCODER = {"a": 60, "b": 40}


class Kept(KeptWeights):
    """A copy that is held for as long as the test says."""

    def __init__(self, own_bytes: int = 5, shared: Mapping[str, int] | None = None) -> None:
        self.size = own_bytes
        self.common = dict(shared or {})
        self.is_read = False
        self.releases = 0
        self.on_release: Callable[[], Any] = lambda: None
        self.on_size: Callable[[], Any] = lambda: None

    @property
    def own_bytes(self) -> int:
        self.on_size()
        return self.size

    @property
    def shared(self) -> Mapping[str, int]:
        return self.common

    def release(self) -> None:
        self.releases += 1
        self.on_release()

    @property
    def is_held(self) -> bool:
        return not self.releases or self.is_read


class Model(LoadedModel):
    """A model that does one thing: it is kept."""

    def __init__(self, keep: Callable[[], KeptWeights | None]) -> None:
        self._keep = keep

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        raise AssertionError("it is not run")

    def measured_bytes(self) -> Mapping[int, int]:
        return {}

    def witnesses(self) -> tuple[Witness, ...]:
        return ()

    def keep(self) -> KeptWeights | None:
        return self._keep()

    def close(self) -> None:
        raise AssertionError("it is not closed")


@pytest.fixture
async def copies() -> AsyncIterator[Copies]:
    made = Copies(patience_s=0)
    made.start()
    yield made
    await made.stop(PATIENCE_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "copies"]


def held(keep: Callable[[], KeptWeights | None], name: str = "m") -> HeldModel:
    return HeldModel(name=name, home=0, sizes={}, loaded=Model(keep))


def made(copies: Copies, model: int, keep: Callable[[], KeptWeights | None]) -> MadeCopy | None:
    copies.begin(model)
    return copies.make(model, held(keep, f"m{model}"))


def now_and_peak(copies: Copies) -> tuple[int, int]:
    read = copies.read()
    return read.measured_bytes, read.peak_measured_bytes


def raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


# --- Making ---------------------------------------------------------------------------------------


async def test_what_copies_share_is_measured_once_for_as_long_as_one_is_there(
    copies: Copies,
) -> None:
    for model, own in ((1, 5), (2, 7)):
        made(copies, model, lambda own=own: Kept(own, ENCODER))  # type: ignore[misc]
    assert now_and_peak(copies) == (112, 112)
    assert await copies.drop(1) is True
    assert now_and_peak(copies) == (107, 112)
    assert await copies.drop(2) is True
    assert now_and_peak(copies) == (0, 112)


async def test_how_long_it_took_is_the_time_of_keeping_alone() -> None:
    ticks = [1.0]

    def slow() -> Kept:
        ticks[0] += 2.5
        kept = Kept(5)
        kept.on_size = lambda: ticks.__setitem__(0, ticks[0] + 100)
        return kept

    copies = Copies(clock=lambda: ticks[0])
    assert made(copies, 1, slow) == MadeCopy(own_bytes=5, keep_s=2.5)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "there is no memory for a copy of the weights of m1"),
        (ValueError("odd"), "a copy of the weights of m1 cannot be made"),
        (SystemExit(), "a copy of the weights of m1 cannot be made"),
    ],
)
async def test_one_that_cannot_be_made_is_logged_once_and_is_none(
    copies: Copies, error: BaseException, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert made(copies, 1, raising(error)) is None
    assert [record.getMessage() for record in caplog.records] == [text]
    assert now_and_peak(copies) == (0, 0)
    assert await copies.drop(1) is True
    assert made(copies, 1, Kept) is not None


async def test_a_failure_holds_nothing_of_the_model(copies: Copies) -> None:
    errors = [ValueError()]  # It lives on in here, with its traceback.
    model = held(lambda: raising(errors[0])())
    watch = ref(model.loaded)
    copies.begin(1)
    copies.make(1, model)
    del model.loaded
    assert watch() is None
    assert errors[0].__traceback__ is not None


async def test_one_that_does_not_say_what_it_holds_is_let_go_of(
    copies: Copies, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept()
    kept.on_size = raising(ValueError("odd"))
    assert made(copies, 1, lambda: kept) is None
    assert kept.releases == 1
    assert "does not say what it holds" in caplog.text
    assert await copies.drop(1) is True


async def test_a_model_without_anything_to_be_kept_has_none(copies: Copies) -> None:
    assert made(copies, 1, lambda: None) is None
    assert await copies.drop(1) is True


async def test_a_second_copy_of_a_model_is_refused(copies: Copies) -> None:
    kept = Kept()
    made(copies, 1, lambda: kept)
    with pytest.raises(ValueError, match="a copy of model 1 already"):
        copies.begin(1)
    kept.is_read = True
    assert await copies.drop(1) is False
    with pytest.raises(ValueError, match="a copy of model 1 already"):
        copies.begin(1)
    kept.is_read = False
    assert await copies.drop(1) is True
    copies.begin(1)
    with pytest.raises(ValueError, match="a copy of model 1 already"):
        copies.begin(1)
    copies.make(1, held(lambda: None))


# --- What it may hold -----------------------------------------------------------------------------


async def test_one_that_is_larger_than_it_may_be_is_let_go_of_at_once() -> None:
    ticks = [1.0]
    copies = Copies(clock=lambda: ticks[0])
    kept = Kept(5, ENCODER)

    def keep() -> Kept:
        ticks[0] += 2.5
        return kept

    copies.begin(1)
    assert copies.make(1, held(keep), most_bytes=4) == MadeCopy(5, 2.5, is_kept=False)
    assert kept.releases == 1
    assert now_and_peak(copies) == (0, 0)
    # There is none, and nothing that would have to be dropped before the next one.
    assert await copies.drop(1) is True
    copies.begin(1)
    assert copies.make(1, held(lambda: Kept(5, ENCODER)), most_bytes=5) == MadeCopy(5, 0.0)
    assert now_and_peak(copies) == (105, 105)


@pytest.mark.parametrize("running", [running_threads, running_processes])
async def test_an_engine_says_how_much_more_it_would_have_had_to_hold(running: Any) -> None:
    spec, home = odd(copy=30, shared={"a": 60}), Target.whole(0)
    async with running(odd_devices("")) as engine:
        for most_bytes in (0, 29):
            await engine.load(1, spec, home)
            unloaded = await engine.unload(1, keep=True, most_bytes=most_bytes)
            assert unloaded == Unloaded(freed={0: 100}, refused_bytes=30)
            assert engine.memory(0).measured_bytes == 0
            assert engine.copies == DeviceMemory(measured_bytes=0, peak_measured_bytes=0)
        assert (await engine.load(1, spec, home)).source is LoadSource.STORAGE
        # What it shares is not in what it may hold.
        unloaded = await engine.unload(1, keep=True, most_bytes=30)
        assert (unloaded.kept_bytes, unloaded.refused_bytes) == (30, None)
        assert engine.copies.measured_bytes == 90
        assert (await engine.load(1, spec, home)).source is LoadSource.COPY
        await engine.unload(1)
        assert await engine.drop_copy(1) is True


# --- Dropping -------------------------------------------------------------------------------------


async def test_one_that_is_being_made_cannot_be_dropped_yet(copies: Copies) -> None:
    copies.begin(1)
    assert await copies.drop(1) is False
    copies.make(1, held(Kept))
    assert await copies.drop(1) is True


async def test_one_that_is_read_from_is_measured_until_it_is_known_to_be_back(
    copies: Copies,
) -> None:
    kept = Kept(5, ENCODER)
    made(copies, 1, lambda: kept)
    kept.is_read = True
    assert await copies.drop(1) is False
    assert await copies.drop(1) is False
    assert now_and_peak(copies) == (105, 105)
    kept.is_read = False
    assert await copies.drop(1) is True
    assert await copies.drop(1) is True
    assert now_and_peak(copies) == (0, 105)


async def test_whoever_drops_one_waits_for_whoever_reads_from_it() -> None:
    copies = Copies(patience_s=PATIENCE_S)
    copies.start()
    kept, other = Kept(), Kept()
    made(copies, 1, lambda: kept)
    made(copies, 2, lambda: other)
    kept.is_read = True
    drops = [asyncio.create_task(copies.drop(1)) for _ in range(2)]
    while kept.releases < 4:  # noqa: ASYNC110 - a thread sets no events of the loop
        await asyncio.sleep(0)
    # Meanwhile others are dropped.
    assert await copies.drop(2) is True
    assert not any(drop.done() for drop in drops)
    kept.is_read = False
    assert await asyncio.gather(*drops) == [True, True]
    assert now_and_peak(copies) == (0, 10)
    await copies.stop(PATIENCE_S)


async def test_who_waits_for_an_old_copy_does_not_drop_a_new_one() -> None:
    copies = Copies(patience_s=PATIENCE_S)
    copies.start()
    gate, reached = threading.Event(), threading.Event()

    def hang() -> None:
        reached.set()
        gate.wait(PATIENCE_S)

    old, new = Kept(), Kept()
    old.on_release = hang
    made(copies, 1, lambda: old)
    # Both have asked for the old one by the time the first of them is answered.
    first, second = (asyncio.create_task(copies.drop(1)) for _ in range(2))
    await asyncio.to_thread(reached.wait, PATIENCE_S)
    old.on_release = lambda: None
    first.add_done_callback(lambda _: made(copies, 1, lambda: new))
    gate.set()
    assert (await first, await second) == (True, True)
    assert new.releases == 0
    assert now_and_peak(copies) == (5, 5)
    await copies.stop(PATIENCE_S)
    assert new.releases == 1


async def test_one_that_fails_to_let_go_is_back_when_it_says_so(
    copies: Copies, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept()
    kept.on_release = raising(ValueError("odd"))
    kept.is_read = True
    made(copies, 1, lambda: kept)
    assert await copies.drop(1) is False
    kept.is_read = False
    assert await copies.drop(1) is True
    assert "failed while it was let go of" in caplog.text


async def test_one_that_hangs_while_it_lets_go_does_not_hang_the_loop(copies: Copies) -> None:
    gate, reached = threading.Event(), threading.Event()

    def hang() -> None:
        reached.set()
        gate.wait(PATIENCE_S)

    kept = Kept()
    kept.on_release = hang
    made(copies, 1, lambda: kept)
    drop = asyncio.create_task(copies.drop(1))
    await asyncio.to_thread(reached.wait, PATIENCE_S)
    assert not drop.done()
    gate.set()
    assert await drop is True


async def test_a_stop_lets_go_of_all_and_keeps_none_that_comes_later() -> None:
    copies = Copies(patience_s=PATIENCE_S)
    copies.start()
    kept, other, late = Kept(), Kept(), Kept()
    made(copies, 1, lambda: kept)
    made(copies, 2, lambda: other)
    kept.is_read = True
    drop = asyncio.create_task(copies.drop(1))
    while not kept.releases:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0)
    copies.begin(3)
    stopped = threading.Event()

    def keep() -> Kept:
        stopped.wait(PATIENCE_S)
        return late

    making = asyncio.create_task(asyncio.to_thread(copies.make, 3, held(keep)))
    await asyncio.sleep(0)
    assert await copies.stop(PATIENCE_S) is True
    assert other.releases == 1
    stopped.set()
    assert await making is None
    assert late.releases == 1
    # Whatever begins to be made after that is not even copied.
    assert copies.make(4, held(raising(AssertionError()))) is None
    assert await drop is False
    assert now_and_peak(copies) == (0, 10)
    assert await copies.drop(1) is True
