"""Prints requirement groups of pyproject.toml, one requirement a line, for `pip install -r`.

    python tools/list_requirements.py build runtime dev

`build` is build-system.requires, `runtime` the project's dependencies, any other name an extra. pip
can install an extra only together with the project, which would compile the C++ core once more for
a new version of a linter.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements(group: str) -> list[str]:
    """Returns the requirements of one group.

    Raises:
        SystemExit: pyproject.toml has no such group.
    """
    content = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    extras: dict[str, list[str]] = content["project"].get("optional-dependencies", {})
    groups: dict[str, list[str]] = {
        **extras,
        "build": content["build-system"]["requires"],
        "runtime": content["project"]["dependencies"],
    }
    if group not in groups:
        raise SystemExit(f"no requirement group {group!r}; there are: {', '.join(sorted(groups))}")
    return groups[group]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print("\n".join(requirements(name)))
