"""What every benchmark does: a configuration as a file, figures as a file that says of where."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["machine", "write_figures", "written"]


def written(folder: Path, config: str, name: str = "modelyard") -> Path:
    """A configuration as a file of a folder."""
    path = folder / f"{name}.toml"
    path.write_text(config)
    return path


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes figures as JSON, with the machine and the commit they are of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**figures, **machine()}, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """Where and from what the figures come."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "machine_cpus": os.cpu_count() or 0,
        "machine_load_1min": round(os.getloadavg()[0], 2),
        "machine_kernel": platform.release(),
        "python_version": sys.version.split()[0],
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
