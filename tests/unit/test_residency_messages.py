"""Where a model stands, as a message."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modelyard.v1 import residency_pb2 as pb
from modelyard_server.residency.values import GONE, CopyState, State
from modelyard_server.services.explanation import summary_of
from modelyard_server.services.residency_messages import residency_message


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (CopyState.NONE, pb.COPY_STATE_NONE),
        (CopyState.AWAITED, pb.COPY_STATE_MAKING),
        (CopyState.MAKING, pb.COPY_STATE_MAKING),
        (CopyState.KEPT, pb.COPY_STATE_KEPT),
        (CopyState.DROPPING, pb.COPY_STATE_DROPPING),
    ],
)
def test_every_state_of_a_copy_is_told(state: CopyState, told: pb.CopyState.ValueType) -> None:
    message = residency_message("m", replace(GONE, copy_state=state), ())
    assert message.copy_state == told
    assert not message.HasField("copy_load_duration")


def test_what_a_copy_holds_and_saves_is_told() -> None:
    use = replace(GONE, copy_state=CopyState.KEPT, copy_bytes=7, copy_duration_s=0.25)
    message = residency_message("m", use, ())
    assert message.copy_bytes == 7
    assert message.copy_load_duration.ToTimedelta().total_seconds() == 0.25
    assert list(message.charges) == []


@pytest.mark.parametrize(
    ("state", "summary"),
    [
        (CopyState.NONE, "Not in memory, never loaded."),
        (CopyState.DROPPING, "Not in memory, never loaded."),
        (
            CopyState.KEPT,
            "Not in memory, never loaded; a copy of its weights is on the host tier.",
        ),
    ],
)
def test_a_summary_says_that_there_is_a_copy(state: CopyState, summary: str) -> None:
    use = replace(GONE, state=State.COLD, copy_state=state)
    assert summary_of("models/m", use, [], device_names=(), truncated=False) == summary
