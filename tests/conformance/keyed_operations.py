"""The recorded calls on Beam's keyed models, done with modelyard: see ``operations``.

Keys and updates are judged on the table that the server resolves with, residency on the decision
core and on real servers with real models, and what Beam asks of a handler on real handlers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.conformance import keyed_servers
from tests.conformance.core_replay import CoreReplay
from tests.conformance.operations import NotUnderstood, Operation, pair, part
from tests.support.config_text import device_table

from modelyard.devices import Device, DeviceType
from modelyard_server.config import parse_config
from modelyard_server.devices.inventory import take_inventory
from modelyard_server.devices.probes import Probed
from modelyard_server.routing.key_table import KeyMapping, KeyTable, Updated

__all__ = ["KEYED_OPERATIONS", "keyed_operation", "served_together", "steady_cycle"]

_SIZE = 10
_MB = 10**6
_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "eight": 8}

# The routing that the recorded updates and batches began with: k1 and k2 mean A, k3 means B.
_COHORTS: Mapping[str, Sequence[str]] = {"a": ("k1", "k2"), "b": ("k3",)}


def key_routes(_library: object, given: Any) -> object:
    if isinstance(given, str):
        found = re.fullmatch(r"keys given as the string '(.*)'", given)
        if found is None:
            raise NotUnderstood(f"not a string of keys: {given!r}")
        given = [[found.group(1), "a"]]
    mappings = [KeyMapping(keys, target) for keys, target in map(pair, given)]
    table = KeyTable.of(mappings)
    repeats = sum(len(set(mapping.keys)) < len(mapping.keys) for mapping in mappings)
    if bool(repeats) != bool(table.warnings):
        raise RuntimeError(
            f"{repeats} mappings repeat a key, and the warnings are {table.warnings}"
        )
    for mapping in mappings:
        cohort = table.cohort_of(mapping.keys[-1])
        if cohort is None or cohort.id != mapping.keys[0]:
            raise RuntimeError(f"{mapping} is the cohort {cohort}")
    return dict(table.targets())


def key_types(_library: object, given: Any) -> object:
    if isinstance(given, list):
        return [repr(key) for key in KeyTable.of([KeyMapping(given, "c1")])]
    try:
        keys = [ast.literal_eval(word) for word in given.split(" then ")]
    except (AttributeError, SyntaxError, ValueError) as error:
        raise NotUnderstood(f"neither keys nor one then another: {given!r}") from error
    table = KeyTable.of(KeyMapping([key], f"c{n}") for n, key in enumerate(keys, start=1))
    return [repr(key) for key in table]


def hint_values(_library: object, given: Any) -> object:
    """A cap of so many models is a budget of so many times a model's bytes."""
    if not isinstance(given, list) or len(given) != 1:
        raise NotUnderstood(f"not a list of one hint: {given!r}")
    (hint,) = given
    budget = hint * _SIZE if type(hint) is int else hint
    config = parse_config(device_table("cpu", budget), base=keyed_servers.anywhere())
    resolved = config.devices[0].budget.resolve(10**9)
    replay = CoreReplay(resolved, {"a": _SIZE, "b": _SIZE}, "lru")
    return [replay.serve(name) for name in "ab"]


def route_batch(_library: object, given: Any) -> object:
    return keyed_servers.answers_by_key(_COHORTS, [(key, float(x)) for key, x in map(pair, given)])


def handler_returns_too_few(_library: object, given: Any) -> object:
    items = [(str(name), float(value)) for name, value in map(pair, given)]
    return keyed_servers.answers_of_a_model_that_drops_rows(items)


def _cap(given: Any) -> tuple[list[str], int]:
    keys, most = part(given, "keys"), part(given, "max_models")
    if not isinstance(keys, list) or not isinstance(most, int | None):
        raise NotUnderstood(f"no keys and cap: {given!r}")
    return keys, len(set(keys)) if most is None else most


def lru_trace(_library: object, given: Any) -> object:
    keys, most = _cap(given)
    replay = CoreReplay(most * _SIZE, dict.fromkeys(keys, _SIZE), "lru")
    events = [replay.serve(key) for key in keys]
    return {
        "events": events,
        "loads": len(replay.loads),
        "resident_lru_first": replay.next_to_leave(),
    }


def _requests(given: Any) -> tuple[list[str], int]:
    """Requests and the cap of a text such as "200 requests sorted by key, cap 4"."""
    count = re.search(r"(\d+) requests", str(given))
    most = re.search(r"\bcap (\d+)", str(given))
    if count is None or most is None or "ipf" in str(given):
        raise NotUnderstood(f"no number of requests and cap: {given!r}")
    models = re.search(r"\b(\d+|" + "|".join(_NUMBERS) + r") (?:equal )?models", str(given))
    word = models.group(1) if models else "5"
    names = [f"m{i}" for i in range(_NUMBERS.get(word) or int(word))]
    keys = [names[i % len(names)] for i in range(int(count.group(1)))]
    return sorted(keys) if "sorted" in given else keys, int(most.group(1))


def lru_loads(_library: object, given: Any) -> object:
    keys, most = _requests(given)
    replay = CoreReplay(most * _SIZE, dict.fromkeys(keys, _SIZE), "lru")
    for key in keys:
        replay.serve(key)
    return len(replay.loads)


def served_together(_library: object, given: Any) -> object:
    """Loads of the same requests as the server serves them: its own policy, 20 in flight."""
    keys, most = _requests(given)
    replay = CoreReplay(most * _SIZE, dict.fromkeys(keys, _SIZE), "ensemble")
    for begin in range(0, len(keys), 20):
        replay.serve_together(keys[begin : begin + 20])
    return len(replay.loads)


def steady_cycle(_library: object, given: Any) -> object:
    """Loads a request, if a trace is repeated without end under the server's own policy."""
    keys, most = _cap(given)
    replay = CoreReplay(most * _SIZE, dict.fromkeys(keys, _SIZE), "ensemble")
    for key in keys * 100:
        replay.serve(key)
    return len(replay.loads) / (len(keys) * 100)


def load_failure_then_retry(_library: object, given: Any) -> object:
    events = [re.fullmatch(r"(\w+)( \(fails once\))?", str(event)) for event in given]
    if not all(events):
        raise NotUnderstood(f"neither a model nor one that fails once: {given!r}")
    return keyed_servers.fail_then_retry([(e.group(1), bool(e.group(2))) for e in events if e])


def two_loads_overlap_cap1(_library: object, given: Any) -> object:
    return keyed_servers.overlapping_loads(given)


def hint_counted_per_caller(_library: object, given: Any) -> object:
    return keyed_servers.most_resident_at_once(part(given, "hint"), part(given, "callers"))


def update_paths(_library: object, given: Any) -> object:
    table = KeyTable.of(KeyMapping(keys, name) for name, keys in _COHORTS.items())
    return _told(table.updated([KeyMapping(keys, path) for keys, path in map(pair, given)]))


def update_paths_single_model(_library: object, given: Any) -> object:
    table = KeyTable.single("a")
    return _told(table.updated([KeyMapping(keys, path) for keys, path in map(pair, given)]))


def update_path_on_multi(_library: object, given: Any) -> object:
    table = KeyTable.of(KeyMapping(keys, name) for name, keys in _COHORTS.items())
    return table.retargeted(given).get("k1")


def _told(updated: Updated[str]) -> object:
    table = updated.table
    return {
        "key_to_cohort": {key: cohort.id for cohort in table.cohorts for key in cohort.keys},
        "updates(cohort,path,from)": [
            [update.cohort, update.target, update.origin] for update in updated.updates
        ],
    }


def cold_start(_library: object, given: Any) -> object:
    found = re.fullmatch(r"([\w,]+) of (\d+) each, (\d+) total", str(given))
    if found is None:
        raise NotUnderstood(f"no models of a size in a total: {given!r}")
    names = found.group(1).split(",")
    replay = CoreReplay(int(found.group(3)), dict.fromkeys(names, int(found.group(2))), "ensemble")
    for name in names:
        replay.serve(name)
    return {"loads": replay.loads, "deleted": replay.deleted, "used_after": float(replay.used)}


def two_gpus(_library: object, given: Any) -> object:
    """Two cards of 16 and 24 GB are two devices; and two budgets are kept apart by a server."""
    if given != "nvidia-smi prints two lines":
        raise NotUnderstood(f"not two lines: {given!r}")
    seen = tuple(
        Probed(device=Device.gpu(i), torch_device=f"cuda:{i}", total_bytes=total * _MB)
        for i, total in enumerate((16000, 24000))
    )
    tables = "".join(device_table(str(found.device), "100%") for found in seen)
    config = parse_config(tables, base=keyed_servers.anywhere())
    devices = take_inventory(config.devices, using={DeviceType.GPU: lambda: seen})
    held = keyed_servers.two_budgets([1, 2])
    if held != [1, 2]:
        raise RuntimeError(f"room for 1 and 2 models, and {held} are resident")
    return {
        "detected": len(devices) == 2,
        "total_mb": [device.budget_bytes / _MB for device in devices],
    }


def same_model_twice_at_once(_library: object, given: Any) -> object:
    found = re.fullmatch(r"(\w+) acquired twice concurrently", str(given))
    if found is None:
        raise NotUnderstood(f"no model acquired twice: {given!r}")
    return keyed_servers.concurrent_requests_for_one_model(found.group(1), 2)


def _handlers() -> Any:
    """The handlers; imported when one is asked for, because that imports Beam."""
    from tests.conformance import keyed_handlers

    return keyed_handlers


def route_batch_empty(_library: object, given: Any) -> object:
    return _handlers().keyed_answers(
        _COHORTS, [(str(key), float(x)) for key, x in map(pair, given)]
    )


def copies_conflict(_library: object, given: Any) -> object:
    found = re.fullmatch(r"model_copies=(\d+) inside a keyed mapping", str(given))
    if found is None:
        raise NotUnderstood(f"no number of copies: {given!r}")
    return _handlers().copies_in_a_mapping(int(found.group(1)))


def prefn_inside_mapping(_library: object, given: Any) -> object:
    if given is not None:
        raise NotUnderstood(f"no argument is known here: {given!r}")
    return _handlers().preprocessing_in_a_mapping()


def fn_order(_library: object, given: Any) -> object:
    return _handlers().function_order(part(given, "pre"), part(given, "post"))


def ignored_child_settings(_library: object, given: Any) -> object:
    if not isinstance(given, dict):
        raise NotUnderstood(f"no settings: {given!r}")
    return _handlers().batch_settings(given)


def defaults(_library: object, given: Any) -> object:
    if given is not None:
        raise NotUnderstood(f"no argument is known here: {given!r}")
    return _handlers().defaults()


def prediction_result(_library: object, given: Any) -> object:
    return _handlers().result_fields(*pair(given))


def maybe_keyed(_library: object, given: Any) -> object:
    return _handlers().keyed_and_unkeyed([(str(key), float(x)) for key, x in map(pair, given)])


KEYED_OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        key_routes,
        key_types,
        hint_values,
        route_batch,
        route_batch_empty,
        handler_returns_too_few,
        lru_trace,
        lru_loads,
        load_failure_then_retry,
        two_loads_overlap_cap1,
        hint_counted_per_caller,
        update_paths,
        update_paths_single_model,
        update_path_on_multi,
        cold_start,
        two_gpus,
        same_model_twice_at_once,
        copies_conflict,
        prefn_inside_mapping,
        fn_order,
        ignored_child_settings,
        defaults,
        prediction_result,
        maybe_keyed,
    )
}
"""By name; a name that goes on behind one of these (``update_paths_new_key``) is that call."""

_FAMILIES = ("key_routes", "key_types", "route_batch", "update_paths", "lru_trace", "lru_loads")


def keyed_operation(op: str) -> Operation | None:
    """The operation of a name; None if there is none."""
    if op in KEYED_OPERATIONS:
        return KEYED_OPERATIONS[op]
    family = next((name for name in _FAMILIES if op.startswith(f"{name}_")), None)
    return None if family is None else KEYED_OPERATIONS[family]
