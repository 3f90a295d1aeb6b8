"""What Haystack's devices do, case by case, and where modelyard means to differ.

Each case of the groups ``device`` and ``hf_precedence`` records one call on the real package;
``judge`` says when one passes. ``MODELYARD_CASES=PATH`` names another file to judge.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.conformance import rules
from tests.conformance.cases import (
    DEVICE_GROUPS,
    MORE_FILE,
    SEED_FILE,
    VARIABLE,
    Case,
    Outcome,
    chosen_files,
    load,
)
from tests.conformance.judge import judge, meets, observe
from tests.conformance.libraries import Modelyard
from tests.conformance.operations import OPERATIONS
from tests.conformance.rules import documented_difference, refusal

from modelyard.devices import ComponentDevice, DeviceType

CASES = [case for file in chosen_files() for case in file.judged_of(DEVICE_GROUPS)]
OURS = Modelyard()

# What modelyard does for the seed cases where the recorded result is not wanted, to the text.
DIFFERENCES: dict[str, Outcome] = {
    # Improved: the same class of result, with a text that helps or a wish that is honoured.
    "H20": refusal("ValueError", "Device string 'cuda:1:2' has more than one ':'"),
    "H35": refusal("TypeError", "Device map value for key 'a' must be a string, got 0"),
    "H90": {"ok": "cpu"},
    "H91": {"ok": "cuda:1"},
    # Deviations: refused where Haystack accepts, asserts or writes what Hugging Face refuses.
    "H21": refusal("ValueError", "Device id must be an integer, got ' 1'"),
    "H22": refusal("ValueError", "Device id must be an integer, got +1"),
    "H23": refusal("ValueError", "Device id must be an integer, got 1_0"),
    "H25": refusal("ValueError", "Device id must be <= 127, got 99999999999999999999"),
    "H45": refusal("TypeError", "unexpected device 'True' for 'l1'"),
    "H55": refusal("ValueError", "'cuda' for key 'l1' has none: write the id"),
    "H63": refusal("ValueError", "can neither be empty nor contain both"),
    "H69": {"ok": {"device": "cuda:1"}},
    "P12": {"ok": ["device_map"]},
}


def case_of(op: str, given: object, stance: str, expect: object) -> Case:
    return {"id": "X1", "op": op, "input": given, "stance": stance, "expect": expect}


@pytest.mark.parametrize("case", CASES, ids=[str(case.get("id")) for case in CASES])
def test_case(case: Case, request: pytest.FixtureRequest) -> None:
    missed = judge(OURS, case)
    if missed is not None:
        # Not by record_property, which warns where a report in XML is written.
        note = f"{case['id']}: our error's text has no {missed!r}"
        request.node.user_properties.append(("text_differs", note))


class TestSeedFile:
    """The seed file itself, whichever file is judged."""

    SEEDS = load(SEED_FILE).judged_of(DEVICE_GROUPS)

    def test_every_case_of_the_groups_is_judged(self) -> None:
        recorded = json.loads(SEED_FILE.read_bytes())["groups"]
        ids = [case["id"] for group in DEVICE_GROUPS for case in recorded[group]]
        assert [case["id"] for case in self.SEEDS] == ids
        assert len(set(ids)) == 71
        for case in self.SEEDS:
            judge(OURS, case)

    def test_recorded_texts_of_matching_cases_are_ours_too(self) -> None:
        assert [judge(OURS, case) for case in self.SEEDS if case["stance"] == "match"] == (
            [None] * 58
        )

    def test_differences_are_as_listed_to_the_text(self) -> None:
        differing = {case["id"]: case for case in self.SEEDS if case["stance"] != "match"}
        assert differing.keys() == DIFFERENCES.keys()
        for name, case in differing.items():
            observed = observe(OURS, case["op"], case["input"])
            assert meets(case["op"], observed, DIFFERENCES[name]), f"{name}: {observed}"
            text = DIFFERENCES[name].get("error", {}).get("message_has", "")
            assert text in observed.text, f"{name}: {observed}"
            if case["stance"] == "deviate":
                assert not meets(case["op"], observed, case["expect"]), name

    def test_no_operation_is_left_over(self) -> None:
        assert set(OPERATIONS) == {case["op"] for case in self.SEEDS}

    def test_every_difference_follows_from_a_rule(self) -> None:
        # Cases that nobody listed are judged by these rules: they must not need a list.
        for case in self.SEEDS:
            if case["stance"] == "deviate":
                assert documented_difference(case["op"], case["input"]) is not None, case["id"]


class TestAnotherFile:
    """`MODELYARD_CASES` in a pytest of its own."""

    def run(self, folder: Path, content: object) -> subprocess.CompletedProcess[str]:
        path = folder / "others.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::test_case"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, VARIABLE: str(path)},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_its_cases_are_judged_and_the_others_counted(self, tmp_path: Path) -> None:
        good = case_of("device_from_str", "xpu", "match", {"ok": "xpu"})
        groups = {
            "device": [
                good | {"id": "A1"},
                good | {"id": "A2", "op": "unheard_of"},
                good | {"id": "A3", "input": "mps"},
            ],
            "hf_precedence": [
                case_of("pipeline_kwargs", {"device": None, "kwargs": {}}, "match", {"ok": {}})
            ],
            "of_another_kind": [{"id": "B1"}, {"id": "B2"}],
        }
        done = self.run(tmp_path, {"groups": groups})
        assert done.returncode == 1, done.stderr
        for line in (
            "1 passed",
            "3 failed",
            "case A2: no handler for op 'unheard_of'",
            "case A3 (match) device_from_str('mps'): result ",
            "case X1 (match) pipeline_kwargs(",
            "4 cases judged (device 3, hf_precedence 1), 2 of groups that are not judged yet "
            "(of_another_kind 2)",
        ):
            assert line in done.stdout, done.stdout

    def test_a_file_of_another_shape_is_an_error(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, {"cases": []})
        assert done.returncode not in (0, 5)
        assert "has no 'groups': it is no file of cases" in done.stdout + done.stderr


class TestJudge:
    """Cases that we do not know are judged by their stance, and wrong results are noticed."""

    @pytest.mark.parametrize(
        ("op", "given", "stance", "expect"),
        [
            (
                "device_from_str",
                "disk:3",
                "match",
                {"ok": {"type": "DISK", "id": 3, "str": "disk:3"}},
            ),
            ("device_from_str", None, "match", {"error": {"type": "TypeError"}}),
            (
                "device_from_str",
                "cuda:a",
                "match",
                {"error": {"message_has": "must be an integer"}},
            ),
            ("device_from_str", "cuda:\u0661", "deviate", {"ok": "cuda:1"}),
            ("device_from_str", "cuda:128", "deviate", {"ok": "cuda:128"}),
            ("device_from_str", "cuda:1:2", "deviate", refusal("ValueError", "too many values")),
            ("device_gpu", True, "deviate", {"ok": "cuda:True"}),
            ("device_gpu", 1.5, "deviate", {"ok": "cuda:1.5"}),
            ("device_gpu", 3, "match", {"ok": "cuda:3"}),
            ("device_gpu", None, "match", {"ok": "cuda:0"}),
            ("map_from_hf", "auto", "improve", refusal("AttributeError", "no attribute 'items'")),
            (
                "map_from_hf",
                {"a": "torch.device('meta')"},
                "match",
                {"error": {"type": "ValueError"}},
            ),
            ("map_from_dict", {"a": "cuda:1_0"}, "deviate", {"ok": {"a": "cuda:10"}}),
            ("single_convert", "cuda", "deviate", refusal("AssertionError", "")),
            ("single_convert", "disk", "match", refusal("ValueError", "The disk device can only")),
            (
                "multi_to_hf",
                {"a": "xpu:1", "b": "mps"},
                "match",
                {"ok": {"a": "xpu:1", "b": "mps"}},
            ),
            ("first_device", "xpu:1", "match", {"ok": {"type": "single", "device": "xpu:1"}}),
            ("empty_component", "to_dict", "deviate", refusal("AssertionError", "")),
            ("both_component", "first_device", "match", {"error": {"type": "ValueError"}}),
            (
                "update_hf_kwargs",
                {"component": {"a": "cuda:1"}, "kwargs": {"device": 0}, "overwrite": True},
                "deviate",
                {"ok": {"device": 0, "device_map": {"a": 1}}},
            ),
            (
                "component_from_dict",
                {"type": "multiple", "device_map": None},
                "improve",
                refusal("AttributeError", "'NoneType' object has no attribute 'items'"),
            ),
            (
                "resolve_none_env",
                {"mps": 1, "HAYSTACK_MPS_ENABLED": "false"},
                "match",
                {"ok": "cpu"},
            ),
            (
                "resolve_none_env",
                {"xpu": 1, "HAYSTACK_XPU_ENABLED": "No"},
                "improve",
                {"ok": "xpu"},
            ),
            ("resolve_invalid", "Device.gpu(1) (Device)", "improve", refusal("ValueError", "In")),
            ("resolve_invalid", "{'a': 'cpu'} (dict)", "match", refusal("ValueError", "Invalid")),
            ("resolve_invalid", 3, "match", refusal("ValueError", "Invalid component device type")),
            (
                "pipeline_kwargs",
                {"device": "mps", "kwargs": {"device": 0, "task": "t"}},
                "match",
                {"ok": {"device": 0}},
            ),
            (
                "model_kwargs_device_map",
                {"device": "cuda:1", "kwargs": {"device_map": 0}},
                "deviate",
                {"ok": {"device_map": "cuda:1"}},
            ),
            (
                "model_kwargs_device_map",
                {"device": None, "kwargs": {"device_map": {}, "torch_dtype": "auto"}},
                "match",
                {"ok": {"torch_dtype": "auto", "device_map": "cpu"}},
            ),
            ("generator_mutates_caller_kwargs", {}, "match", {"ok": []}),
        ],
    )
    def test_cases_like_the_recorded_ones_pass(
        self, op: str, given: object, stance: str, expect: object
    ) -> None:
        judge(OURS, case_of(op, given, stance, expect))

    @pytest.mark.parametrize(
        ("op", "given", "stance", "expect"),
        [
            ("device_from_str", "cpu", "match", {"ok": {"type": "CPU", "id": None, "str": "cuda"}}),
            ("map_len_contains", {"layer1": "cpu"}, "match", {"ok": [1, 1, 0]}),
            ("device_from_str", "cpu", "match", refusal("ValueError", "Unknown")),
            ("device_from_str", "auto", "match", {"ok": None}),
            ("device_from_str", "auto", "match", {"error": {"message_has": "another text"}}),
            ("map_from_hf", {"a": 0.1}, "match", refusal("ValueError", "Couldn't convert")),
            # Haystack's own defects, had they been recorded as wanted.
            ("device_from_str", "cuda: 1", "match", {"ok": "cuda:1"}),
            ("single_convert", "cuda", "match", refusal("AssertionError", "")),
            # An improvement keeps the class of result.
            ("device_from_str", "cpu", "improve", {"ok": "cuda"}),
            ("component_from_dict", {}, "improve", refusal("ValueError", "type")),
            # What is no defect is not refused, and a record that we repeat is no deviation.
            ("device_from_str", "cpu", "deviate", {"ok": "cpu"}),
            ("device_equal", ["cuda", "cuda:0"], "deviate", {"ok": True}),
            (
                "pipeline_kwargs",
                {"device": "cuda:1", "kwargs": {"device": 0}},
                "deviate",
                {"ok": {"device": 0}},
            ),
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
            ({"stance": "perhaps"}, "case X1: unknown stance 'perhaps'"),
            ({"expect": {}}, "case X1 expects neither a value nor an error"),
            ({"expect": {"error": "ValueError"}}, "case X1 expects neither"),
            ({"op": "device_equal"}, "case X1: device_equal does not understand its input"),
            ({"op": "update_hf_kwargs", "input": {}}, "does not understand its input: no 'comp"),
            ({"op": "both_component"}, "no member of a component device: 'cpu'"),
            ({"op": "resolve_none"}, "not an object that says what is available"),
            ({"op": "resolve_invalid", "input": "a b (dict)"}, "nor a literal"),
            ({"op": "map_from_hf", "input": {"a": "torch.device(4, 4)"}}, "not a torch.device"),
        ],
    )
    def test_a_case_that_cannot_be_judged_fails_by_name(
        self, change: dict[str, object], text: str
    ) -> None:
        with pytest.raises(AssertionError, match=text):
            judge(OURS, case_of("device_from_str", "cpu", "match", {"ok": "cpu"}) | change)

    def test_a_case_without_its_parts_fails_by_name(self) -> None:
        with pytest.raises(AssertionError, match="case X1 has no expect, stance"):
            judge(OURS, {"id": "X1", "op": "device_from_str"})

    def test_a_changed_input_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def careless(
            self: ComponentDevice, hf_kwargs: dict[str, Any], *, overwrite: bool
        ) -> dict[str, Any]:
            hf_kwargs["device"] = self.to_hf()
            return dict(hf_kwargs)

        monkeypatch.setattr(ComponentDevice, "update_hf_kwargs", careless)
        given = {"component": "cpu", "kwargs": {}, "overwrite": True}
        with pytest.raises(AssertionError, match="X1: update_hf_kwargs changed its input"):
            judge(OURS, case_of("update_hf_kwargs", given, "match", {"ok": {"device": "cpu"}}))

    def test_without_its_rule_a_deviation_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = next(case for case in TestSeedFile.SEEDS if case["id"] == "H69")
        judge(OURS, case)
        monkeypatch.setattr(rules, "RULES", ())
        with pytest.raises(AssertionError, match="no documented difference allows that"):
            judge(OURS, case)

    def test_a_text_that_differs_is_reported_and_passes(self) -> None:
        case = case_of("device_from_str", "cuda:a", "match", refusal("ValueError", "got 'a'"))
        assert judge(OURS, case) == "got 'a'"


def test_our_own_cases_are_of_the_judged_groups_and_new() -> None:
    seeds = {case["id"] for case in load(SEED_FILE).judged_of(DEVICE_GROUPS)}
    more = load(MORE_FILE)
    assert set(more.groups) <= set(DEVICE_GROUPS)
    ids = Counter(case["id"] for case in more.judged)
    assert not seeds & ids.keys()
    assert set(ids.values()) == {1}


def test_device_type_names_are_the_recorded_ones() -> None:
    assert {member.name: member.value for member in DeviceType} == {
        "CPU": "cpu",
        "GPU": "cuda",
        "DISK": "disk",
        "MPS": "mps",
        "XPU": "xpu",
    }
