"""[yard]: how it is decided what stays and who waits."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.config_problems import CPU, only_problem

from modelyard_server.config import parse_config
from modelyard_server.config.yard import POLICIES


class TestYard:
    def test_an_unknown_policy_is_told_which_there_are(self, base: Path) -> None:
        line, key, problem = only_problem(f'[yard]\npolicy = "lfu"\n{CPU}', base)
        assert (line, key) == (2, "yard.policy")
        assert "must be one of ensemble, learned, " in problem

    @pytest.mark.parametrize("policy", POLICIES)
    def test_every_policy_of_the_core_may_be_chosen(self, base: Path, policy: str) -> None:
        config = parse_config(f'[yard]\npolicy = "{policy}"\n{CPU}', base=base)
        assert config.yard.policy == policy

    @pytest.mark.parametrize(
        "setting",
        [
            "max_waiting = 0",
            "max_waiting = 1.0",
            "max_waiting = true",
            "max_waiting_per_model = 1000001",
            "overdue_after_s = 0",
            "backoff_initial_s = 61",
            "backoff_max_s = 86401",
            "loads_per_device = 0",
            "explain_capacity = 0",
            'policy = ""',
            'order = "lifo"',
        ],
    )
    def test_yard_values_out_of_range_are_refused(self, base: Path, setting: str) -> None:
        line, key, _ = only_problem(f"[yard]\n{setting}\n{CPU}", base)
        assert (line, key) == (2, f"yard.{setting.split()[0]}")
