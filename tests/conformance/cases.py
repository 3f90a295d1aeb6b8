"""Files of recorded cases: where they lie, what a case is, which are judged.

``MODELYARD_CASES=PATH pytest tests/conformance`` judges the cases of another file of the same shape
in place of ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE_GROUPS = ("device", "hf_precedence")
KEYED_GROUPS = ("keyed_models", "beam_model_manager")
JUDGED_GROUPS = (*DEVICE_GROUPS, *KEYED_GROUPS)

NOT_YET: Mapping[str, str] = {}
"""Operations that cannot be judged yet, and what each needs."""

VARIABLE = "MODELYARD_CASES"
SEED_FILE = Path(__file__).with_name("seed_cases.json")
# Recorded by us on the same releases, for inputs that the seed file leaves out.
MORE_FILE = Path(__file__).with_name("more_cases.json")

# A case as it stands in the file.
Case = dict[str, Any]
# ``{"ok": value}`` or ``{"error": {"type": name, "message_has": text}}``, either key optional.
Outcome = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFile:
    """The cases of one file by group, in its order."""

    path: Path
    groups: dict[str, list[Case]]

    def judged_of(self, groups: Sequence[str]) -> list[Case]:
        """The cases of some groups that are judged."""
        cases = [case for group in groups for case in self.groups.get(group, [])]
        return [case for case in cases if case.get("op") not in NOT_YET]

    @property
    def judged(self) -> list[Case]:
        return self.judged_of(JUDGED_GROUPS)

    @property
    def not_yet(self) -> list[Case]:
        """Cases of judged groups that wait for something to be built."""
        cases = [case for group in JUDGED_GROUPS for case in self.groups.get(group, [])]
        return [case for case in cases if case.get("op") in NOT_YET]

    @property
    def summary(self) -> str:
        """How many cases of which group are judged, how many are not, and what those wait for."""
        counts = {
            group: len(self.judged_of([group])) if group in JUDGED_GROUPS else len(cases)
            for group, cases in self.groups.items()
        }
        judged = [f"{group} {counts[group]}" for group in JUDGED_GROUPS if group in counts]
        waiting = [
            f"\n  {case.get('id', '(no id)')} {case['op']} is not judged yet: {NOT_YET[case['op']]}"
            for case in self.not_yet
        ]
        others = [
            f"{group} {count}" for group, count in counts.items() if group not in JUDGED_GROUPS
        ]
        return (
            f"{self.path}: {len(self.judged)} cases judged ({', '.join(judged) or 'none'}), "
            f"{sum(counts.values()) - len(self.judged)} of groups that are not judged yet "
            f"({', '.join(others) or 'none'}){''.join(waiting)}"
        )


def load(path: Path) -> CaseFile:
    """Read a file. Raises ``ValueError`` that names it if it does not have the shape."""
    content = json.loads(path.read_text(encoding="utf-8"))
    groups = content.get("groups") if isinstance(content, dict) else None
    if not isinstance(groups, dict):
        raise ValueError(f"{path} has no 'groups': it is no file of cases")
    for group, cases in groups.items():
        if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
            raise ValueError(f"{path}: group {group!r} is no list of cases")
    return CaseFile(path=path, groups=groups)


def chosen_files() -> list[CaseFile]:
    """The file that the environment names, else ours."""
    other = os.environ.get(VARIABLE)
    return [load(Path(other))] if other else [load(SEED_FILE), load(MORE_FILE)]
