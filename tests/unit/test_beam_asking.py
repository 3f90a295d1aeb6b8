"""Asking for a batch: what is asked for again, when, how often, and in how many calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
import pytest

from modelyard import (
    AnswerTooLarge,
    BatchItem,
    DeadlineExceeded,
    InvalidRequest,
    KeyNotFound,
    ModelFailed,
    ModelyardError,
    Prediction,
    QueueFull,
    Served,
    ServerUnavailable,
)

pytest.importorskip("apache_beam")

from modelyard.integrations.beam._asking import AskingSettings, Figures, ask

SERVED = Served(model="models/m", device="devices/cpu", cold=False, wait_s=0, load_s=None, run_s=0)

Answer = Prediction | ModelyardError


def error(kind: type[ModelyardError], retry_after_s: float | None = None) -> ModelyardError:
    return kind("no", code=grpc.StatusCode.UNKNOWN, retry_after_s=retry_after_s)


def items(count: int, *, size: int = 1) -> list[BatchItem]:
    return [BatchItem(key=f"k{i}", inputs=np.zeros(size, np.uint8)) for i in range(count)]


@dataclass
class Server:
    """Answers as it is told, and notes what it is asked for. Its clock is moved by sleeping."""

    answer: Callable[[str, int], Answer | type[Exception]]
    calls: list[list[str]] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    now: float = 100.0
    call_s: float = 0.0

    def predict_batch(
        self, batch: Sequence[BatchItem], *, timeout_s: float | None = None
    ) -> list[Answer]:
        keys = [item.key for item in batch]
        self.calls.append(keys)
        self.timeouts.append(timeout_s)
        self.now += self.call_s
        answers = []
        for key in keys:
            answer = self.answer(key, len(self.calls))
            if isinstance(answer, type):
                raise answer(f"{key} cannot be sent")
            answers.append(answer)
        return answers

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def ask(
        self, batch: Sequence[BatchItem], *, figures: Figures | None = None, **settings: float
    ) -> list[Answer]:
        given = AskingSettings(**settings)  # type: ignore[arg-type]
        clock = lambda: self.now  # noqa: E731
        return ask(self, batch, given, figures=figures, sleep=self.sleep, clock=clock)


def good(key: str) -> Prediction:
    return Prediction({"output": [key]}, SERVED)


def told(results: Sequence[Answer]) -> list[str]:
    return [
        str(np.asarray(result.only)[0]) if isinstance(result, Prediction) else type(result).__name__
        for result in results
    ]


def test_only_what_can_pass_is_asked_for_again_when_the_server_says() -> None:
    def answer(key: str, call: int) -> Answer:
        match key, call:
            case ("k1", 1):
                return error(QueueFull, 0.5)
            case ("k2", 1 | 2):
                return error(QueueFull, 1.5)
            case ("k3", _):
                return error(KeyNotFound)
            case ("k4", _):
                return error(ModelFailed)
            case _:
                return good(key)

    server, figures = Server(answer), Figures()
    results = server.ask(items(5), figures=figures)
    assert told(results) == ["k0", "k1", "k2", "KeyNotFound", "ModelFailed"]
    assert server.calls == [["k0", "k1", "k2", "k3", "k4"], ["k1", "k2"], ["k2"]]
    # The longest of those that the round has.
    assert server.slept == [1.5, 1.5]
    assert (figures.call_count, figures.retried_count) == (3, 3)


def test_rounds_are_bounded_and_the_last_error_is_told() -> None:
    server = Server(lambda key, call: error(QueueFull, 0.1))
    assert told(server.ask(items(1), max_retries=2)) == ["QueueFull"]
    assert len(server.calls) == 3
    assert server.slept == [0.1, 0.1]


def test_nobody_sleeps_beyond_the_batch_s_time() -> None:
    server = Server(lambda key, call: error(QueueFull, 5.0))
    assert told(server.ask(items(1), timeout_s=12)) == ["QueueFull"]
    assert server.slept == [5.0, 5.0]
    assert server.timeouts == [12.0, 7.0, 2.0]


def test_an_unreachable_server_is_asked_again_ever_more_rarely() -> None:
    server = Server(lambda key, call: error(ServerUnavailable))
    assert told(server.ask(items(2), max_retries=3)) == ["ServerUnavailable"] * 2
    assert server.slept == [0.1, 0.2, 0.4]


def test_answers_that_were_too_large_together_are_asked_for_in_smaller_calls() -> None:
    server = Server(
        lambda key, call: (
            error(AnswerTooLarge) if len(server.calls[-1]) > 2 and key > "k1" else good(key)
        )
    )
    assert told(server.ask(items(8))) == [f"k{i}" for i in range(8)]
    assert [len(call) for call in server.calls] == [8, 4, 2, 2, 2]
    assert server.slept == [0.0, 0.0]


def test_an_answer_that_is_too_large_alone_is_not_asked_for_for_ever() -> None:
    server = Server(lambda key, call: error(AnswerTooLarge))
    assert told(server.ask(items(1))) == ["AnswerTooLarge"]
    assert len(server.calls) == 1


def test_calls_are_bounded_in_items_and_bytes() -> None:
    server = Server(lambda key, call: good(key))
    server.ask(items(5, size=3 * 1024**2), max_items=3)
    assert [len(call) for call in server.calls] == [2, 2, 1]
    server.calls.clear()
    server.ask(items(7), max_items=3)
    assert [len(call) for call in server.calls] == [3, 3, 1]


def test_what_does_not_get_its_turn_in_time_says_so() -> None:
    server = Server(lambda key, call: good(key), call_s=10)
    results = server.ask(items(3), timeout_s=15, max_items=1)
    assert told(results) == ["k0", "k1", "DeadlineExceeded"]
    assert isinstance(results[2], DeadlineExceeded)


def test_an_item_that_cannot_be_sent_is_told_from_its_neighbours() -> None:
    server = Server(lambda key, call: TypeError if key == "k1" else good(key))
    results = server.ask(items(3))
    assert told(results) == ["k0", "InvalidRequest", "k2"]
    assert isinstance(results[1], InvalidRequest)
    assert str(results[1]) == "k1 cannot be sent"


def test_a_call_that_fails_as_a_whole_fails_each_of_its_items() -> None:
    calls = 0

    class Down:
        def predict_batch(
            self, batch: Sequence[BatchItem], *, timeout_s: float | None = None
        ) -> list[Answer]:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise error(ServerUnavailable, 0.25)
            return [good(item.key) for item in batch]

    slept: list[float] = []
    results = ask(Down(), items(2), AskingSettings(), sleep=slept.append)
    assert told(results) == ["k0", "k1"]
    assert slept == [0.25]


@pytest.mark.parametrize(
    "settings", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"max_retries": -1},
                 {"max_items": 0}, {"max_items": 1025}]
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        AskingSettings(**settings)  # type: ignore[arg-type]
