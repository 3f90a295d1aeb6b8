"""Laws of the configuration: nothing but ``ConfigError``, and sizes that come back."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from modelyard_server.config import Budget, Config, ConfigError, default_config_text, parse_config
from modelyard_server.config.lines import LineIndex
from modelyard_server.config.problems import KeyPath
from modelyard_server.devices.sizes import MAX_SIZE_BYTES, UNITS, format_size, parse_size

# A folder that is there on every machine; its content does not matter.
BASE = Path("/")
EXAMPLE = default_config_text()

# What a person, or somebody hostile, may write where a value, a key or a line is expected.
VALUES = (
    *("true", "0", "-1", "1.5", "nan", "inf", "[]", "{}", "[[]]", "[{}]", '""', "''", "[1, 'a']"),
    *("2020-01-01", "07:32:00", "0xffffffffffffffffffffffff", '"cpu"', '"cuda:1"', '"disk"'),
    *('"..", "a"', '"a\\u0000"', '"\\u001b[31m"', '"1e9GiB"', '"999%"', '"/etc"', '"[::"', '":0"'),
    *('{ type = "single" }', '{ type = "multiple", device_map = { "" = 1 } }', '{ a.b = "cpu" }'),
    *(
        '"balanced"',
        '{ strategy = "balanced", devices = ["cpu", 1] }',
        '"4GiB/s"',
        '"x/s"',
        '"a.db"',
    ),
    *('"""\nx = 1\n"""', "'''\n[a]\n'''", '"unclosed', "[1,\n2]", "9" * 5000, "[" * 3000),
)
KEYS = ("id", "device", "keys", '""', '"a b"', "a.b", "'['", '"\\n"', "options", "é", "x" * 300)
LINES = (
    *("[server]", "[[devices]]", "[devices]", "[models]", "[[models]]", "[models.sentiment]"),
    *("[models.a.device]", '[models."../a"]', "[roots]", "[runtimes.x]", "[a.b.c]", "[", "]]"),
    *("[catalog]", "# comment", "", '"""', "=", "a = 1", "\x00", "\r", "\t\t"),
)

edits = st.lists(
    st.tuples(
        st.sampled_from(["replace value", "replace key", "insert", "delete", "repeat", "cut"]),
        st.integers(min_value=0, max_value=len(EXAMPLE.splitlines()) - 1),
        st.sampled_from(VALUES) | st.text(max_size=12),
        st.sampled_from(KEYS) | st.text(max_size=12),
        st.sampled_from(LINES) | st.text(max_size=12),
    ),
    min_size=1,
    max_size=6,
)


def edited(changes: list[tuple[str, int, str, str, str]]) -> str:
    lines = EXAMPLE.splitlines()
    for change, position, value, key, line in changes:
        position = min(position, len(lines) - 1)
        old = lines[position]
        old_key, _, old_value = old.partition(" = ")
        match change:
            case "replace value":
                lines[position] = f"{old_key} = {value}"
            case "replace key":
                lines[position] = f"{key} = {old_value}"
            case "insert":
                lines.insert(position, line)
            case "delete" if len(lines) > 1:
                del lines[position]
            case "repeat":
                lines.insert(position, old)
            case "cut":
                lines[position] = old[: len(old) // 2]
    return "\n".join(lines)


ROOT_LINE = (
    default_config_text()
    .splitlines()
    .index(next(line for line in default_config_text().splitlines() if line.startswith("store = ")))
)
"""Where the example names a root: a name that is none must not reach a terminal as it is."""


@given(edits)
@example([("replace key", ROOT_LINE, "true", '"\\n"', "")])
def test_edits_of_the_example_parse_or_raise_config_error(
    changes: list[tuple[str, int, str, str, str]],
) -> None:
    check_outcome(edited(changes))


@given(st.text(max_size=200))
def test_any_text_parses_or_raises_config_error(text: str) -> None:
    check_outcome(text)


@given(
    st.sampled_from(VALUES),
    st.sampled_from(["server", "yard", "catalog", "devices", "models.a", "roots"]),
)
def test_odd_values_in_odd_places_raise_config_error(value: str, place: str) -> None:
    check_outcome(f"{place} = {value}\n")


def check_outcome(text: str) -> None:
    """Parse a text and check what is promised about either outcome."""
    last_line = text.count("\n") + 1
    try:
        config = parse_config(text, base=BASE)
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert 1 <= problem.line <= last_line
            assert problem.text
            assert problem.describe("f").isprintable()
        assert [found.line for found in error.problems] == sorted(
            found.line for found in error.problems
        )
    else:
        assert isinstance(config, Config)
        assert config.devices


# --- Lines ---------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c-d", "E_5", '"q r"', '"x.y"', "'#'", '"]"'])
written_values = st.sampled_from(
    [
        *(
            "1",
            "true",
            '"text"',
            "'a = 1'",
            '"# no"',
            "[1, 2]",
            "[\n  1, # ]\n  2,\n]",
            "{ z = 1 }",
        ),
        *('"""\n[x]\n"""', "'''\na = 1\n'''", '[["""\n"""], { k = [\n1] }]', "1979-05-27 07:32:00"),
    ]
)
dotted = st.lists(names, min_size=1, max_size=3).map(".".join)
statements = st.one_of(
    st.tuples(dotted, written_values).map(" = ".join),
    dotted.map(lambda name: f"[{name}]"),
    dotted.map(lambda name: f"[[{name}]]"),
    st.sampled_from(["", "[catalog]", "# comment", "  "]),
)


@given(st.lists(statements, max_size=12))
def test_every_key_of_a_document_is_on_the_line_of_its_statement(parts: list[str]) -> None:
    # Statements that do not fit those before them (a key twice, say) are left out, so that what
    # a statement adds is what its lines have to be.
    text = ""
    seen: set[KeyPath] = set()
    index_at: dict[KeyPath, tuple[int, int]] = {}
    for part in parts:
        longer = f"{text}{part}\n"
        try:
            document = tomllib.loads(longer)
        except tomllib.TOMLDecodeError:
            continue
        first, last = text.count("\n") + 1, longer.count("\n")
        for path in set(paths_of(document)) - seen:
            seen.add(path)
            index_at[path] = (first, last)
        text = longer
    index = LineIndex.of(text)
    assert set(index.paths()) <= seen
    headers = {path for path in seen if path in index and path_is_table(text, path)}
    for path, (first, last) in index_at.items():
        if path not in headers:
            assert first <= index.line_of(path) <= last, (path, text)


def path_is_table(text: str, path: KeyPath) -> bool:
    """Whether a path is a table, whose line may be that of a later header of its own."""
    value: Any = tomllib.loads(text)
    for part in path:
        value = value[part]
    return isinstance(value, dict)


def paths_of(value: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of everything in a document."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_of(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths_of(inner, (*path, index))


# --- Sizes ---------------------------------------------------------------------------------------

sizes = st.integers(min_value=0, max_value=MAX_SIZE_BYTES) | st.builds(
    lambda count, unit: min(count * UNITS[unit], MAX_SIZE_BYTES),
    st.integers(min_value=0, max_value=2000),
    st.sampled_from(sorted(UNITS)),
)


@given(sizes)
def test_exact_sizes_come_back(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes, exact=True)) == size_bytes


@given(sizes)
def test_rounded_sizes_come_back_within_a_thousandth(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert len(text) <= 9
    assert abs(parse_size(text) - size_bytes) <= size_bytes / 1000


@given(st.text(alphabet="0123456789. BkKMGTPiEe+-_%", max_size=12) | st.text(max_size=12))
def test_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        size_bytes = parse_size(text)
    except ValueError:
        return
    assert 0 <= size_bytes <= MAX_SIZE_BYTES
    number = Decimal(text.rstrip("BkKMGTPi").rstrip())
    unit = text.removeprefix(str(number)).strip()
    if unit in UNITS:
        assert size_bytes == int(number * UNITS[unit])


@given(
    st.decimals(min_value="0.000001", max_value=100, places=6),
    st.integers(min_value=0, max_value=MAX_SIZE_BYTES),
)
def test_percentages_never_exceed_the_whole_and_come_back(
    percent: Decimal, total_bytes: int
) -> None:
    budget = Budget(percent=percent)
    assert 0 <= budget.resolve(total_bytes) <= total_bytes
    assert budget.resolve(total_bytes) * 100 <= percent * total_bytes
    assert Budget.from_str(str(budget)) == budget
