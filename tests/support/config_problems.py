"""Texts of configurations, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from modelyard_server.config import ConfigError, parse_config

__all__ = ["CPU", "ECHO", "only_problem", "problems_of", "with_model"]

CPU = '[[devices]]\ndevice = "cpu"\nbudget = "1GB"\n'
ECHO = '[models.echo]\nruntime = "identity"\n'


def problems_of(text: str, base: Path) -> list[tuple[int, str, str]]:
    """Line, key and text of every problem of a configuration, which must have some."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, base=base)
    return [(found.line, found.key, found.text) for found in caught.value.problems]


def only_problem(text: str, base: Path) -> tuple[int, str, str]:
    """The one problem that a configuration has."""
    problems = problems_of(text, base)
    assert len(problems) == 1, problems
    return problems[0]


def with_model(settings_text: str) -> str:
    """Return a configuration whose model has these settings, from line 10."""
    text = (
        '[[devices]]\ndevice = "cpu"\nbudget = 1\n'
        '[[devices]]\ndevice = "cuda:0"\nbudget = 1\n'
        '[roots]\nstore = "models"\n[models.m]\n'
    )
    return text + dedent(settings_text)
