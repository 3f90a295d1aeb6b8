"""What a worker answers is checked before it is believed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modelyard_server.execution.engine import Loaded, Unloaded
from modelyard_server.execution.workers.answers import (
    back_of,
    is_back_of,
    loaded_of,
    unloaded_of,
)
from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.payload import understand
from modelyard_server.execution.workers.worker_process import Answer
from modelyard_server.runtimes.api import LoadSource
from modelyard_server.runtimes.targets import Target

TARGET = Target(home=0, parts=(("a", 0), ("b", 1)))
HELD = {0: 100, 1: 20}


def answer(result: Any, **more: Any) -> Answer:
    return Answer({"op": "answer", "call": 1, "result": result, **more})


def test_a_load_says_what_is_held_and_where_it_came_from() -> None:
    said = answer({"own_bytes": [[0, 40], [1, 20]], "source": "copy"}, held=[[0, 100], [1, 20]])
    expected = Loaded(own_bytes={0: 40, 1: 20}, source=LoadSource.COPY)
    assert loaded_of(said, TARGET, 2) == (expected, HELD)


@pytest.mark.parametrize(
    ("result", "held"),
    [
        ({"own_bytes": [[0, 1]], "source": "moon"}, [[0, 1]]),
        ({"own_bytes": [[0, 1]], "source": None}, [[0, 1]]),
        ({"own_bytes": [[0, 1]], "source": ["copy"]}, [[0, 1]]),
        ({"own_bytes": [[0, 1]]}, [[0, 1]]),
        ({"own_bytes": [[0, -1]], "source": "copy"}, [[0, 1]]),
        ({"own_bytes": [[1, 1]], "source": "copy"}, [[0, 1]]),
        ({"own_bytes": [[2, 1]], "source": "copy"}, [[2, 1]]),
        ([[0, 1]], [[0, 1]]),
        (None, None),
    ],
)
def test_a_load_that_cannot_be_is_not_understood(result: Any, held: Any) -> None:
    with pytest.raises(MalformedMessage):
        understand(lambda: loaded_of(answer(result, held=held), TARGET, 3))


def freed(**more: Any) -> dict[str, Any]:
    nothing = {"kept_bytes": None, "keep_s": 0.0, "refused_bytes": None}
    return {"freed": [[0, 100], [1, 0]], **nothing, **more}


def test_an_unload_says_what_is_back_and_what_is_kept() -> None:
    assert unloaded_of(answer(freed()), HELD, False, 2) == Unloaded(freed={0: 100, 1: 0})
    assert unloaded_of(answer(freed()), HELD, True, 2) == Unloaded(freed={0: 100, 1: 0})
    kept = unloaded_of(answer(freed(kept_bytes=0, keep_s=3)), HELD, True, 2)
    assert kept == Unloaded(freed={0: 100, 1: 0}, kept_bytes=0, keep_s=3.0)


@pytest.mark.parametrize(
    "result",
    [
        freed(freed=[[0, 101]]),
        freed(freed=[[2, 1]]),
        freed(freed=None),
        freed(kept_bytes=-1),
        freed(kept_bytes=True),
        freed(kept_bytes=1.5),
        freed(kept_bytes="1"),
        freed(keep_s=-0.1),
        freed(keep_s=None),
        freed(keep_s=True),
        freed(keep_s="0"),
        freed(keep_s=json.loads("NaN")),
        freed(keep_s=json.loads("Infinity")),
        freed(keep_s=10**400),
        {"freed": [[0, 100]]},
        [[0, 100]],
        None,
    ],
)
def test_an_unload_that_cannot_be_is_not_understood(result: Any) -> None:
    with pytest.raises(MalformedMessage):
        understand(lambda: unloaded_of(answer(result), HELD, True, 2))


def test_a_copy_that_nobody_asked_for_is_not_understood() -> None:
    with pytest.raises(MalformedMessage, match="not to be kept"):
        understand(lambda: unloaded_of(answer(freed(kept_bytes=5)), HELD, False, 2))


def test_a_copy_is_back_or_not() -> None:
    assert is_back_of(answer(True)) is True
    assert is_back_of(answer(False)) is False
    for other in (None, 0, 1, "true", [True]):
        with pytest.raises(MalformedMessage):
            understand(lambda other=other: is_back_of(answer(other)))  # type: ignore[misc]


def test_what_is_back_since_is_sizes_of_devices() -> None:
    assert back_of(answer([[1, 5]]), 2) == {1: 5}
    with pytest.raises(MalformedMessage):
        understand(lambda: back_of(answer([[2, 5]]), 2))
