"""The written forms of a placement, and what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType
from modelyard.placements import (
    AutomaticPlacement,
    Placement,
    PlacementStrategy,
    placement_to_json,
    read_placement,
)

AUTO, BALANCED, SEQUENTIAL = PlacementStrategy
SPLIT = DeviceMap({"encoder": Device.gpu(0), "": Device.cpu()})


def parts(**devices: str) -> ComponentDevice:
    return ComponentDevice.from_multiple(DeviceMap.from_dict(devices))


class TestReading:
    @pytest.mark.parametrize(
        ("written", "placement"),
        [
            (None, None),
            ("cuda:1", ComponentDevice.from_str("cuda:1")),
            ("auto", AutomaticPlacement()),
            ("balanced", AutomaticPlacement(strategy=BALANCED)),
            ("sequential", AutomaticPlacement(strategy=SEQUENTIAL)),
            (Device.gpu(1), ComponentDevice.from_single(Device.gpu(1))),
            (SPLIT, ComponentDevice.from_multiple(SPLIT)),
            ({"encoder": "cuda:0", "": "cpu"}, ComponentDevice.from_multiple(SPLIT)),
            ({"encoder": Device.gpu(0), "": "cpu"}, ComponentDevice.from_multiple(SPLIT)),
            ({"type": "single", "device": "cpu"}, ComponentDevice.from_str("cpu")),
            ({"type": "multiple", "device_map": {"a": "cpu"}}, parts(a="cpu")),
            ({"strategy": "balanced"}, AutomaticPlacement(strategy=BALANCED)),
            (
                {"strategy": "sequential", "devices": ["cuda:0", Device.disk()]},
                AutomaticPlacement(strategy=SEQUENTIAL, devices=(Device.gpu(0), Device.disk())),
            ),
        ],
    )
    def test_every_form_is_read(self, written: Any, placement: Placement | None) -> None:
        assert read_placement(written) == placement

    @pytest.mark.parametrize(
        "placement", [AutomaticPlacement(strategy=BALANCED), ComponentDevice.from_str("cpu")]
    )
    def test_placements_are_themselves(self, placement: Placement) -> None:
        assert read_placement(placement) is placement

    def test_parts_of_a_model_may_be_called_like_fields(self) -> None:
        assert read_placement({"strategy": "cpu", "devices": "cuda:0"}) == parts(
            strategy="cpu", devices="cuda:0"
        )
        assert read_placement({"type": "cpu", "device": "cuda:0"}) == parts(
            type="cpu", device="cuda:0"
        )
        assert read_placement({"type": "cpu", "device_map": "cpu"}) == parts(
            type="cpu", device_map="cpu"
        )

    @pytest.mark.parametrize(
        ("written", "error", "text"),
        [
            ("fair", ValueError, "fair"),
            ("Balanced", ValueError, "Balanced"),
            ("disk", ValueError, "disk"),
            (1, TypeError, "int"),
            (True, TypeError, "bool"),
            (["cpu"], TypeError, "list"),
            ({}, ValueError, "at least one part"),
            ({"a": 1}, TypeError, "'a'"),
            ({"a": None}, TypeError, "'a'"),
            ({"a": "gpu"}, ValueError, "'a'"),
            ({"a": {"b": "cpu"}}, TypeError, "'a'"),
            ({1: "cpu"}, TypeError, "1"),
            ({"strategy": "fair"}, ValueError, "auto, balanced, sequential"),
            ({"strategy": "balanced", "device": ["cpu"]}, ValueError, "'device'"),
            ({"strategy": "balanced", "devices": "cpu"}, TypeError, "list of devices"),
            ({"strategy": "balanced", "devices": {"a": "cpu"}}, TypeError, "list of devices"),
            ({"strategy": "balanced", "devices": [0]}, TypeError, "0"),
            ({"strategy": "balanced", "devices": ["gpu"]}, ValueError, "gpu"),
            ({"type": "both"}, ValueError, "both"),
            ({"type": "single"}, ValueError, "device"),
            ({"type": "single", "device": "disk"}, ValueError, "disk"),
            ({"type": "multiple", "device_map": {"a": "x"}}, ValueError, "'a'"),
            ({"device_map": {"a": "cpu"}}, ValueError, "'type' is missing"),
        ],
    )
    def test_what_says_no_placement_is_refused_by_name(
        self, written: Any, error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error) as caught:
            read_placement(written)
        assert type(caught.value) is error
        assert text in str(caught.value)


class TestAutomaticPlacement:
    @pytest.mark.parametrize(
        ("strategy", "devices", "text"),
        [
            (BALANCED, ("cpu", "cpu"), "twice"),
            (AUTO, ("cpu", "disk"), "cannot hold a whole model"),
            (AUTO, ("disk",), "cannot hold a whole model"),
            (BALANCED, ("disk", "cpu"), "last"),
            (SEQUENTIAL, ("disk",), "last"),
        ],
    )
    def test_devices_that_contradict_the_strategy_are_refused(
        self, strategy: PlacementStrategy, devices: tuple[str, ...], text: str
    ) -> None:
        with pytest.raises(ValueError, match=text):
            AutomaticPlacement(
                strategy=strategy, devices=tuple(Device.from_str(each) for each in devices)
            )

    @pytest.mark.parametrize("given", [{"strategy": "auto"}, {"devices": ("cpu",)}])
    def test_other_types_are_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(TypeError):
            AutomaticPlacement(**given)

    def test_equal_ones_are_equal_and_hashable(self) -> None:
        listed: Any = [Device.cpu()]
        one = AutomaticPlacement(strategy=BALANCED, devices=listed)
        assert one == AutomaticPlacement(strategy=BALANCED, devices=(Device.cpu(),))
        assert len({one, AutomaticPlacement(strategy=BALANCED, devices=(Device.cpu(),))}) == 1

    def test_a_strategy_is_its_name(self) -> None:
        assert [str(each) for each in PlacementStrategy] == ["auto", "balanced", "sequential"]


placements = st.one_of(
    st.none(),
    st.builds(
        lambda kind, number: ComponentDevice.from_single(Device(kind, number)),
        st.sampled_from([kind for kind in DeviceType if kind is not DeviceType.DISK]),
        st.none() | st.integers(0, 127),
    ),
    st.dictionaries(
        # Among them what the tables' own fields are called.
        st.sampled_from(["", "a.b", "type", "device", "device_map", "strategy", "devices"]),
        st.builds(Device, st.sampled_from(DeviceType), st.none() | st.integers(0, 127)),
        min_size=1,
    ).map(lambda mapping: ComponentDevice.from_multiple(DeviceMap(mapping))),
    st.builds(
        AutomaticPlacement,
        strategy=st.sampled_from(PlacementStrategy),
        devices=st.lists(st.builds(Device.gpu, st.integers(0, 127)), unique=True, max_size=3).map(
            tuple
        ),
    ),
)


@given(placements)
def test_json_reads_back_as_the_same_placement(placement: Placement | None) -> None:
    written = json.loads(json.dumps(placement_to_json(placement)))
    assert read_placement(written) == placement


@given(
    st.dictionaries(
        st.sampled_from(["", "type", "device", "device_map", "strategy", "devices"]),
        st.sampled_from(["cpu", "single", "multiple", "balanced", 1, None, ["cpu"], {"a": "cpu"}]),
    )
)
def test_any_table_is_a_placement_or_refused_as_documented(table: dict[str, Any]) -> None:
    try:
        read = read_placement(table)
    except (TypeError, ValueError) as error:
        assert str(error)
    else:
        assert isinstance(read, ComponentDevice | AutomaticPlacement)
