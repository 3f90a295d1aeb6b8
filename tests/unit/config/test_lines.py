"""On which line each key of a TOML text is."""

from __future__ import annotations

import tomllib
from textwrap import dedent

import pytest

from modelyard_server.config.lines import LineIndex
from modelyard_server.config.problems import KeyPath


def lines_of(text: str) -> dict[KeyPath, int]:
    """Index a text that has to be valid TOML."""
    text = dedent(text)
    tomllib.loads(text)
    index = LineIndex.of(text)
    return {path: index.line_of(path) for path in index.paths()}


def test_tables_and_keys_are_on_their_own_lines() -> None:
    assert lines_of(
        """\
        # a comment
        title = "x"

        [server]  # another
          listen = "a # b"   # [not.a.table]

        [models.a]
        keys = []
        """
    ) == {
        ("title",): 2,
        ("server",): 4,
        ("server", "listen"): 5,
        ("models",): 7,
        ("models", "a"): 7,
        ("models", "a", "keys"): 8,
    }


def test_elements_of_arrays_of_tables_are_counted_and_nested() -> None:
    assert lines_of(
        """\
        [[devices]]
        device = "cpu"
        [devices.extra]
        a = 1
        [[devices]]
        device = "cuda"
        [[devices.parts]]
        b = 1
        [[devices.parts]]
        b = 2
        [devices.parts.deep]
        c = 3
        """
    ) == {
        ("devices",): 1,
        ("devices", 0): 1,
        ("devices", 0, "device"): 2,
        ("devices", 0, "extra"): 3,
        ("devices", 0, "extra", "a"): 4,
        ("devices", 1): 5,
        ("devices", 1, "device"): 6,
        ("devices", 1, "parts"): 7,
        ("devices", 1, "parts", 0): 7,
        ("devices", 1, "parts", 0, "b"): 8,
        ("devices", 1, "parts", 1): 9,
        ("devices", 1, "parts", 1, "b"): 10,
        ("devices", 1, "parts", 1, "deep"): 11,
        ("devices", 1, "parts", 1, "deep", "c"): 12,
    }


def test_a_header_moves_a_table_that_a_sub_table_has_mentioned() -> None:
    assert lines_of("[a.b]\nx = 1\n[a]\ny = 2\n") == {
        ("a",): 3,
        ("a", "b"): 1,
        ("a", "b", "x"): 2,
        ("a", "y"): 4,
    }


def test_dotted_and_quoted_keys_are_taken_apart() -> None:
    assert lines_of(
        r"""
        a.b.c = 1
        a . "b.x" . 'y z' = 2
        "" = 3
        "tab\there\u0041" = 4
        'back\slash' = 5
        [ "q.r" . s ]
        "a=b#c" = 6
        """
    ) == {
        ("a",): 2,
        ("a", "b"): 2,
        ("a", "b", "c"): 2,
        ("a", "b.x"): 3,
        ("a", "b.x", "y z"): 3,
        ("",): 4,
        ("tab\thereA",): 5,
        ("back\\slash",): 6,
        ("q.r",): 7,
        ("q.r", "s"): 7,
        ("q.r", "s", "a=b#c"): 8,
    }


@pytest.mark.parametrize(
    "value",
    [
        '"""\n[no.table]\nno = 1\n"""',
        '"""\\"""\nno = 1\n"""',
        '"""two quotes "" inside\nno = 1"""',
        '"""quotes at the end"""""',
        '"""\nno = 1\nquote at the end""""',
        '""""quote at the start\nno = 1"""',
        '""""""',
        "'''\nno = 1\n'''",
        "''''quote' ''at both\nno = 1\nends'''''",
        "''''''",
        '""',
        "''",
        r'"a \" ] b = 1"',
        r"'C:\'",
        "1979-05-27 07:32:00  # date",
        "-1.5e+3",
        "inf",
        "0xdead_beef",
        "[]",
        "{}",
        "{ a = 1, b.c = [1, 2], d = { e = '}' } }  # } ] ",
        '{ a = """\nno = 1\n""" }',
    ],
)
def test_the_key_after_any_value_is_found_where_it_is(value: str) -> None:
    text = f"before = 1\nvalue = {value}\nafter = 2\n[table]\n"
    assert "no" not in tomllib.loads(text)
    assert lines_of(text) == {
        ("before",): 1,
        ("value",): 2,
        ("after",): 3 + value.count("\n"),
        ("table",): 4 + value.count("\n"),
    }


def test_elements_of_arrays_have_lines_but_not_what_is_inside_of_them() -> None:
    assert lines_of(
        """\
        keys = [ "a",  # ]
          # "no", [
          "b", "c]",
          [1,
           2],
          { x = 1, y = [1,
             2] },

          1979-05-27,
        ]
        after = [[1, 2], [3]]
        """
    ) == {
        ("keys",): 1,
        ("keys", 0): 1,
        ("keys", 1): 3,
        ("keys", 2): 3,
        ("keys", 3): 4,
        ("keys", 4): 6,
        ("keys", 5): 9,
        ("after",): 11,
        ("after", 0): 11,
        ("after", 1): 11,
    }


def test_what_is_inside_an_inline_table_is_on_the_line_of_the_table() -> None:
    index = LineIndex.of("[a]\nb = 1\ndevice = { type = 'single', device = 'cpu' }\n")
    assert ("a", "device", "type") not in index
    assert index.line_of(("a", "device", "type")) == 3


def test_unknown_paths_are_on_the_line_of_the_nearest_known_one() -> None:
    index = LineIndex.of("\n[a.b]\nc = 1\n")
    assert index.line_of(("a", "b", "missing", 3)) == 2
    assert index.line_of(("a", "missing")) == 2
    assert index.line_of(("missing",)) == 1
    assert index.line_of(()) == 1


def test_windows_line_ends_and_a_missing_last_one_make_no_difference() -> None:
    text = '[a]\r\nx = """\r\ntwo\r\n"""\r\ny = 2'
    tomllib.loads(text)
    index = LineIndex.of(text)
    assert index.line_of(("a", "x")) == 2
    assert index.line_of(("a", "y")) == 5


def test_nesting_and_length_take_neither_recursion_nor_quadratic_room() -> None:
    assert LineIndex.of(f"a = {'[' * 50_000}{']' * 50_000}\nb = 1").line_of(("b",)) == 2
    assert LineIndex.of(f"{'.'.join('a' * 50_000)} = 1\nb = 1").line_of(("b",)) == 2
