"""Generations inside a loaded model: the tokens that each would have alone, whoever goes on with
it; and their bounds and ends."""

from __future__ import annotations

import gc
import itertools
import secrets
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.support.tiny_models import WORDS, make_tiny_decoder, make_tiny_gpt2

from modelyard_server.execution.memory import HeldModel, drop
from modelyard_server.runtimes.api import ModelSpec, OptionError
from modelyard_server.runtimes.hf.generation import TextGenerator
from modelyard_server.runtimes.hf.generations import IDLE_S, MOST_SESSIONS
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.sessions import (
    SESSION,
    Closing,
    Command,
    Finish,
    Going,
    Opening,
    SessionAnswer,
    SessionState,
    read_command,
)
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

PROMPTS = ("the cat", "a big red dog sat on the mat", "i", "not bad bird and fish")
KINDS = ("gpt2", "llama", "mistral", "bloom", "gpt1")
TOGETHER = ("gpt2", "llama")
NEW = 30


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of several those of models this small would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("decoders")
    made = {kind: make_tiny_decoder(base / kind, kind, seed=3) for kind in KINDS if kind != "gpt2"}
    return made | {"gpt2": make_tiny_gpt2(base / "gpt2", seed=3)}


def load(folder: Path, **options: Any) -> TextGenerator:
    spec = ModelSpec(
        name="m", runtime="transformers", task="text-generation", folder=folder, options=options
    )
    loaded = TransformersRuntime().load(spec, place=Place.on("cpu"), stop=lambda: False)
    assert isinstance(loaded, TextGenerator)
    # However slow the machine is, no run ends for having taken its time.
    loaded.generations._clock = lambda: 0.0
    return loaded


def prompt_of(text: str) -> tuple[TensorValue, ...]:
    return (TensorValue(name="prompt", dtype=DType.TEXT, shape=(1,), data=(text,)),)


def run(model: TextGenerator, *commands: Command, prompts: Sequence[str] = ()) -> Any:
    """One run of all of these; prompts for those that open a session."""
    texts = iter(prompts)
    prepared = []
    for command in commands:
        inputs = prompt_of(next(texts)) if isinstance(command, Opening) else ()
        one = model.prepare(inputs, command.parameters())
        assert one is not None
        prepared.append(one)
    assert len({one.key for one in prepared}) == 1
    return [SessionAnswer.of(values) for values in model.run_batch(prepared)]


@dataclass
class Writing:
    """A generation as its caller sees it."""

    model: TextGenerator
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish = Finish.NOT

    def note(self, answer: SessionAnswer) -> Writing:
        assert answer.state is SessionState.OK
        self.ids += answer.token_ids
        self.text += answer.text
        self.finish = answer.finish
        assert answer.token_count == len(self.ids)
        return self

    def open(self, prompt: str, **settings: Any) -> Writing:
        settings = {"max_new_tokens": NEW} | settings
        return self.note(run(self.model, Opening(id=self.id, **settings), prompts=[prompt])[0])

    def go(self, most: int = 8) -> Writing:
        return self.note(run(self.model, Going(id=self.id, most=most))[0])

    def to_end(self) -> Writing:
        while not self.finish:
            self.go()
        return self


def alone(model: TextGenerator, prompt: str, **settings: Any) -> Writing:
    return Writing(model).open(prompt, **settings).to_end()


def by_the_library(folder: Path, model: TextGenerator, prompt: str) -> list[int]:
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    module.eval()
    ids = torch.tensor([model._tokenizer.encode("", [prompt])[0].ids])
    with torch.inference_mode():
        written = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
    found: list[int] = written[0, ids.shape[1] :].tolist()
    return found


@contextmanager
def passes(model: TextGenerator) -> Iterator[list[int]]:
    """The rows of each forward pass."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(kwargs["input_ids"]))

    handle = model._module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@contextmanager
def failing(model: TextGenerator, when: Any) -> Iterator[list[int]]:
    """The last layer raises when it is told to: a step that fails half way."""
    rows: list[int] = []
    layers = getattr(model._module, "transformer", None) or model._module.model
    layer = (layers.h if hasattr(layers, "h") else layers.layers)[-1]

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows.append(len(hidden))
        if when(rows):
            raise ArithmeticError("asked to fail")

    handle = layer.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


class TestTokens:
    @pytest.mark.parametrize("kind", KINDS)
    def test_alone_they_are_those_of_the_librarys_own_loop(
        self, folders: dict[str, Path], kind: str
    ) -> None:
        model = load(folders[kind])
        for prompt in PROMPTS:
            assert alone(model, prompt).ids == by_the_library(folders[kind], model, prompt)

    @pytest.mark.parametrize("kind", KINDS)
    def test_who_goes_on_together_and_when_makes_no_difference(
        self, folders: dict[str, Path], kind: str
    ) -> None:
        model = load(folders[kind])
        expected = [alone(model, prompt) for prompt in PROMPTS]
        # Sessions begin and go on in turns of all sizes, so that rows join and leave.
        written = [Writing(model) for _ in PROMPTS]
        turns = itertools.cycle([1, 3, 2, 4, 1])
        opened = 0
        while not all(one.finish for one in written):
            if opened < len(written):
                written[opened].open(PROMPTS[opened])
                opened += 1
            going = [one for one in written[:opened] if not one.finish][: next(turns)]
            commands = [Going(id=one.id, most=1 + len(one.ids) % 7) for one in going]
            for one, answer in zip(going, run(model, *commands) if going else [], strict=True):
                one.note(answer)
            written.sort(key=lambda one: len(one.ids) if one.ids else 99)
        by_tokens = {tuple(one.ids): one.text for one in written}
        assert by_tokens == {tuple(one.ids): one.text for one in expected}
        assert model.generations.count == 0

    def test_prompts_are_read_together(self, folders: dict[str, Path]) -> None:
        model = load(folders["llama"])
        expected = [alone(model, prompt).ids for prompt in PROMPTS]
        written = [Writing(model) for _ in PROMPTS]
        with passes(model) as rows:
            openings = [Opening(id=one.id, max_new_tokens=NEW) for one in written]
            for one, answer in zip(written, run(model, *openings, prompts=PROMPTS), strict=True):
                one.note(answer)
        assert rows == [len(PROMPTS)]
        assert [one.to_end().ids for one in written] == expected

    @pytest.mark.parametrize("kind", TOGETHER)
    def test_those_that_are_not_asked_for_go_on_as_well(
        self, folders: dict[str, Path], kind: str
    ) -> None:
        model = load(folders[kind])
        one, other = (Writing(model).open("the fish", max_new_tokens=NEW) for _ in range(2))
        with passes(model) as rows:
            one.go(8)
            assert rows == [2] * 8
            other.go(8)
            assert rows == [2] * 8
            assert one.ids == other.ids
            # Of one that nobody asks for only so much is made.
            for _ in range(3):
                one.go(4)
            assert rows[8:] == [2] * 8 + [1] * 4

    def test_a_seed_gives_the_same_text_alone_and_in_company(
        self, folders: dict[str, Path]
    ) -> None:
        model = load(folders["llama"])
        drawing = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "seed": 11}
        expected = alone(model, PROMPTS[0], **drawing)
        assert alone(model, PROMPTS[0], **(drawing | {"seed": 12})).ids != expected.ids
        company = [Writing(model).open(prompt, temperature=1.0) for prompt in PROMPTS]
        one = Writing(model).open(PROMPTS[0], **drawing)
        while not one.finish:
            one.go(3)
            for other in company:
                if not other.finish:
                    other.go(1)
        assert (one.ids, one.text) == (expected.ids, expected.text)

    def test_the_text_is_that_of_the_other_runs(self, folders: dict[str, Path]) -> None:
        model = load(folders["gpt2"])
        for prompt in PROMPTS:
            outputs = model.run(prompt_of(prompt), {"max_new_tokens": NEW})
            assert alone(model, prompt).text == outputs[0].data[0]

    def test_a_stop_text_ends_it(self, folders: dict[str, Path]) -> None:
        model = load(folders["gpt2"])
        whole = alone(model, PROMPTS[0]).text
        stop = whole[10:18]
        written = alone(model, PROMPTS[0], stops=(stop,))
        assert written.text == whole[: whole.index(stop)]
        assert written.finish is Finish.STOP

    def test_an_end_token_ends_it(self, folders: dict[str, Path]) -> None:
        model = load(folders["llama"])
        ends = [one for one in (alone(model, word) for word in WORDS) if len(one.ids) < NEW]
        assert ends
        for one in ends:
            assert one.finish is Finish.END
            assert one.ids[-1] == 0
            assert "<eos>" not in one.text

    def test_a_run_ends_when_it_has_taken_its_time(self, folders: dict[str, Path]) -> None:
        model = load(folders["gpt2"])
        written = Writing(model).open("the cat")
        seconds = itertools.count()
        model.generations._clock = lambda: float(next(seconds))
        assert len(written.go(8).ids) == 2
        assert len(written.go(8).ids) == 3


class TestBounds:
    def test_all_that_the_context_leaves_can_be_generated(self, folders: dict[str, Path]) -> None:
        model = load(folders["gpt2"])
        written = alone(model, "the cat sat", max_new_tokens=61)
        assert (len(written.ids), written.finish) == (61, Finish.LENGTH)

    def test_by_default_it_is_no_more_than_the_context_leaves(
        self, folders: dict[str, Path]
    ) -> None:
        model = load(folders["gpt2"])
        assert len(alone(model, "the cat sat", max_new_tokens=None).ids) == 61

    @pytest.mark.parametrize(
        ("words", "most", "option", "text"),
        [
            (64, 1, "prompt", "has 64 tokens; the model's context has 64"),
            (100, None, "prompt", "has 100 tokens"),
            (5_000, None, "prompt", "has more than 64 tokens"),
            (60, 5, "max_new_tokens", "is 5; the prompt has 60 tokens, .* of 64 leaves 4"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_its_numbers(
        self, folders: dict[str, Path], words: int, most: int | None, option: str, text: str
    ) -> None:
        model = load(folders["gpt2"])
        with pytest.raises(OptionError, match=text) as refused:
            model.prepare(
                prompt_of("cat " * words), Opening(id="x", max_new_tokens=most).parameters()
            )
        assert refused.value.option == option

    def test_a_prompt_without_tokens_is_refused(self, folders: dict[str, Path]) -> None:
        with pytest.raises(TensorError, match="no tokens"):
            load(folders["gpt2"]).prepare(prompt_of("  "), Opening(id="x").parameters())

    def test_there_are_so_many_sessions_and_no_more(self, folders: dict[str, Path]) -> None:
        model = load(folders["gpt2"])
        written = [Writing(model).open("cat", max_new_tokens=2) for _ in range(MOST_SESSIONS)]
        opening = Opening(id="one more", max_new_tokens=2)
        (answer,) = run(model, opening, prompts=["cat"])
        assert answer.state is SessionState.FULL
        assert written.pop().to_end().finish
        (answer,) = run(model, opening, prompts=["cat"])
        assert answer.state is SessionState.OK
        assert model.generations.count == MOST_SESSIONS

    def test_together_they_are_no_longer_than_the_largest_batch(
        self, folders: dict[str, Path]
    ) -> None:
        model = load(folders["gpt2"], batch_size=2)
        openings = [Opening(id=str(i), max_new_tokens=32) for i in range(2)]
        openings += [Opening(id="long", max_new_tokens=None), Opening(id="short", max_new_tokens=9)]
        states = [run(model, opening, prompts=["cat"])[0].state for opening in openings]
        assert states == [SessionState.OK, SessionState.OK, SessionState.FULL, SessionState.OK]

    def test_one_that_nobody_asks_for_is_dropped(self, folders: dict[str, Path]) -> None:
        model = load(folders["gpt2"])
        now = 0.0
        model.generations._clock = lambda: now
        kept, forgotten = Writing(model).open("cat"), Writing(model).open("dog")
        now = 0.6 * IDLE_S
        kept.go()
        now = 1.2 * IDLE_S
        kept.go()
        assert model.generations.count == 1
        (answer,) = run(model, Going(id=forgotten.id, most=1))
        assert answer.state is SessionState.GONE


class TestEnds:
    def test_one_that_is_closed_is_gone_and_the_others_go_on(
        self, folders: dict[str, Path]
    ) -> None:
        model = load(folders["gpt2"])
        expected = alone(model, "the fish").ids
        one, other = Writing(model).open("the cat"), Writing(model).open("the fish")
        one.go(4)
        before = model.generations.cache_bytes
        run(model, Closing(id=one.id))
        assert model.generations.count == 1
        assert model.generations.cache_bytes < before
        (answer,) = run(model, Going(id=one.id, most=1))
        assert answer.state is SessionState.GONE
        assert other.to_end().ids == expected

    def test_one_that_is_not_there_can_be_closed(self, folders: dict[str, Path]) -> None:
        assert run(load(folders["gpt2"]), Closing(id="none"))[0].state is SessionState.OK

    def test_it_is_gone_with_its_end(self, folders: dict[str, Path]) -> None:
        model = load(folders["gpt2"])
        written = alone(model, "the cat")
        assert model.generations.count == model.generations.cache_bytes == 0
        (answer,) = run(model, Going(id=written.id, most=1))
        assert answer.state is SessionState.GONE

    def test_one_that_ended_before_it_was_asked_holds_nothing_but_its_text(
        self, folders: dict[str, Path]
    ) -> None:
        model = load(folders["gpt2"])
        expected = [alone(model, prompt, max_new_tokens=4).ids for prompt in PROMPTS[:2]]
        one, other = (Writing(model).open(p, max_new_tokens=4) for p in PROMPTS[:2])
        one.go()
        assert one.finish
        assert model.generations.count == 1
        assert model.generations.cache_bytes == 0
        assert [one.ids, other.go().ids] == expected

    @pytest.mark.parametrize("kind", ["gpt2", "mistral"])
    def test_a_model_that_is_dropped_leaves_nothing_of_them(
        self, folders: dict[str, Path], kind: str
    ) -> None:
        model = load(folders[kind])
        sizes = dict(model.measured_bytes())
        opened = [Writing(model).open(prompt) for prompt in PROMPTS]
        opened[0].go(3)
        # What is remembered of texts is no weight.
        assert dict(model.measured_bytes()) == sizes
        sessions = model.generations._sessions.values()
        caches = [s.group.batch.cache if s.group is not None else s.cache for s in sessions]
        remembered = [weakref.ref(layer.keys) for cache in caches for layer in cache.layers]
        assert remembered
        held = HeldModel(name="m", home=0, sizes=sizes, loaded=model)
        del model, opened, sessions, caches
        gc.collect()
        gc.disable()
        try:
            assert drop(held) == ()
            assert all(reference() is None for reference in remembered)
        finally:
            gc.enable()


class TestFailures:
    @pytest.mark.parametrize("kind", TOGETHER)
    def test_a_step_that_failed_half_way_can_be_done_again(
        self, folders: dict[str, Path], kind: str
    ) -> None:
        model = load(folders[kind])
        expected = [alone(model, prompt).ids for prompt in PROMPTS]
        written = [Writing(model).open(prompt) for prompt in PROMPTS]
        with failing(model, lambda rows: len(rows) in (4, 5)):
            # With company, and then without. What was made until then is there: three tokens.
            assert len(written[0].go(8).ids) == 1 + 3
            with pytest.raises(ArithmeticError):
                written[0].go(8)
        assert [one.to_end().ids for one in written] == expected

    def test_company_that_fails_costs_nobody_his_answer(self, folders: dict[str, Path]) -> None:
        model = load(folders["gpt2"])
        expected = [alone(model, prompt).ids for prompt in PROMPTS]
        written = [Writing(model).open(prompt) for prompt in PROMPTS]
        with failing(model, lambda rows: rows[-1] > 1) as rows:
            assert [one.to_end().ids for one in written] == expected
        # It is not tried each time.
        assert sum(count > 1 for count in rows) < 5

    def test_an_opening_that_failed_can_be_done_again(self, folders: dict[str, Path]) -> None:
        model = load(folders["gpt2"])
        expected = alone(model, "the cat", temperature=1.0, seed=4).ids
        written = Writing(model)
        with failing(model, lambda rows: True), pytest.raises(ArithmeticError):
            written.open("the cat", temperature=1.0, seed=4)
        assert model.generations.count == 0
        assert written.open("the cat", temperature=1.0, seed=4).to_end().ids == expected

    def test_scores_that_are_no_numbers_are_the_failure_of_that_one_alone(
        self, folders: dict[str, Path]
    ) -> None:
        model = load(folders["gpt2"])
        expected = alone(model, "the fish", temperature=1.0, seed=2).ids
        one = Writing(model).open("the cat", temperature=1.0)
        other = Writing(model).open("the fish", temperature=1.0, seed=2)

        def spoil(module: Any, args: Any, kwargs: Any, outcome: Any) -> None:
            outcome.logits[0] = torch.nan

        handle = model._module.register_forward_hook(spoil, with_kwargs=True)
        requests = [Going(id=one.id, most=1), Going(id=other.id, most=1)]
        with pytest.raises(ValueError, match="no numbers"):
            run(model, *requests)
        handle.remove()
        # Then each is run by itself.
        with pytest.raises(ValueError, match="no numbers"):
            run(model, requests[0])
        assert other.to_end().ids == expected
        assert model.generations.count == 0


class TestCommands:
    @pytest.mark.parametrize(
        "command",
        [
            Opening(id="x", max_new_tokens=3, temperature=0.5, top_k=2, top_p=0.5, seed=-1),
            Opening(id="x", stops=("a", "\n"), seed=2**63 - 1),
            Going(id="x", most=8),
            Closing(id="x"),
        ],
    )
    def test_what_is_said_is_understood(self, command: Command) -> None:
        assert read_command(command.parameters()) == command

    def test_other_runs_are_none_of_theirs(self) -> None:
        assert read_command({"max_new_tokens": 3}) is None

    @pytest.mark.parametrize(
        "said",
        [
            *({}, {"open": ""}, {"go": "x", "most": 9}, {"go": "x", "more": 1}, {"open": 7}),
            *({"open": "x", "top_p": 0}, {"open": "x", "stops": [""]}, {"open": "x", "stops": "a"}),
            {"open": "x" * 65},
        ],
    )
    def test_what_is_not_understood_is_refused(self, said: dict[str, Any]) -> None:
        with pytest.raises(OptionError):
            read_command({SESSION: said})

    def test_a_command_stands_by_itself(self) -> None:
        with pytest.raises(OptionError, match="known"):
            read_command(Closing(id="x").parameters() | {"seed": 1})

    def test_alone_a_model_knows_no_such_parameter(self, folders: dict[str, Path]) -> None:
        with pytest.raises(OptionError, match="not known"):
            load(folders["gpt2"]).run(prompt_of("the cat"), Closing(id="x").parameters())
