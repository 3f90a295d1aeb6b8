"""Device values to and from the installed haystack-ai."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from modelyard import ComponentDevice, Device, DeviceMap, DeviceType, resolve_device

# Read when haystack is imported: it would write a file to the home directory and send events.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from haystack import component, default_from_dict, default_to_dict
from haystack.utils import device as theirs

from modelyard.integrations.haystack import from_haystack, to_haystack

devices = st.builds(
    Device, st.sampled_from(DeviceType), st.none() | st.integers(min_value=0, max_value=127)
)
maps = st.dictionaries(st.text(max_size=20), devices, max_size=6).map(DeviceMap)
components = st.one_of(
    devices.filter(lambda device: device.type is not DeviceType.DISK).map(
        ComponentDevice.from_single
    ),
    maps.map(ComponentDevice.from_multiple),
)

# What Haystack lets be built or set, by somebody without a type checker.
LAX: Any = theirs


def run_python(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": path, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


class TestRoundTrip:
    @pytest.mark.parametrize("kind", DeviceType)
    def test_types(self, kind: DeviceType) -> None:
        assert to_haystack(kind) is theirs.DeviceType(kind.value)
        assert from_haystack(to_haystack(kind)) is kind

    def test_both_sides_have_the_same_types(self) -> None:
        assert {kind.name: kind.value for kind in theirs.DeviceType} == {
            kind.name: kind.value for kind in DeviceType
        }

    @given(devices)
    def test_devices(self, device: Device) -> None:
        converted = to_haystack(device)
        assert type(converted) is theirs.Device
        assert converted == theirs.Device.from_str(str(device))
        assert str(converted) == str(device)
        assert from_haystack(converted) == device

    @given(maps)
    def test_maps_in_their_order(self, device_map: DeviceMap) -> None:
        converted = to_haystack(device_map)
        assert type(converted) is theirs.DeviceMap
        assert list(converted.to_dict().items()) == list(device_map.to_dict().items())
        assert converted == theirs.DeviceMap.from_dict(device_map.to_dict())
        read = from_haystack(converted)
        assert read == device_map
        assert list(read) == list(device_map)

    @given(components)
    def test_component_devices_with_the_same_json(self, value: ComponentDevice) -> None:
        converted = to_haystack(value)
        assert type(converted) is theirs.ComponentDevice
        assert json.dumps(converted.to_dict()) == json.dumps(value.to_dict())
        assert converted == theirs.ComponentDevice.from_dict(value.to_dict())
        assert converted.has_multiple_devices is value.has_multiple_devices
        assert from_haystack(converted) == value

    @given(components)
    def test_haystacks_json_is_read_by_us(self, value: ComponentDevice) -> None:
        assert ComponentDevice.from_dict(to_haystack(value).to_dict()) == value


class TestCopies:
    def test_a_converted_map_can_be_changed_without_changing_ours(self) -> None:
        ours = DeviceMap({"a": Device.cpu()})
        converted = to_haystack(ours)
        converted["b"] = theirs.Device.disk()
        converted["a"].id = 5
        assert ours == DeviceMap({"a": Device.cpu()})
        assert to_haystack(ours).to_dict() == {"a": "cpu"}

    def test_changes_of_haystacks_values_do_not_show_in_ours(self) -> None:
        device = theirs.Device.gpu(1)
        device_map = theirs.DeviceMap({"a": device})
        read = from_haystack(theirs.ComponentDevice.from_multiple(device_map))
        single = from_haystack(theirs.ComponentDevice.from_single(device))
        device.id = 2
        device_map["b"] = theirs.Device.cpu()
        assert read.to_dict() == {"type": "multiple", "device_map": {"a": "cuda:1"}}
        assert single.to_dict() == {"type": "single", "device": "cuda:1"}


class TestStrictness:
    @pytest.mark.parametrize(
        ("number", "error", "text"),
        [
            (128, ValueError, "must be <= 127, got 128"),
            (10**20, ValueError, "must be <= 127"),
            (True, TypeError, "must be an int or None, got True"),
            (1.5, TypeError, "must be an int or None, got 1.5"),
        ],
    )
    def test_ids_that_haystack_lets_pass(
        self, number: Any, error: type[Exception], text: str
    ) -> None:
        device = theirs.Device(theirs.DeviceType.GPU, number)
        with pytest.raises(error, match=text):
            from_haystack(device)
        with pytest.raises(error, match=rf"{text}.* \(device map key 'head'\)"):
            from_haystack(theirs.DeviceMap({"a": theirs.Device.cpu(), "head": device}))
        with pytest.raises(error, match=text):
            from_haystack(theirs.ComponentDevice.from_single(device))

    @pytest.mark.parametrize(("number", "error"), [(-1, ValueError), ("1", TypeError)])
    def test_ids_that_were_set_afterwards(self, number: Any, error: type[Exception]) -> None:
        device = theirs.Device.gpu(0)
        device.id = number
        with pytest.raises(error, match="Device id must be"):
            from_haystack(device)

    def test_a_type_that_is_none(self) -> None:
        with pytest.raises(TypeError, match="no DeviceType but 'nonsense' as its type"):
            from_haystack(LAX.Device("nonsense", 1))
        with pytest.raises(TypeError, match=r"no DeviceType but 'cuda'.* key 'a'"):
            from_haystack(LAX.DeviceMap({"a": LAX.Device("cuda", 1)}))

    @pytest.mark.parametrize("entry", ["cpu", None, 0, Device.cpu()])
    def test_maps_that_hold_something_else(self, entry: object) -> None:
        with pytest.raises(TypeError, match=r"no Device but .* for key 'head'"):
            from_haystack(LAX.DeviceMap({"head": entry}))

    @pytest.mark.parametrize("content", [None, "auto", [("a", theirs.Device.cpu())]])
    def test_maps_that_hold_no_mapping(self, content: object) -> None:
        with pytest.raises(TypeError, match="map holds no mapping but"):
            from_haystack(LAX.DeviceMap(content))

    def test_keys_that_are_no_strings(self) -> None:
        with pytest.raises(TypeError, match="keys must be strings, got 7"):
            from_haystack(LAX.DeviceMap({7: theirs.Device.cpu()}))

    def test_an_empty_union_and_one_that_holds_both(self) -> None:
        with pytest.raises(ValueError, match="it holds neither"):
            from_haystack(theirs.ComponentDevice())
        with pytest.raises(ValueError, match="it holds neither"):
            from_haystack(LAX.ComponentDevice.from_multiple(None))
        both = theirs.ComponentDevice(theirs.Device.cpu(), theirs.DeviceMap({}))
        # The control: Haystack itself writes this one down without a word.
        assert both.to_dict() == {"type": "single", "device": "cpu"}
        with pytest.raises(ValueError, match="it holds both"):
            from_haystack(both)

    def test_unions_of_other_things(self) -> None:
        with pytest.raises(TypeError, match="holds no Device but 'cpu'"):
            from_haystack(LAX.ComponentDevice("cpu"))
        with pytest.raises(TypeError, match=r"holds no DeviceMap but \{'a': 'cpu'\}"):
            from_haystack(LAX.ComponentDevice.from_multiple({"a": "cpu"}))

    def test_the_disk_as_a_single_device(self) -> None:
        with pytest.raises(ValueError, match="only be used as a part of device maps"):
            from_haystack(theirs.ComponentDevice(theirs.Device.disk()))

    @pytest.mark.parametrize("wrong", ["cuda:1", None, 0, {"a": "cpu"}, object()])
    def test_other_types(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="to Haystack: give a device value of modelyard"):
            to_haystack(wrong)
        with pytest.raises(TypeError, match=r"from Haystack: give a .* of haystack\.utils"):
            from_haystack(wrong)

    def test_each_side_refuses_the_values_that_it_makes(self) -> None:
        foreign: Any = theirs.Device.cpu()
        own: Any = Device.cpu()
        with pytest.raises(TypeError, match="Cannot convert Device"):
            to_haystack(foreign)
        with pytest.raises(TypeError, match="Cannot convert Device"):
            from_haystack(own)


@component
class Embedder:
    """A Haystack component with a device, as people write them."""

    def __init__(self, device: theirs.ComponentDevice | None = None) -> None:
        self.device = theirs.ComponentDevice.resolve_device(device)

    def to_dict(self) -> dict[str, Any]:
        return default_to_dict(self, device=self.device)

    @component.output_types(where=str)
    def run(self) -> dict[str, str]:
        return {"where": self.device.to_torch_str()}


class TestInAComponent:
    @pytest.mark.parametrize("text", ["cuda:1", "mps", "cpu"])
    def test_a_component_takes_and_serialises_it(self, text: str) -> None:
        ours = resolve_device(text)
        embedder = Embedder(device=to_haystack(ours))
        assert embedder.run() == {"where": text}
        written = embedder.to_dict()
        assert written["init_parameters"]["device"] == ours.to_dict()
        read = default_from_dict(Embedder, copy.deepcopy(written))
        assert from_haystack(read.device) == ours

    def test_kwargs_for_hugging_face_are_the_same(self) -> None:
        ours = ComponentDevice.from_multiple(
            DeviceMap.from_dict({"encoder": "cuda:1", "head": "cpu", "rest": "disk"})
        )
        converted = to_haystack(ours)
        assert converted.to_hf() == ours.to_hf()
        assert converted.update_hf_kwargs({}, overwrite=False) == ours.update_hf_kwargs(
            {}, overwrite=False
        )
        first = converted.first_device
        assert first is not None
        assert from_haystack(first) == ours.first_device


class TestImporting:
    def test_modelyard_does_not_import_haystack(self) -> None:
        done = run_python(
            "import sys, modelyard, modelyard.devices, modelyard.hf_kwargs, modelyard.integrations;"
            "modelyard.resolve_device('cpu');"
            "sys.exit(sorted({'haystack', 'torch'} & set(sys.modules)) or 0)"
        )
        assert done.returncode == 0, done.stderr

    def test_without_haystack_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "modelyard.integrations.haystack")
        for name in ("haystack", "haystack.utils", "haystack.utils.device"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install 'modelyard\[haystack\]'"):
            import_module("modelyard.integrations.haystack")

    def test_the_extra_allows_the_installed_release(self) -> None:
        extra = next(
            found
            for found in map(Requirement, requires("modelyard") or [])
            if found.name == "haystack-ai"
            and found.marker is not None
            and found.marker.evaluate({"extra": "haystack"})
        )
        assert version("haystack-ai") in extra.specifier
        assert "2.99" not in extra.specifier

    def test_telemetry_is_off_here_and_leaves_no_file(self, tmp_path: Path) -> None:
        program = (
            "import sys; from modelyard.integrations import haystack;"
            "from haystack.telemetry import _telemetry; sys.exit(_telemetry.telemetry is not None)"
        )
        off = run_python(program, HOME=str(tmp_path), HAYSTACK_TELEMETRY_ENABLED="False")
        assert off.returncode == 0, off.stderr
        assert list(tmp_path.iterdir()) == []
        telemetry = import_module("haystack.telemetry._telemetry")
        assert telemetry.telemetry is None
