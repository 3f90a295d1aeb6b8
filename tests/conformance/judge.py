"""Judges one case: does the call and says whether what happened is what the case asks for.

``match``    the recorded result: the same value and types, or the same class of error.
``improve``  the documented difference that applies to this call; where none does, the recorded
             result, or the recorded class of error with a text of ours.
``deviate``  the documented difference that applies; where none does, the record is a defect that
             we do not name, and only a refusal with a text is right: ValueError, TypeError or
             KeyError.

The text of a recorded error is a hint (the file says so): another text is reported, not failed.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from tests.conformance import rules
from tests.conformance.cases import Case, Outcome
from tests.conformance.keyed_operations import keyed_operation
from tests.conformance.keyed_rules import keyed_difference
from tests.conformance.libraries import Library
from tests.conformance.operations import OPERATIONS, NotUnderstood, Operation

# Of these calls the records keep what they are about, where the component adds more.
KEPT_KEYS = {
    "pipeline_kwargs": ("device", "device_map"),
    "model_kwargs_device_map": ("device_map",),
}
REFUSALS = ("ValueError", "TypeError", "KeyError")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a call did: returned ``result`` when ``error`` is empty, else raised that class."""

    result: object = None
    error: str = ""
    text: str = ""

    def __str__(self) -> str:
        return f"{self.error}: {self.text}" if self.error else f"result {self.result!r}"


def operation_of(op: str) -> Operation | None:
    """The operation of a name, of whichever group; None if there is none."""
    return OPERATIONS.get(op) or keyed_operation(op)


def difference_of(op: str, given: Any) -> rules.Difference | None:
    """The documented difference that applies to a call, if one does."""
    found = rules.documented_difference if op in OPERATIONS else keyed_difference
    return found(op, given)


def observe(
    library: Library, op: str, given: Any, *, operation: Operation | None = None
) -> Observed:
    """Do a call. ``NotUnderstood`` is raised, not observed: it is the harness's failure."""
    perform = operation or operation_of(op)
    assert perform is not None, op
    try:
        return Observed(result=perform(library, given))
    except NotUnderstood:
        raise
    except Exception as error:
        return Observed(error=type(error).__name__, text=str(error))


def same_value(result: object, recorded: object) -> bool:
    """Equal, and of equal types: to Python 1, True and 1.0 are equal."""
    if (
        isinstance(recorded, str)
        and isinstance(result, dict)
        and result.keys() == {"type", "id", "str"}
    ):
        # A device described in full where the record has its text.
        result = result["str"]
    return json.dumps(result, sort_keys=True) == json.dumps(recorded, sort_keys=True)


def meets(op: str, observed: Observed, expected: Outcome) -> bool:
    """Whether an outcome is the expected value or class of error."""
    if "below" in expected:
        number = observed.result
        return isinstance(number, int | float) and number < expected["below"]
    if "ok" in expected:
        result, recorded = observed.result, expected["ok"]
        if op in KEPT_KEYS and isinstance(result, dict) and isinstance(recorded, dict):
            wanted = {*KEPT_KEYS[op], *recorded}
            result = {key: value for key, value in result.items() if key in wanted}
        return not observed.error and same_value(result, recorded)
    if "type" in expected["error"]:
        return bool(observed.error == expected["error"]["type"])
    # The type is the contract and the text a hint, but here the text is all there is.
    return bool(observed.error) and hint_missed(observed, expected) is None


def hint_missed(observed: Observed, expected: Outcome) -> str | None:
    """The text that a recorded error has and ours has not."""
    hint = str(expected.get("error", {}).get("message_has") or "")
    return hint if hint not in observed.text else None


def judge(library: Library, case: Case) -> str | None:
    """Judge a case; return the recorded text that our error does not have, if any.

    Raises:
        AssertionError: the case fails; the text names it.
    """
    name = f"case {case.get('id', '(no id)')}"
    missing = {"id", "op", "expect", "stance"} - case.keys()
    assert not missing, f"{name} has no {', '.join(sorted(missing))}"
    op, given, expected, stance = case["op"], case.get("input"), case["expect"], case["stance"]
    assert operation_of(op) is not None, f"{name}: no handler for op {op!r}"
    assert isinstance(expected, dict) and (
        expected.keys() == {"ok"}
        or (expected.keys() == {"error"} and isinstance(expected["error"], dict))
    ), f"{name} expects neither a value nor an error: {expected!r}"
    before = copy.deepcopy(given)
    try:
        difference = None if stance == "match" else difference_of(op, before)
        instead = None if difference is None else difference.operation
        observed = observe(library, op, given, operation=instead)
    except NotUnderstood as error:
        raise AssertionError(f"{name}: {op} does not understand its input: {error}") from error
    assert given == before, f"{name}: {op} changed its input to {given!r}"
    told = f"{name} ({stance}) {op}({before!r}): {observed}"
    match stance:
        case "match":
            assert meets(op, observed, expected), f"{told}; recorded is {expected}"
            return hint_missed(observed, expected)
        case "improve" | "deviate" if difference is not None:
            wanted = difference.outcome
            assert meets(op, observed, wanted) and hint_missed(observed, wanted) is None, (
                f"{told}; '{difference.name}' asks for {wanted}"
            )
        case "improve":
            assert meets(op, observed, expected), f"{told}; recorded is {expected}"
            assert not observed.error or observed.text, f"{told}; an improvement has a text"
        case "deviate":
            assert observed.error in REFUSALS and observed.text, (
                f"{told}; no documented difference allows that, and it is no refusal with a text"
            )
        case _:
            raise AssertionError(f"{name}: unknown stance {stance!r}")
    return None
