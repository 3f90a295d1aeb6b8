"""What is quarantined of a model whose unloads have left bytes on a device more than once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.residency.losses import Losses


def test_all_of_one_loss_comes_back_at_once_or_in_parts() -> None:
    losses = Losses()
    losses.add(0, left_bytes=150, missing_bytes=150)
    assert losses.take_off({0: 50}) == {0: 50}
    assert losses.take_off({0: 100}) == {0: 100}
    assert losses.take_off({0: 100}) == {}


def test_what_others_held_as_well_comes_first() -> None:
    losses = Losses()
    losses.add(0, left_bytes=120, missing_bytes=20)
    assert losses.take_off({0: 100}) == {}
    assert losses.take_off({0: 20}) == {0: 20}


def test_devices_do_not_pay_for_each_other() -> None:
    losses = Losses()
    losses.add(0, left_bytes=10, missing_bytes=10)
    losses.add(1, left_bytes=10, missing_bytes=5)
    assert losses.take_off({1: 10, 2: 10}) == {1: 5}
    assert losses.take_off({0: 10, 1: 10}) == {0: 10}


@given(st.data())
def test_no_less_is_quarantined_than_is_missing(data: st.DataObject) -> None:
    losses = Losses()
    there: list[tuple[int, int]] = []
    quarantined = 0

    def come_back() -> None:
        nonlocal quarantined
        left, _ = there.pop(data.draw(st.integers(0, len(there) - 1)))
        found = losses.take_off({0: left})
        quarantined -= found.get(0, 0)
        assert quarantined >= sum(missing for _, missing in there)
        assert quarantined <= sum(left for left, _ in there)

    for _ in range(data.draw(st.integers(1, 12))):
        is_back = data.draw(st.booleans())
        if there and is_back:
            come_back()
            continue
        left = data.draw(st.integers(1, 20))
        missing = data.draw(st.integers(0, left))
        losses.add(0, left_bytes=left, missing_bytes=missing)
        there.append((left, missing))
        quarantined += missing
    while there:
        come_back()
    assert quarantined == 0
