"""Where modelyard means to differ from Beam's keyed models: see ``rules``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tests.conformance.keyed_operations import served_together, steady_cycle
from tests.conformance.operations import pair, part
from tests.conformance.rules import Difference, Rule, refusal

__all__ = ["KEYED_RULES", "keyed_difference"]

_MODELS = {"k1": "A", "k2": "A", "k3": "B"}
_COHORT_OF = {"k1": "k1", "k2": "k1", "k3": "k3"}


def keys_are_a_list(op: str, given: Any) -> Difference | None:
    """A bare string is no list of its letters."""
    if op != "key_routes" or not isinstance(given, str):
        return None
    return Difference(name="no bare string", outcome=refusal("TypeError", "bare string"))


def repeat_counts_once(op: str, given: Any) -> Difference | None:
    """A key that one mapping has twice is one key."""
    if op != "key_routes":
        return None
    routes: dict[str, str] = {}
    for keys, target in map(pair, given):
        if not keys or any(key in routes for key in keys):
            return None
        routes |= dict.fromkeys(keys, target)
    return Difference(name="a repeat counts once", outcome={"ok": routes})


def budget_is_positive(op: str, given: Any) -> Difference | None:
    """A budget of less than one byte, or of what is no number of bytes, is no configuration."""
    if op != "hint_values" or (type(given[0]) is int and given[0] > 0):
        return None
    text = "devices[0].budget"
    return Difference(name="a budget is positive", outcome=refusal("ConfigError", text))


def every_item_for_itself(op: str, given: Any) -> Difference | None:
    """Results in the order of the call; an unknown key is an error of its item."""
    if not op.startswith("route_batch"):
        return None
    told = [
        [key, f"{_MODELS[key]}:{float(x):g}" if key in _MODELS else "KEY_NOT_FOUND"]
        for key, x in map(pair, given)
    ]
    return Difference(name="every item for itself", outcome={"ok": told})


def no_row_is_lost(op: str, given: Any) -> Difference | None:
    """A model that loses rows of others is run for each request alone."""
    if op != "handler_returns_too_few":
        return None
    told = [[name, float(x)] for name, x in map(pair, given)]
    return Difference(name="no row is lost", outcome={"ok": told})


def failure_leaves_no_trace(op: str, given: Any) -> Difference | None:
    """After a failed load the model is not there: the next request loads it, and evictions work."""
    if op != "load_failure_then_retry":
        return None
    told: list[str] = []
    resident = None
    for event in given:
        name, _, fails = event.partition(" ")
        if fails and name != resident:
            told.append("LoadFailed")
            resident = None
        else:
            told.append("hit" if name == resident else "load")
            resident = name
    return Difference(name="a failure leaves no trace", outcome={"ok": told})


def loads_wait(op: str, given: Any) -> Difference | None:
    """Who finds no room while another model is being loaded waits and is answered."""
    if op != "two_loads_overlap_cap1":
        return None
    return Difference(name="loads wait", outcome={"ok": ["answered"] * len(given)})


def budget_is_absolute(op: str, given: Any) -> Difference | None:
    """A budget is the server's, however many call it."""
    if op != "hint_counted_per_caller":
        return None
    return Difference(name="a budget is absolute", outcome={"ok": float(part(given, "hint"))})


def updates_are_partial(op: str, given: Any) -> Difference | None:
    """What an update does not name stays; a key is added by what adds keys."""
    if not op.startswith("update_paths") or op == "update_paths_single_model":
        return None
    named: dict[str, str] = {}
    for keys, path in map(pair, given):
        for key in keys:
            if key not in _COHORT_OF:
                return Difference(
                    name="keys are added, not updated", outcome=refusal("ValueError", "add it")
                )
            if key in named or not path:
                return None
            named[key] = path
    if len(named) == len(_COHORT_OF):
        return None
    cohorts: dict[str, str] = {}
    updates: list[list[str]] = []
    for origin in dict.fromkeys(_COHORT_OF[key] for key in named):
        keys = [key for key, cohort in _COHORT_OF.items() if cohort == origin]
        for path in dict.fromkeys(named[key] for key in named if key in keys):
            inside = [key for key in named if key in keys and named[key] == path]
            cohort = origin if origin in inside else inside[0]
            cohorts |= dict.fromkeys(inside, cohort)
            updates.append([cohort, path, origin])
        rest = [key for key in keys if key not in named]
        cohorts |= dict.fromkeys(rest, origin if origin in rest else "".join(rest[:1]))
    told: Mapping[str, object] = {
        "key_to_cohort": _COHORT_OF | cohorts,
        "updates(cohort,path,from)": updates,
    }
    return Difference(name="updates are partial", outcome={"ok": told})


def sizes_are_known(op: str, given: Any) -> Difference | None:
    """Models have sizes before they are loaded: what fits together stays together."""
    if op != "cold_start":
        return None
    names, _, sizes = given.partition(" of ")
    size, total = (int(word.split()[0]) for word in sizes.replace(" each", "").split(", "))
    loads = names.split(",")
    if len(loads) * size > total:
        return None
    told = {"loads": loads, "deleted": [], "used_after": float(len(loads) * size)}
    return Difference(name="sizes are known", outcome={"ok": told})


def devices_are_told_apart(op: str, given: Any) -> Difference | None:
    """Each card is a device with a budget of its own."""
    if op != "two_gpus":
        return None
    told = {"detected": True, "total_mb": [16000.0, 24000.0]}
    return Difference(name="devices are told apart", outcome={"ok": told})


def one_copy(op: str, given: Any) -> Difference | None:
    """Requests for one model share one copy of it."""
    if op != "same_model_twice_at_once":
        return None
    told = {"instances": 1.0, "loads": [given.split()[0]]}
    return Difference(name="one copy", outcome={"ok": told})


def settings_of_mappings_count(op: str, given: Any) -> Difference | None:
    """How batches are made is what the handlers of a keyed one's mappings say."""
    if op != "ignored_child_settings":
        return None
    return Difference(name="settings of mappings count", outcome={"ok": dict(given)})


def loops_are_kept(op: str, given: Any) -> Difference | None:
    """A cycle that is longer than the cap does not miss every time for ever."""
    if not op.startswith("lru_trace"):
        return None
    most, keys = part(given, "max_models"), part(given, "keys")
    if most is None or len(set(keys)) <= most:
        return None
    return Difference(name="loops are kept", outcome={"below": 0.9}, operation=steady_cycle)


def requests_are_served_together(op: str, given: Any) -> Difference | None:
    """What waits for the same model is served together: a fifth of the loads at the most."""
    count = re.search(r"(\d+) requests", str(given))
    if not op.startswith("lru_loads") or count is None or "sorted" in given:
        return None
    most = int(count.group(1)) // 5
    return Difference(
        name="served together", outcome={"below": most + 1}, operation=served_together
    )


KEYED_RULES: tuple[Rule, ...] = (
    keys_are_a_list,
    repeat_counts_once,
    budget_is_positive,
    every_item_for_itself,
    no_row_is_lost,
    failure_leaves_no_trace,
    loads_wait,
    budget_is_absolute,
    updates_are_partial,
    sizes_are_known,
    devices_are_told_apart,
    one_copy,
    settings_of_mappings_count,
    loops_are_kept,
    requests_are_served_together,
)


def keyed_difference(op: str, given: Any) -> Difference | None:
    """Return the first rule's difference that applies to this call, or None."""
    return next((found for rule in KEYED_RULES if (found := rule(op, given)) is not None), None)
