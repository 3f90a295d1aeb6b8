"""Generate over real channels: text as it comes, shared runs, and ends of all kinds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from tests.support import tiny_models
from tests.support.config_text import CPU, ROOTS, model_table
from tests.support.server import RunningApp, eventually, refusal_of, running_app

from modelyard import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    FinishReason,
    GenerationPiece,
    InvalidRequest,
    KeyNotFound,
    ModelFailed,
    WorkerLost,
)
from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.execution.engine import ModelFailed as EngineModelFailed
from modelyard_server.execution.engine import WorkerLost as EngineWorkerLost
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.runtimes.hf import generations
from modelyard_server.runtimes.hf.generation import TextGenerator
from modelyard_server.runtimes.sessions import SESSION, Going, Opening
from modelyard_server.services import generation as service
from modelyard_server.services.inference import MOST_WORKERS

pytestmark = pytest.mark.asyncio(loop_scope="module")

GENERATE = "/modelyard.v1.InferenceService/Generate"
PROMPTS = ("the cat", "a big red dog sat on the mat", "i", "not bad bird and fish")
LONG = 10_000
"""Tokens that are never all generated."""


def config() -> str:
    text = CPU + ROOTS
    for name in ("writer", "rotary", "endless"):
        text += model_table(name, "transformers", task="text-generation")
    return text + model_table("embedder", "transformers", task="feature-extraction")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def yard(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    base = tmp_path_factory.mktemp("yard")
    tiny_models.make_tiny_gpt2(base / "store" / "writer", seed=1)
    tiny_models.make_tiny_decoder(base / "store" / "rotary", "llama", seed=3)
    tiny_models.make_tiny_decoder(
        base / "store" / "endless", "llama", seed=4, positions=4 * LONG, ends=False
    )
    tiny_models.make_tiny_bert(base / "store" / "embedder", seed=1)
    async with running_app(config(), base) as running:
        yield running


def generator_of(yard: RunningApp, model: str) -> TextGenerator:
    """A model that is loaded, for looking inside."""
    engine = yard.app.engine
    assert isinstance(engine, ThreadEngine)
    (found,) = [held.loaded for held in engine._held.values() if held.name == model]
    assert isinstance(found, TextGenerator)
    return found


async def all_is_given_back(yard: RunningApp, model: str) -> None:
    """No session and no lease is left of any generation."""
    await eventually("no session is left", lambda: not generator_of(yard, model).generations.count)
    await yard.at_rest()
    stats = await yard.admin(lambda admin: admin.stats())
    assert stats.active_request_count == 0


class Engine:
    """Stands before the engine's runs of sessions."""

    def __init__(self, yard: RunningApp, patch: pytest.MonkeyPatch) -> None:
        self.commands: list[Any] = []
        self.instead: Callable[[int, Callable[[Any], None]], bool] = lambda number, done: False
        self._run = yard.app.engine.run
        patch.setattr(yard.app.engine, "run", self._instead_of_run)

    def _instead_of_run(
        self, model: int, inputs: Any, parameters: Any, on_done: Any, client: Any, waited_s: float
    ) -> Any:
        if SESSION in parameters:
            self.commands.append(parameters[SESSION])
            if self.instead(len(self.commands), on_done):
                return self
        return self._run(model, inputs, parameters, on_done, client, waited_s)

    def abandon(self) -> None:
        """Nothing runs."""


class Clock:
    """The time of generations, which can be moved on. That of the client and of timers cannot."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._ahead_ns = 0
        patch.setattr(service, "monotonic_ns", lambda: time.monotonic_ns() + self._ahead_ns)

    def advance(self, seconds: float) -> bool:
        self._ahead_ns += int(seconds * 1e9)
        return False


@pytest.fixture
def engine(yard: RunningApp, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(yard, monkeypatch)


class TestText:
    @pytest.mark.parametrize("model", ["writer", "rotary"])
    async def test_it_is_what_predict_answers(self, yard: RunningApp, model: str) -> None:
        for prompt in PROMPTS:
            predicted = await yard.client.predict(
                model, [prompt], parameters={"max_new_tokens": 40}
            )
            generation = yard.client.generate(model, prompt, max_new_tokens=40)
            pieces = [piece async for piece in generation]
            assert ["".join(piece.text for piece in pieces)] == predicted["text"]
            assert [pieces[-1].token_count] == np.asarray(predicted["token_count"]).tolist()
            assert all(piece.text for piece in pieces[:-1])
            assert len(pieces) > 2

    async def test_the_last_message_tells_how_it_was(self, yard: RunningApp) -> None:
        generation = yard.client.generate("writer", "the cat sat", max_new_tokens=20)
        pieces = [piece async for piece in generation]
        assert all(piece.finish is None and piece.served is None for piece in pieces[:-1])
        last = generation.last
        assert last.finish is FinishReason.LENGTH
        assert (last.prompt_token_count, last.token_count) == (3, 20)
        assert sum(len(piece.token_ids) for piece in pieces) == 20
        # The first words come early.
        assert len(pieces[0].token_ids) == 1
        assert last.served is not None
        assert (last.served.model, last.served.device) == ("models/writer", "devices/cpu")
        assert not last.served.cold
        assert last.served.run_s > 0

    async def test_without_a_number_of_tokens_it_is_what_the_context_leaves(
        self, yard: RunningApp
    ) -> None:
        generation = yard.client.generate("writer", "the cat sat")
        assert await generation.text()
        assert generation.last.token_count == 61

    async def test_a_stop_string_ends_it_and_is_not_sent(self, yard: RunningApp) -> None:
        whole = await yard.client.generate("writer", "the cat", max_new_tokens=40).text()
        stop = whole[12:20]
        generation = yard.client.generate("writer", "the cat", max_new_tokens=40, stop=["zz", stop])
        assert await generation.text() == whole[: whole.index(stop)]
        assert generation.last.finish is FinishReason.STOP

    async def test_a_seed_makes_it_the_same_again(self, yard: RunningApp) -> None:
        async def draw(seed: int | None) -> str:
            drawing: dict[str, Any] = {"temperature": 2.0, "top_k": 30, "top_p": 0.99}
            return await yard.client.generate("writer", "i", seed=seed, **drawing).text()

        texts = [await draw(seed) for seed in (1, 1, 2, None, None)]
        assert texts[0] == texts[1]
        assert len(set(texts)) == 4

    async def test_the_blocking_client_has_the_same(self, yard: RunningApp) -> None:
        def read() -> tuple[str, GenerationPiece]:
            with Client(yard.target) as client:
                generation = client.generate("writer", "the cat", max_new_tokens=40)
                return generation.text(), generation.last

        text, last = await asyncio.to_thread(read)
        assert text == await yard.client.generate("writer", "the cat", max_new_tokens=40).text()
        assert last.token_count == 40


class TestTogether:
    async def test_generations_share_their_runs_and_have_the_text_they_have_alone(
        self, yard: RunningApp
    ) -> None:
        settings: dict[str, Any] = {"max_new_tokens": 48}
        alone = [
            await yard.client.generate("writer", prompt, **settings).text() for prompt in PROMPTS
        ]
        assert isinstance(yard.app.engine, ThreadEngine)
        rows: list[int] = []
        hook = generator_of(yard, "writer")._module.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        before = yard.app.engine.figures
        several = 4
        texts = await asyncio.gather(
            *(
                yard.client.generate("writer", prompt, **settings).text()
                for prompt in PROMPTS * several
            )
        )
        after = yard.app.engine.figures
        hook.remove()
        assert texts == alone * several
        tokens = 48 * len(texts)
        # Of passes of the model there are far fewer than tokens, of runs of the lane fewer still.
        assert len(rows) < tokens / 3
        assert max(rows) > len(PROMPTS)
        assert after.batch_count - before.batch_count < len(rows)
        await all_is_given_back(yard, "writer")

    async def test_a_generation_counts_as_one_request(self, yard: RunningApp) -> None:
        before = await yard.admin(lambda admin: admin.stats())
        await yard.client.generate("writer", "the cat", max_new_tokens=40).text()
        after = await yard.admin(lambda admin: admin.stats())
        assert after.answered_count - before.answered_count == 1
        assert after.hit_count - before.hit_count == 1

    async def test_others_have_their_turn_while_it_goes_on(self, yard: RunningApp) -> None:
        async with yard.client.generate("endless", "the cat", max_new_tokens=LONG) as generation:
            await anext(generation)
            for _ in range(3):
                await yard.client.predict("embedder", ["a cat"])
                assert (await anext(generation)).finish is None
        await all_is_given_back(yard, "endless")


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "field", "text"),
        [
            ({"prompt": ""}, "prompt", "must not be empty"),
            ({"prompt": "cat " * 64}, "prompt", "has 64 tokens; the model's context has 64"),
            ({"max_new_tokens": 64}, "max_new_tokens", "the prompt has 2 tokens"),
            ({"max_new_tokens": -1}, "max_new_tokens", "must not be negative"),
            ({"stop": [""]}, "stop[0]", "must have 1 to 256 bytes"),
            ({"stop": ["a", "\u00e9" * 129]}, "stop[1]", "must have 1 to 256 bytes"),
            ({"stop": ["a"] * 17}, "stop", "at most 16"),
            ({"temperature": 10.5}, "temperature", "from 0 to 10"),
            ({"temperature": float("nan")}, "temperature", "from 0 to 10"),
            ({"top_k": -1}, "top_k", "must not be negative"),
            ({"top_p": 1.5}, "top_p", "from 0 to 1"),
            ({"affinity": "x" * 257}, "affinity", "longer than 256 bytes"),
            ({"version": "2"}, "version", "not versions"),
            ({"key": "embedder"}, "key", "of the task 'feature-extraction'"),
            ({"key": "../x"}, "key", "must match"),
        ],
    )
    async def test_what_is_wrong_is_told_by_its_field(
        self, yard: RunningApp, settings: dict[str, Any], field: str, text: str
    ) -> None:
        request = pb.GenerateRequest(**({"key": "writer", "prompt": "the cat"} | settings))
        rpc: Any = yard.channel.unary_stream(GENERATE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc(request.SerializeToString(), timeout=10).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (caught.value.details() or "").startswith(f"{field}: ")
        assert text in (caught.value.details() or "")
        await all_is_given_back(yard, "writer")

    async def test_a_key_that_means_nothing_is_not_found(self, yard: RunningApp) -> None:
        with pytest.raises(KeyNotFound):
            await yard.client.generate("nothing", "the cat").text()

    async def test_bytes_that_are_no_request_are_refused(self, yard: RunningApp) -> None:
        rpc: Any = yard.channel.unary_stream(GENERATE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc(b"\xff\xff", timeout=10).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    async def test_nobody_reaches_a_session_by_predict(
        self, yard: RunningApp, engine: Engine
    ) -> None:
        async with yard.client.generate("writer", "the cat", max_new_tokens=60) as generation:
            await anext(generation)
            identity = engine.commands[0]["open"]
            for command in (Going(id=identity, most=8), Opening(id="mine")):
                error = await refusal_of(
                    yard.client.predict("writer", ["x"], parameters=command.parameters())
                )
                assert isinstance(error, InvalidRequest)
                assert error.violations[0].field == f"parameters.{SESSION}"
            text = await generation.text()
        assert all(said.get("open") != "mine" for said in engine.commands)
        whole = await yard.client.generate("writer", "the cat", max_new_tokens=60).text()
        assert whole.endswith(text)

    async def test_a_model_that_generates_as_much_as_it_may_takes_no_more(
        self, yard: RunningApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        most = 4
        monkeypatch.setattr(generations, "MOST_SESSIONS", most)
        request = pb.GenerateRequest(key="endless", prompt="the cat", max_new_tokens=LONG)
        rpc: Any = yard.channel.unary_stream(GENERATE)
        calls = []
        try:
            for _ in range(most):
                calls.append(rpc(request.SerializeToString(), timeout=60))
                await calls[-1].read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc(request.SerializeToString(), timeout=60).read()
        finally:
            for call in calls:
                call.cancel()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "retry_after_ms=" in (caught.value.details() or "")
        await all_is_given_back(yard, "endless")


class TestEnds:
    @pytest.mark.parametrize("how", ["close", "cancel the task"])
    async def test_a_client_that_leaves_ends_it(self, yard: RunningApp, how: str) -> None:
        generation = yard.client.generate("endless", "the cat", max_new_tokens=LONG, timeout_s=60)
        await anext(generation)
        assert generator_of(yard, "endless").generations.count == 1
        if how == "close":
            generation.close()
        else:
            task = asyncio.create_task(generation.text())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
        await all_is_given_back(yard, "endless")

    async def test_a_deadline_may_come_after_some_text(
        self, yard: RunningApp, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        engine.instead = lambda number, done: clock.advance(100) if number == 3 else False
        generation = yard.client.generate("writer", "the cat", max_new_tokens=40, timeout_s=60)
        told = 0
        with pytest.raises(DeadlineExceeded) as caught:
            async for piece in generation:
                told += len(piece.token_ids)
        assert caught.value.reason == "DEADLINE_IN_RUN"
        assert told == 1 + 2 + 4
        await all_is_given_back(yard, "writer")
        assert [next(iter(said)) for said in engine.commands] == ["open", "go", "go", "close"]

    async def test_a_deadline_finds_a_run_that_hangs(
        self, yard: RunningApp, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock(monkeypatch)
        hanging: list[Callable[[Any], None]] = []

        def hang(number: int, done: Callable[[Any], None]) -> bool:
            if number == 1:
                clock.advance(58)
            if number == 2:
                hanging.append(done)
            return number == 2

        engine.instead = hang
        generation = yard.client.generate("writer", "the cat", max_new_tokens=40, timeout_s=60)
        assert (await anext(generation)).text
        with pytest.raises(DeadlineExceeded) as caught:
            await anext(generation)
        assert caught.value.reason == "DEADLINE_IN_RUN"
        # As long as it runs its model is leased, and its session is there.
        assert yard.app.residency.lease_count == 1
        hanging[0](None)
        await all_is_given_back(yard, "writer")
        assert [next(iter(said)) for said in engine.commands] == ["open", "go", "close"]

    async def test_a_reader_that_does_not_read_holds_nothing_beyond_its_deadline(
        self, yard: RunningApp
    ) -> None:
        request = pb.GenerateRequest(key="endless", prompt="the cat", max_new_tokens=LONG)
        rpc: Any = yard.channel.unary_stream(GENERATE)
        call = rpc(request.SerializeToString(), timeout=4.0)
        await call.read()
        await all_is_given_back(yard, "endless")
        call.cancel()


class TestWorkers:
    def lose(self, engine: Engine, numbers: range) -> None:
        """These runs end as if their worker had died before they began."""

        def lost(number: int, done: Callable[[Any], None]) -> bool:
            if number in numbers:
                done(EngineWorkerLost("its worker died (killed by SIGKILL)"))
            return number in numbers

        engine.instead = lost

    @pytest.mark.parametrize("first", [1, 2])
    async def test_what_was_not_sent_yet_is_begun_again_without_a_word(
        self, yard: RunningApp, engine: Engine, first: int
    ) -> None:
        expected = await yard.client.generate("writer", "the cat", max_new_tokens=20).text()
        engine.commands.clear()
        # The text of the first token is kept: it may be the beginning of a stop string.
        stop = expected.split()[0] + " zz"
        self.lose(engine, range(first, first + 1))
        text = await yard.client.generate(
            "writer", "the cat", max_new_tokens=20, stop=[stop]
        ).text()
        assert text == expected
        assert sum("open" in said for said in engine.commands) == 2

    async def test_what_begins_in_no_worker_is_given_up(
        self, yard: RunningApp, engine: Engine
    ) -> None:
        self.lose(engine, range(1, 99))
        request = pb.GenerateRequest(key="writer", prompt="the cat")
        rpc: Any = yard.channel.unary_stream(GENERATE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc(request.SerializeToString(), timeout=10).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(engine.commands) == MOST_WORKERS

    async def test_after_some_text_it_is_told(self, yard: RunningApp, engine: Engine) -> None:
        self.lose(engine, range(3, 99))
        generation = yard.client.generate("writer", "the cat", max_new_tokens=40)
        told = ""
        with pytest.raises(WorkerLost, match="worker died"):
            async for piece in generation:
                told += piece.text
        assert told
        assert sum("open" in said for said in engine.commands) == 1
        # In truth the model is still there, and has a session that nobody closes any more.
        generator_of(yard, "writer").generations.clear()

    async def test_a_model_that_fails_says_so_and_its_session_is_closed(
        self, yard: RunningApp, engine: Engine
    ) -> None:
        def fail(number: int, done: Callable[[Any], None]) -> bool:
            if number == 3:
                done(EngineModelFailed("ValueError", "the story"))
            return number == 3

        engine.instead = fail
        with pytest.raises(ModelFailed, match="ValueError"):
            await yard.client.generate("writer", "the cat", max_new_tokens=40).text()
        await all_is_given_back(yard, "writer")
        assert "close" in engine.commands[-1]


async def test_in_worker_processes_it_is_the_same(yard: RunningApp, tmp_path: Path) -> None:
    tiny_models.make_tiny_gpt2(tmp_path / "store" / "writer", seed=1)
    text = CPU + ROOTS + model_table("writer", "transformers", task="text-generation")
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 2**40}
    expected = [await yard.client.generate("writer", p, **settings).text() for p in PROMPTS]
    async with (
        running_app(text + '\n[engine]\nkind = "process"\n', tmp_path) as other,
        AsyncClient(other.target, timeout_s=60) as client,
    ):
        cold = client.generate("writer", PROMPTS[0], **settings)
        assert await cold.text() == expected[0]
        served = cold.last.served
        assert served is not None
        assert served.cold
        assert served.load_s is not None
        texts = await asyncio.gather(
            *(client.generate("writer", prompt, **settings).text() for prompt in PROMPTS)
        )
        assert texts == expected
        error = await refusal_of(client.generate("writer", "cat " * 70).text())
        assert isinstance(error, InvalidRequest)
        assert "has 70 tokens" in str(error)
