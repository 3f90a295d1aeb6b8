"""What Haystack's devices do, case by case, and where modelyard means to differ.

Each case of group ``device`` records one call on the real package. ``match`` cases must give the
recorded result. The others are listed in ``DIFFERENCES`` with what modelyard does instead; a case
that is not ``match`` and not listed there fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType, resolve_device

Case = dict[str, Any]
Outcome = dict[str, Any]

CASES: list[Case] = json.loads(
    Path(__file__).with_name("seed_cases.json").read_text(encoding="utf-8")
)["groups"]["device"]

ERRORS: dict[str, type[Exception]] = {
    "KeyError": KeyError,
    "TypeError": TypeError,
    "ValueError": ValueError,
}


# Operations: each does the recorded call and returns its result in the shape of the records.


def device_from_str(text: str) -> object:
    device = Device.from_str(text)
    return {"type": device.type.name, "id": device.id, "str": str(device)}


def device_gpu(number: int) -> object:
    return str(Device.gpu(number))


def device_equal(texts: list[str]) -> object:
    left, right = map(Device.from_str, texts)
    return left == right


def map_len_contains(devices: dict[str, str]) -> object:
    device_map = DeviceMap.from_dict(devices)
    return [len(device_map), "layer1" in device_map, "x" in device_map]


def map_get_missing(arguments: tuple[dict[str, str], str]) -> object:
    devices, key = arguments
    return str(DeviceMap.from_dict(devices)[key])


def map_from_dict(devices: dict[str, str]) -> object:
    return DeviceMap.from_dict(devices).to_dict()


def map_equal_any_order(maps: list[dict[str, str]]) -> object:
    left, right = map(DeviceMap.from_dict, maps)
    return left == right


def map_first_device(devices: dict[str, str]) -> object:
    first = DeviceMap.from_dict(devices).first_device
    return None if first is None else str(first)


def map_from_hf(hf_device_map: dict[str, object]) -> object:
    return DeviceMap.from_hf(hf_device_map).to_dict()


def map_from_hf_torch_device(written: dict[str, str]) -> object:
    def read(text: str) -> torch.device:
        found = re.fullmatch(r"torch\.device\('(.+)'\)", text)
        assert found is not None, text
        return torch.device(found.group(1))

    return DeviceMap.from_hf({key: read(text) for key, text in written.items()}).to_dict()


def single_convert(text: str) -> object:
    component = ComponentDevice.from_str(text)
    # to_torch has no column in the records; it has to say the same as its string.
    assert component.to_torch() == torch.device(component.to_torch_str())
    return {
        "torch_str": component.to_torch_str(),
        "spacy": component.to_spacy(),
        "hf": component.to_hf(),
    }


def _multiple(devices: dict[str, str]) -> ComponentDevice:
    return ComponentDevice.from_multiple(DeviceMap.from_dict(devices))


def multi_to_hf(devices: dict[str, str]) -> object:
    return _multiple(devices).to_hf()


def multi_to_torch_str(devices: dict[str, str]) -> object:
    return _multiple(devices).to_torch_str()


def multi_to_spacy(devices: dict[str, str]) -> object:
    return _multiple(devices).to_spacy()


def first_device(devices: dict[str, str]) -> object:
    return _multiple(devices).first_device.to_dict()


def empty_component(converter: str) -> object:
    return getattr(ComponentDevice(), converter)()


def both_component(converter: str) -> object:
    both = ComponentDevice(single=Device.cpu(), multiple=DeviceMap({"a": Device.cpu()}))
    return getattr(both, converter)()


def update_hf_kwargs(arguments: dict[str, Any]) -> object:
    component = ComponentDevice.from_str(arguments["component"])
    callers = dict(arguments["kwargs"])
    updated = component.update_hf_kwargs(callers, overwrite=arguments["overwrite"])
    assert callers == arguments["kwargs"], "the caller's dict was changed"
    assert updated is not callers
    return updated


def component_from_dict(data: dict[str, Any]) -> object:
    return ComponentDevice.from_dict(data).to_dict()


def resolve_none(available: dict[str, int]) -> object:
    return resolve_device(
        None, probe=lambda device_type: bool(available.get(str(device_type), 0)), environ={}
    ).to_torch_str()


def resolve_none_env(arguments: dict[str, Any]) -> object:
    # Variables are the upper-case names; the rest says what is available.
    environ = {name: value for name, value in arguments.items() if name.isupper()}
    return resolve_device(
        None, probe=lambda device_type: bool(arguments.get(str(device_type), 0)), environ=environ
    ).to_torch_str()


def resolve_invalid(described: str) -> object:
    text, _, kind = described.partition(" ")
    assert kind == "(plain string)", described
    return resolve_device(text).to_torch_str()


OPERATIONS: dict[str, Callable[[Any], object]] = {
    operation.__name__: operation
    for operation in (
        device_from_str,
        device_gpu,
        device_equal,
        map_len_contains,
        map_get_missing,
        map_from_dict,
        map_equal_any_order,
        map_first_device,
        map_from_hf,
        map_from_hf_torch_device,
        single_convert,
        multi_to_hf,
        multi_to_torch_str,
        multi_to_spacy,
        first_device,
        empty_component,
        both_component,
        update_hf_kwargs,
        component_from_dict,
        resolve_none,
        resolve_none_env,
        resolve_invalid,
    )
}


# What modelyard does where the recorded result is not wanted: outcomes in the shape of the records.


def _refused(error: str, text: str) -> Outcome:
    return {"error": {"type": error, "message_has": text}}


DIFFERENCES: dict[str, Outcome] = {
    # Improved: the same class of result, with a text that helps or a wish that is honoured.
    "H20": _refused("ValueError", "Device string 'cuda:1:2' has more than one ':'"),
    "H35": _refused("TypeError", "Device map value for key 'a' must be a string, got 0"),
    # Haystack's variable is not ours; test_own_variable_turns_mps_off has ours.
    "H90": {"ok": "mps"},
    "H91": {"ok": "cuda:1"},
    # Deviations: refused where Haystack accepts, asserts or writes what Hugging Face refuses.
    "H21": _refused("ValueError", "Device id must be an integer, got ' 1'"),
    "H22": _refused("ValueError", "Device id must be an integer, got '+1'"),
    "H23": _refused("ValueError", "Device id must be an integer, got '1_0'"),
    "H25": _refused("ValueError", "Device id must be <= 127, got 99999999999999999999"),
    "H45": _refused("TypeError", "unexpected device 'True' for key 'l1'"),
    "H55": _refused("ValueError", "'cuda' for key 'l1' has none: write the id"),
    "H63": _refused("ValueError", "can neither be empty nor contain both"),
    "H69": {"ok": {"device": "cuda:1"}},
}


def expected_outcome(case: Case) -> Outcome:
    """Return what modelyard has to do: the record, or the listed difference."""
    if case["stance"] == "match":
        assert case["id"] not in DIFFERENCES, f"{case['id']} is listed as a difference"
        outcome: Outcome = case["expect"]
        return outcome
    assert case["stance"] in {"improve", "deviate"}, case["stance"]
    assert case["id"] in DIFFERENCES, f"{case['id']} says {case['stance']}, but not how"
    return DIFFERENCES[case["id"]]


def run_case(case: Case) -> str:
    """Do the recorded call, compare with what is expected and return the id of the case."""
    assert case["op"] in OPERATIONS, f"case {case['id']}: no handler for {case['op']!r}"
    operation = OPERATIONS[case["op"]]
    expected = expected_outcome(case)
    if "ok" in expected:
        result = operation(case["input"])
        assert result == expected["ok"]
        # 1 == True == 1.0: equality alone would let a wrong type through.
        assert json.dumps(result) == json.dumps(expected["ok"])
    else:
        error = expected["error"]
        with pytest.raises(ERRORS[error["type"]], match=re.escape(error["message_has"])) as caught:
            operation(case["input"])
        assert caught.type is ERRORS[error["type"]]
    return str(case["id"])


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_device_case(case: Case) -> None:
    run_case(case)


def test_every_case_of_the_group_is_run() -> None:
    ran = [run_case(case) for case in CASES]
    recorded = json.loads(Path(__file__).with_name("seed_cases.json").read_bytes())
    assert ran == [case["id"] for case in recorded["groups"]["device"]]
    assert len(ran) == len(set(ran)) == 61


def test_no_operation_or_difference_is_left_over() -> None:
    assert set(OPERATIONS) == {case["op"] for case in CASES}
    assert set(DIFFERENCES) == {case["id"] for case in CASES if case["stance"] != "match"}


def test_a_difference_of_stance_deviate_is_not_the_recorded_result() -> None:
    for case in CASES:
        if case["stance"] == "deviate":
            assert DIFFERENCES[case["id"]] != case["expect"], case["id"]


def test_own_variable_turns_mps_off() -> None:
    # The other half of H90: "0" counts, not only the exact text "false".
    assert resolve_none_env({"mps": 1, "MODELYARD_MPS_ENABLED": "0"}) == "cpu"


# Negative controls: the machinery above notices what it is there to notice.


def test_a_case_without_handler_fails() -> None:
    with pytest.raises(AssertionError, match="case X1: no handler for 'unheard_of'"):
        run_case({"id": "X1", "op": "unheard_of", "input": None, "stance": "match"})


def test_a_difference_that_is_not_listed_fails() -> None:
    with pytest.raises(AssertionError, match="X2 says deviate, but not how"):
        run_case({"id": "X2", "op": "device_from_str", "input": "cpu", "stance": "deviate"})


@pytest.mark.parametrize(
    ("operation", "argument", "expect"),
    [
        ("device_from_str", "cpu", {"ok": {"type": "CPU", "id": None, "str": "cuda"}}),
        ("map_len_contains", {"layer1": "cpu"}, {"ok": [1, 1, 0]}),
        ("device_from_str", "cpu", _refused("ValueError", "Unknown")),
        ("device_from_str", "auto", _refused("ValueError", "another text")),
        ("device_from_str", "auto", {"ok": None}),
        ("map_from_hf", {"a": 0.1}, _refused("ValueError", "Couldn't convert")),
    ],
    ids=["value", "type of value", "no error", "text", "error", "type of error"],
)
def test_a_wrong_result_is_noticed(operation: str, argument: object, expect: Outcome) -> None:
    case = {"id": "X3", "op": operation, "input": argument, "stance": "match", "expect": expect}
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError, TypeError)) as caught:
        run_case(case)
    # Not refused by the machinery for another reason.
    assert "X3" not in str(caught.value)


def test_device_type_names_are_the_recorded_ones() -> None:
    assert {member.name: member.value for member in DeviceType} == {
        "CPU": "cpu",
        "GPU": "cuda",
        "DISK": "disk",
        "MPS": "mps",
        "XPU": "xpu",
    }
