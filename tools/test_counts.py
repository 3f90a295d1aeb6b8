"""Prints what the test programs counted: `NAME: N passed, N failed, N skipped`, one a line.

    python tools/test_counts.py build/reports [PREFIX]

Reads the GoogleTest reports (*.json) and pytest's JUnit report (*.xml) in the folder, of the
programs whose name begins with PREFIX. A program leaves NAME.started before it runs and its report
when it ends; one without the other means that it died on the way. Exits with 1 when anything
failed, died, or nothing ran at all.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What one test program reported."""

    passed: int
    failed: int
    skipped: int


def read_gtest(path: Path) -> Counts:
    """Reads a report written by `--gtest_output=json:PATH`."""
    report = json.loads(path.read_text(encoding="utf-8"))
    results = [test["result"] for suite in report["testsuites"] for test in suite["testsuite"]]
    skipped = sum(result != "COMPLETED" for result in results)
    failed = int(report["failures"]) + int(report.get("errors", 0))
    return Counts(passed=len(results) - skipped - failed, failed=failed, skipped=skipped)


def read_junit(path: Path) -> Counts:
    """Reads a report written by `pytest --junitxml=PATH`."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))

    def total(attribute: str) -> int:
        return sum(int(suite.get(attribute, "0")) for suite in suites)

    failed, skipped = total("failures") + total("errors"), total("skipped")
    return Counts(passed=total("tests") - failed - skipped, failed=failed, skipped=skipped)


def main(folder: Path, prefix: str = "") -> int:
    """Prints the counts of every program that left a trace in `folder`; returns the exit status."""
    status = 0
    started = sorted(folder.glob(f"{prefix}*.started"))
    for trace in started:
        if (report := trace.with_suffix(".json")).exists():
            counts = read_gtest(report)
        elif (report := trace.with_suffix(".xml")).exists():
            counts = read_junit(report)
        else:
            print(f"{trace.stem}: ended without a report (it crashed, or was not built)")
            status = 1
            continue
        skipped = f", {counts.skipped} skipped" if counts.skipped else ""
        print(f"{trace.stem}: {counts.passed} passed, {counts.failed} failed{skipped}")
        if counts.failed or not counts.passed:
            status = 1
    if not started:
        print("no test ran")
        status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), *sys.argv[2:3]))
