"""What a worker says that it has kept is within what it was allowed to keep."""

from __future__ import annotations

import pytest

from modelyard_server.execution.engine import Unloaded
from modelyard_server.execution.workers.answers import unloaded_of
from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.payload import understand
from modelyard_server.execution.workers.worker_process import Answer


def said(kept: int | None = None, refused: int | None = None) -> Unloaded:
    result = {"freed": [[0, 9]], "kept_bytes": kept, "keep_s": 0.5, "refused_bytes": refused}
    answer = Answer({"op": "answer", "call": 1, "result": result})
    return understand(lambda: unloaded_of(answer, {0: 9}, True, 1, 100))


def test_what_was_allowed_is_kept_and_what_was_not_is_refused() -> None:
    assert said(kept=100) == Unloaded(freed={0: 9}, kept_bytes=100, keep_s=0.5)
    assert said(refused=101) == Unloaded(freed={0: 9}, keep_s=0.5, refused_bytes=101)
    assert said() == Unloaded(freed={0: 9}, keep_s=0.5)


@pytest.mark.parametrize(("kept", "refused"), [(101, None), (None, 100), (None, 0), (5, 101)])
def test_more_than_that_is_not_understood(kept: int | None, refused: int | None) -> None:
    with pytest.raises(MalformedMessage):
        said(kept, refused)
