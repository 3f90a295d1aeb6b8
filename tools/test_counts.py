"""Prints what the test programs counted: `NAME: N passed, N failed, N skipped`, one a line.

    python tools/test_counts.py build/reports [PREFIX]

Under each program stand the tests that failed and how, since what is read of a long run is its end.

Reads the GoogleTest reports (*.json) and pytest's JUnit report (*.xml) in the folder, of the
programs whose name begins with PREFIX. A program leaves NAME.started before it runs and its report
when it ends; one without the other means that it died on the way. Exits with 1 when anything
failed, died, or nothing ran at all.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SHOWN_FAILURES: Final = 20
_FIRST_LINES: Final = 3
_LAST_LINES: Final = 8
"""Of each failure: one program says it at the beginning, the other at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A test that failed, and what it said."""

    test: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What one test program reported."""

    passed: int
    failed: int
    skipped: int
    failures: tuple[Failure, ...]


def read_gtest(path: Path) -> Counts:
    """Reads a report written by `--gtest_output=json:PATH`."""
    report = json.loads(path.read_text(encoding="utf-8"))
    tests = [test for suite in report["testsuites"] for test in suite["testsuite"]]
    skipped = sum(test["result"] != "COMPLETED" for test in tests)
    failed = int(report["failures"]) + int(report.get("errors", 0))
    failures = tuple(
        Failure(
            test=f"{test['classname']}.{test['name']}",
            message="\n".join(failure["failure"] for failure in test["failures"]),
        )
        for test in tests
        if test.get("failures")
    )
    return Counts(
        passed=len(tests) - skipped - failed, failed=failed, skipped=skipped, failures=failures
    )


def read_junit(path: Path) -> Counts:
    """Reads a report written by `pytest --junitxml=PATH`."""
    root = ElementTree.parse(path).getroot()
    suites = list(root.iter("testsuite"))

    def total(attribute: str) -> int:
        return sum(int(suite.get(attribute, "0")) for suite in suites)

    failed, skipped = total("failures") + total("errors"), total("skipped")
    failures = tuple(
        Failure(
            test=f"{test.get('classname')}.{test.get('name')}",
            message=fault.text or fault.get("message") or "",
        )
        for test in root.iter("testcase")
        for fault in (*test.findall("failure"), *test.findall("error"))
    )
    return Counts(
        passed=total("tests") - failed - skipped, failed=failed, skipped=skipped, failures=failures
    )


def print_failures(failures: Sequence[Failure]) -> None:
    """Names the tests that failed, each with the beginning and the end of what it said."""
    for failure in failures[:_SHOWN_FAILURES]:
        print(f"  failed: {failure.test}")
        lines = failure.message.strip().splitlines()
        if len(lines) > _FIRST_LINES + _LAST_LINES:
            lines[_FIRST_LINES:-_LAST_LINES] = ["..."]
        for line in lines:
            print(f"    {line}")
    if len(failures) > _SHOWN_FAILURES:
        print(f"  and {len(failures) - _SHOWN_FAILURES} more")


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
        print_failures(counts.failures)
        if counts.failed or not counts.passed:
            status = 1
    if not started:
        print("no test ran")
        status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), *sys.argv[2:3]))
