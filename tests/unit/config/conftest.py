"""What tests of the configuration share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of the configuration file, with an empty folder "models" in it."""
    (tmp_path / "models").mkdir()
    return tmp_path
