"""Configurations of a host tier that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.server import running_app
from tests.support.tiered import tier_config

from modelyard_server.config import ConfigError, parse_config
from modelyard_server.devices.budgets import BudgetImpossible


@pytest.mark.parametrize("budget", ['"1EiB"', '"63TiB"', '"100%"'])
async def test_a_tier_that_promises_more_than_the_machine_has_is_refused(
    tmp_path: Path, budget: str
) -> None:
    config = tier_config(tmp_path, copies=1)
    text = config.replace(
        next(line for line in config.splitlines() if line.startswith("budget = ")),
        f"budget = {budget}",
        1,
    )
    with pytest.raises((ConfigError, BudgetImpossible)) as caught:
        async with running_app(text, tmp_path):
            pass
    assert "host" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "piece",
    [
        "[host_tier]\nbudget = -1",
        '[host_tier]\nbudget = "much"',
        "[host_tier]\nbudget = true",
        "[host_tier]\nbudget = 1.5",
        '[host_tier]\nbudget = "0%"',
        '[host_tier]\nbudget = "101%"',
        "[host_tier]\nbudgets = 1",
        "[[host_tier]]\nbudget = 1",
        "host_tier = 5",
    ],
)
def test_what_cannot_be_a_tier_is_told_by_its_name(tmp_path: Path, piece: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(piece, base=tmp_path)
    assert "host_tier" in str(caught.value)
