"""The server's log: nothing that a client sends can forge a line of it."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.observability.log import _OneLine, start_logging
from modelyard_server.observability.process import peak_resident_bytes, resident_bytes

FORGED = "2026-01-01 00:00:00,000 INFO    modelyard: the key is fine"
# Whatever some reader of logs takes for the end of a line.
BREAKS = [
    "\n",
    "\r",
    "\r\n",
    "\n\r",
    "\v",
    "\f",
    "\x1c",
    "\x1d",
    "\x1e",
    "\x85",
    "\u2028",
    "\u2029",
]
NAME = "%(levelname)s %(name)s: %(message)s"


def formatted(message: str, *args: object, error: BaseException | None = None) -> str:
    record = logging.LogRecord(
        "modelyard",
        logging.WARNING,
        __file__,
        1,
        message,
        args,
        None if error is None else (type(error), error, error.__traceback__),
    )
    return _OneLine(NAME).format(record)


def lines_at_the_margin(text: str) -> list[str]:
    """Lines as the most generous reader sees them, but for those that are indented."""
    return [line for line in text.splitlines() if line and not line[0].isspace()]


@pytest.fixture
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("line_break", BREAKS, ids=repr)
def test_a_line_break_in_an_argument_begins_no_line(line_break: str) -> None:
    text = formatted("no model goes by %s", f"k{line_break}{FORGED}")
    assert len(lines_at_the_margin(text)) == 1
    assert text.startswith("WARNING modelyard: no model goes by k")


@pytest.mark.parametrize("line_break", BREAKS, ids=repr)
def test_a_line_break_after_a_line_break_begins_no_line(line_break: str) -> None:
    text = formatted("no model goes by %s", f"k\n{line_break}{FORGED}")
    assert len(lines_at_the_margin(text)) == 1


@pytest.mark.parametrize("line_break", BREAKS, ids=repr)
def test_a_line_break_in_a_message_without_arguments_begins_no_line(line_break: str) -> None:
    text = formatted(f"k{line_break}{FORGED}")
    assert len(lines_at_the_margin(text)) == 1
    assert "\n" not in text


@pytest.mark.parametrize(
    "escape", ["\x1b[2K\x1b[1G", "\x1b]0;title\x07", "\x08\x08", "\x9b2J", "\0"]
)
@pytest.mark.parametrize("before", ["", "first line\n"])
def test_what_would_steer_a_terminal_is_escaped(escape: str, before: str) -> None:
    text = formatted("key %s", f"{before}{escape}x")
    assert not [c for c in text if c != "\n" and not c.isprintable()]


@pytest.mark.parametrize("before", ["", "first line\n"])
def test_direction_marks_are_escaped(before: str) -> None:
    text = formatted("key %s", f"{before}\u202egnirts\u2066")
    assert "\u202e" not in text
    assert "\u2066" not in text


@given(argument=st.text())
def test_no_argument_begins_a_line_or_steers_a_terminal(argument: str) -> None:
    text = formatted("key %s", argument)
    assert len(lines_at_the_margin(text)) == 1
    assert not [c for c in text if c != "\n" and not c.isprintable()]


@pytest.mark.parametrize("line_break", BREAKS, ids=repr)
def test_the_text_of_an_exception_begins_no_line_that_looks_like_the_logs(
    line_break: str,
) -> None:
    try:
        raise ValueError(f"bad key k{line_break}{FORGED}")
    except ValueError as error:
        text = formatted("defect %s", "abc", error=error)
    assert not [line for line in text.splitlines() if line.startswith(FORGED[:4])]


def test_a_traceback_is_readable() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        text = formatted("defect %s", "abc", error=error)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "WARNING modelyard: defect abc"
    assert "Traceback (most recent call last):" in lines
    assert 'raise ValueError("boom")' in lines
    assert lines[-1] == "ValueError: boom"


def test_the_story_of_a_models_failure_keeps_its_lines() -> None:
    story = "Traceback (most recent call last):\n  File x\nValueError: boom\n"
    text = formatted("model %s failed\n%s", "m", story)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines[1:] == ["Traceback (most recent call last):", "File x", "ValueError: boom"]
    assert len(lines_at_the_margin(text)) == 1


def test_ordinary_text_is_left_alone() -> None:
    assert formatted("loaded %s in %.3f s", "größe-模型", 0.5) == (
        "WARNING modelyard: loaded größe-模型 in 0.500 s"
    )


def test_the_log_goes_to_standard_error_from_its_level_up(
    monkeypatch: pytest.MonkeyPatch, restored: None
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    start_logging("warning")
    logging.getLogger("modelyard_server.x").info("quiet")
    logging.getLogger("modelyard_server.x").warning("loud %s", "a\nb")
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("WARNING modelyard_server.x: loud a")
    assert lines[1:] == ["    b"]


def test_figures_of_this_process() -> None:
    assert 0 < resident_bytes() <= peak_resident_bytes() * 1.1
