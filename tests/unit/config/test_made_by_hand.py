"""Configurations that are made of values, without a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelyard.devices import ComponentDevice, Device, DeviceMap
from modelyard_server.config import (
    Budget,
    CatalogConfig,
    Config,
    DeviceConfig,
    ModelConfig,
    ServerConfig,
    YardConfig,
)

# What a caller without a type checker may pass.
WRONG: Any = object()


class TestValuesMadeByHand:
    """The same rules hold for code that makes a configuration without a file."""

    def test_rules_apply(self) -> None:
        with pytest.raises(ValueError, match=r"listen.*no TLS"):
            ServerConfig(listen="0.0.0.0:1")
        with pytest.raises(ValueError, match="max_waiting"):
            YardConfig(max_waiting=0)
        with pytest.raises(ValueError, match="device"):
            DeviceConfig(device=Device.from_str("disk:1"), budget=Budget(size_bytes=1))
        with pytest.raises(ValueError, match="on the disk"):
            ModelConfig(
                id="a",
                runtime="identity",
                device=ComponentDevice.from_multiple(DeviceMap({"": Device.disk()})),
            )
        with pytest.raises(ValueError, match="absolute"):
            CatalogConfig(path=Path("x.db"))
        with pytest.raises(ValueError, match="folder"):
            ModelConfig(id="a", runtime="torch", root="store", folder="../a")
        with pytest.raises(ValueError, match="threads"):
            DeviceConfig(device=Device.cpu(), budget=Budget(size_bytes=1), threads=WRONG)

    def test_parts_have_to_fit(self, base: Path) -> None:
        cpu = DeviceConfig(device=Device.cpu(), budget=Budget(size_bytes=1))
        echo = ModelConfig(id="echo", runtime="identity")
        net = ModelConfig(id="t", runtime="torch", root="store", folder="a")
        assert Config(devices=(cpu,), models=(echo, net), roots={"store": base}).devices == (cpu,)
        with pytest.raises(ValueError, match="at least one"):
            Config(devices=())
        with pytest.raises(ValueError, match="declared already"):
            Config(devices=(cpu, cpu))
        with pytest.raises(ValueError, match="same id"):
            Config(devices=(cpu,), models=(echo, echo))
        with pytest.raises(ValueError, match="not in"):
            Config(devices=(cpu,), models=(net,))
