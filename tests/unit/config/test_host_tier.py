"""[host_tier]: its budget, and the devices that it is for."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.support.config_problems import CPU, only_problem

from modelyard.devices import Device
from modelyard_server.config import Budget, Config, DeviceConfig, HostTierConfig, parse_config


class TestHostTier:
    LOGICAL = '[[devices]]\ndevice = "cuda:0"\nlogical = true\nbudget = "1GB"\n'
    REAL = '[[devices]]\ndevice = "cuda:0"\nbudget = "1GB"\n'
    DISK = '[[devices]]\ndevice = "disk"\nbudget = "1GB"\n[roots]\nstore = "models"\n'

    @pytest.mark.parametrize(
        ("written", "budget"),
        [
            ("", None),
            ("[host_tier]\n", None),
            ("[host_tier]\nbudget = 0\n", None),
            ("[host_tier]\nbudget = 7\n", Budget(size_bytes=7)),
            ('[host_tier]\nbudget = "4GiB"\n', Budget(size_bytes=2**32)),
            ('[host_tier]\nbudget = "12.5%"\n', Budget(percent=Decimal("12.5"))),
        ],
    )
    @pytest.mark.parametrize("devices", [LOGICAL, REAL, REAL + CPU])
    def test_its_budget_is_read_like_those_of_devices(
        self, base: Path, devices: str, written: str, budget: Budget | None
    ) -> None:
        config = parse_config(devices + written, base=base)
        assert config.host_tier == HostTierConfig(budget=budget)

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ('budget = "0%"', "above 0%"),
            ('budget = "101%"', "at most 100%"),
            ("budget = -1", "at least 1"),
            ('budget = "0B"', "at least 1"),
            ("budget = false", "bytes, a size or a percentage"),
            ("budget = 1.5", "bytes, a size or a percentage"),
            ('budget = "lots"', "no size"),
            ("bugdet = 1", 'did you mean "budget"?'),
        ],
    )
    def test_budgets_that_cannot_be_are_refused(self, base: Path, setting: str, text: str) -> None:
        line, key, problem = only_problem(f"{self.LOGICAL}[host_tier]\n{setting}\n", base)
        assert (line, key) == (6, f"host_tier.{setting.split()[0]}")
        assert text in problem

    @pytest.mark.parametrize("devices", [CPU, CPU + DISK])
    def test_it_needs_a_device_that_it_is_for(self, base: Path, devices: str) -> None:
        text = f'[host_tier]\nbudget = "1GB"\n{devices}'
        line, key, problem = only_problem(text, base)
        assert (line, key) == (2, "host_tier.budget")
        assert "no device whose models it could keep" in problem and "page cache" in problem

    def test_without_devices_that_can_be_read_nobody_knows_whether_it_has_one(
        self, base: Path
    ) -> None:
        tier = "[host_tier]\nbudget = 1\n"
        assert only_problem(tier, base)[1] == "devices"
        broken = '[[devices]]\ndevice = "gpu"\nbudget = 1\n'
        assert only_problem(tier + broken + CPU, base)[1] == "devices[0].device"

    def test_it_takes_the_place_of_a_device(self, base: Path) -> None:
        def text(count: int, budget: int) -> str:
            devices = "".join(
                f'[[devices]]\ndevice = "cuda:{index}"\nbudget = 1\n' for index in range(count)
            )
            return f"[host_tier]\nbudget = {budget}\n{devices}"

        assert len(parse_config(text(15, 1), base=base).devices) == 15
        assert len(parse_config(text(16, 0), base=base).devices) == 16
        _, key, problem = only_problem(text(16, 1), base)
        assert key == "devices"
        assert "at most 15 devices beside a host tier, got 16" in problem
        assert "at most 16" in only_problem(text(17, 1), base)[2]

    def test_values_made_by_hand_are_checked_too(self) -> None:
        device = DeviceConfig(device=Device.cpu(), budget=Budget(size_bytes=1))
        below_zero: Any = -1
        with pytest.raises(ValueError, match=r"host_tier\.budget: there is no device"):
            Config(devices=(device,), host_tier=HostTierConfig(budget=Budget(size_bytes=1)))
        with pytest.raises(ValueError, match="at least 1"):
            HostTierConfig(budget=below_zero)
