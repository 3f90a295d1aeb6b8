"""What a single setting may be: functions from a value to the value that is kept.

A rule takes whatever TOML gave, or a value that it returned earlier, and returns the checked value
or raises ``RuleError`` with a text that says what is wrong and what to do. Rules know nothing of
other settings.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeAlias

from modelyard_server.config.budget import Budget
from modelyard_server.config.problems import KeyPath, quoted
from modelyard_server.devices.sizes import MAX_SIZE_BYTES, format_size, parse_size
from modelyard_server.routing.checks import in_itself
from modelyard_server.routing.names import KEY_PATTERN, MODEL_ID_PATTERN
from modelyard_server.routing.target_json import TargetError, path_parts, read_target
from modelyard_server.routing.targets import KINDS, Target, Transform

__all__ = [
    "Finding",
    "Rule",
    "RuleError",
    "bandwidth",
    "boolean",
    "budget",
    "factories",
    "folder",
    "identifier",
    "integer",
    "keys",
    "kind",
    "one_of",
    "optional_budget",
    "options",
    "origins",
    "route_keys",
    "route_prefixes",
    "seconds",
    "size",
    "target",
    "text_of",
    "word",
]

Finding: TypeAlias = tuple[KeyPath, str]
"""Where inside of a value something is wrong (empty: the value itself), and what."""

Rule: TypeAlias = Callable[[object], object]
"""Checks one setting and returns what is kept. Raises ``RuleError``."""

_WORD: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_NAME: Final = "[A-Za-z_][A-Za-z0-9_]*"
_ORIGIN: Final = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_FACTORY: Final = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_MAX_FOLDER_LENGTH: Final = 1024
_MAX_FOLDER_PART_BYTES: Final = 255
_MAX_OPTION_DEPTH: Final = 16
# Options travel as google.protobuf.Struct, whose numbers are doubles.
_MAX_OPTION_INTEGER: Final = 2**53


class RuleError(ValueError):
    """A value that a rule refuses.

    Args:
        findings: a text for the value as a whole, or what is wrong where inside of it.
        usable: what of the value can still be compared with other settings, so that those
            comparisons are reported at the same time.
    """

    def __init__(self, findings: str | Iterable[Finding], *, usable: object = None) -> None:
        self.findings: tuple[Finding, ...] = (
            (((), findings),) if isinstance(findings, str) else tuple(findings)
        )
        self.usable = usable
        super().__init__("; ".join(text for _, text in self.findings))


def kind(value: object) -> str:
    """Return what TOML calls a value, with its article."""
    match value:
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a float"
        case str():
            return "a string"
        case Mapping():
            return "a table"
        case list() | tuple():
            return "an array"
        case datetime.date() | datetime.time():
            return "a date or time"
        case _:
            return f"a {type(value).__name__}"


def boolean(value: object) -> bool:
    """Accept true and false."""
    if not isinstance(value, bool):
        raise RuleError(f"must be true or false, got {kind(value)}")
    return value


def integer(low: int, high: int) -> Rule:
    """Return a rule for integers from ``low`` to ``high``."""

    def rule(value: object) -> int:
        # Exactly int: true is an int to Python.
        if type(value) is not int:
            raise RuleError(f"must be an integer, got {kind(value)}")
        if not low <= value <= high:
            raise RuleError(f"must be {low} to {high}, got {_number(value)}")
        return value

    return rule


def seconds(low: float, high: float) -> Rule:
    """Return a rule for durations in seconds, integers or floats, from ``low`` to ``high``."""

    def rule(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RuleError(f"must be a number of seconds, got {kind(value)}")
        # False for nan as well.
        if not low <= value <= high:
            raise RuleError(f"must be {low:g} to {high:g} seconds, got {_number(value)}")
        return float(value)

    return rule


def size(low: int, high: int) -> Rule:
    """Return a rule for sizes, bytes as an integer or text with a unit."""

    def rule(value: object) -> int:
        size_bytes = _size(value)
        if not low <= size_bytes <= high:
            raise RuleError(
                f"must be {format_size(low, exact=True)} to {format_size(high, exact=True)}, "
                f"got {quoted(value)}"
            )
        return size_bytes

    return rule


def bandwidth(value: object) -> int:
    """Accept bytes a second, as an integer or as a size with "/s" behind it; 0 is no limit."""
    if type(value) is int:
        if not 0 <= value <= MAX_SIZE_BYTES:
            raise RuleError(f"must be 0 to {MAX_SIZE_BYTES} bytes a second, got {_number(value)}")
        return value
    if not isinstance(value, str):
        raise RuleError(f'must be bytes a second (4000000000 or "4GB/s"), got {kind(value)}')
    amount, separator, _ = value.rpartition("/s")
    if not separator or not value.endswith("/s"):
        raise RuleError(f'must end in "/s", as in "4GiB/s", got {quoted(value)}')
    return _size(amount)


def one_of(*names: str) -> Rule:
    """Return a rule for text that is one of a few names."""

    def rule(value: object) -> str:
        text = text_of(value)
        if text not in names:
            raise RuleError(f"must be one of {', '.join(names)}, got {quoted(text)}")
        return text

    return rule


def word(value: object) -> str:
    """Accept lower-case letters, digits and hyphens, as in ``text-classification``, or nothing."""
    text = text_of(value)
    if text and not _WORD.fullmatch(text):
        raise RuleError(f"must be lower-case letters, digits and hyphens, got {quoted(text)}")
    return text


def identifier(value: object) -> str:
    """Accept the ids of models and the names of roots."""
    text = text_of(value)
    if not MODEL_ID_PATTERN.fullmatch(text):
        raise RuleError(f"the name must match {MODEL_ID_PATTERN.pattern}: {quoted(text)} does not")
    if ".." in text:
        raise RuleError('the name must not hold ".."')
    return text


def keys(value: object) -> tuple[str, ...]:
    """Accept an array of different keys."""
    return _strings(value, _key)


def route_keys(value: object) -> tuple[str, ...]:
    """Accept an array of keys. One that is listed twice counts once."""
    return _strings(value, _key, repeats=True)


def route_prefixes(value: object) -> tuple[str, ...]:
    """Accept an array of beginnings of keys. One that is listed twice counts once."""
    return _strings(value, _prefix, repeats=True)


def target(kind: str) -> Rule:
    """Return a rule for what a route of a kind leads to: its table, as routing.target_json says.

    What it leads to has to be there, which is a question of other settings.
    """

    def rule(value: object) -> Target:
        try:
            read = value if isinstance(value, KINDS[kind]) else read_target({kind: value})
        except TargetError as error:
            raise RuleError(_inside(error.findings)) from error
        if findings := in_itself(read, check_transform=_of_transform):
            raise RuleError(_inside(findings), usable=read)
        return read

    return rule


def factories(value: object) -> tuple[str, ...]:
    """Accept an array of different ``module:function`` names."""
    return _strings(value, _factory)


def origins(value: object) -> tuple[str, ...]:
    """Accept an array of different origins of web pages."""
    return _strings(value, _origin)


def folder(value: object) -> str:
    """Accept a relative folder, ``/``-separated, that stays where it is."""
    text = text_of(value)
    if _SCHEME.match(text):
        raise RuleError(f"must be a folder below the root, not a URL or drive: {quoted(text)}")
    if text.startswith("/"):
        raise RuleError("must be relative to the root: remove the leading '/'")
    if "\\" in text:
        raise RuleError("must not hold a backslash: separate folders with '/'")
    if not text.isprintable():
        raise RuleError("must not hold control characters")
    if len(text) > _MAX_FOLDER_LENGTH:
        raise RuleError(f"must have at most {_MAX_FOLDER_LENGTH} characters")
    for part in text.split("/"):
        if part == "..":
            raise RuleError('must not leave its root: remove ".."')
        if part in {"", "."}:
            raise RuleError(
                'must have no empty part and no ".": write for example "team-a/sentiment"'
            )
        if len(part.encode()) > _MAX_FOLDER_PART_BYTES:
            raise RuleError(f"must have parts of at most {_MAX_FOLDER_PART_BYTES} bytes")
    return text


def budget(value: object) -> Budget:
    """Accept bytes, a size or a percentage."""
    if isinstance(value, Budget):
        return value
    try:
        if isinstance(value, str):
            return Budget.from_str(value)
        if type(value) is int:
            return Budget(size_bytes=value)
    except ValueError as error:
        raise RuleError(str(error)) from error
    raise RuleError(
        f'must be bytes, a size or a percentage (300000000, "300MB" or "50%"), got {kind(value)}'
    )


def optional_budget(value: object) -> Budget | None:
    """Accept what ``budget`` does, and 0 for none."""
    if type(value) is int and value == 0:
        return None
    return budget(value)


def options(value: object) -> Mapping[str, object]:
    """Accept a table of anything that JSON can say; return a read-only copy."""
    if not isinstance(value, Mapping):
        raise RuleError(f"must be a table, got {kind(value)}")
    findings: list[Finding] = []
    copy = _frozen(value, (), findings)
    if findings or not isinstance(copy, Mapping):
        raise RuleError(findings)
    return copy


def text_of(value: object) -> str:
    """Return a value that is text; raise ``RuleError`` for any other."""
    if not isinstance(value, str):
        raise RuleError(f"must be a string, got {kind(value)}")
    return value


def _number(value: float) -> str:
    # str() refuses integers of thousands of digits, which TOML can write in hexadecimal.
    return str(value) if abs(value) < 2**64 else "a number far out of range"


def _size(value: object) -> int:
    if isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as error:
            raise RuleError(str(error)) from error
    if type(value) is not int:
        raise RuleError(f'must be bytes or a size (16777216 or "16MiB"), got {kind(value)}')
    if not 0 <= value <= MAX_SIZE_BYTES:
        raise RuleError(f"must be 0 to {MAX_SIZE_BYTES} bytes, got {_number(value)}")
    return value


def _key(value: object) -> str:
    text = text_of(value)
    if not KEY_PATTERN.fullmatch(text):
        raise RuleError(f"a key must match {KEY_PATTERN.pattern}: {quoted(text)} does not")
    if ".." in text:
        raise RuleError(f'a key must not hold "..": {quoted(text)} does')
    return text


def _prefix(value: object) -> str:
    # The empty one is a prefix of every key, and none itself.
    return "" if value == "" else _key(value)


def _of_transform(transform: Transform) -> Iterable[tuple[str, str]]:
    # Imported here: few files have one, and it needs numpy.
    from modelyard_server.routing.transforms import check_transform

    return check_transform(transform)


def _inside(findings: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    """Findings of a whole target as those of the value of its kind."""
    for path, text in findings:
        yield path_parts(path)[1:], text


def _origin(value: object) -> str:
    text = text_of(value)
    if not _ORIGIN.fullmatch(text):
        raise RuleError(
            'must be an origin as a browser writes it, such as "https://example.com" or '
            f'"http://localhost:3000", got {quoted(text)}'
        )
    return text


def _factory(value: object) -> str:
    text = text_of(value)
    if not _FACTORY.fullmatch(text):
        raise RuleError(
            'must be the exact name of a function, "module:function" '
            f'(for example "my_package.nets:make_net"), got {quoted(text)}'
        )
    return text


def _strings(
    value: object, rule: Callable[[object], str], *, repeats: bool = False
) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RuleError(f"must be an array of strings, got {kind(value)}")
    findings: list[Finding] = []
    accepted: dict[str, int] = {}
    for index, element in enumerate(value):
        try:
            text = rule(element)
        except RuleError as error:
            findings.append(((index,), str(error)))
            continue
        if accepted.setdefault(text, index) != index and not repeats:
            findings.append(((index,), f"{quoted(text)} is listed twice: remove one"))
    if findings:
        # Each accepted text at its own place, so that others can still say where it is.
        at = {index: text for text, index in accepted.items()}
        raise RuleError(findings, usable=tuple(at.get(index) for index in range(len(value))))
    return tuple(accepted)


def _frozen(value: object, path: KeyPath, findings: list[Finding]) -> object:
    """Return a read-only deep copy, noting what JSON cannot say."""
    match value:
        case Mapping() | list() | tuple() if len(path) >= _MAX_OPTION_DEPTH:
            findings.append((path, f"must not be nested more than {_MAX_OPTION_DEPTH} deep"))
        case Mapping():
            return MappingProxyType(
                {
                    str(key): _frozen(element, (*path, str(key)), findings)
                    for key, element in value.items()
                }
            )
        case list() | tuple():
            return tuple(
                _frozen(element, (*path, index), findings) for index, element in enumerate(value)
            )
        case float() if not math.isfinite(value):
            findings.append((path, "must be a finite number"))
        case int() if abs(value) > _MAX_OPTION_INTEGER:
            findings.append((path, f"must be an integer of at most 2**53, got {_number(value)}"))
        case bool() | int() | float() | str():
            return value
        case _:
            findings.append(
                (path, f"must be text, a number, a boolean, an array or a table, got {kind(value)}")
            )
    return None
