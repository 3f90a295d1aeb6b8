"""Whose word counts on where a Hugging Face model goes; the recorded cases are in conformance."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from modelyard.devices import Device, DeviceMap, DeviceType
from modelyard.hf_kwargs import hf_model_kwargs, hf_pipeline_kwargs

MAP = DeviceMap({"encoder": Device.gpu(0), "head": Device.cpu()})


def only_mps(device_type: DeviceType) -> bool:
    return device_type is DeviceType.MPS


@pytest.mark.parametrize("device", ["cuda:1", Device.gpu(1)], ids=repr)
def test_strings_and_devices_are_taken(device: Any) -> None:
    assert hf_pipeline_kwargs({"task": "t"}, device=device) == {"task": "t", "device": "cuda:1"}
    assert hf_model_kwargs({"x": 1}, device=device) == {"x": 1, "device_map": "cuda:1"}


def test_maps_are_taken() -> None:
    expected = {"device_map": {"encoder": 0, "head": "cpu"}}
    assert hf_pipeline_kwargs(device=MAP) == hf_model_kwargs(device=MAP) == expected


def test_without_a_device_the_probe_and_the_environment_choose() -> None:
    assert hf_pipeline_kwargs(probe=only_mps, environ={}) == {"device": "mps"}
    assert hf_model_kwargs(probe=only_mps, environ={}) == {"device_map": "mps"}
    off = {"MODELYARD_MPS_ENABLED": "no"}
    assert hf_pipeline_kwargs(probe=only_mps, environ=off) == {"device": "cpu"}
    assert hf_model_kwargs(probe=only_mps, environ=off) == {"device_map": "cpu"}


@pytest.mark.parametrize("value", [None, 0, "auto", {}])
def test_for_a_pipeline_presence_is_the_callers_choice(value: object) -> None:
    for key in ("device", "device_map"):
        assert hf_pipeline_kwargs({key: value}, device=MAP) == {key: value}


@pytest.mark.parametrize("value", ["auto", 0, 1, {"": 0}])
def test_for_a_model_a_device_map_with_content_is_the_callers_choice(
    value: object,
) -> None:
    assert hf_model_kwargs({"device_map": value}, device="cuda:1") == {"device_map": value}


@pytest.mark.parametrize("value", [None, {}, "", False])
def test_for_a_model_a_device_map_without_content_says_nothing(value: object) -> None:
    assert hf_model_kwargs({"device_map": value}, device="cuda:1") == {"device_map": "cuda:1"}


@pytest.mark.parametrize("build", [hf_pipeline_kwargs, hf_model_kwargs])
def test_the_callers_dict_is_copied(build: Any) -> None:
    for callers in ({}, {"x": 1}, {"device_map": "auto"}):
        before = dict(callers)
        built = build(callers, device="cpu")
        built["more"] = 1
        assert callers == before


@pytest.mark.parametrize("build", [hf_pipeline_kwargs, hf_model_kwargs])
@pytest.mark.parametrize("wrong", ["auto", "disk", 0, {"a": "cpu"}])
def test_what_is_no_device_is_refused_even_where_it_would_lose(build: Any, wrong: Any) -> None:
    for kwargs in ({}, {"device_map": "auto"}):
        with pytest.raises(ValueError, match="device"):
            build(kwargs, device=wrong)


@pytest.mark.parametrize("build", [hf_pipeline_kwargs, hf_model_kwargs])
def test_a_gpu_of_a_map_needs_its_number_when_it_is_written(build: Any) -> None:
    unnumbered = DeviceMap.from_dict({"a": "cuda"})
    with pytest.raises(ValueError, match="write the id"):
        build({}, device=unnumbered)
    assert build({"device_map": "auto"}, device=unnumbered) == {"device_map": "auto"}


def test_a_device_that_loses_to_a_device_map_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="modelyard.hf_kwargs"):
        hf_model_kwargs({"device_map": "auto"})
        hf_model_kwargs({"device_map": None}, device="cuda:1")
        assert caplog.messages == []
        hf_model_kwargs({"device_map": "auto"}, device="cuda:1")
    assert caplog.messages == [
        "device_map in the keyword arguments is used, device cuda:1 is not",
    ]
