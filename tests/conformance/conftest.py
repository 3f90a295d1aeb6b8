"""Settings for the real Haystack, and the count of cases at the end of a run."""

from __future__ import annotations

import os

import pytest
from tests.conformance.cases import chosen_files

# Read when haystack is imported, which the tests do after this file: it would write a file to the
# home directory, and send events.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("conformance")
    try:
        for cases in chosen_files():
            terminalreporter.write_line(cases.summary)
    except (OSError, ValueError) as error:
        # The tests have failed of it already.
        terminalreporter.write_line(str(error))
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "text_differs":
                terminalreporter.write_line(str(value))
