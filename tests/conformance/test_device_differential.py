"""The same calls on modelyard and on the installed Haystack, for inputs that nobody recorded.

Both give the same, or ``rules`` names the difference and modelyard does what it asks for.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conformance import rules
from tests.conformance.cases import DEVICE_GROUPS, SEED_FILE, load
from tests.conformance.judge import Observed, meets, observe, same_value
from tests.conformance.libraries import Haystack, Library, Modelyard
from tests.conformance.operations import OPERATIONS
from tests.conformance.rules import Difference, Rule, documented_difference

from modelyard.devices import Device

# These left haystack-ai with 3.0; more_cases.json has records of the last line that had them.
NOT_IN_HAYSTACK = {"model_kwargs_device_map", "generator_mutates_caller_kwargs"}

KINDS = ["cpu", "cuda", "disk", "mps", "xpu"]
FOREIGN = ["", " cuda", "cuda\n", "CUDA", "gpu", "auto", "meta", "hip"]
NUMBERS = ["", ":0", ":1", ":00", ":127", ":128", ":256", ":" + "9" * 20]
LAX = [": 1", ":1 ", ":1\n", ":+1", ":-0", ":1_0", ":\u0661"]
WRONG = [":", ":a", ":1.5", ":-1", ":1:2", "::"]
TEXTS = [kind + number for kind in KINDS + FOREIGN for number in NUMBERS + LAX + WRONG]
PLAIN = [*KINDS, "cuda:0", "cuda:1", "cpu:5", "disk:0", "mps:3", "xpu:1", "cuda:127"]
JUNK: list[Any] = [None, 0, 1, -1, True, False, 1.5, [], ["cuda"], {}, {"a": 1}]
HF_VALUES: list[Any] = [
    *(0, 1, -1, 127, 128, True, False, 0.1, None, [], {}, "auto", "meta", "1", "", "cuda"),
    *("torch.device('cpu')", "torch.device('cuda')", "torch.device('cuda:1')"),
    *("torch.device('cuda', 127)", "torch.device('meta')", "torch.device('xpu:0')"),
]
KWARGS: list[Any] = [
    {},
    {"task": "t"},
    *({"device": None}, {"device": 0}, {"device": "auto"}, {"device": {}}),
    *({"device_map": None}, {"device_map": 0}, {"device_map": "auto"}, {"device_map": {}}),
    {"device": 0, "device_map": "auto"},
    {"device_map": None, "x": 1, "device": None},
]
UNION_MEMBERS = [
    *("to_hf", "to_torch", "to_torch_str", "to_spacy", "to_dict"),
    *("has_multiple_devices", "first_device", "update_hf_kwargs"),
]


def some_maps(values: list[Any], count: int) -> list[Any]:
    # Any seed will do; this one is printed by being here.
    random = Random(20260717)
    keys = ["", "a", "layer1", "layer2", "x", "encoder.layer"]
    return [
        *({"a": value} for value in values),
        *(
            {key: random.choice(values) for key in random.sample(keys, random.randint(0, 4))}
            for _ in range(count)
        ),
        *(None, "auto", 3, [], [["a", "cpu"]]),
    ]


def component_dicts() -> list[Any]:
    singles = [{"type": "single", "device": value} for value in [*PLAIN, *JUNK, *LAX, "cuda:128"]]
    multiples = [
        {"type": "multiple", "device_map": devices} for devices in some_maps([*PLAIN, *JUNK], 20)
    ]
    return [
        *singles,
        *multiples,
        *({"type": value} for value in ("single", "multiple", "other", None, 1, ["single"])),
        *({}, {"device": "cpu"}, None, "single", 3, []),
        {"type": "single", "device": "cpu", "device_map": {"a": "cuda"}, "more": 1},
    ]


def availabilities() -> list[Any]:
    combinations: list[dict[str, Any]] = [
        dict(zip(("cuda", "xpu", "mps"), there, strict=True))
        for there in itertools.product((0, 1), repeat=3)
    ]
    texts = ["false", "False", "FALSE", "0", "no", "No", "true", "", "1", "off"]
    return [
        *combinations,
        *(
            {**there, f"HAYSTACK_{kind}_ENABLED": text}
            for there in combinations
            for kind in ("MPS", "XPU")
            for text in texts
        ),
    ]


COMPONENTS: list[Any] = [*PLAIN, {}, {"a": "cuda"}, {"a": "cpu", "b": "cuda:1"}, {"a": "disk"}]

INPUTS: dict[str, list[Any]] = {
    "device_from_str": [*TEXTS, *JUNK],
    "device_gpu": [*JUNK, 127, 128, 10**20, "1"],
    "device_equal": [list(texts) for texts in itertools.product(PLAIN, [*PLAIN, "gpu"])],
    "map_len_contains": some_maps([*PLAIN, "cuda:+1"], 20),
    "map_get_missing": [[devices, key] for devices in some_maps(PLAIN, 20) for key in ("a", "x")],
    "map_from_dict": some_maps([*PLAIN, *JUNK, "cuda:128", "mps: 1", "auto"], 60),
    "map_equal_any_order": [
        *([devices, devices] for devices in some_maps(PLAIN, 10)),
        [{"a": "cpu", "b": "disk"}, {"b": "disk", "a": "cpu"}],
        [{"a": "cpu"}, {"a": "cpu:0"}],
    ],
    "map_first_device": some_maps([*PLAIN, "auto"], 20),
    "map_from_hf": some_maps([*HF_VALUES, *PLAIN, "cuda:256", "xpu:1 "], 60),
    "map_from_hf_torch_device": some_maps(HF_VALUES, 20),
    "single_convert": [*TEXTS, *JUNK],
    "multi_to_hf": some_maps([*PLAIN, "cuda:128"], 40),
    "multi_to_torch_str": some_maps(PLAIN, 5),
    "multi_to_spacy": some_maps(PLAIN, 5),
    "first_device": [*some_maps(["disk", "disk:1", "cpu", "cuda:1"], 30), *PLAIN],
    "empty_component": UNION_MEMBERS,
    "both_component": UNION_MEMBERS,
    "update_hf_kwargs": [
        {"component": component, "kwargs": kwargs, "overwrite": overwrite}
        for component in COMPONENTS
        for kwargs in KWARGS
        for overwrite in (False, True)
    ],
    "component_from_dict": component_dicts(),
    "resolve_none": availabilities()[:8],
    "resolve_none_env": availabilities(),
    "resolve_invalid": [
        *(f"{text} (plain string)" for text in TEXTS),
        *(f"{text} (Device)" for text in PLAIN),
        *("Device.gpu(1) (Device)", "{'a': 'cpu'} (DeviceMap)", "{'a': 'cpu'} (dict)"),
        *(value for value in JUNK if value is not None),
    ],
    "pipeline_kwargs": [
        {"device": component, "kwargs": kwargs}
        for component in [None, *COMPONENTS, {"type": "single", "device": "mps"}]
        for kwargs in [None, *KWARGS]
    ],
}

# Differences that the inputs above have to meet: the rules are not there for nothing.
MET = {
    "id outside the grammar",
    "id over 127",
    "id of another type",
    "no mapping",
    "invalid union",
    "GPU without number",
    "one device key",
    "switch words",
    "other values resolved",
}


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack()


def same(left: Observed, right: Observed) -> bool:
    if left.error or right.error:
        return left.error == right.error
    return same_value(left.result, right.result)


def compare(ours: Library, theirs: Library, op: str, value: Any) -> str | None:
    """Do a call on both sides; return the name of the difference, None if there is none.

    Raises:
        AssertionError: a difference that no rule names, or not the one that the rule asks for.
    """
    observed = observe(ours, op, copy.deepcopy(value))
    recorded = observe(theirs, op, copy.deepcopy(value))
    if same(observed, recorded):
        return None
    told = f"{op}({value!r}): we have {observed}, Haystack has {recorded}"
    difference = documented_difference(op, value)
    assert difference is not None, f"{told}; no rule names that difference"
    assert meets(op, observed, difference.outcome), f"{told}; {difference} asks for another outcome"
    return difference.name


def compare_all(ours: Library, theirs: Library, op: str) -> tuple[Counter[str | None], list[str]]:
    """Every input of an operation: differences by name, and what is wrong."""
    names: Counter[str | None] = Counter()
    wrong = []
    for value in INPUTS[op]:
        try:
            names[compare(ours, theirs, op, value)] += 1
        except AssertionError as error:
            wrong.append(str(error))
    return names, wrong


@pytest.mark.parametrize("op", INPUTS)
def test_both_do_the_same_or_the_difference_is_documented(op: str, haystack: Haystack) -> None:
    names, wrong = compare_all(Modelyard(), haystack, op)
    assert not wrong, "\n".join(wrong)
    assert names.total() == len(INPUTS[op])


def test_inputs_meet_every_kind_of_difference_and_mostly_none(haystack: Haystack) -> None:
    names: Counter[str | None] = Counter()
    for op in INPUTS:
        names += compare_all(Modelyard(), haystack, op)[0]
    assert {name for name in names if name is not None} == MET
    assert names.total() > 1000
    assert names[None] > names.total() / 2


def test_every_operation_that_haystack_has_is_compared() -> None:
    assert INPUTS.keys() == OPERATIONS.keys() - NOT_IN_HAYSTACK


def test_the_installed_haystack_still_does_what_was_recorded(haystack: Haystack) -> None:
    # Also proof that our operations do the recorded calls.
    for case in load(SEED_FILE).judged_of(DEVICE_GROUPS):
        if case["op"] not in NOT_IN_HAYSTACK:
            observed = observe(haystack, case["op"], copy.deepcopy(case["input"]))
            assert meets(case["op"], observed, case["expect"]), f"{case['id']}: {observed}"
            text = case["expect"].get("error", {}).get("message_has", "")
            assert text in observed.text, f"{case['id']}: {observed}"


texts = st.builds(
    "{}{}{}".format,
    st.sampled_from(KINDS + FOREIGN),
    st.sampled_from(["", ":", ": ", ":+", ":-", ":0"]),
    st.one_of(
        st.just(""),
        st.integers(min_value=0, max_value=300).map(str),
        st.text(alphabet="0123456789_+-. \u0661\uff11\u00b2", max_size=4),
    ),
)
values = st.one_of(texts, st.sampled_from(PLAIN), st.sampled_from(HF_VALUES))
mappings = st.dictionaries(st.text(max_size=3), values, max_size=4)


@settings(max_examples=300, deadline=None)
@given(text=texts, devices=mappings, kwargs=st.sampled_from(KWARGS), overwrite=st.booleans())
def test_generated_inputs_differ_by_a_documented_rule_only(
    text: str, devices: dict[str, Any], kwargs: dict[str, Any], overwrite: bool
) -> None:
    ours, theirs = Modelyard(), Haystack()
    for op, value in (
        ("device_from_str", text),
        ("single_convert", text),
        ("map_from_dict", devices),
        ("map_from_hf", devices),
        ("multi_to_hf", devices),
        ("first_device", devices),
        ("component_from_dict", {"type": "single", "device": text}),
        ("component_from_dict", {"type": "multiple", "device_map": devices}),
        ("update_hf_kwargs", {"component": text, "kwargs": kwargs, "overwrite": overwrite}),
        ("update_hf_kwargs", {"component": devices, "kwargs": kwargs, "overwrite": overwrite}),
    ):
        compare(ours, theirs, op, value)


# Negative controls: a wrong library and a missing rule are noticed.


class NumbersSingles(Modelyard):
    """Gives Hugging Face a number for a single GPU, as a map would."""

    def pipeline_kwargs(self, device: Any, kwargs: dict[str, Any] | None) -> dict[str, Any]:
        return {
            key: int(value.removeprefix("cuda:")) if value == "cuda:1" else value
            for key, value in super().pipeline_kwargs(device, kwargs).items()
        }


def test_a_wrong_result_is_noticed(haystack: Haystack) -> None:
    value = {"device": "cuda:1", "kwargs": {}}
    assert compare(Modelyard(), haystack, "pipeline_kwargs", value) is None
    with pytest.raises(AssertionError, match="no rule names that difference"):
        compare(NumbersSingles(), haystack, "pipeline_kwargs", value)


class LaxDevice:
    """Reads a sign, and not even right."""

    @staticmethod
    def from_str(text: str) -> Device:
        kind, _, number = text.partition(":")
        return Device.from_str(f"{kind}:{int(number) + 1}")


class Lax(Modelyard):
    Device: Any = LaxDevice


def test_a_lax_reader_is_noticed(haystack: Haystack) -> None:
    assert compare(Modelyard(), haystack, "device_from_str", "cuda:00") is None
    assert compare(Modelyard(), haystack, "device_from_str", "cuda:+1") == "id outside the grammar"
    with pytest.raises(AssertionError, match="asks for another outcome"):
        compare(Lax(), haystack, "device_from_str", "cuda:+1")


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_a_rule_that_asks_for_something_else_is_noticed(
    rule: Rule, haystack: Haystack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_rule(op: str, value: Any) -> Difference | None:
        found = rule(op, value)
        return found and Difference(name=found.name, outcome={"ok": "something else"})

    changed = tuple(wrong_rule if each is rule else each for each in rules.RULES)
    monkeypatch.setattr(rules, "RULES", changed)
    wrong = [text for op in INPUTS for text in compare_all(Modelyard(), haystack, op)[1]]
    # These two speak of calls that Haystack no longer has.
    unused = rule in (rules.first_gpu_by_number, rules.callers_dict_kept)
    assert bool(wrong) is not unused
