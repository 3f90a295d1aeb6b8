"""Behaviour of device values beyond the recorded cases."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modelyard.devices import (
    MAX_DEVICE_ID,
    AvailabilityProbe,
    ComponentDevice,
    Device,
    DeviceMap,
    DeviceType,
    resolve_device,
)

# What a caller without a type checker may pass.
WRONG: Any = object()

MIXED = DeviceMap({"encoder": Device.gpu(1), "decoder": Device.disk(), "lm_head": Device.cpu()})

FOREIGN_TYPES = [
    "",
    " ",
    " cuda",
    "cuda ",
    "gpu",
    "GPU",
    "CUDA",
    "auto",
    "hip",
    "meta",
    "npu",
    "tpu",
]
# What int() would read, what it would not, and what torch would wrap round.
LAX_IDS = [" 1", "1 ", "1\n", "+1", "-0", "1_0", "\u0661", "\uff11"]
NO_IDS = ["", "a", "1.5", "0x1", "1:2", ":", "\u00b2", "-", "-1", "--1"]
LARGE_IDS = ["128", "255", "256", "0128", "9" * 20, "9" * 5000]


def seen(*available: DeviceType) -> AvailabilityProbe:
    return lambda device_type: device_type in available


class TestDeviceType:
    @pytest.mark.parametrize("member", DeviceType)
    def test_text_is_the_value_and_is_read_back(self, member: DeviceType) -> None:
        assert str(member) == member.value
        assert DeviceType.from_str(str(member)) is member

    @pytest.mark.parametrize(
        "junk",
        [*FOREIGN_TYPES, "cuda:0", "cpu\n", None, 0, b"cpu", DeviceType.CPU],
    )
    def test_anything_but_an_exact_name_is_a_value_error(self, junk: Any) -> None:
        with pytest.raises(ValueError, match=r"Unknown device type string .* use one of cpu, cuda"):
            DeviceType.from_str(junk)


class TestDevice:
    @pytest.mark.parametrize(
        ("device", "text"),
        [
            (Device.cpu(), "cpu"),
            (Device.disk(), "disk"),
            (Device.mps(), "mps"),
            (Device.xpu(), "xpu"),
            (Device.gpu(), "cuda:0"),
            (Device.gpu(id=1), "cuda:1"),
            (Device(DeviceType.GPU), "cuda"),
            (Device(DeviceType.CPU, 5), "cpu:5"),
        ],
    )
    def test_factories_have_the_ids_of_haystack(self, device: Device, text: str) -> None:
        assert str(device) == text
        assert Device.from_str(text) == device
        assert repr(device) == f"Device.from_str('{text}')"

    @pytest.mark.parametrize(
        ("text", "read"),
        [("cuda:00", "cuda:0"), ("mps:007", "mps:7"), ("xpu:" + "0" * 5000, "xpu:0")],
    )
    def test_leading_zeros_are_dropped(self, text: str, read: str) -> None:
        assert str(Device.from_str(text)) == read

    @pytest.mark.parametrize(
        "text",
        [
            *FOREIGN_TYPES,
            *(f"{name}:0" for name in FOREIGN_TYPES),
            *(f"cuda:{number}" for number in LAX_IDS + NO_IDS + LARGE_IDS),
        ],
    )
    def test_text_outside_the_grammar_is_a_value_error(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"^(Device|Unknown device type string)") as caught:
            Device.from_str(text)
        assert len(str(caught.value)) < 200

    def test_minus_zero_is_not_called_negative(self) -> None:
        with pytest.raises(ValueError, match="Device id must be an integer, got -0: write ASCII"):
            Device.from_str("cuda:-0")

    @pytest.mark.parametrize("wrong", [None, 0, True, b"cpu", DeviceType.CPU])
    def test_from_str_of_no_string_is_a_type_error(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="Device must be given as a string"):
            Device.from_str(wrong)

    @pytest.mark.parametrize("wrong", [True, False, 1.0, 1.5, "1", b"1"])
    def test_an_id_of_another_type_is_a_type_error(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="Device id must be an int or None"):
            Device(DeviceType.GPU, wrong)
        with pytest.raises(TypeError, match="Device id must be an int or None"):
            Device.gpu(wrong)

    @pytest.mark.parametrize("wrong", ["cuda", None, 1])
    def test_a_type_of_another_type_is_a_type_error(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="Device type must be a DeviceType"):
            Device(wrong, 0)

    @pytest.mark.parametrize(("number", "text"), [(-1, ">= 0, got -1"), (128, "<= 127, got 128")])
    def test_an_id_out_of_range_is_a_value_error(self, number: int, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            Device.gpu(number)
        with pytest.raises(ValueError, match=text):
            Device.from_str(f"cuda:{number}")
        with pytest.raises(ValueError, match=text):
            dataclasses.replace(Device.gpu(), id=number)

    @pytest.mark.parametrize("text", ["cpu", "cuda", "cuda:127", "mps:0", "xpu:3"])
    def test_a_torch_device_is_read(self, text: str) -> None:
        assert Device.from_torch(torch.device(text)) == Device.from_str(text)
        assert ComponentDevice.from_torch(torch.device(text)).to_torch() == torch.device(text)

    @pytest.mark.parametrize("device", [torch.device("meta"), torch.device("cuda:128")], ids=str)
    def test_a_torch_device_that_is_none_of_ours_is_a_value_error(
        self, device: torch.device
    ) -> None:
        for read in (Device.from_torch, ComponentDevice.from_torch):
            with pytest.raises(
                ValueError, match=r"Unknown device type string 'meta'|>= 0, got -128"
            ):
                read(device)

    @pytest.mark.parametrize("wrong", ["cpu", None, 0, Device.cpu(), WRONG])
    def test_from_torch_of_another_type_is_a_type_error(self, wrong: Any) -> None:
        for read in (Device.from_torch, ComponentDevice.from_torch):
            with pytest.raises(TypeError, match=r"must be given as a torch\.device"):
                read(wrong)

    def test_from_torch_needs_no_torch_to_refuse(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(TypeError, match=r"must be given as a torch\.device"):
            Device.from_torch(WRONG)

    def test_is_frozen(self) -> None:
        device = Device.gpu()
        for change in ("id", "type", "other"):
            with pytest.raises((dataclasses.FrozenInstanceError, TypeError, AttributeError)):
                setattr(device, change, 1)
        assert device == Device.gpu()
        assert not hasattr(device, "__dict__")

    def test_no_id_and_id_zero_are_different_until_canonical(self) -> None:
        unnumbered, first = Device(DeviceType.GPU), Device.gpu(0)
        assert unnumbered != first
        assert len({unnumbered, first}) == 2
        assert unnumbered.canonical() == first.canonical() == first

    @pytest.mark.parametrize(
        ("text", "canonical"),
        [
            ("cuda", "cuda:0"),
            ("mps", "mps:0"),
            ("xpu", "xpu:0"),
            ("cuda:3", "cuda:3"),
            ("cpu", "cpu"),
            ("cpu:2", "cpu:2"),
            ("disk", "disk"),
        ],
    )
    def test_canonical_numbers_accelerators_only(self, text: str, canonical: str) -> None:
        assert str(Device.from_str(text).canonical()) == canonical

    def test_has_no_order(self) -> None:
        with pytest.raises(TypeError):
            sorted([Device.gpu(1), Device.gpu(0)])  # type: ignore[type-var]  # the point


class TestDeviceMap:
    def test_iterates_over_pairs_in_the_order_given(self) -> None:
        pairs = [("encoder", Device.gpu(1)), ("decoder", Device.disk()), ("lm_head", Device.cpu())]
        assert list(MIXED) == pairs
        assert list(MIXED.items()) == pairs
        assert list(MIXED.keys()) == [key for key, _ in pairs]
        assert list(MIXED.values()) == [device for _, device in pairs]
        assert dict(MIXED) == dict(pairs)

    def test_reads_like_a_mapping(self) -> None:
        assert MIXED["encoder"] == MIXED.get("encoder") == Device.gpu(1)
        assert "lm_head" in MIXED
        assert "lm" not in MIXED
        assert MIXED.get("lm") is None
        assert len(MIXED) == 3
        with pytest.raises(KeyError, match="lm"):
            MIXED["lm"]

    def test_an_empty_map_is_falsy_and_has_no_first_device(self) -> None:
        assert DeviceMap() == DeviceMap({})
        assert not DeviceMap({})
        assert DeviceMap({}).first_device is None
        assert MIXED

    def test_holds_a_copy_of_the_argument(self) -> None:
        callers = {"a": Device.cpu()}
        device_map = DeviceMap(callers)
        callers["b"] = Device.disk()
        callers["a"] = Device.disk()
        assert device_map.to_dict() == {"a": "cpu"}

    def test_cannot_be_changed(self) -> None:
        changeable: Any = DeviceMap({"a": Device.cpu()})
        with pytest.raises(TypeError):
            changeable["b"] = Device.disk()
        with pytest.raises(TypeError):
            del changeable["a"]
        with pytest.raises(TypeError):
            changeable.mapping["b"] = Device.disk()
        with pytest.raises(dataclasses.FrozenInstanceError):
            changeable.mapping = {}
        assert changeable.to_dict() == {"a": "cpu"}
        assert not hasattr(changeable, "__dict__")

    def test_equality_and_hash_ignore_the_order(self) -> None:
        turned = DeviceMap(dict(reversed(list(MIXED))))
        assert list(turned) != list(MIXED)
        assert turned == MIXED
        assert hash(turned) == hash(MIXED)

    def test_differs_from_other_maps_and_from_plain_dicts(self) -> None:
        assert DeviceMap({"a": Device.cpu()}) != DeviceMap({"a": Device.disk()})
        assert DeviceMap({"a": Device.cpu()}) != DeviceMap({"b": Device.cpu()})
        assert DeviceMap({"a": Device.cpu()}) != {"a": Device.cpu()}

    @pytest.mark.parametrize("wrong", [None, "auto", 3, [("a", Device.cpu())], MIXED])
    def test_is_made_from_a_mapping_only(self, wrong: Any) -> None:
        for make in (DeviceMap, DeviceMap.from_dict, DeviceMap.from_hf):
            with pytest.raises(TypeError, match="must be made from a mapping"):
                make(wrong)

    @pytest.mark.parametrize("make", [DeviceMap, DeviceMap.from_dict, DeviceMap.from_hf])
    def test_keys_are_strings(self, make: Any) -> None:
        with pytest.raises(TypeError, match="keys must be strings, got 7"):
            make({7: Device.cpu()})

    @pytest.mark.parametrize("wrong", ["cpu", None, 0, ComponentDevice.from_str("cpu")])
    def test_values_are_devices(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="for key 'head' must be a Device, got"):
            DeviceMap({"head": wrong})

    @pytest.mark.parametrize("wrong", [None, 0, True, Device.cpu(), {}])
    def test_from_dict_refuses_values_that_are_no_strings(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="for key 'head' must be a string"):
            DeviceMap.from_dict({"head": wrong})

    def test_refusals_name_the_key(self) -> None:
        with pytest.raises(ValueError, match=r"got -1 \(device map key 'head'\)$"):
            DeviceMap.from_dict({"ok": "cpu", "head": "cuda:-1"})
        with pytest.raises(ValueError, match=r"got 128 \(device map key 'head'\)$"):
            DeviceMap.from_hf({"ok": "cpu", "head": 128})

    def test_repr_makes_an_equal_map(self) -> None:
        assert repr(MIXED) == (
            "DeviceMap.from_dict({'encoder': 'cuda:1', 'decoder': 'disk', 'lm_head': 'cpu'})"
        )

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0, "cuda:0"),
            (127, "cuda:127"),
            ("disk", "disk"),
            ("cuda", "cuda"),
            (torch.device("cpu"), "cpu"),
            (torch.device("cuda"), "cuda"),
            (torch.device("cuda", 3), "cuda:3"),
            (torch.device("mps:0"), "mps:0"),
        ],
        ids=str,
    )
    def test_from_hf_reads_numbers_strings_and_torch_devices(self, value: Any, text: str) -> None:
        assert DeviceMap.from_hf({"": value}).to_dict() == {"": text}

    @pytest.mark.parametrize(
        "value",
        [-1, 128, "auto", "1", "meta", "", torch.device("meta"), torch.device("cuda:128")],
        ids=str,
    )
    def test_from_hf_refuses_what_names_no_device(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"device map key 'head'"):
            DeviceMap.from_hf({"head": value})

    @pytest.mark.parametrize("value", [True, 0.1, None, b"cpu", Device.cpu(), [0]], ids=str)
    def test_from_hf_refuses_other_types(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"unexpected device .* for 'head'"):
            DeviceMap.from_hf({"head": value})

    def test_from_hf_needs_no_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        assert DeviceMap.from_hf({"a": 1, "b": "cpu"}).to_dict() == {"a": "cuda:1", "b": "cpu"}
        with pytest.raises(TypeError, match="unexpected device"):
            DeviceMap.from_hf({"a": WRONG})


class TestComponentDevice:
    def test_holds_exactly_one_of_the_two(self) -> None:
        with pytest.raises(ValueError, match="can neither be empty nor contain both"):
            ComponentDevice()
        with pytest.raises(ValueError, match="can neither be empty nor contain both"):
            ComponentDevice(single=Device.cpu(), multiple=MIXED)
        # An empty map is falsy, and still a map.
        with pytest.raises(ValueError, match="can neither be empty nor contain both"):
            ComponentDevice(single=Device.cpu(), multiple=DeviceMap({}))

    @pytest.mark.parametrize("disk", [Device.disk(), Device(DeviceType.DISK, 0)], ids=str)
    def test_the_disk_is_refused_alone_however_it_is_built(self, disk: Device) -> None:
        builds: tuple[Callable[[], ComponentDevice], ...] = (
            lambda: ComponentDevice(single=disk),
            lambda: ComponentDevice.from_single(disk),
            lambda: ComponentDevice.from_str(str(disk)),
            lambda: ComponentDevice.from_dict({"type": "single", "device": str(disk)}),
            lambda: resolve_device(disk),
            lambda: resolve_device(str(disk)),
        )
        for build in builds:
            with pytest.raises(ValueError, match="can only be used as a part of device maps"):
                build()

    @pytest.mark.parametrize("wrong", [None, "cpu", DeviceMap({}), {}, WRONG])
    def test_from_single_takes_a_device(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="Single device must be a Device"):
            ComponentDevice.from_single(wrong)

    @pytest.mark.parametrize("wrong", [None, "cpu", Device.cpu(), {"a": Device.cpu()}, WRONG])
    def test_from_multiple_takes_a_device_map(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="Multiple devices must be a DeviceMap"):
            ComponentDevice.from_multiple(wrong)

    def test_the_constructor_checks_types(self) -> None:
        wrong: Any = "cpu"
        with pytest.raises(TypeError, match="Single device must be a Device, got 'cpu'"):
            ComponentDevice(single=wrong)
        with pytest.raises(TypeError, match="Multiple devices must be a DeviceMap, got 'cpu'"):
            ComponentDevice(multiple=wrong)

    def test_is_frozen(self) -> None:
        component: Any = ComponentDevice.from_str("cpu")
        with pytest.raises(dataclasses.FrozenInstanceError):
            component.single = Device.disk()
        assert not hasattr(component, "__dict__")

    def test_equal_values_are_one_dictionary_key(self) -> None:
        turned = DeviceMap(dict(reversed(list(MIXED))))
        held = {
            ComponentDevice.from_str("cuda:1"): "single",
            ComponentDevice.from_multiple(MIXED): "multiple",
        }
        assert held[ComponentDevice.from_single(Device.gpu(1))] == "single"
        assert held[ComponentDevice.from_multiple(turned)] == "multiple"

    @pytest.mark.parametrize(
        ("device_map", "multiple"),
        [(None, False), (DeviceMap({}), True), (DeviceMap({"": Device.cpu()}), True)],
    )
    def test_a_map_counts_as_multiple_whatever_its_length(
        self, device_map: DeviceMap | None, multiple: bool
    ) -> None:
        component = (
            ComponentDevice.from_str("cpu")
            if device_map is None
            else ComponentDevice.from_multiple(device_map)
        )
        assert component.has_multiple_devices is multiple

    def test_first_device_of_a_single_is_equal_to_it(self) -> None:
        component = ComponentDevice.from_str("xpu:1")
        assert component.first_device == component

    def test_first_device_of_a_map_skips_the_disk(self) -> None:
        device_map = DeviceMap.from_dict({"a": "disk:0", "b": "disk", "c": "mps", "d": "cpu"})
        component = ComponentDevice.from_multiple(device_map)
        assert component.first_device == ComponentDevice.from_str("mps")

    @pytest.mark.parametrize("devices", [{}, {"a": "disk"}])
    def test_a_map_without_usable_device_has_no_first(self, devices: dict[str, str]) -> None:
        component = ComponentDevice.from_multiple(DeviceMap.from_dict(devices))
        with pytest.raises(ValueError, match="No usable device found in the device map"):
            _ = component.first_device

    @pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu"])
    def test_every_id_survives_the_way_to_torch(self, kind: str) -> None:
        for number in range(MAX_DEVICE_ID + 1):
            device = ComponentDevice.from_str(f"{kind}:{number}").to_torch()
            assert (device.type, device.index) == (kind, number)
        assert ComponentDevice.from_str(kind).to_torch().index is None

    def test_torch_itself_loses_the_first_id_we_refuse(self) -> None:
        # Why MAX_DEVICE_ID is what it is. When this fails torch has changed: look at the limit.
        assert torch.device(f"cuda:{MAX_DEVICE_ID + 1}").index != MAX_DEVICE_ID + 1

    def test_to_torch_without_torch_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        component = ComponentDevice.from_str("cuda:1")
        with pytest.raises(ImportError, match="install the package 'torch'"):
            component.to_torch()
        assert component.to_torch_str() == "cuda:1"

    @pytest.mark.parametrize(
        ("convert", "target"),
        [("to_torch", "PyTorch"), ("to_torch_str", "PyTorch"), ("to_spacy", "spaCy")],
    )
    def test_maps_have_no_single_device_formats(self, convert: str, target: str) -> None:
        component = ComponentDevice.from_multiple(MIXED)
        with pytest.raises(ValueError, match=f"Only single devices .* {target} format"):
            getattr(component, convert)()

    def test_spacy_needs_the_number_of_a_gpu(self) -> None:
        with pytest.raises(ValueError, match="for example 'cuda:0'"):
            ComponentDevice.from_str("cuda").to_spacy()

    def test_hf_takes_a_string_alone_and_numbers_in_maps(self) -> None:
        assert ComponentDevice.from_str("cuda:1").to_hf() == "cuda:1"
        assert ComponentDevice.from_str("cuda").to_hf() == "cuda"
        assert ComponentDevice.from_multiple(DeviceMap({})).to_hf() == {}
        devices = {"a": "cuda:1", "b": "xpu:1", "c": "disk"}
        component = ComponentDevice.from_multiple(DeviceMap.from_dict(devices))
        assert component.to_hf() == {"a": 1, "b": "xpu:1", "c": "disk"}

    @pytest.mark.parametrize("own", ["device", "device_map"])
    @pytest.mark.parametrize("present", [("device",), ("device_map",), ("device", "device_map")])
    @pytest.mark.parametrize("value", [None, 0, "auto"])
    def test_hf_kwargs_presence_is_the_callers_choice(
        self, own: str, present: tuple[str, ...], value: object
    ) -> None:
        component = (
            ComponentDevice.from_str("cuda:1")
            if own == "device"
            else ComponentDevice.from_multiple(MIXED)
        )
        callers: dict[str, object] = {"task": "t"} | dict.fromkeys(present, value)
        before = dict(callers)
        kept = component.update_hf_kwargs(callers, overwrite=False)
        replaced = component.update_hf_kwargs(callers, overwrite=True)
        assert callers == kept == before
        assert kept is not callers
        assert replaced == {"task": "t", own: component.to_hf()}

    def test_hf_kwargs_of_a_map(self) -> None:
        component = ComponentDevice.from_multiple(MIXED)
        expected = {"device_map": {"encoder": 1, "decoder": "disk", "lm_head": "cpu"}}
        assert component.update_hf_kwargs({}, overwrite=False) == expected
        assert component.update_hf_kwargs({"device": 0}, overwrite=True) == expected

    @pytest.mark.parametrize("data", [None, "single", [("type", "single")]])
    def test_from_dict_takes_a_mapping(self, data: Any) -> None:
        with pytest.raises(TypeError, match="Component device data must be a mapping"):
            ComponentDevice.from_dict(data)

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            ({"type": "single", "device": None}, TypeError),
            ({"type": "single", "device": 0}, TypeError),
            ({"type": "single", "device": "auto"}, ValueError),
            ({"type": "multiple", "device_map": None}, TypeError),
            ({"type": "multiple", "device_map": {"a": None}}, TypeError),
            ({"type": "multiple", "device_map": {"a": "auto"}}, ValueError),
            ({"type": None}, ValueError),
            ({"type": ["single"]}, ValueError),
        ],
    )
    def test_from_dict_refuses_wrong_content(self, data: Any, error: type[Exception]) -> None:
        with pytest.raises(error):
            ComponentDevice.from_dict(data)

    def test_from_dict_ignores_other_keys(self) -> None:
        data = {"type": "single", "device": "cpu", "device_map": {}, "note": 1}
        assert ComponentDevice.from_dict(data) == ComponentDevice.from_str("cpu")

    @pytest.mark.parametrize("value", [Device.gpu(1), MIXED, ComponentDevice.from_multiple(MIXED)])
    def test_values_survive_pickle_and_copies(self, value: object) -> None:
        for made in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
            assert made == value
            assert hash(made) == hash(value)
            assert repr(made) == repr(value)

    def test_repr_makes_an_equal_value(self) -> None:
        assert repr(ComponentDevice.from_str("cuda:1")) == (
            "ComponentDevice(single=Device.from_str('cuda:1'), multiple=None)"
        )


class TestResolveDevice:
    def test_a_component_device_is_returned_as_it_is(self) -> None:
        component = ComponentDevice.from_str("cuda:5")
        assert resolve_device(component) is component
        assert ComponentDevice.resolve_device(component) is component

    @pytest.mark.parametrize("resolve", [resolve_device, ComponentDevice.resolve_device])
    def test_strings_devices_and_maps_are_wrapped(self, resolve: Any) -> None:
        assert resolve("cuda:1") == ComponentDevice.from_str("cuda:1")
        assert resolve(Device.mps()) == ComponentDevice.from_single(Device.mps())
        assert resolve(MIXED) == ComponentDevice.from_multiple(MIXED)
        assert resolve(DeviceMap({})) == ComponentDevice.from_multiple(DeviceMap({}))

    @pytest.mark.parametrize("wrong", [0, True, b"cpu", {}, [], DeviceType.CPU, WRONG])
    def test_other_types_are_value_errors_as_in_haystack(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match="Invalid component device type"):
            resolve_device(wrong)

    @pytest.mark.parametrize("text", ["", "auto", "gpu", "CPU"])
    def test_strings_that_name_no_device_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="Unknown device type string"):
            resolve_device(text)

    @pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=3)))
    def test_none_takes_the_first_type_there_is(self, present: tuple[bool, bool, bool]) -> None:
        order = (DeviceType.GPU, DeviceType.XPU, DeviceType.MPS)
        available = [kind for kind, there in zip(order, present, strict=True) if there]
        expected = (
            {"cuda": "cuda:0"}.get(str(available[0]), str(available[0])) if available else "cpu"
        )
        chosen = resolve_device(None, probe=seen(*available), environ={})
        assert chosen.to_torch_str() == expected

    @pytest.mark.parametrize("text", ["false", "False", "FALSE", "0", "no", "No"])
    @pytest.mark.parametrize(
        ("variable", "expected"),
        [("MODELYARD_XPU_ENABLED", "mps"), ("MODELYARD_MPS_ENABLED", "xpu")],
    )
    def test_a_variable_turns_its_own_type_off(
        self, variable: str, expected: str, text: str
    ) -> None:
        probe = seen(DeviceType.XPU, DeviceType.MPS)
        assert resolve_device(probe=probe, environ={variable: text}).to_torch_str() == expected

    @pytest.mark.parametrize("text", ["true", "1", "yes", "", "off", "nonsense"])
    def test_other_texts_leave_a_type_on(self, text: str) -> None:
        environ = {"MODELYARD_MPS_ENABLED": text, "HAYSTACK_MPS_ENABLED": "false"}
        chosen = resolve_device(probe=seen(DeviceType.MPS), environ=environ)
        assert chosen.to_torch_str() == "mps"

    def test_a_type_that_is_off_is_not_even_asked_for(self) -> None:
        asked: list[DeviceType] = []

        def probe(device_type: DeviceType) -> bool:
            asked.append(device_type)
            return False

        off = {"MODELYARD_MPS_ENABLED": "0", "MODELYARD_XPU_ENABLED": "0"}
        assert resolve_device(probe=probe, environ=off) == ComponentDevice.from_str("cpu")
        assert asked == [DeviceType.GPU]

    def test_the_process_environment_is_read_by_default(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MODELYARD_MPS_ENABLED", raising=False)
        assert resolve_device(probe=seen(DeviceType.MPS)).to_torch_str() == "mps"
        monkeypatch.setenv("MODELYARD_MPS_ENABLED", "no")
        assert resolve_device(probe=seen(DeviceType.MPS)).to_torch_str() == "cpu"

    def test_named_devices_do_not_ask_the_probe(self) -> None:
        def probe(device_type: DeviceType) -> bool:
            raise AssertionError(device_type)

        assert resolve_device("cuda:5", probe=probe).to_torch_str() == "cuda:5"

    @pytest.mark.parametrize(
        ("module", "expected"),
        [(torch.cuda, "cuda:0"), (torch.xpu, "xpu"), (torch.backends.mps, "mps"), (None, "cpu")],
        ids=["cuda", "xpu", "mps", "none"],
    )
    def test_the_default_probe_asks_torch(
        self, monkeypatch: pytest.MonkeyPatch, module: Any, expected: str
    ) -> None:
        for each in (torch.cuda, torch.xpu, torch.backends.mps):
            monkeypatch.setattr(each, "is_available", lambda each=each: each is module)
        assert resolve_device(environ={}).to_torch_str() == expected

    def test_a_torch_without_xpu_has_no_xpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for each in (torch.cuda, torch.backends.mps):
            monkeypatch.setattr(each, "is_available", lambda: False)
        monkeypatch.delattr(torch, "xpu")
        assert resolve_device(environ={}).to_torch_str() == "cpu"

    def test_without_torch_the_cpu_is_what_there_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        assert resolve_device(environ={}).to_torch_str() == "cpu"


def test_importing_and_using_devices_does_not_import_torch() -> None:
    program = (
        "import sys; from modelyard.devices import *;"
        "DeviceMap.from_hf({'a': 1}); resolve_device('cuda:1').to_hf();"
        "sys.exit(sorted({'torch', 'transformers', 'modelyard_server'} & set(sys.modules)) or 0)"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
