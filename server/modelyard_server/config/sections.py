"""What a section of a configuration is, and how its fields are checked.

A field is a setting of the same name, its default is the setting's default, and its ``rule`` says
what it may be, so that the sections, the reader and the documentation cannot drift apart. Values
are immutable, checked when made, and may be shared between threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, ClassVar, Final, Protocol, cast

from modelyard_server.config.problems import key_text
from modelyard_server.config.rules import Finding, Rule, RuleError

__all__ = [
    "DAY_S",
    "Section",
    "ascending",
    "check",
    "fields_of",
    "raise_if_any",
    "rule_of",
    "ruled",
    "settings",
]

DAY_S: Final = 86400
"""Seconds of a day: the longest time that most settings can be."""

_RULE: Final = "rule"


class Section(Protocol):
    """A part of the configuration that is read field by field."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield what is wrong between settings that are each right.

        Args:
            given: the fields that passed their rules, by name; others are absent.
        """
        ...


def ruled(rule: Rule) -> Mapping[str, Rule]:
    """Return the metadata of a field that has a rule."""
    return {_RULE: rule}


def rule_of(setting: Field[Any]) -> Rule:
    """Return the rule of a field of a section."""
    return cast("Rule", setting.metadata[_RULE])


def settings(section: type[Section]) -> tuple[Field[Any], ...]:
    """Return the fields of a section, in the order in which they are documented."""
    return tuple(section.__dataclass_fields__.values())


def check(section: Section) -> None:
    """Apply the rules to a value that is being made, and refuse it if it breaks one.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """
    findings: list[Finding] = []
    for setting in fields(section):
        value = getattr(section, setting.name)
        # None is what a field without a value has, where that is its default.
        if value is None and setting.default is None:
            continue
        try:
            object.__setattr__(section, setting.name, rule_of(setting)(value))
        except RuleError as error:
            findings += [((setting.name, *path), text) for path, text in error.findings]
    if not findings:
        findings += section.conflicts(fields_of(section))
    raise_if_any(findings)


def raise_if_any(findings: Iterator[Finding] | Sequence[Finding]) -> None:
    """Raise ``ValueError`` with all that is wrong, each behind its key, if anything is."""
    text = "; ".join(f"{key_text(path)}: {text}" for path, text in findings)
    if text:
        raise ValueError(text)


def fields_of(section: Section) -> dict[str, Any]:
    """Return the values of a section's fields by name, as ``conflicts`` takes them."""
    return {setting.name: getattr(section, setting.name) for setting in fields(section)}


def ascending(given: Mapping[str, Any], low: str, high: str) -> Iterator[Finding]:
    """Yield what is wrong if the first of two settings is above the second."""
    if low in given and high in given and given[low] > given[high]:
        yield (
            (low,),
            f"must not be above {high}: {given[low]:g} is more than {given[high]:g}",
        )
