"""Which budgets there can be."""

from __future__ import annotations

import pytest

from modelyard.devices import Device
from modelyard_server.devices.budgets import (
    MAX_BUDGET_BYTES,
    BudgetImpossible,
    budget_violations,
)
from modelyard_server.devices.host_tier import HostTier
from modelyard_server.devices.inventory import ManagedDevice

HOST = 1000


def managed(
    text: str, *, logical: bool = False, total: int = HOST, reserve: int = 0
) -> ManagedDevice:
    return ManagedDevice(
        name=f"devices/{text.replace(':', '-')}",
        device=Device.from_str(text),
        logical=logical,
        torch_device="cpu",
        threads=1,
        total_bytes=total,
        budget_bytes=0,
        reserve_bytes=reserve,
    )


@pytest.mark.parametrize("budget", [0, 1, HOST])
def test_a_budget_may_be_all_that_a_device_has(budget: int) -> None:
    assert budget_violations([managed("cpu")], [budget]) == ()


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (-1, "at least 0 bytes, got -1"),
        (HOST + 1, "budget 1001 bytes is more than it has, 1000 bytes"),
        (MAX_BUDGET_BYTES + 1, f"at most {MAX_BUDGET_BYTES} bytes"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda:0", "disk"])
def test_a_budget_that_a_device_cannot_have_is_named(device: str, budget: int, text: str) -> None:
    (violation,) = budget_violations([managed(device)], [budget])
    assert violation.field == f"devices/{device.replace(':', '-')}"
    assert text in violation.description


def test_the_largest_budget_is_one_on_a_device_that_has_it() -> None:
    disk = managed("disk", total=MAX_BUDGET_BYTES + 5)
    assert budget_violations([disk], [MAX_BUDGET_BYTES]) == ()


def test_a_reserve_is_not_for_budgets() -> None:
    device = managed("cuda:0", reserve=100)
    assert budget_violations([device], [900]) == ()
    (violation,) = budget_violations([device], [901])
    assert "less 100 bytes in reserve" in violation.description


def test_a_reserve_of_more_than_there_is_is_named() -> None:
    (violation,) = budget_violations([managed("cpu", reserve=HOST + 1)], [0])
    assert "its reserve of 1001 bytes is more than it has" in violation.description


def test_devices_in_host_memory_share_it() -> None:
    devices = [managed("cpu"), managed("cuda:0", logical=True), managed("cuda:1", logical=True)]
    assert budget_violations(devices, [200, 300, 500]) == ()
    (violation,) = budget_violations(devices, [200, 301, 500])
    assert violation.field == "devices/cpu"
    for words in ("1001 bytes together", "devices/cuda-0 301", "devices/cuda-1 500", "1000 bytes"):
        assert words in violation.description


def test_their_reserves_add_up() -> None:
    devices = [managed("cpu", reserve=100), managed("cuda:0", logical=True, reserve=50)]
    assert budget_violations(devices, [450, 400]) == ()
    (violation,) = budget_violations(devices, [450, 401])
    assert "less 150 bytes in reserve" in violation.description


def test_what_has_its_own_memory_does_not_count() -> None:
    devices = [managed("cpu"), managed("cuda:0"), managed("disk"), managed("xpu:0")]
    assert budget_violations(devices, [HOST] * 4) == ()


def test_every_violation_is_told_at_once_but_no_sum_of_impossible_ones() -> None:
    devices = [managed("cpu"), managed("cuda:0", logical=True)]
    fields = [v.field for v in budget_violations(devices, [HOST + 1, -1])]
    assert fields == ["devices/cpu", "devices/cuda-0"]


def test_what_stops_the_start_is_one_line() -> None:
    devices = [managed("cpu"), managed("cuda:0")]
    error = BudgetImpossible(budget_violations(devices, [HOST + 1, -1]))
    assert str(error) == (
        "devices/cpu: budget 1001 bytes is more than it has, 1000 bytes; "
        "devices/cuda-0: a budget is at least 0 bytes, got -1"
    )


def tier_of(budget: int) -> HostTier:
    return HostTier(budget_bytes=budget, total_bytes=HOST, above=())


def test_the_host_tier_is_a_pool_of_host_memory_like_the_others() -> None:
    devices = [managed("cpu"), managed("cuda:0", logical=True, reserve=100), managed("cuda:1")]
    assert budget_violations(devices, [200, 300, HOST], tier_of(400)) == ()
    (violation,) = budget_violations(devices, [200, 300, HOST], tier_of(401))
    assert violation.field == "devices/cpu"
    assert violation.description == (
        "the budgets of devices in host memory and its tier are 901 bytes together "
        "(devices/cpu 200, devices/cuda-0 300, the host tier 401), and it has 1000 bytes, "
        "less 100 bytes in reserve"
    )


def test_one_device_and_the_host_tier_are_two_pools() -> None:
    assert budget_violations([managed("cpu")], [600], tier_of(400)) == ()
    assert len(budget_violations([managed("cpu")], [600], tier_of(401))) == 1
    assert len(budget_violations([managed("cuda:0", logical=True)], [601], tier_of(400))) == 1


def test_a_host_tier_alone_is_bounded_by_host_memory() -> None:
    cards = [managed("cuda:0")]
    assert budget_violations(cards, [HOST], tier_of(HOST)) == ()
    (violation,) = budget_violations(cards, [HOST], tier_of(HOST + 1))
    assert violation.field == "hostTier"
    assert violation.description == "budget 1001 bytes is more than the host has, 1000 bytes"
    (violation,) = budget_violations(cards, [HOST], tier_of(MAX_BUDGET_BYTES + 1))
    assert f"at most {MAX_BUDGET_BYTES} bytes" in violation.description


def test_a_host_tier_that_is_impossible_by_itself_is_named_once() -> None:
    (violation,) = budget_violations([managed("cpu")], [1], tier_of(HOST + 1))
    assert violation.field == "hostTier"
