"""Examples that share a request: which do, what each is answered, and what becomes of failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from modelyard import (
    BatchItem,
    Bfloat16,
    DeadlineExceeded,
    KeyNotFound,
    LoadFailed,
    ModelFailed,
    ModelyardError,
    Prediction,
    Served,
)

pytest.importorskip("apache_beam")

from modelyard.integrations.beam._asking import AskingSettings, Figures
from modelyard.integrations.beam._stacking import ask_for_rows

SERVED = Served(model="models/m", device="devices/cpu", cold=True, wait_s=0, load_s=None, run_s=0)

Answer = Prediction | ModelyardError


def rows_in(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        return rows_in(next(iter(inputs.values())))
    if isinstance(inputs, str | bytes):
        return 1
    return len(inputs.bits if isinstance(inputs, Bfloat16) else inputs)


class Echo:
    """Answers with the inputs; fails for items in which a row is bad."""

    def __init__(self, *, loses_rows: bool = False, error: type[ModelyardError] = ModelFailed):
        self.asked: list[tuple[str, int]] = []
        self._loses_rows = loses_rows
        self._error = error

    def predict_batch(
        self, items: Sequence[BatchItem], *, timeout_s: float | None = None
    ) -> list[Answer]:
        return [self._answer(item) for item in items]

    def _answer(self, item: BatchItem) -> Answer:
        self.asked.append((item.key, rows_in(item.inputs)))
        inputs: Any = item.inputs if isinstance(item.inputs, Mapping) else {"y": item.inputs}
        outputs: dict[str, Any] = {}
        for name, value in inputs.items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and (value < 0).any():
                return self._error("a bad row", code=grpc.StatusCode.INTERNAL)
            rows = [value] if isinstance(value, str | bytes) else value
            outputs[name] = rows[:1] if self._loses_rows else rows
        return Prediction(outputs, SERVED)


def items(values: Sequence[Any], key: str = "k") -> list[BatchItem]:
    return [BatchItem(key=key, inputs=value) for value in values]


def row(*values: float) -> Any:
    return np.array([values], np.float32)


def told(results: Sequence[Answer]) -> list[Any]:
    return [
        type(result).__name__
        if isinstance(result, ModelyardError)
        else np.asarray(result.only).tolist()
        for result in results
    ]


def test_rows_of_a_key_share_a_request_and_are_told_apart_again() -> None:
    echo, figures = Echo(), Figures()
    mixed = [BatchItem(key="ab"[n % 2], inputs=row(n)) for n in range(6)]
    results = ask_for_rows(echo, mixed, AskingSettings(), figures=figures)
    assert told(results) == [[[float(n)]] for n in range(6)]
    assert echo.asked == [("a", 3), ("b", 3)]
    assert figures.call_count == 1
    assert all(isinstance(one, Prediction) and one.served is SERVED for one in results)
    # Nobody's answer keeps everybody's memory.
    (first, *_) = results
    assert isinstance(first, Prediction)
    assert isinstance(first.only, np.ndarray)
    assert first.only.base is None


def test_a_request_has_so_many_rows_and_no_more() -> None:
    echo = Echo()
    results = ask_for_rows(echo, items([row(n) for n in range(7)]), AskingSettings(max_rows=3))
    assert told(results) == [[[float(n)]] for n in range(7)]
    assert echo.asked == [("k", 3), ("k", 3), ("k", 1)]
    echo.asked.clear()
    ask_for_rows(echo, items([row(1), row(2)]), AskingSettings(max_rows=1))
    assert echo.asked == [("k", 1), ("k", 1)]


def test_only_what_is_alike_goes_together() -> None:
    echo = Echo()
    parameters = {"top_k": 1}
    mixed = [
        BatchItem(key="k", inputs=row(1)),
        BatchItem(key="k", inputs=row(1, 2)),
        BatchItem(key="k", inputs=row(3).astype(np.float64)),
        BatchItem(key="k", inputs={"x": row(1)}),
        BatchItem(key="k", inputs={"z": row(1)}),
        BatchItem(key="k", inputs=row(4), parameters=parameters),
        BatchItem(key="k", inputs=row(5)),
        BatchItem(key="k", inputs=row(6), affinity="u1"),
        BatchItem(key="k", inputs=row(7), affinity="u1"),
        BatchItem(key="k", inputs=row(8), affinity="u2"),
        BatchItem(key="k", inputs=row(9), version="v2"),
        # More than one row already.
        BatchItem(key="k", inputs=np.zeros((2, 1), np.float32)),
        BatchItem(key="k", inputs=["a", "b"]),
    ]
    results = ask_for_rows(echo, mixed, AskingSettings())
    assert told(results)[:3] == [[[1.0]], [[1.0, 2.0]], [[3.0]]]
    assert sorted(rows for _, rows in echo.asked) == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]


def test_texts_bytes_and_bfloat16_share_requests_too() -> None:
    echo = Echo()
    bits = [Bfloat16.from_float32(row(value)) for value in (1.5, -2.0)]
    values = ["one", "two", b"1", b"2", *bits]
    results = ask_for_rows(echo, items(values), AskingSettings())
    assert echo.asked == [("k", 2)] * 3
    assert told(results) == [["one"], ["two"], [b"1"], [b"2"], [[1.5]], [[-2.0]]]


def test_several_inputs_and_outputs_are_cut_alike() -> None:
    echo = Echo()
    results = ask_for_rows(
        echo, items([{"text": "a", "x": row(1)}, {"text": "b", "x": row(2)}]), AskingSettings()
    )
    assert echo.asked == [("k", 2)]
    second = results[1]
    assert isinstance(second, Prediction)
    assert (second["text"], np.asarray(second["x"]).tolist()) == (["b"], [[2.0]])


def test_one_row_s_failure_is_no_other_s() -> None:
    echo = Echo()
    results = ask_for_rows(echo, items([row(1), row(-1), row(2)]), AskingSettings())
    assert told(results) == [[[1.0]], "ModelFailed", [[2.0]]]
    assert echo.asked == [("k", 3), ("k", 1), ("k", 1), ("k", 1)]


@pytest.mark.parametrize("error", [KeyNotFound, LoadFailed])
def test_what_is_wrong_with_the_model_is_told_to_all_at_once(error: type[ModelyardError]) -> None:
    echo = Echo(error=error)
    results = ask_for_rows(echo, items([row(1), row(-1), row(2)]), AskingSettings())
    assert told(results) == [error.__name__] * 3
    assert echo.asked == [("k", 3)]


def test_a_model_that_does_not_answer_by_row_is_asked_for_each() -> None:
    echo = Echo(loses_rows=True)
    results = ask_for_rows(echo, items([row(1), row(2)]), AskingSettings())
    assert told(results) == [[[1.0]], [[2.0]]]
    assert echo.asked == [("k", 2), ("k", 1), ("k", 1)]


def test_nothing_is_asked_for_alone_once_the_time_is_over() -> None:
    times = iter([0.0, 0.0, 0.0, 100.0])
    results = ask_for_rows(
        Echo(loses_rows=True),
        items([row(1), row(2)]),
        AskingSettings(timeout_s=50),
        clock=lambda: next(times, 100.0),
    )
    assert all(isinstance(result, DeadlineExceeded) for result in results)
