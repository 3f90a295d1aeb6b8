"""The core through its bindings: types, errors and values, and seven recorded failures of others.

The scenarios replay what was measured in the two systems modelyard learned from, and show what this
core does instead.
"""

from __future__ import annotations

import ast
import enum
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from modelyard_server import _core
from modelyard_server._core import LoadFailure, RefuseReason, State
from modelyard_server.config.yard import POLICIES

NEVER = _core.NEVER_NS
SECOND = 10**9
STUB = ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text())


def make_yard(*budgets: int, **options: Any) -> _core.Yard:
    return _core.Yard(budgets=budgets or (100,), **options)


def actions_of(kind: type, actions: list[Any] | None) -> list[Any]:
    return [action for action in actions or () if isinstance(action, kind)]


def bring_in(yard: _core.Yard, model: int, now: int = 0, size: int | None = None) -> int:
    """Requests a cold model that has room, loads it and returns the lease."""
    _, actions = yard.request(model, now, NEVER)
    (load,) = actions_of(_core.Load, actions)
    entry = yard.entry(model)
    assert entry is not None
    actual = entry.placements[load.placement] if size is None else {0: size}
    (grant,) = actions_of(_core.Grant, yard.load_done(model, now, actual, 0.5))
    return int(grant.lease)


def state_of(yard: _core.Yard, model: int) -> State:
    entry = yard.entry(model)
    assert entry is not None
    return entry.state


# --- Errors ---------------------------------------------------------------------------------------


def test_every_error_type_is_a_runtime_error_of_its_own() -> None:
    kinds = [
        _core.StaleIdError,
        _core.WrongStateError,
        _core.PinnedError,
        _core.CapacityError,
    ]
    assert len(set(kinds)) == len(kinds)
    for kind in kinds:
        assert issubclass(kind, RuntimeError)
        assert kind.__module__ == "modelyard_server._core"
        assert kind.__doc__


def test_a_stale_id_is_stale_id_error() -> None:
    yard = make_yard()
    calls: list[Callable[[], object]] = [
        lambda: yard.request(7, 0, NEVER),
        lambda: yard.try_acquire(7, 0),
        lambda: yard.cancel(7, 0),
        lambda: yard.release(7, 0),
        lambda: yard.pin(7, 0),
        lambda: yard.unpin(7, 0),
        lambda: yard.unload(7, 0),
        lambda: yard.remove_model(7, 0),
        lambda: yard.update_placements(7, [{0: 1}], 0),
        lambda: yard.load_done(7, 0, {}, 0.0),
        lambda: yard.load_failed(7, 0, LoadFailure.TRANSIENT),
        lambda: yard.unload_done(7, 0, {}),
        lambda: yard.reclaimed(7, 0, {}),
        lambda: yard.remeasured(7, 0, {}),
    ]
    for call in calls:
        with pytest.raises(_core.StaleIdError, match="is not known"):
            call()
    assert yard.entry(7) is None
    assert yard.entry(-1) is None


def test_an_id_is_stale_once_its_slot_is_somebody_elses() -> None:
    yard = make_yard()
    first = yard.add_model("first", [{0: 10}], 1.0)
    yard.remove_model(first, 0)
    second = yard.add_model("second", [{0: 10}], 1.0)
    assert first != second
    assert yard.entry(first) is None
    with pytest.raises(_core.StaleIdError):
        yard.request(first, 0, NEVER)
    lease = bring_in(yard, second)
    yard.release(lease, 1)
    with pytest.raises(_core.StaleIdError):
        yard.release(lease, 2)
    yard.audit()


def test_an_event_that_does_not_fit_is_wrong_state_error_and_names_the_state() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    calls: list[Callable[[], object]] = [
        lambda: yard.load_done(model, 0, {0: 10}, 1.0),
        lambda: yard.load_failed(model, 0, LoadFailure.PERMANENT),
        lambda: yard.unload_done(model, 0, {}),
        lambda: yard.remeasured(model, 0, {0: 10}),
    ]
    for call in calls:
        with pytest.raises(_core.WrongStateError, match="does not fit state COLD"):
            call()


def test_unloading_a_pinned_model_is_pinned_error() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    yard.release(bring_in(yard, model), 1)
    yard.pin(model, 2)
    with pytest.raises(_core.PinnedError, match="pinned"):
        yard.unload(model, 3)
    assert state_of(yard, model) == State.RESIDENT


def test_one_model_too_many_is_capacity_error() -> None:
    yard = make_yard()
    for i in range(65536):
        yard.add_model(str(i), [{}], 1.0)
    with pytest.raises(_core.CapacityError, match="too many models"):
        yard.add_model("one too many", [{}], 1.0)
    assert yard.model_count == 65536


def test_audit_of_a_sound_yard_says_nothing() -> None:
    make_yard().audit()


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budgets": []}, "1 to 16 devices"),
        ({"budgets": [1] * 17}, "1 to 16 devices"),
        ({"budgets": [-1]}, "budget"),
        ({"budgets": [_core.MAX_BYTES + 1]}, "budget"),
        (
            {"policy": "fifo"},
            'no policy "fifo"; there are: ensemble learned next-use due gap mix decay gdsf lru',
        ),
        ({"loads_per_device": 0}, "load channel"),
        ({"max_waiting": 0}, "room for one"),
        ({"max_waiting_per_model": 0}, "room for one"),
        ({"overdue_after_s": 0.0}, "out of range"),
        ({"overdue_after_s": math.nan}, "overdue_after_s must be 0 to 9e9"),
        ({"overdue_after_s": math.inf}, "overdue_after_s"),
        ({"overdue_after_s": -1.0}, "overdue_after_s"),
        ({"backoff_initial_s": 0.0}, "out of range"),
        ({"backoff_initial_s": math.nan}, "backoff_initial_s"),
        ({"backoff_initial_s": 2.0, "backoff_max_s": 1.0}, "out of range"),
        ({"backoff_max_s": 1e10}, "backoff_max_s"),
    ],
)
def test_an_option_out_of_range_is_value_error(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _core.Yard(**({"budgets": [100]} | options))


@pytest.mark.parametrize("name", ["max_waiting", "max_waiting_per_model", "loads_per_device"])
@pytest.mark.parametrize("value", [-1, 2**32, "3", 1.5, None])
def test_a_count_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        _core.Yard(**{"budgets": [100], name: value})


def test_options_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        _core.Yard([100])  # type: ignore[call-arg]  # the point of the test


@pytest.mark.parametrize(
    "charge",
    [
        {-1: 1},
        {16: 1},
        {2: 1},  # the yard has two devices
        {2**40: 1},
        {0: -1},
        {0: _core.MAX_BYTES + 1},
        {0: 2**70},
        {2**70: 1},
        {0: 1.5},
        {0: math.nan},
        {0: None},
        {0: "1"},
        {"0": 1},
        {None: 1},
    ],
    ids=repr,
)
def test_what_is_no_charge_is_value_or_type_error(charge: dict[Any, Any]) -> None:
    yard = make_yard(100, 100)
    model = yard.add_model("m", [{0: 10}], 1.0)
    bring_in(yard, model)
    calls: list[Callable[[], object]] = [
        lambda: yard.add_model("n", [charge], 1.0),
        lambda: yard.update_placements(model, [charge], 0),
        lambda: yard.remeasured(model, 0, charge),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)):
            call()
    assert yard.model_count == 1
    entry = yard.entry(model)
    assert entry is not None
    assert entry.placements == [{0: 10}]
    assert entry.held == {0: 10}
    yard.audit()


@pytest.mark.parametrize("placements", [[], [{0: 1}] * 17, [5], None, {0: 1}], ids=repr)
def test_what_are_no_placements_is_refused(placements: Any) -> None:
    yard = make_yard()
    with pytest.raises((ValueError, TypeError)):
        yard.add_model("m", placements, 1.0)
    assert yard.model_count == 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_reload_seconds_must_be_a_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="reload_seconds"):
        make_yard().add_model("m", [{0: 1}], seconds)


@pytest.mark.parametrize("seconds", [-1e-9, math.nan, math.inf, 1e10])
def test_took_must_be_a_time_and_a_bad_one_changes_nothing(seconds: float) -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    yard.request(model, 0, NEVER)
    with pytest.raises(ValueError, match="took_s"):
        yard.load_done(model, 1, {0: 10}, seconds)
    assert state_of(yard, model) == State.LOADING


@pytest.mark.parametrize("device", [-1, 1, 16, 2**40])
def test_a_device_there_is_not_is_value_error(device: int) -> None:
    yard = make_yard(100)
    for call in (
        lambda: yard.account(device),
        lambda: yard.device_counters(device),
        lambda: yard.set_budget(device, 1, 0),
        lambda: yard.set_device_closed(device, True, 0),
    ):
        with pytest.raises(ValueError, match="no device has position"):
            call()


@pytest.mark.parametrize("budget", [-1, _core.MAX_BYTES + 1])
def test_a_budget_out_of_range_is_value_error(budget: int) -> None:
    yard = make_yard(100)
    with pytest.raises(ValueError, match="budget"):
        yard.set_budget(0, budget, 0)
    assert yard.account(0).budget == 100


@pytest.mark.parametrize("now", [2**63, -(2**63) - 1, 1.5, None, "1"])
def test_a_time_that_is_none_is_refused(now: Any) -> None:
    yard = make_yard()
    with pytest.raises((TypeError, ValueError)):
        yard.tick(now)


def test_more_than_was_held_cannot_come_back() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    yard.release(bring_in(yard, model), 0)
    yard.unload(model, 0)
    with pytest.raises(ValueError, match="more bytes came back than were held"):
        yard.unload_done(model, 0, {0: 11})
    yard.unload_done(model, 0, {0: 4})
    with pytest.raises(ValueError, match="more bytes came back than were quarantined"):
        yard.reclaimed(model, 0, {0: 7})
    assert yard.account(0).quarantined == 6


def test_amounts_may_be_as_large_as_the_bound() -> None:
    top = _core.MAX_BYTES
    yard = make_yard(top, top)
    model = yard.add_model("m", [{0: top, 1: top}], 1.0)
    bring_in(yard, model)
    assert yard.account(0).resident == top
    assert yard.account(1).free == 0


def test_only_a_dict_is_a_charge() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    yard.request(model, 0, NEVER)
    with pytest.raises(TypeError):
        yard.load_done(model, 1, MappingProxyType({0: 10}), 1.0)  # type: ignore[arg-type]  # so
    yard.audit()


# --- Values ---------------------------------------------------------------------------------------


def test_no_actions_are_none_and_some_are_a_list() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    assert yard.pin(model, 0) is None
    assert yard.tick(1) is None
    ticket, actions = yard.request(model, 2, NEVER)
    assert ticket > 0
    assert isinstance(actions, list)
    assert [type(action) for action in actions] == [_core.Load]
    assert yard.cancel(ticket, 3) is None


def test_try_acquire_gives_zero_while_the_model_is_not_resident() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    assert yard.try_acquire(model, 0) == 0
    bring_in(yard, model)
    assert yard.try_acquire(model, 1) > 0
    assert yard.lease_count == 2


def test_entries_and_accounts_are_copies() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    entry, account, counters = yard.entry(model), yard.account(0), yard.counters
    assert entry is not None
    bring_in(yard, model)
    assert (entry.state, entry.held, entry.load_count) == (State.COLD, {}, 0)
    assert (account.resident, counters.load_count) == (0, 0)
    assert yard.counters.load_count == 1
    for charge in (entry.held, entry.placements[0], entry.quarantined):
        charge[0] = 77
    later = yard.entry(model)
    assert later is not None
    assert (later.held, later.placements, later.quarantined) == ({0: 10}, [{0: 10}], {})
    yard.explanations()[1]["bytes"] = 77
    assert yard.explanations()[1]["bytes"] == 10
    yard.remove_model(model, 5)
    assert entry.label == "m"


def test_values_outlive_their_yard() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    _, actions = yard.request(model, 0, 5)
    assert actions is not None
    entry, account = yard.entry(model), yard.account(0)
    del yard
    assert entry is not None
    assert entry.held == {0: 10}
    assert account.reserved == 10
    (load,) = actions_of(_core.Load, actions)
    assert load.model == model


def test_values_cannot_be_written() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    _, actions = yard.request(model, 0, NEVER)
    assert actions is not None
    for value, name in (
        (yard.entry(model), "state"),
        (yard.account(0), "budget"),
        (yard.counters, "hit_count"),
        (actions[0], "model"),
    ):
        with pytest.raises(AttributeError):
            setattr(value, name, 1)


@pytest.mark.parametrize("kind", [_core.State, _core.LoadFailure, _core.RefuseReason])
def test_enums_are_enums_whose_members_are_one_object(kind: Any) -> None:
    # Code compares states with `is`, and the stub promises enum.Enum.
    assert issubclass(kind, enum.Enum)
    assert [kind(member.value) is member for member in kind] == [True] * len(kind)


def test_an_enum_value_from_the_core_is_the_member_itself() -> None:
    yard = make_yard(100)
    model = yard.add_model("m", [{0: 101}], 1.0)
    entry = yard.entry(model)
    assert entry is not None
    assert entry.state is State.COLD
    _, actions = yard.request(model, 0, NEVER)
    (refuse,) = actions_of(_core.Refuse, actions)
    assert refuse.reason is RefuseReason.NEVER_FITS


def test_constants() -> None:
    assert _core.MAX_DEVICES == 16
    assert _core.MAX_BYTES == 2**46 - 1
    assert _core.NEVER_NS == 2**63 - 1
    assert _core.POLICIES == POLICIES
    assert make_yard().policy == "ensemble"


@pytest.mark.parametrize("policy", _core.POLICIES)
def test_a_yard_goes_by_the_policy_it_was_given(policy: str) -> None:
    yard = make_yard(100, policy=policy)
    assert yard.policy == policy
    model = yard.add_model("m", [{0: 60}], 2.0)
    yard.request(model, 0, NEVER)
    if policy in {"ensemble", "learned"}:
        assert yard.leader == "lru", "the first leader"
        assert yard.shadow_seconds == (2.0, 2.0), "what its own rule has paid, and LRU"
    else:
        assert yard.leader == policy
        assert yard.shadow_seconds is None


@pytest.mark.parametrize("policy", _core.POLICIES)
def test_a_yard_says_what_lru_would_have_paid(policy: str) -> None:
    yard = make_yard(100, policy=policy)
    a, b, c = (yard.add_model(name, [{0: 40}], 9.0) for name in "abc")
    now = 0

    def ask(model: int, took_s: float) -> None:
        nonlocal now
        now += SECOND
        _, actions = yard.request(model, now, NEVER)
        for unload in actions_of(_core.Unload, actions):
            actions = yard.unload_done(unload.model, now, {0: 40})
        assert actions_of(_core.Load, actions)
        (grant,) = actions_of(_core.Grant, yard.load_done(model, now, {0: 40}, took_s))
        yard.release(grant.lease, now)

    ask(a, 1.0)
    yard.pin(a, now)
    for model in (b, c, b, c):  # LRU drops a, and has room for both.
        ask(model, 2.0)
    assert (yard.counters.load_seconds, yard.lru_seconds) == (9.0, 5.0)
    assert yard.departure_counts == {"MODEL": 3}
    # The victims were asked for, and loaded, one request before.
    assert yard.victim_ages == [(SECOND, SECOND)] * 3
    evicted = [record for record in yard.explanations() if record["decision"] == "EVICTED"]
    assert [record["expected_s"] for record in evicted] == [2.0] * 3
    assert {record["rule"] for record in evicted} <= set(_core.POLICIES) - {"ensemble", "learned"}
    assert {(record["idle_ns"], record["stayed_ns"]) for record in evicted} == {(SECOND, SECOND)}


def test_a_load_says_who_waited_for_it() -> None:
    yard = make_yard(100)
    model = yard.add_model("m", [{0: 40}], 1.0)
    for now in (0, 2 * SECOND):
        yard.request(model, now, NEVER)
    for grant in actions_of(_core.Grant, yard.load_done(model, 5 * SECOND, {0: 40}, 1.0)):
        yard.release(grant.lease, 5 * SECOND)
    told = yard.explanations()[-1]
    assert told["decision"] == "LOAD_DONE"
    assert (told["waiting_count"], told["waited_ns"], told["waited_sum_ns"]) == (
        2,
        5 * SECOND,
        8 * SECOND,
    )
    assert yard.departure_counts == {}


def test_a_refusal_carries_numbers_and_the_largest_holders() -> None:
    yard = make_yard(100)
    held = [yard.add_model(f"h{i}", [{0: size}], 1.0) for i, size in enumerate((10, 40, 20, 25))]
    for model in held:
        yard.release(bring_in(yard, model), 0)
        yard.pin(model, 0)
    late = yard.add_model("late", [{0: 30}], 1.0)
    ticket, actions = yard.request(late, 0, NEVER)
    (refuse,) = actions_of(_core.Refuse, actions)
    assert refuse.ticket == ticket
    assert refuse.reason == RefuseReason.BUDGET_EXHAUSTED
    assert (refuse.device, refuse.needed, refuse.free, refuse.budget) == (0, 30, 5, 100)
    assert refuse.holders == [(held[1], 40), (held[3], 25), (held[2], 20)]
    assert refuse.retry_after_ns == 0


def test_explanations_are_bounded_and_numbered() -> None:
    yard = make_yard(explain_capacity=3)
    model = yard.add_model("m", [{0: 10}], 1.0)
    for now in range(4):
        yard.release(bring_in(yard, model, now), now)
        yard.unload(model, now)
        yard.unload_done(model, now, {0: 10})
    records = yard.explanations()
    assert len(records) == 3
    assert [r["sequence"] for r in records] == [18, 19, 20]
    assert [r["decision"] for r in records] == ["LOAD_DONE", "EVICTED", "UNLOADED"]
    assert records[1]["why"] == "OPERATOR"
    assert yard.last_explained == 20
    assert yard.explanations_after(18) == records[1:]
    assert yard.explanations_after(20) == []


def test_a_clone_goes_its_own_way() -> None:
    yard = make_yard()
    model = yard.add_model("m", [{0: 10}], 1.0)
    lease = bring_in(yard, model)
    other = yard.clone()
    assert other.leases_of(model) == [lease]
    other.remove_model(model, 1)
    other.set_device_closed(0, True, 1)
    assert other.device_closed(0)
    assert not yard.device_closed(0)
    entry = yard.entry(model)
    assert entry is not None
    assert entry.state is State.RESIDENT
    heir = yard.add_model("n", [{0: 10}], 1.0, replaces=model)
    assert yard.entry(heir) is not None
    assert other.entry(heir) is None


# --- The stub -------------------------------------------------------------------------------------


def test_the_stub_names_what_the_module_has() -> None:
    in_stub: set[str] = set()
    for node in STUB.body:
        match node:
            case ast.ClassDef(name=name):
                in_stub.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                in_stub.add(name)
    in_module = {name for name in dir(_core) if not name.startswith("_")}
    assert {name for name in in_stub if not name.startswith("_")} == in_module


@pytest.mark.parametrize(
    "node", [n for n in STUB.body if isinstance(n, ast.ClassDef)], ids=lambda n: str(n.name)
)
def test_a_class_of_the_stub_has_the_members_of_the_modules(node: ast.ClassDef) -> None:
    real = getattr(_core, node.name)
    in_stub: set[str] = set()
    for child in node.body:
        match child:
            case ast.FunctionDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                in_stub.add(name)
    in_module = {name for name in vars(real) if not name.startswith("_")}
    if hasattr(real, "__members__"):
        in_module = set(real.__members__)
    assert in_stub - {"__init__"} == in_module


def test_argument_names_of_the_stub_are_those_of_the_module() -> None:
    (yard,) = (n for n in STUB.body if isinstance(n, ast.ClassDef) and n.name == "Yard")
    for node in yard.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        arguments = [*node.args.args, *node.args.kwonlyargs]
        in_stub = [argument.arg for argument in arguments if argument.arg != "self"]
        first_line = (inspect.getdoc(getattr(_core.Yard, node.name)) or "").splitlines()[0]
        in_module = re.findall(r"(\w+): (?!modelyard_server\._core\.Yard)", first_line)
        assert in_stub == in_module, node.name


# --- Replays of what was recorded in other systems ------------------------------------------------


def test_m05_a_waiter_that_times_out_behind_a_newcomer_wedges_nothing() -> None:
    """Recorded: the newcomer failed with IndexError and isolation stayed on for ever."""
    yard = make_yard(100)
    busy, first, newcomer = (yard.add_model(n, [{0: 100}], 1.0) for n in ("busy", "1st", "new"))
    lease = bring_in(yard, busy)
    waiter, _ = yard.request(first, 1, 5 * SECOND)
    late, _ = yard.request(newcomer, 2, NEVER)
    (refuse,) = actions_of(_core.Refuse, yard.tick(6 * SECOND))
    assert (refuse.ticket, refuse.reason) == (waiter, RefuseReason.DEADLINE_IN_QUEUE)
    assert state_of(yard, first) == State.COLD

    # The one behind is next as soon as there is room, and so is everybody after it.
    actions = yard.release(lease, 7 * SECOND)
    if state_of(yard, busy) == State.RESIDENT:
        (unload,) = actions_of(_core.Unload, actions)
        assert unload.model == busy
    (load,) = actions_of(_core.Load, yard.unload_done(busy, 8 * SECOND, {0: 100}))
    assert load.model == newcomer
    (grant,) = actions_of(_core.Grant, yard.load_done(newcomer, 9 * SECOND, {0: 100}, 1.0))
    assert grant.ticket == late
    yard.release(grant.lease, 10 * SECOND)
    for now, model, gone in ((11, first, newcomer), (14, busy, first)):
        _, actions = yard.request(model, now * SECOND, NEVER)
        assert [a.model for a in actions_of(_core.Unload, actions)] == [gone]
        (load,) = actions_of(_core.Load, yard.unload_done(gone, (now + 1) * SECOND, {0: 100}))
        done = yard.load_done(model, (now + 2) * SECOND, {0: 100}, 1.0)
        yard.release(actions_of(_core.Grant, done)[0].lease, (now + 2) * SECOND)
    assert (yard.waiting_count, yard.lease_count) == (0, 0)
    yard.audit()


def test_m05_cancelling_the_oldest_waiter_serves_the_next() -> None:
    yard = make_yard(100)
    resident, big, small = (
        yard.add_model(n, [{0: s}], 1.0) for n, s in (("resident", 60), ("big", 100), ("small", 30))
    )
    lease = bring_in(yard, resident)
    old, _ = yard.request(big, 1, NEVER)
    yard.tick(60 * SECOND)  # Overdue: nobody passes it any more.
    young, actions = yard.request(small, 61 * SECOND, NEVER)
    assert not actions_of(_core.Load, actions)
    (load,) = actions_of(_core.Load, yard.cancel(old, 62 * SECOND))
    assert load.model == small
    (grant,) = actions_of(_core.Grant, yard.load_done(small, 63 * SECOND, {0: 30}, 1.0))
    assert grant.ticket == young
    yard.release(lease, 64 * SECOND)
    yard.audit()


@pytest.mark.parametrize("failure", [LoadFailure.TRANSIENT, LoadFailure.PERMANENT])
def test_r08_and_b23_a_failed_load_leaves_no_trace(failure: LoadFailure) -> None:
    """Recorded: the failed model was listed as resident, reloaded for each batch, and the next
    eviction raised KeyError."""
    yard = make_yard(100, backoff_initial_s=1.0, backoff_max_s=4.0)
    broken = yard.add_model("broken", [{0: 60}], 1.0)
    other = yard.add_model("other", [{0: 100}], 1.0)
    ticket, _ = yard.request(broken, 0, NEVER)
    actions = yard.load_failed(broken, SECOND, failure)
    (refuse,) = actions_of(_core.Refuse, actions)
    assert (refuse.ticket, refuse.reason) == (ticket, RefuseReason.LOAD_FAILED)
    assert refuse.failure == failure
    assert refuse.retry_after_ns == SECOND
    assert yard.account(0).used == 0
    entry = yard.entry(broken)
    assert entry is not None
    assert (entry.state, entry.held, entry.failure_count) == (State.FAILED, {}, 1)

    # Not loaded again for each request, and in nobody's way.
    _, actions = yard.request(broken, SECOND + 1, NEVER)
    assert not actions_of(_core.Load, actions)
    assert actions_of(_core.Refuse, actions)[0].retry_after_ns == SECOND - 1
    yard.release(bring_in(yard, other, SECOND + 2), SECOND + 3)
    yard.unload(other, SECOND + 4)
    yard.unload_done(other, SECOND + 5, {0: 100})

    # Once its files are whole it loads once and stays.
    lease = bring_in(yard, broken, 3 * SECOND)
    yard.release(lease, 3 * SECOND)
    for now in range(4, 8):
        lease = yard.try_acquire(broken, now * SECOND)
        assert lease
        yard.release(lease, now * SECOND)
    assert yard.counters.load_count == 2
    assert yard.counters.load_failure_count == 1
    yard.audit()


def test_b23_back_off_doubles_up_to_its_bound_and_a_success_forgives() -> None:
    yard = make_yard(100, backoff_initial_s=1.0, backoff_max_s=5.0)
    model = yard.add_model("m", [{0: 10}], 1.0)
    now, waits = 0, []
    for _ in range(5):
        _, actions = yard.request(model, now, NEVER)
        assert actions_of(_core.Load, actions)
        (refuse,) = actions_of(_core.Refuse, yard.load_failed(model, now, LoadFailure.TRANSIENT))
        waits.append(refuse.retry_after_ns // SECOND)
        now += refuse.retry_after_ns
    assert waits == [1, 2, 4, 5, 5]
    yard.release(bring_in(yard, model, now), now)
    entry = yard.entry(model)
    assert entry is not None
    assert entry.failure_count == 0


def test_r11_a_model_in_use_is_never_evicted_and_the_limit_holds() -> None:
    """Recorded: models in use were "evicted", stayed alive, and the cap was exceeded."""
    yard = make_yard(100)
    one, two = (yard.add_model(n, [{0: 100}], 1.0) for n in ("one", "two"))
    lease = bring_in(yard, one)
    ticket, actions = yard.request(two, 1, NEVER)
    assert not actions_of(_core.Unload, actions)
    assert not actions_of(_core.Load, actions)
    assert yard.account(0).used == 100

    # In endless use it is asked to leave in the end, but only its last user lets it go.
    (drain,) = actions_of(_core.Drain, yard.tick(60 * SECOND))
    assert drain.model == one
    assert yard.try_acquire(one, 61 * SECOND) == 0
    assert yard.account(0).used == 100
    (unload,) = actions_of(_core.Unload, yard.release(lease, 62 * SECOND))
    assert unload.model == one
    # The room is there when it is really there.
    assert not actions_of(_core.Load, yard.tick(63 * SECOND))
    (load,) = actions_of(_core.Load, yard.unload_done(one, 64 * SECOND, {0: 100}))
    assert load.model == two
    (grant,) = actions_of(_core.Grant, yard.load_done(two, 65 * SECOND, {0: 100}, 1.0))
    assert grant.ticket == ticket
    assert yard.account(0).peak == 100


def test_b25_overlapping_loads_at_a_limit_of_one_wait_for_each_other() -> None:
    """Recorded: two overlapping loads at cap 1 crashed with KeyError."""
    yard = make_yard(100)
    one, two = (yard.add_model(n, [{0: 100}], 1.0) for n in ("one", "two"))
    first, actions = yard.request(one, 0, NEVER)
    assert [a.model for a in actions_of(_core.Load, actions)] == [one]
    second, actions = yard.request(two, 1, NEVER)
    assert not actions_of(_core.Load, actions)
    assert not actions_of(_core.Unload, actions)

    actions = yard.load_done(one, 2, {0: 100}, 1.0)
    (grant,) = actions_of(_core.Grant, actions)
    assert grant.ticket == first
    actions = yard.release(grant.lease, 3)
    assert [a.model for a in actions_of(_core.Unload, actions)] == [one]
    actions = yard.unload_done(one, 4, {0: 100})
    assert [a.model for a in actions_of(_core.Load, actions)] == [two]
    (grant,) = actions_of(_core.Grant, yard.load_done(two, 5, {0: 100}, 1.0))
    assert grant.ticket == second
    yard.audit()


def test_r06_and_r07_a_limit_is_in_bytes_and_does_not_grow_with_callers() -> None:
    """Recorded: hint 1 and four callers made a cap of 4; all three models were resident."""
    yard = make_yard(100)
    models = [yard.add_model(f"m{i}", [{0: 40}], 1.0) for i in range(3)]
    # Four callers ask for every model at once: one load each, and never three resident.
    tickets = {model: [yard.request(model, 0, NEVER)[0] for _ in range(4)] for model in models}
    granted: set[int] = set()
    loads = 0
    for now in range(1, 60):
        for model in models:
            state = state_of(yard, model)
            if state == State.LOADING:
                loads += 1
                grants = actions_of(_core.Grant, yard.load_done(model, now, {0: 40}, 1.0))
                granted |= {grant.ticket for grant in grants}
                for grant in grants:
                    yard.release(grant.lease, now)
            elif state == State.UNLOADING:
                yard.unload_done(model, now, {0: 40})
            assert yard.account(0).used <= 100
            yard.audit()
    assert granted == {ticket for waiting in tickets.values() for ticket in waiting}
    assert loads == 3
    assert yard.account(0).peak <= 100
    assert yard.lease_count == 0


def test_a_removed_model_in_use_stays_until_released_whatever_is_reclaimed() -> None:
    """A model of no bytes, with quarantine from an earlier life, is in use while it is removed."""
    yard = make_yard(100)
    model = yard.add_model("m", [{0: 60}], 1.0)
    yard.release(bring_in(yard, model), 0)
    yard.unload(model, 1)
    yard.unload_done(model, 2, {0: 10})
    yard.update_placements(model, [{}], 3)
    lease = bring_in(yard, model, 4)
    assert [type(a) for a in yard.remove_model(model, 5) or ()] == [_core.Drain]
    assert yard.reclaimed(model, 6, {0: 50}) is None
    yard.audit()
    assert state_of(yard, model) == State.DRAINING
    assert actions_of(_core.Unload, yard.release(lease, 7))
    yard.unload_done(model, 8, {})
    assert yard.entry(model) is None


def test_a_removed_model_stays_while_it_loads_whatever_is_reclaimed() -> None:
    yard = make_yard(100)
    model = yard.add_model("m", [{0: 60}], 1.0)
    yard.release(bring_in(yard, model), 0)
    yard.unload(model, 1)
    yard.unload_done(model, 2, {})
    yard.update_placements(model, [{}], 3)
    yard.request(model, 4, NEVER)
    yard.remove_model(model, 5)
    yard.reclaimed(model, 6, {0: 60})
    assert yard.load_failed(model, 7, LoadFailure.CANCELLED) is None
    assert yard.entry(model) is None
    yard.audit()
