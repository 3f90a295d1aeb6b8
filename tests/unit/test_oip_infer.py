"""What bounds a stream of the protocol, what models are told to take, and what they have done."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from modelyard_server.errors import Reason, Refusal
from modelyard_server.runtimes.api import ModelSpec
from modelyard_server.runtimes.registry import make_runtimes
from modelyard_server.runtimes.signature import ANY
from modelyard_server.runtimes.tensors import DType
from modelyard_server.services.oip.infer import MOST_IN_FLIGHT, InferService
from modelyard_server.services.request_log import RequestFacts
from modelyard_server.services.tallies import ModelTallies
from modelyard_server.transport.api import Call

# --- Streams --------------------------------------------------------------------------------------


class EndlessLink:
    """A client that sends what is no message, and does not read."""

    def __init__(self, size_bytes: int) -> None:
        self.body = bytes(size_bytes)
        self.read_count = 0
        self.is_stuck = asyncio.Event()

    async def read(self) -> bytes | None:
        self.read_count += 1
        await asyncio.sleep(0)
        return self.body

    async def write(self, message: bytes) -> None:
        self.is_stuck.set()
        await asyncio.Event().wait()


class Inference:
    """Refuses everything at once."""

    class figures:  # noqa: N801  stands for an attribute
        active_count = 0

    def timeout_s(self, call: Call) -> float:
        return 1.0

    def note_refused(self, facts: RequestFacts, refusal: Refusal) -> None:
        assert refusal.reason is Reason.INVALID_FIELD


@pytest.mark.parametrize(
    ("size_bytes", "most_bytes", "wanted"),
    [
        (1, 1 << 30, MOST_IN_FLIGHT),
        # What counts is the larger of what came and what goes back.
        (4096, 4096, 1),
    ],
)
async def test_a_client_that_does_not_read_is_not_read(
    size_bytes: int, most_bytes: int, wanted: int
) -> None:
    fake: Any = Inference()
    meanings: Any = None
    service = InferService(
        inference=fake,
        meanings=meanings,
        most_answer_bytes=1 << 20,
        most_bytes_in_flight=most_bytes,
    )
    link = EndlessLink(size_bytes)
    call = Call(b"", lambda: (), None)
    stream = asyncio.create_task(service.model_stream_infer(call, link))
    await link.is_stuck.wait()
    for _ in range(4 * MOST_IN_FLIGHT):
        await asyncio.sleep(0)
    # One more is in its hand, and waits for room.
    assert wanted <= link.read_count <= MOST_IN_FLIGHT + 1
    count = link.read_count
    for _ in range(100):
        await asyncio.sleep(0)
    assert link.read_count == count
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream


# --- Signatures -----------------------------------------------------------------------------------

RUNTIMES = make_runtimes(frozenset({"a:b"}))


def signature(runtime: str, task: str = "", *input_names: str, **options: object) -> Any:
    spec = ModelSpec(name="m", runtime=runtime, task=task, options=options)
    return RUNTIMES[runtime].signature(spec, input_names)


@pytest.mark.parametrize(
    ("task", "outputs"),
    [
        ("text-classification", ["label", "score", "probabilities"]),
        ("fill-mask", ["token", "score", "sequence"]),
        ("text-generation", ["text", "token_count"]),
        ("feature-extraction", ["embedding"]),
    ],
)
def test_text_tasks_take_one_vector_of_texts(task: str, outputs: list[str]) -> None:
    found = signature("transformers", task)
    (kind,) = found.inputs
    assert (kind.dtype, kind.shape) == (DType.TEXT, (ANY,))
    assert found.takes_text and found.is_exact
    assert [each.name for each in found.outputs] == outputs


def test_without_pooling_there_is_a_mask_as_well() -> None:
    found = signature("transformers", "feature-extraction", pooling="none")
    assert [each.name for each in found.outputs] == ["embeddings", "mask"]


def test_what_is_only_an_example_says_so() -> None:
    for found in (
        signature("identity"),
        signature("torch", "", "ids", "mask", factory="a:b"),
        signature("transformers", "image-classification"),
    ):
        assert not found.is_exact
        assert not found.takes_text


def test_a_torch_models_names_are_those_of_its_options_before_those_of_its_code() -> None:
    assert [k.name for k in signature("torch", "", "ids", "mask", factory="a:b").inputs] == [
        "ids",
        "mask",
    ]
    found = signature("torch", "", "ids", factory="a:b", inputs=["x"], outputs=["y", "z"])
    assert [kind.name for kind in found.inputs] == ["x"]
    assert [kind.name for kind in found.outputs] == ["y", "z"]


# --- Tallies --------------------------------------------------------------------------------------


def facts(model: str, arrived: int, leased: int, ended: int, rows: int = 1) -> RequestFacts:
    made = RequestFacts(arrived)
    made.model, made.leased_ns, made.ended_ns, made.row_count = model, leased, ended, rows
    return made


def test_a_tally_adds_up_what_requests_took() -> None:
    tallies = ModelTallies()
    tallies.note_answered(facts("a", 10, 30, 100, rows=4))
    tallies.note_answered(facts("a", 10, 10, 20))
    tally = tallies.of("a")
    assert (tally.answered_count, tally.row_count) == (2, 5)
    assert (tally.answered_ns, tally.waited_ns, tally.run_ns) == (100, 20, 80)
    assert tallies.of("b").answered_count == 0


def test_a_request_that_asked_for_no_model_is_on_nobodys_tally() -> None:
    tallies = ModelTallies()
    tallies.note_failed(facts("", 1, 0, 0))
    tallies.note_failed(facts("a", 1, 0, 0))
    assert tallies.of("").failed_count == 0
    assert tallies.of("a").failed_count == 1
    assert tallies.of("a").failed_ns > 0


def test_models_that_are_gone_are_forgotten_once_they_are_many() -> None:
    tallies = ModelTallies()
    for i in range(3000):
        tallies.note_answered(facts(f"m{i}", 0, 0, 1))
    tallies.forget_all_but(["m1", "m2"])
    assert tallies.of("m1").answered_count == 1
    assert tallies.of("m7").answered_count == 0
    tallies.note_answered(facts("m7", 0, 0, 1))
    tallies.forget_all_but(["m1", "m2"])
    assert tallies.of("m7").answered_count == 1
