"""Laws of the device values, on generated ones."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from modelyard.devices import (
    MAX_DEVICE_ID,
    ComponentDevice,
    Device,
    DeviceMap,
    DeviceType,
    resolve_device,
)

# The grammar once more, written differently from the code.
GRAMMAR = re.compile(r"(cpu|cuda|disk|mps|xpu)(:0*([0-9]|[1-9][0-9]|1[01][0-9]|12[0-7]))?")

ids = st.integers(min_value=0, max_value=MAX_DEVICE_ID)
devices = st.builds(Device, st.sampled_from(DeviceType), st.none() | ids)
# Few ids and few keys, so that equal values turn up often.
near_devices = st.builds(Device, st.sampled_from(DeviceType), st.sampled_from([None, 0, 1]))
near_maps = st.dictionaries(st.sampled_from(["", "a", "b"]), near_devices, max_size=3).map(
    DeviceMap
)
maps = st.dictionaries(st.text(max_size=20), devices, max_size=8).map(DeviceMap)
runnable = devices.filter(lambda device: device.type is not DeviceType.DISK)
components = st.one_of(
    runnable.map(ComponentDevice.from_single), maps.map(ComponentDevice.from_multiple)
)
numbered_maps = st.dictionaries(
    st.text(max_size=20),
    devices.filter(lambda device: device.type is not DeviceType.GPU or device.id is not None),
    max_size=8,
).map(DeviceMap)
# Random text is hardly ever close to a device string; this is.
almost = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", " ", "\n"]),
    st.sampled_from(["cpu", "cuda", "disk", "mps", "xpu", "CUDA", "gpu", "auto", ""]),
    st.sampled_from(["", ":", "::", ": ", ":+", ":-", ":0", ":_"]),
    st.one_of(
        st.just(""),
        st.integers(min_value=-300, max_value=300).map(str),
        st.text(alphabet="0123456789_+-. \n\u0661\uff11\u00b2", max_size=6),
        st.text(max_size=4),
    ),
)
junk = st.text() | almost


@given(devices)
def test_a_device_survives_its_text(device: Device) -> None:
    assert Device.from_str(str(device)) == device
    assert GRAMMAR.fullmatch(str(device))


@given(junk)
def test_text_is_a_device_or_a_value_error(text: str) -> None:
    try:
        device = Device.from_str(text)
    except ValueError:
        assert not GRAMMAR.fullmatch(text)
    else:
        assert GRAMMAR.fullmatch(text)
        assert Device.from_str(str(device)) == device


@given(junk)
def test_every_reader_of_text_agrees_or_raises_a_value_error(text: str) -> None:
    try:
        expected = Device.from_str(text)
    except ValueError:
        expected = None
    readers: tuple[Callable[[], Device | None], ...] = (
        lambda: DeviceMap.from_dict({"": text})[""],
        lambda: DeviceMap.from_hf({"": text})[""],
        lambda: ComponentDevice.from_str(text).single,
        lambda: ComponentDevice.from_dict({"type": "single", "device": text}).single,
        lambda: resolve_device(text).single,
    )
    for number, read in enumerate(readers):
        # The disk is a device, but only maps may name it.
        only_in_maps = expected is not None and expected.type is DeviceType.DISK and number >= 2
        try:
            assert read() == expected
        except ValueError:
            assert expected is None or only_in_maps
        else:
            assert expected is not None
            assert not only_in_maps


@given(st.integers())
def test_a_number_is_an_id_or_a_value_error(number: int) -> None:
    try:
        device = Device.gpu(number)
    except ValueError:
        assert not 0 <= number <= MAX_DEVICE_ID
    else:
        assert device.id == number
        assert 0 <= number <= MAX_DEVICE_ID


@given(maps)
def test_a_map_survives_its_dict_in_order(device_map: DeviceMap) -> None:
    read = DeviceMap.from_dict(device_map.to_dict())
    assert read == device_map
    assert list(read) == list(device_map)
    assert hash(read) == hash(device_map)


@given(numbered_maps)
def test_a_map_with_numbered_gpus_survives_hugging_face(device_map: DeviceMap) -> None:
    read = DeviceMap.from_hf(device_map.to_hf())
    assert read == device_map
    assert list(read) == list(device_map)


@given(components)
def test_a_component_device_survives_its_dict_and_pickle(component: ComponentDevice) -> None:
    assert ComponentDevice.from_dict(component.to_dict()) == component
    assert pickle.loads(pickle.dumps(component)) == component
    assert resolve_device(component) is component


@given(runnable)
def test_a_single_device_survives_hugging_face_and_torch_text(device: Device) -> None:
    component = ComponentDevice.from_single(device)
    assert component.to_hf() == component.to_torch_str()
    assert ComponentDevice.from_str(component.to_torch_str()) == component
    assert ComponentDevice.from_torch(component.to_torch()) == component


@given(near_devices, near_devices)
def test_devices_are_equal_exactly_when_their_texts_are(left: Device, right: Device) -> None:
    assert (left == right) == (str(left) == str(right))
    if left == right:
        assert hash(left) == hash(right)


@given(near_maps, near_maps)
def test_maps_are_equal_exactly_when_their_dicts_are(left: DeviceMap, right: DeviceMap) -> None:
    assert (left == right) == (left.to_dict() == right.to_dict())
    if left == right:
        assert hash(left) == hash(right)
    as_components = ComponentDevice.from_multiple(left), ComponentDevice.from_multiple(right)
    assert (as_components[0] == as_components[1]) == (left == right)


@given(maps, st.randoms(use_true_random=False))
def test_order_takes_no_part_in_equality_or_hash(device_map: DeviceMap, random: Random) -> None:
    pairs = list(device_map)
    random.shuffle(pairs)
    shuffled = DeviceMap(dict(pairs))
    assert shuffled == device_map
    assert hash(shuffled) == hash(device_map)


@given(devices)
def test_canonical_is_idempotent_and_keeps_numbers(device: Device) -> None:
    canonical = device.canonical()
    assert canonical.canonical() == canonical
    assert canonical.type is device.type
    assert device.id is None or canonical == device


@given(
    components.filter(
        lambda component: (
            component.multiple is None
            or all(str(device) != "cuda" for device in component.multiple.values())
        )
    ),
    st.dictionaries(st.sampled_from(["device", "device_map", "task"]), st.none() | st.integers()),
)
def test_overwritten_hf_kwargs_name_one_device(
    component: ComponentDevice, kwargs: dict[str, int | None]
) -> None:
    before = dict(kwargs)
    updated = component.update_hf_kwargs(kwargs, overwrite=True)
    assert kwargs == before
    assert len(updated.keys() & {"device", "device_map"}) == 1
    assert component.update_hf_kwargs(updated, overwrite=False) == updated
    assert component.update_hf_kwargs(updated, overwrite=True) == updated
