"""[[devices]]: what can be one, and what it can have."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.config_problems import CPU, only_problem, problems_of

from modelyard.devices import Device
from modelyard_server.config import parse_config


class TestDevices:
    @pytest.mark.parametrize("text", ["", "devices = []\n", "[server]\n"])
    def test_there_is_at_least_one(self, base: Path, text: str) -> None:
        assert "at least one" in only_problem(text, base)[2]

    def test_there_are_at_most_sixteen(self, base: Path) -> None:
        def text(count: int) -> str:
            return "".join(
                f'[[devices]]\ndevice = "cuda:{index}"\nbudget = 1\n' for index in range(count)
            )

        assert len(parse_config(text(16), base=base).devices) == 16
        assert only_problem(text(17), base)[:2] == (1, "devices")

    @pytest.mark.parametrize(
        ("first", "second"),
        [("cpu", "cpu"), ("cpu", "cpu:0"), ("cuda", "cuda:0"), ("mps:0", "mps")],
    )
    def test_each_is_declared_once(self, base: Path, first: str, second: str) -> None:
        text = "".join(f'[[devices]]\ndevice = "{each}"\nbudget = 1\n' for each in (first, second))
        line, key, problem = only_problem(text, base)
        assert (line, key) == (5, "devices[1].device")
        assert "devices[0]" in problem

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ('device = "disk"', "add [roots]"),
            ('device = "disk:1"', "there is one disk"),
            ('device = "gpu"', "use one of"),
            ('device = "cuda:128"', "127"),
            ('device = "cuda: 1"', "integer"),
            ("device = 0", "must be a device"),
            ('device = "cpu:1"', "logical"),
            ("logical = 1", "true or false"),
            ("threads = 0", "1 to 1024"),
            ("reserve = -1", "0 to"),
            ('reserve = "10%"', "no size"),
            ('transfer_bandwidth = "4GiB"', 'must end in "/s"'),
            ('transfer_bandwidth = "4 cats/s"', "unknown unit"),
            ('transfer_bandwidth = "/s"', "no size"),
            ("transfer_bandwidth = -1", "0 to"),
            ("transfer_bandwidth = 1.5", "bytes a second"),
            ('transfer_bandwidth = "1GB/s"', "logical devices"),
            ('budget = "0%"', "above 0%"),
            ('budget = "100.5%"', "at most 100%"),
            ('budget = "half%"', "no percentage"),
            ('budget = "0B"', "at least 1"),
            ("budget = 0", "at least 1"),
            ("budget = -5", "at least 1"),
            (f"budget = 0x{'f' * 9000}", "at most"),
            ("budget = 1.5", "bytes, a size or a percentage"),
            ('budget = "lots"', "no size"),
        ],
    )
    def test_values_that_cannot_be_are_refused(self, base: Path, setting: str, text: str) -> None:
        lines = {"device": 'device = "cpu"', "budget": "budget = 1"}
        lines[setting.split()[0]] = setting
        content = "[[devices]]\n" + "\n".join(lines.values()) + "\n"
        if "disk" in setting:
            content += CPU
        _, key, problem = only_problem(content, base)
        assert key == f"devices[0].{setting.split()[0]}"
        assert text in problem

    def test_pools_of_host_memory_may_be_numbered(self, base: Path) -> None:
        text = '[[devices]]\ndevice = "cpu:1"\nbudget = 1\nlogical = true\n'
        assert parse_config(text, base=base).devices[0].device == Device.from_str("cpu:1")

    def test_logical_devices_may_have_a_bandwidth_and_all_a_reserve(self, base: Path) -> None:
        text = '[[devices]]\ndevice = "cuda:0"\nbudget = 1\nlogical = true\nreserve = "1KiB"\n'
        (device,) = parse_config(f'{text}transfer_bandwidth = "1.5 kB/s"', base=base).devices
        assert (device.reserve, device.transfer_bandwidth) == (1024, 1500)
        (device,) = parse_config(f"{text}transfer_bandwidth = 7", base=base).devices
        assert device.transfer_bandwidth == 7

    def test_the_disk_is_a_device_for_parts_where_there_are_roots(self, base: Path) -> None:
        disk = '[[devices]]\ndevice = "disk:0"\nbudget = 1\n'
        config = parse_config(f'{disk}{CPU}[roots]\na = "models"\n', base=base)
        assert config.devices[0].device == Device.disk()
        assert problems_of(disk, base) == [
            (1, "devices", 'need one that can run models: add for example device = "cpu"'),
            (2, "devices[0].device", "the disk is where the roots are: add [roots]"),
        ]

    @pytest.mark.parametrize(
        ("setting", "text"),
        [
            ("logical = true", "no pool"),
            ("threads = 2", "nothing runs"),
            ('transfer_bandwidth = "1GB/s"', "logical devices"),
        ],
    )
    def test_the_disk_has_no_pool_and_no_lane(self, base: Path, setting: str, text: str) -> None:
        disk = f'[[devices]]\ndevice = "disk"\nbudget = 1\n{setting}\n'
        line, key, problem = only_problem(f'{disk}{CPU}[roots]\na = "models"\n', base)
        assert (line, key) == (4, f"devices[0].{setting.split()[0]}")
        assert text in problem
