"""Budgets as people write them."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from modelyard.devices import Device
from modelyard_server.config import Budget, Config, DeviceConfig, YardConfig, parse_config
from modelyard_server.simulation.machine import Machine
from modelyard_server.simulation.machine_text import (
    describe_budgets,
    machine_of_config,
    parse_budget,
    parse_what_if,
)

NAMED = Machine(budgets=(10**9, 2 * 10**9), device_names=("cuda:0", "cuda:1"))


@pytest.mark.parametrize(
    ("text", "budget"),
    [("0.2", 200), ("20%", 200), ("12.5 %", 125), ("1", 1000), ("100%", 1000), ("3kB", 3000)],
)
def test_a_budget_is_a_size_or_a_share(text: str, budget: int) -> None:
    assert parse_budget(text, 1000) == budget


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("0", "as a share of all models is above 0"),
        ("1.5", "for bytes write a unit"),
        ("101%", "as a share of all models"),
        ("300", "for bytes write a unit"),
        ("0.0001", "at least 1 byte"),
        ("0B", "at least 1 byte"),
        ("100TB", "at most 63.99TiB|at most 64"),
        ("8gb", "unknown unit"),
        ("", "is no size"),
        ("-8GB", "is no size"),
    ],
)
def test_what_is_no_budget_is_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_budget(text, 1000)


def test_a_share_that_is_too_much_says_of_how_much() -> None:
    with pytest.raises(
        ValueError, match=r"^'0\.5' of 256TiB: a budget is at least 1 byte and at mo"
    ):
        parse_budget("0.5", 1 << 48)
    assert parse_budget("0.2", 1 << 48) == (1 << 48) // 5


def test_what_if_changes_each_budget_or_that_of_one_device() -> None:
    assert parse_what_if("+8GB").applied_to(NAMED).budgets == (9 * 10**9, 10 * 10**9)
    assert parse_what_if("-500MB").applied_to(NAMED).budgets == (5 * 10**8, 15 * 10**8)
    assert parse_what_if("cuda:1=+1GB").applied_to(NAMED).budgets == (10**9, 3 * 10**9)


@pytest.mark.parametrize("text", ["8GB", "=+8GB", "+", "+8", "", "+-8GB", "cuda:0=8GB"])
def test_what_is_no_change_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_what_if(text)


def test_a_change_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no device 'cuda:2'; there are cuda:0, cuda:1"):
        parse_what_if("cuda:2=+1GB").applied_to(NAMED)
    with pytest.raises(ValueError, match="there are none with a name"):
        parse_what_if("cuda:2=+1GB").applied_to(Machine(budgets=(1,)))
    with pytest.raises(ValueError, match="a budget would be 0 bytes"):
        parse_what_if("-1GB").applied_to(NAMED)
    with pytest.raises(ValueError, match="a budget would be"):
        parse_what_if("+80TB").applied_to(NAMED)


def test_a_servers_file_says_what_its_machine_is(tmp_path: Path) -> None:
    text = (
        "[yard]\noverdue_after_s = 7\nloads_per_device = 2\n"
        '[roots]\nstore = "."\n'
        '[[devices]]\ndevice = "cuda:0"\nbudget = "3GB"\nlogical = true\n'
        '[[devices]]\ndevice = "disk"\nbudget = "9GB"\n'
        '[[devices]]\ndevice = "cpu"\nbudget = "1GB"\n'
    )
    config = parse_config(text, base=tmp_path)
    machine = machine_of_config(config, Machine(budgets=(1,), slots=9))
    assert machine.budgets == (3 * 10**9, 10**9)
    assert machine.device_names == ("cuda:0", "cpu")
    assert (machine.overdue_after_s, machine.loads_per_device, machine.slots) == (7.0, 2, 9)


def test_a_servers_file_says_what_its_host_tier_is_and_who_may_wait(tmp_path: Path) -> None:
    text = (
        "[yard]\nmax_waiting = 70\nmax_waiting_per_model = 7\n"
        '[host_tier]\nbudget = "TIER"\n'
        '[[devices]]\ndevice = "cuda:0"\nbudget = "3GB"\n'
        '[[devices]]\ndevice = "cpu"\nbudget = "1GB"\n'
    )
    base = Machine(budgets=(1,))
    config = parse_config(text.replace("TIER", "5GB"), base=tmp_path)
    machine = machine_of_config(config, base)
    assert (machine.host_budget_bytes, machine.above_tier) == (5 * 10**9, (True, False))
    assert (machine.max_waiting, machine.max_waiting_per_model) == (70, 7)
    assert machine_of_config(config, base, 0).host_budget_bytes == 0
    config = parse_config(text.replace("TIER", "5%"), base=tmp_path)
    with pytest.raises(ValueError, match="the budget of the host tier is 5%: nobody knows here"):
        machine_of_config(config, base)
    assert machine_of_config(config, base, 9).host_budget_bytes == 9


def test_a_share_of_a_device_that_nobody_sees_is_refused() -> None:
    device = DeviceConfig(device=Device.from_str("cpu"), budget=Budget(percent=Decimal(50)))
    config = Config(devices=(device,), yard=YardConfig())
    with pytest.raises(ValueError, match="the budget of cpu is 50%: nobody knows here of how much"):
        machine_of_config(config, Machine(budgets=(1,)))


def test_budgets_are_told_with_the_names_there_are() -> None:
    assert describe_budgets((1024,), ()) == "1KiB"
    assert describe_budgets((1024, 2048), ()) == "device 0 1KiB, device 1 2KiB"
    assert describe_budgets((1024, 2048), ("cuda:0", "cpu")) == "cuda:0 1KiB, cpu 2KiB"
