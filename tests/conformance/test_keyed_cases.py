"""What Beam's keyed models do, case by case, and where modelyard means to differ.

Each case of the groups ``keyed_models`` and ``beam_model_manager`` records one call on the real
package; ``judge`` says when one passes. ``MODELYARD_CASES=PATH`` names another file to judge.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conformance import cases, keyed_operations, keyed_rules
from tests.conformance.cases import (
    KEYED_GROUPS,
    NOT_YET,
    SEED_FILE,
    VARIABLE,
    Case,
    chosen_files,
    load,
)
from tests.conformance.core_replay import CoreReplay
from tests.conformance.judge import difference_of, judge, observe
from tests.conformance.keyed_operations import KEYED_OPERATIONS
from tests.conformance.libraries import Modelyard
from tests.conformance.rules import refusal

CASES = [case for file in chosen_files() for case in file.judged_of(KEYED_GROUPS)]
SEEDS = load(SEED_FILE)
OURS = Modelyard()


def case_of(op: str, given: object, stance: str, expect: object) -> Case:
    return {"id": "X1", "op": op, "input": given, "stance": stance, "expect": expect}


@pytest.mark.parametrize("case", CASES, ids=[str(case.get("id")) for case in CASES])
def test_case(case: Case, request: pytest.FixtureRequest) -> None:
    missed = judge(OURS, case)
    if missed is not None:
        note = f"{case['id']}: our error's text has no {missed!r}"
        request.node.user_properties.append(("text_differs", note))


class TestSeedFile:
    """The seed file itself, whichever file is judged."""

    JUDGED = SEEDS.judged_of(KEYED_GROUPS)

    def test_every_case_of_the_groups_is_judged_or_named(self) -> None:
        recorded = json.loads(SEED_FILE.read_bytes())["groups"]
        ids = {case["id"] for group in KEYED_GROUPS for case in recorded[group]}
        judged = {case["id"] for case in self.JUDGED}
        waiting = {case["id"] for case in SEEDS.not_yet}
        assert judged | waiting == ids
        assert not judged & waiting
        assert (len(judged), len(waiting)) == (36, 0)

    def test_what_is_not_judged_is_named_with_what_it_needs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert not set(NOT_YET) & set(KEYED_OPERATIONS)
        assert "not judged yet: " not in SEEDS.summary
        monkeypatch.setattr(cases, "NOT_YET", {"fn_order": "needs an order"})
        assert "B39 fn_order is not judged yet: needs an order" in SEEDS.summary
        assert len(SEEDS.judged_of(KEYED_GROUPS)) == 35

    def test_recorded_texts_of_matching_cases_are_ours_too(self) -> None:
        refused = [
            case for case in self.JUDGED if case["stance"] == "match" and "error" in case["expect"]
        ]
        assert len(refused) == 7
        assert [judge(OURS, case) for case in refused] == [None] * 7

    def test_every_deviation_follows_from_a_rule(self) -> None:
        for case in self.JUDGED:
            if case["stance"] == "deviate":
                assert difference_of(case["op"], case["input"]) is not None, case["id"]


class TestAnotherFile:
    """`MODELYARD_CASES` in a pytest of its own."""

    def test_its_cases_are_judged_and_what_waits_is_named(self, tmp_path: Path) -> None:
        good = case_of("key_routes", [[["a"], "m"]], "match", {"ok": {"a": "m"}})
        groups = {
            "keyed_models": [
                good | {"id": "A1"},
                good | {"id": "A2", "op": "unheard_of"},
                good | {"id": "A3", "op": "defaults", "input": "none"},
            ],
            "beam_model_manager": [good | {"id": "A4", "expect": {"ok": {"a": "n"}}}],
        }
        path = tmp_path / "others.json"
        path.write_text(json.dumps({"groups": groups}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::test_case"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, VARIABLE: str(path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        for line in (
            "1 passed",
            "3 failed",
            "case A2: no handler for op 'unheard_of'",
            "case A4 (match) key_routes(",
            "case A3: defaults does not understand its input: no argument is known here: 'none'",
            "4 cases judged (keyed_models 3, beam_model_manager 1), 0 of groups",
        ):
            assert line in done.stdout, done.stdout


class TestJudge:
    """Cases that we do not know are judged by their stance, and wrong results are noticed."""

    @pytest.mark.parametrize(
        ("op", "given", "stance", "expect"),
        [
            ("key_routes", [[["a"], "m"], [["b", "a"], "n"]], "match", refusal("ValueError", "")),
            ("key_routes", [[["a", "a"], "m"]], "deviate", refusal("ValueError", "")),
            ("key_types", ["a", 2.5, False], "improve", {"ok": ["'a'", "2.5", "False"]}),
            ("hint_values", [0], "deviate", refusal("KeyError", "")),
            ("hint_values", [1.5], "deviate", {"ok": ["load", "load -a"]}),
            ("hint_values", ["2"], "deviate", {"ok": ["load", "load"]}),
            ("hint_values", [1], "match", {"ok": ["load", "load -a"]}),
            (
                "lru_trace",
                {"keys": ["a", "b", "c", "a"], "max_models": 2},
                "match",
                {
                    "ok": {
                        "events": ["load", "load", "load -a", "load -b"],
                        "loads": 4,
                        "resident_lru_first": ["c", "a"],
                    }
                },
            ),
            ("lru_trace", {"keys": ["a", "b", "c"], "max_models": 2}, "improve", {"ok": {}}),
            ("lru_loads", "200 requests, five models round robin, cap 4", "match", {"ok": 200}),
            ("lru_loads", "200 requests, five models round robin, cap 4", "deviate", {"ok": 200}),
            (
                "update_paths_split_cohort",
                [[["k2"], "p"], [["k1"], "q"], [["k3"], "p"]],
                "match",
                {
                    "ok": {
                        "key_to_cohort": {"k1": "k1", "k2": "k2", "k3": "k3"},
                        "updates(cohort,path,from)": [
                            ["k2", "p", "k1"],
                            ["k1", "q", "k1"],
                            ["k3", "p", "k3"],
                        ],
                    }
                },
            ),
            ("update_paths_empty_path", [[["k1"], ""]], "match", refusal("ValueError", "path")),
            ("route_batch_empty", [], "improve", {"ok": []}),
            ("copies_conflict", "model_copies=1 inside a keyed mapping", "match", {"ok": 1}),
            (
                "fn_order",
                {"pre": ["a", "b", "c"], "post": []},
                "match",
                {"ok": {"pre": ["c", "b", "a"], "post": []}},
            ),
            (
                "ignored_child_settings",
                {"max_batch_size": 7, "max_batch_duration_secs": 2},
                "improve",
                {"ok": {}},
            ),
            (
                "maybe_keyed",
                [["z", 1], ["y", 2]],
                "match",
                {"ok": [[["z", "A:1"], ["y", "A:2"]], ["A:1", "A:2"]]},
            ),
            (
                "cold_start",
                "a,b of 6000 each, 20000 total",
                "deviate",
                {"ok": {"loads": ["a", "b"], "deleted": ["a"], "used_after": 6000.0}},
            ),
        ],
    )
    def test_cases_like_the_recorded_ones_pass(
        self, op: str, given: object, stance: str, expect: object
    ) -> None:
        judge(OURS, case_of(op, given, stance, expect))

    @pytest.mark.parametrize(
        ("op", "given", "stance", "expect"),
        [
            ("key_routes", [[["a"], "m"]], "match", {"ok": {"a": "n"}}),
            ("key_routes", [[["a", "a"], "m"]], "match", refusal("ValueError", "")),
            ("key_types", "1 then True", "match", {"ok": ["1", "True"]}),
            ("hint_values", [-1], "match", refusal("KeyError", "")),
            (
                "lru_trace",
                {"keys": ["a", "b", "a"], "max_models": 1},
                "match",
                {"ok": {"events": ["load", "load -a", "hit"], "loads": 2}},
            ),
            ("lru_loads", "200 requests sorted by key, cap 4", "match", {"ok": 4}),
            ("copies_conflict", "model_copies=2 inside a keyed mapping", "match", {"ok": 2}),
            ("fn_order", {"pre": ["a", "b"], "post": []}, "match", {"ok": {"pre": ["a", "b"]}}),
            ("ignored_child_settings", {"min_batch_size": 5}, "match", {"ok": {}}),
            # What is no defect is not refused.
            ("update_paths", [[["k1", "k2"], "p"], [["k3"], "q"]], "deviate", {"ok": {}}),
        ],
    )
    def test_a_wrong_result_is_noticed(
        self, op: str, given: object, stance: str, expect: object
    ) -> None:
        with pytest.raises(AssertionError, match=rf"case X1 \({stance}\) {op}"):
            judge(OURS, case_of(op, given, stance, expect))

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"op": "unheard_of"}, "case X1: no handler for op 'unheard_of'"),
            ({"op": "lru_tracer"}, "case X1: no handler for op 'lru_tracer'"),
            ({"op": "hint_values", "input": 3}, "not a list of one hint"),
            ({"op": "lru_loads", "input": "many"}, "no number of requests and cap"),
            ({"op": "lru_loads", "input": "9 requests, Zipf, cap 4"}, "no number of requests"),
            ({"op": "lru_trace", "input": {}}, "does not understand its input: no 'keys'"),
            ({"op": "cold_start", "input": "a"}, "no models of a size"),
            ({"op": "two_gpus", "input": "three lines"}, "not two lines"),
            ({"op": "key_types", "input": "one"}, "neither keys nor one then another"),
            ({"op": "key_routes", "input": "abc"}, "not a string of keys"),
            ({"op": "copies_conflict", "input": "two"}, "no number of copies"),
            ({"op": "fn_order", "input": {}}, "does not understand its input: no 'pre'"),
        ],
    )
    def test_a_case_that_cannot_be_judged_fails_by_name(
        self, change: dict[str, object], text: str
    ) -> None:
        case = case_of("key_routes", [[["a"], "m"]], "match", {"ok": {"a": "m"}}) | change
        with pytest.raises(AssertionError, match=text):
            judge(OURS, case)

    @pytest.mark.parametrize("name", ["B02", "B10", "M01"])
    def test_without_its_rule_a_deviation_fails(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = next(case for case in TestSeedFile.JUDGED if case["id"] == name)
        judge(OURS, case)
        monkeypatch.setattr(keyed_rules, "KEYED_RULES", ())
        with pytest.raises(AssertionError, match="no documented difference allows that"):
            judge(OURS, case)

    def test_a_policy_that_thrashes_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = case_of(
            "lru_trace", {"keys": ["a", "b", "c"], "max_models": 2}, "improve", {"ok": 0}
        )
        judge(OURS, case)
        real = CoreReplay

        def thrashing(budget: int, sizes: dict[str, int], policy: str) -> Any:
            return real(budget, sizes, "lru")

        monkeypatch.setattr(keyed_operations, "CoreReplay", thrashing)
        with pytest.raises(AssertionError, match="'loops are kept' asks for"):
            judge(OURS, case)

    def test_a_table_that_takes_a_key_twice_is_noticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Careless:
            @staticmethod
            def of(mappings: Any) -> list[object]:
                return [key for mapping in mappings for key in mapping.keys]

        case = next(case for case in TestSeedFile.JUDGED if case["id"] == "B08")
        judge(OURS, case)
        monkeypatch.setattr(keyed_operations, "KeyTable", Careless)
        with pytest.raises(AssertionError, match=r"case B08 \(match\) key_types"):
            judge(OURS, case)


def test_keys_that_are_no_text_do_not_go_over_the_wire() -> None:
    """In process a key is any hashable value; a client sends text, and refuses anything else."""
    from modelyard import Client

    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="key must be a str"):
        client.predict(1, "x")  # type: ignore[arg-type]


def test_an_observed_call_of_an_unknown_name_is_the_harness_s_failure() -> None:
    with pytest.raises(AssertionError):
        observe(OURS, "unheard_of", None)
