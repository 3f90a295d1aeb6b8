"""What an arrival costs the core: its own benchmark, for 300 models with all shadows.

`make bench-thrash` builds and runs it, and hands its report on with `--core`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.thrash_figures import arrival_us
from modelyard_server import _core

__all__ = ["arrival_figures"]

_MODELS = 300


def arrival_figures(report: Path) -> dict[str, Any]:
    """Reads google-benchmark's report.

    Raises:
        OSError: it cannot be read.
        ValueError: the run is not in it.
    """
    read = json.loads(report.read_text(encoding="utf-8"))
    return {"arrival_us_300": arrival_us(read, _core.POLICIES[0], _MODELS)}
