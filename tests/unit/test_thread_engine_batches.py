"""The engine of threads runs together what waits together, and what is wrong stays with its own."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest
from tests.support.toy_engine import PATIENCE_S, Toy, ToyRuntime, spec_of, toy_devices

from modelyard_server.execution.batcher import BatchLimits
from modelyard_server.execution.engine import ModelFailed, RunOutcome, Work
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.runtimes.api import JsonValue, Prepared
from modelyard_server.runtimes.targets import Target
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

GATE = "gate"
"""A text that holds the lane up until the test lets it go."""


class Batches:
    """What the toys of a test do and have done.

    Attributes:
        ran: the texts of each run, together.
        gate: what a run with GATE waits for.
        began: set when it does.
        fail: raises what a run is to raise.
    """

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.gate = threading.Event()
        self.began = threading.Event()
        self.fail: Callable[[list[str]], None] = lambda texts: None
        self.answers: Callable[[list[Any]], list[Any]] = lambda answers: answers
        self.prepared: list[str] = []


class BatchToy(Toy):
    """Answers texts in capitals, together."""

    batches: Batches

    def prepare(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> Prepared | None:
        (value,) = inputs
        texts = [str(text) for text in value.data]
        self.batches.prepared += texts
        if "bad" in texts:
            raise TensorError(value.name, "is bad")
        if "alone" in texts:
            return None
        return Prepared(key=(), rows=len(texts), most_rows=8, content=texts)

    def run_batch(self, requests: Sequence[Prepared]) -> Sequence[tuple[TensorValue, ...]]:
        assert self.parts, "it is run after it was closed"
        texts = [text for request in requests for text in request.content]
        self.batches.ran.append(texts)
        if GATE in texts:
            self.batches.began.set()
            assert self.batches.gate.wait(PATIENCE_S)
        self.batches.fail(texts)
        answers = [(text_of(*(t.upper() for t in request.content)),) for request in requests]
        return self.batches.answers(answers)

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        self.batches.ran.append(["run", *map(str, inputs[0].data)])
        self.batches.fail(["run"])
        return tuple(inputs)


def text_of(*texts: str) -> TensorValue:
    return TensorValue(name="x", dtype=DType.TEXT, shape=(len(texts),), data=texts)


class Asked:
    """A request and what became of it."""

    def __init__(
        self,
        engine: ThreadEngine,
        *texts: str,
        model: int = 1,
        client: str = "",
        waited_s: float = 0.0,
    ) -> None:
        self.texts = texts
        self.outcomes: list[RunOutcome | None] = []
        self._done = asyncio.Event()
        self.work: Work = engine.run(
            model, (text_of(*texts),), {}, self._on_done, lambda: client, waited_s
        )

    def _on_done(self, outcome: RunOutcome | None) -> None:
        self.outcomes.append(outcome)
        self._done.set()

    async def get(self) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            await self._done.wait()
        (outcome,) = self.outcomes
        return outcome

    async def check(self) -> None:
        """It was answered, with its own answer."""
        (value,) = await self.get()
        assert value.data == tuple(text.upper() for text in self.texts)


@pytest.fixture
def batches() -> Batches:
    return Batches()


@pytest.fixture
async def engine(batches: Batches) -> AsyncIterator[ThreadEngine]:
    async for made in engines(batches, BatchLimits()):
        yield made


async def engines(batches: Batches, limits: BatchLimits) -> AsyncIterator[ThreadEngine]:
    runtime = ToyRuntime()
    runtime.kind = type("OwnBatchToy", (BatchToy,), {"batches": batches})
    made = ThreadEngine(devices=toy_devices("cpu"), runtimes={"toy": runtime}, batches=limits)
    await made.start(["toy"])
    await made.load(1, spec_of("a"), Target.whole(0))
    await made.load(2, spec_of("b"), Target.whole(0))
    yield made
    batches.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await made.stop(PATIENCE_S)


async def held_up(engine: ThreadEngine, batches: Batches) -> Asked:
    """The lane is busy: what is asked now gathers."""
    asked = Asked(engine, GATE, model=2)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.to_thread(batches.began.wait, PATIENCE_S)
    return asked


async def test_an_idle_lane_runs_one_request_at_once(
    engine: ThreadEngine, batches: Batches
) -> None:
    await Asked(engine, "a").check()
    assert batches.ran == [["a"]]


async def test_requests_that_wait_share_one_run_and_each_has_its_own_answer(
    engine: ThreadEngine, batches: Batches
) -> None:
    first = await held_up(engine, batches)
    asked = [Asked(engine, *texts) for texts in ("a", "bc", "d")]
    batches.gate.set()
    for each in (first, *asked):
        await each.check()
    assert batches.ran == [[GATE], ["a", "b", "c", "d"]]
    assert sorted(batches.prepared) == ["a", "b", "c", "d", GATE]


async def test_models_do_not_share_runs(engine: ThreadEngine, batches: Batches) -> None:
    await held_up(engine, batches)
    asked = [Asked(engine, text, model=model) for text, model in (("a", 1), ("b", 2), ("c", 1))]
    batches.gate.set()
    for each in asked:
        await each.check()
    assert batches.ran == [[GATE], ["a", "c"], ["b"]]


async def test_a_batch_ends_at_the_models_own_limit(engine: ThreadEngine, batches: Batches) -> None:
    await held_up(engine, batches)
    asked = [Asked(engine, str(i)) for i in range(11)]
    batches.gate.set()
    for each in asked:
        await each.check()
    assert [len(texts) for texts in batches.ran] == [1, 8, 3]


async def test_limit_one_turns_batching_off(batches: Batches) -> None:
    async for engine in engines(batches, BatchLimits(most_rows=1)):
        await held_up(engine, batches)
        asked = [Asked(engine, str(i)) for i in range(3)]
        batches.gate.set()
        for each in asked:
            await each.check()
        assert batches.ran == [[GATE], ["0"], ["1"], ["2"]]


async def test_what_cannot_share_a_run_has_its_own(engine: ThreadEngine, batches: Batches) -> None:
    await held_up(engine, batches)
    asked = [Asked(engine, text) for text in ("a", "alone", "b")]
    batches.gate.set()
    await asked[0].check()
    assert await asked[1].get() == (text_of("alone"),)
    await asked[2].check()
    assert batches.ran == [[GATE], ["a", "b"], ["run", "alone"]]
    assert sorted(batches.prepared) == ["a", "alone", "b", GATE]  # Each once.


async def test_a_request_that_is_refused_is_refused_alone_and_runs_not_at_all(
    engine: ThreadEngine, batches: Batches
) -> None:
    await held_up(engine, batches)
    asked = [Asked(engine, text) for text in ("a", "bad", "b")]
    batches.gate.set()
    await asked[0].check()
    await asked[2].check()
    assert isinstance(await asked[1].get(), TensorError)
    assert batches.ran == [[GATE], ["a", "b"]]


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_a_row_that_breaks_the_run_fails_alone(
    engine: ThreadEngine, batches: Batches, position: int
) -> None:
    def fail(texts: list[str]) -> None:
        if "broken" in texts:
            raise ValueError("boom")

    batches.fail = fail
    await held_up(engine, batches)
    texts = ["a", "b", "c"]
    texts[position] = "broken"
    asked = [Asked(engine, text) for text in texts]
    batches.gate.set()
    for i, each in enumerate(asked):
        if i != position:
            await each.check()
    outcome = await asked[position].get()
    assert isinstance(outcome, ModelFailed)
    assert outcome.exception_type == "ValueError"
    assert batches.ran == [[GATE], texts, *([text] for text in texts)]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory: you tried")], ids=repr
)
async def test_a_batch_too_large_for_memory_is_cut_in_two(
    engine: ThreadEngine, batches: Batches, error: Exception
) -> None:
    def fail(texts: list[str]) -> None:
        if len(texts) > 2:
            raise error

    batches.fail = fail
    await held_up(engine, batches)
    asked = [Asked(engine, str(i)) for i in range(7)]
    batches.gate.set()
    for each in asked:
        await each.check()
    assert [len(texts) for texts in batches.ran] == [1, 7, 4, 2, 2, 3, 2, 1]


async def test_a_request_too_large_for_memory_fails_alone(
    engine: ThreadEngine, batches: Batches
) -> None:
    def fail(texts: list[str]) -> None:
        if "huge" in texts:
            raise MemoryError

    batches.fail = fail
    await held_up(engine, batches)
    asked = [Asked(engine, text) for text in ("a", "huge", "b")]
    batches.gate.set()
    await asked[0].check()
    await asked[2].check()
    outcome = await asked[1].get()
    assert isinstance(outcome, ModelFailed)
    assert outcome.exception_type == "MemoryError"


async def test_a_model_that_loses_answers_gives_nobody_the_wrong_one(
    engine: ThreadEngine, batches: Batches
) -> None:
    batches.answers = lambda answers: answers[:-1] if len(answers) > 1 else answers
    await held_up(engine, batches)
    asked = [Asked(engine, text) for text in "abc"]
    batches.gate.set()
    for each in asked:
        await each.check()


async def test_requests_that_are_abandoned_while_they_wait_are_left_out(
    engine: ThreadEngine, batches: Batches
) -> None:
    await held_up(engine, batches)
    asked = [Asked(engine, text) for text in "abc"]
    asked[0].work.abandon()
    asked[2].work.abandon()
    batches.gate.set()
    await asked[1].check()
    assert [await asked[i].get() for i in (0, 2)] == [None, None]
    assert batches.ran == [[GATE], ["b"]]
    assert sorted(batches.prepared) == ["b", GATE]


async def test_a_request_that_is_abandoned_while_its_batch_runs_ends_with_it(
    engine: ThreadEngine, batches: Batches
) -> None:
    asked = await held_up(engine, batches)
    asked.work.abandon()
    batches.gate.set()
    await asked.check()


async def test_clients_take_turns_where_not_all_fit(engine: ThreadEngine, batches: Batches) -> None:
    await held_up(engine, batches)
    many = [Asked(engine, f"many{i}", client="many") for i in range(20)]
    one = Asked(engine, "one", client="one")
    batches.gate.set()
    for each in (*many, one):
        await each.check()
    assert "one" in batches.ran[1]
    assert [text for texts in batches.ran for text in texts if text.startswith("many")] == [
        f"many{i}" for i in range(20)
    ]


async def test_who_has_waited_for_his_model_does_not_stand_in_line_again(
    engine: ThreadEngine, batches: Batches
) -> None:
    await held_up(engine, batches)
    hits = [Asked(engine, f"hit{i}") for i in range(3)]
    cold = [Asked(engine, f"cold{i}", model=2, waited_s=3600.0) for i in range(2)]
    batches.gate.set()
    for each in (*hits, *cold):
        await each.check()
    assert batches.ran[1:] == [["cold0", "cold1"], ["hit0", "hit1", "hit2"]]


async def test_a_client_is_not_asked_for_where_it_does_not_matter(engine: ThreadEngine) -> None:
    def client() -> str:
        raise AssertionError("it is asked for")

    runtime = ToyRuntime()
    runtime.kind = type("BriefBatchToy", (BatchToy,), {"brief": True, "batches": Batches()})
    brief = ThreadEngine(devices=toy_devices("cpu"), runtimes={"toy": runtime})
    await brief.start(["toy"])
    await brief.load(1, spec_of("a"), Target.whole(0))
    outcomes: list[RunOutcome | None] = []
    brief.run(1, (text_of("a"),), {}, outcomes.append, client)
    assert outcomes == [(text_of("a"),)]
    assert await brief.stop(PATIENCE_S)


@pytest.mark.parametrize("fails", [False, True])
async def test_nothing_of_a_batch_outlives_it(
    engine: ThreadEngine, batches: Batches, fails: bool
) -> None:
    class Kept:
        """Stands for a tensor of the batch."""

    witnesses: list[weakref.ref[Kept]] = []

    def fail(texts: list[str]) -> None:
        kept = Kept()
        witnesses.append(weakref.ref(kept))
        if fails and len(texts) != 1:
            raise ValueError(kept)
        if fails and {"c", "run"} & set(texts):
            raise ValueError(kept)

    batches.fail = fail
    await held_up(engine, batches)
    gc.disable()
    try:
        asked = [Asked(engine, text) for text in ("a", "b", "c", "alone")]
        batches.gate.set()
        for each in asked:
            await each.get()
            del each.work  # It would hold its outcome, and that it.
        del asked, each
        # The thread waits for its next job now, and holds nothing of the last ones.
        await Asked(engine, "next").check()
        assert len(witnesses) == (7 if fails else 4)
        assert [witness() for witness in witnesses] == [None] * len(witnesses)
        unloaded = await engine.unload(1)
        assert unloaded.freed == {0: 100}
    finally:
        gc.enable()


async def test_a_lane_counts_what_shared_its_runs(engine: ThreadEngine, batches: Batches) -> None:
    await held_up(engine, batches)
    asked = [Asked(engine, *texts) for texts in ("a", "bc", "d")]
    alone = Asked(engine, "alone")
    batches.gate.set()
    for each in asked:
        await each.check()
    await alone.get()
    figures = engine.figures
    assert (figures.batch_count, figures.request_count, figures.row_count) == (2, 4, 5)
    assert (figures.largest_request_count, figures.largest_row_count) == (3, 4)
    assert (figures.alone_count, figures.unshared_count, figures.split_count) == (1, 1, 0)


async def test_a_lane_counts_how_often_batches_are_cut(
    engine: ThreadEngine, batches: Batches
) -> None:
    def fail(texts: list[str]) -> None:
        if len(texts) > 2:
            raise MemoryError

    batches.fail = fail
    await held_up(engine, batches)
    asked = [Asked(engine, str(i)) for i in range(7)]
    batches.gate.set()
    for each in asked:
        await each.check()
    # 7 fail, then 4 and 3 of them: that is one batch, and three cuts.
    assert (engine.figures.batch_count, engine.figures.split_count) == (2, 3)
    batches.fail = lambda texts: None
    await Asked(engine, "fine").check()
    assert engine.figures.split_count == 3


async def test_what_is_abandoned_before_it_runs_is_not_counted(
    engine: ThreadEngine, batches: Batches
) -> None:
    await held_up(engine, batches)
    asked = [Asked(engine, text) for text in ("a", "alone")]
    for each in asked:
        each.work.abandon()
    batches.gate.set()
    for each in asked:
        assert await each.get() is None
    assert (engine.figures.request_count, engine.figures.unshared_count) == (1, 0)


async def test_what_is_no_request_is_not_counted() -> None:
    runtime = ToyRuntime()
    runtime.kind = type("BriefBatchToy", (BatchToy,), {"brief": True, "batches": Batches()})
    told: list[tuple[int, int]] = []
    brief = ThreadEngine(
        devices=toy_devices("cpu"),
        runtimes={"toy": runtime},
        on_ran=lambda device, figures: told.append((device, figures.unshared_count)),
    )
    await brief.start(["toy"])  # Warms the lane up.
    await brief.load(1, spec_of("a"), Target.whole(0))
    assert brief.figures == LaneFigures()
    outcomes: list[RunOutcome | None] = []
    for _ in range(2):
        brief.run(1, (text_of("a"),), {}, outcomes.append)
    assert brief.figures == LaneFigures(unshared_count=2)
    assert told == [(0, 1), (0, 2)]
    assert await brief.stop(PATIENCE_S)


async def test_a_stop_runs_what_waits(engine: ThreadEngine, batches: Batches) -> None:
    await held_up(engine, batches)
    asked = [Asked(engine, text) for text in "abc"]
    stopping = asyncio.create_task(engine.stop(PATIENCE_S))
    await asyncio.sleep(0)
    batches.gate.set()
    assert await stopping
    for each in asked:
        await each.check()
