"""The table of keys: what it takes, what it refuses, and how the next one comes of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.routing.key_table import KeyChange, KeyMapping, KeyTable, KeyUpdate

Mappings = Sequence[tuple[Sequence[Hashable], str]]


def mappings(*given: tuple[Sequence[Hashable], str]) -> list[KeyMapping[str]]:
    return [KeyMapping(keys, target) for keys, target in given]


def table_of(*given: tuple[Sequence[Hashable], str]) -> KeyTable[str]:
    return KeyTable.of(mappings(*given))


def audit(table: KeyTable[str]) -> None:
    """A key is in one cohort, and a cohort's id is one of its keys."""
    keys = [key for cohort in table.cohorts for key in cohort.keys]
    assert len(set(keys)) == len(keys) == len(table)
    assert list(table) == keys
    for cohort in table.cohorts:
        assert cohort.id in cohort.keys
        for key in cohort.keys:
            assert table.cohort_of(key) is cohort
            assert table.get(key) == cohort.target


def test_the_first_key_of_a_mapping_is_the_cohorts_id() -> None:
    table = table_of((["a", "b"], "m1"), (["c"], "m2"))
    assert [(cohort.id, cohort.keys) for cohort in table.cohorts] == [
        ("a", ("a", "b")),
        ("c", ("c",)),
    ]
    assert dict(table.targets()) == {"a": "m1", "b": "m1", "c": "m2"}
    assert table.get("d") is None
    audit(table)


def test_a_key_in_two_mappings_is_refused_by_its_name_and_both_models() -> None:
    with pytest.raises(ValueError, match=r"key b maps to multiple .*given to m1 and to m2"):
        table_of((["a", "b"], "m1"), (["c", "b"], "m2"))


def test_a_repeat_inside_a_mapping_counts_once_and_warns_once() -> None:
    table = table_of((["a", "a", "b", "a"], "m1"))
    assert table.cohorts[0].keys == ("a", "b")
    assert table.warnings == ("key a is given more than once for m1: it counts once",)
    audit(table)


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ([], ValueError, "Empty list maps to model handler m"),
        ("abc", TypeError, r"bare string 'abc': write \['abc'\]"),
        (b"abc", TypeError, "bare string"),
        ({"a", "b"}, TypeError, "a list, which has an order, got a set"),
        (None, TypeError, "got a NoneType"),
        ([["a"]], TypeError, "hashable, got a list"),
    ],
)
def test_what_is_no_list_of_keys_is_refused(
    keys: object, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        KeyMapping(keys, "m")  # type: ignore[arg-type]


def test_a_mapping_needs_a_target() -> None:
    with pytest.raises(TypeError, match="need a target, got None"):
        KeyMapping(["a"], None)
    with pytest.raises(TypeError, match="must not be None"):
        KeyTable.single(None)
    with pytest.raises(TypeError, match="must be mappings of keys, got a tuple"):
        KeyTable[str].of([(["a"], "m")])  # type: ignore[list-item]


def test_any_hashable_is_a_key_and_equal_ones_are_one() -> None:
    table = table_of(([1, "1", None, ("a", 2), False], "m"))
    assert [table.get(key) for key in (1, "1", None, ("a", 2), False, 0, 1.0)] == ["m"] * 7
    with pytest.raises(ValueError, match="key True maps to multiple"):
        table_of(([1], "m1"), ([True], "m2"))


def test_an_update_repoints_what_it_names_and_leaves_the_rest() -> None:
    table = table_of((["k1", "k2"], "a"), (["k3"], "b"))
    updated = table.updated(mappings((["k1", "k2"], "p")))
    assert dict(updated.table.targets()) == {"k1": "p", "k2": "p", "k3": "b"}
    assert updated.changes == (KeyChange("k1", "a", "p"), KeyChange("k2", "a", "p"))
    assert updated.updates == (KeyUpdate("k1", "p", "k1"),)
    assert dict(table.targets()) == {"k1": "a", "k2": "a", "k3": "b"}, "the old one is as it was"
    audit(updated.table)


def test_a_cohort_whose_keys_are_given_different_targets_parts() -> None:
    table = table_of((["k1", "k2", "k4"], "a"), (["k3"], "b"))
    updated = table.updated(mappings((["k4", "k2"], "p"), (["k1"], "q"), (["k3"], "p")))
    assert updated.updates == (
        KeyUpdate("k4", "p", "k1"),
        KeyUpdate("k1", "q", "k1"),
        KeyUpdate("k3", "p", "k3"),
    )
    # Cohorts that are given the same target stay two.
    assert {cohort.id: cohort.keys for cohort in updated.table.cohorts} == {
        "k1": ("k1",),
        "k3": ("k3",),
        "k4": ("k2", "k4"),
    }
    audit(updated.table)


def test_a_key_that_is_not_named_keeps_the_cohorts_target() -> None:
    updated = table_of((["k1", "k2"], "a")).updated(mappings((["k1"], "p")))
    assert [(c.id, c.keys, c.target) for c in updated.table.cohorts] == [
        ("k1", ("k1",), "p"),
        ("k2", ("k2",), "a"),
    ]
    assert updated.updates == (KeyUpdate("k1", "p", "k1"),)
    audit(updated.table)


def test_to_give_what_is_there_changes_nothing() -> None:
    table = table_of((["k1", "k2"], "a"))
    updated = table.updated(mappings((["k1"], "a")))
    assert updated.table is table
    assert not updated.changes
    assert table.updated([]).table is table


@pytest.mark.parametrize(
    ("update", "partial", "text"),
    [
        (((["k1"], "p"), (["k1"], "q")), True, "k1 appears in multiple update lists. A single mo"),
        (((["k1", "k1"], "p"),), True, "k1 appears in multiple update lists"),
        (((["k9"], "p"),), True, "k9 appears in update, but not in the original"),
        (((["k1", "k2"], "p"),), False, "0 appears in the original configuration, but not"),
        (((["k1"], ""),), True, r"path for \['k1'\] is empty"),
    ],
)
def test_an_update_that_cannot_be_is_refused(update: Mappings, partial: bool, text: str) -> None:
    table = table_of((["k1", "k2"], "a"), ([0], "b"))
    with pytest.raises(ValueError, match=f"Invalid model update.*{text}"):
        table.updated(mappings(*update), partial=partial)
    assert dict(table.targets()) == {"k1": "a", "k2": "a", 0: "b"}


def test_where_every_key_means_one_model_that_one_is_changed_as_a_whole() -> None:
    table = KeyTable.single("m")
    assert table.get("anything") == "m"
    assert table.retargeted("n").get("anything") == "n"
    with pytest.raises(RuntimeError, match="sent many model paths"):
        table.updated(mappings((["k1"], "p")))
    with pytest.raises(RuntimeError, match="cannot be added"):
        table.added(mappings((["k1"], "p")))
    with pytest.raises(RuntimeError, match="currently not supported"):
        table_of((["k1"], "a")).retargeted("p")


def test_keys_are_added_to_a_cohort_and_taken_away_while_it_is_in_use() -> None:
    table = table_of((["a", "b"], "m1"), (["c"], "m2"))
    extended = table.extended("b", ["d", "a", "d"])
    assert extended.changes == (KeyChange("d", None, "m1"),)
    assert extended.table.cohorts[0].keys == ("a", "b", "d")
    assert table.extended("a", ["b"]).table is table
    with pytest.raises(ValueError, match="key c maps to multiple"):
        table.extended("a", ["c"])
    with pytest.raises(KeyError, match="x"):
        table.extended("x", ["y"])
    without = extended.table.without(["a", "c"])
    assert without.changes == (KeyChange("a", "m1", None), KeyChange("c", "m2", None))
    assert [(cohort.id, cohort.keys) for cohort in without.table.cohorts] == [("b", ("b", "d"))]
    with pytest.raises(KeyError, match="c"):
        without.table.without(["c"])
    for each in (table, extended.table, without.table):
        audit(each)


KEYS = st.integers(0, 9)
TARGETS = st.sampled_from("pqr")


@given(
    st.lists(st.tuples(st.lists(KEYS, min_size=1, max_size=4), TARGETS), max_size=5),
    st.lists(st.tuples(st.lists(KEYS, min_size=1, max_size=3), TARGETS), max_size=6),
    st.sampled_from(["added", "updated", "extended", "without"]),
)
def test_every_step_does_what_its_changes_say_or_nothing(
    start: list[tuple[list[int], str]], step: list[tuple[list[int], str]], kind: str
) -> None:
    distinct: set[int] = set()
    table = KeyTable[str]()
    for keys, target in start:
        if not distinct & set(keys):
            distinct |= set(keys)
            table = table.added(mappings((keys, target))).table
    before = dict(table.targets())
    try:
        match kind:
            case "added":
                updated = table.added(mappings(*step))
            case "updated":
                updated = table.updated(mappings(*step))
            case "extended":
                updated = table.extended(step[0][0][0], step[-1][0]) if step else table.added([])
            case _:
                updated = table.without([key for keys, _ in step for key in keys])
    except (KeyError, ValueError):
        assert dict(table.targets()) == before
        return
    audit(updated.table)
    after = dict(updated.table.targets())
    wanted = dict(before)
    for change in updated.changes:
        assert before.get(change.key) == change.before != change.after
        if change.after is None:
            del wanted[change.key]
        else:
            wanted[change.key] = change.after
    assert after == wanted
    assert dict(table.targets()) == before
