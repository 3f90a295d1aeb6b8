"""Whatever the model, the devices and the budgets: cuts and maps keep to their rules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType
from modelyard.placements import AutomaticPlacement, PlacementStrategy
from modelyard_server.devices.cutting import CannotCut, Piece, cut, pieces_of
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placed import PlacedAs, enumerated
from modelyard_server.devices.placement import expand
from modelyard_server.errors import Reason, Refusal
from modelyard_server.runtimes.api import Price
from modelyard_server.runtimes.targets import (
    DISK,
    Structure,
    TensorPart,
    covers,
    resident_device,
    staging_bytes,
)

DISK_AT = 4
DEVICES = tuple(
    ManagedDevice(
        name=f"devices/{name.replace(':', '-')}",
        device=Device.from_str(name),
        logical=True,
        torch_device=DISK if name == "disk" else "cpu",
        threads=1,
        total_bytes=1000,
        budget_bytes=1000,
    )
    for name in ("cpu", "cuda:0", "cuda:1", "xpu:0", "disk")
)
CUTTING = (PlacementStrategy.BALANCED, PlacementStrategy.SEQUENTIAL)


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    """Models with blocks, modules outside of them, ties, buffers, and holes in the files."""
    tensors: list[TensorPart] = []
    blocks: list[str] = []
    units: list[str] = []
    for i in range(draw(st.integers(1, 8))):
        is_block = draw(st.booleans())
        if is_block:
            blocks.append(f"top.{i}")
        for j in range(draw(st.integers(1, 3))):
            module = f"top.{i}.{j}"
            units.append(module)
            for k in range(draw(st.integers(1, 2))):
                is_buffer = draw(st.integers(0, 5)) == 0
                tensors.append(
                    TensorPart(
                        names=(f"{module}.t{k}",),
                        size_bytes=draw(st.integers(0, 20)),
                        is_buffer=is_buffer,
                        as_filed=not is_buffer or draw(st.booleans()),
                    )
                )
    if draw(st.booleans()):
        units.append("top")
        tensors.insert(0, TensorPart(names=("top.token",), size_bytes=draw(st.integers(0, 9))))
    if draw(st.booleans()):
        first = tensors[0]
        tensors[0] = TensorPart(
            names=(*first.names, "tail.tied"),
            size_bytes=first.size_bytes,
            is_buffer=first.is_buffer,
            as_filed=first.as_filed,
        )
        units.append("tail")
        if draw(st.booleans()):
            tensors.append(TensorPart(names=("tail.own",), size_bytes=draw(st.integers(0, 9))))
    return Structure(tensors=tuple(tensors), blocks=tuple(blocks), units=tuple(units))


def priced(structure: Structure, extra: int) -> Price:
    return Price(
        resting_bytes=structure.size_bytes,
        peak_bytes=structure.size_bytes + extra,
        structure=structure,
    )


def check_charges(placed: PlacedAs, price: Price) -> None:
    """Every tensor is on one device, and the charges are the price and what visits home."""
    structure = price.structure
    assert structure is not None
    disk = frozenset({DISK_AT})
    staging = 0 if placed.target.is_whole else staging_bytes(structure, placed.target, disk)
    assert sum(placed.charges.values()) == price.peak_bytes + staging
    assert set(placed.charges) == set(placed.target.devices)
    parts = placed.target.parts
    for tensor in structure.tensors:
        for name in tensor.names:
            assert sum(covers(prefix, name) for prefix, _ in parts) == 1
        assert len({placed.target.device_of(name) for name in tensor.names}) == 1
    assert placed.target.home != DISK_AT
    for device, prefixes in placed.prefixes.items():
        assert all(device == position for prefix, position in parts if prefix in prefixes)


cuts = st.fixed_dictionaries(
    {
        "structure": structures(),
        "strategy": st.sampled_from(CUTTING),
        "extra": st.integers(0, 30),
        "budgets": st.lists(st.integers(0, 200), min_size=5, max_size=5),
        "devices": st.lists(st.sampled_from((0, 1, 2, 3)), min_size=1, max_size=4, unique=True),
        "with_disk": st.booleans(),
    }
)


@given(cuts)
def test_cuts_place_every_tensor_once_and_keep_to_budgets_or_refuse(
    given: dict[str, object],
) -> None:
    structure, strategy = given["structure"], given["strategy"]
    budgets, chosen, extra = given["budgets"], given["devices"], given["extra"]
    assert isinstance(structure, Structure)
    assert isinstance(strategy, PlacementStrategy)
    assert isinstance(budgets, list)
    assert isinstance(chosen, list)
    assert isinstance(extra, int)
    positions = [*chosen, DISK_AT] if given["with_disk"] else chosen
    price = priced(structure, extra)
    placement = AutomaticPlacement(
        strategy=strategy, devices=tuple(DEVICES[i].device for i in positions)
    )
    try:
        (placed,) = expand(placement, price=price, devices=DEVICES, budgets=budgets)
    except Refusal as refusal:
        assert refusal.reason is Reason.MODEL_NEVER_FITS
        assert refusal.violations
        # Whatever fits on the first device whole is never refused.
        assert price.peak_bytes > budgets[chosen[0]]
        return
    check_charges(placed, price)
    assert set(placed.charges) <= set(positions)
    assert all(charge <= budgets[i] for i, charge in placed.charges.items())
    for block in structure.blocks:
        inside = {
            placed.target.device_of(name)
            for tensor in structure.tensors
            for name in tensor.names
            if covers(block, name)
        }
        assert len(inside) == 1
    # What runs is a row: each device has neighbours, in the order of the devices.
    row = [placed.target.device_of(piece.names[0]) for piece in pieces_of(structure)]
    order = [positions.index(i) for i in row]
    assert order == sorted(order)
    (again,) = expand(placement, price=price, devices=DEVICES, budgets=budgets)
    assert again == placed


def largest_share(
    ends: Sequence[int], pieces: Sequence[Piece], extra: int, budgets: Sequence[int]
) -> float:
    bounds = [0, *ends]
    used = [sum(p.size_bytes for p in pieces[low:high]) for low, high in pairwise(bounds)]
    home = next(i for i, (low, high) in enumerate(pairwise(bounds)) if high > low)
    used[home] += extra
    return max(u / b for u, b in zip(used, budgets, strict=True))


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.integers(0, 20),
)
def test_balanced_is_the_best_of_all_rows(sizes: list[int], budgets: list[int], extra: int) -> None:
    structure = Structure(
        tensors=tuple(
            TensorPart(names=(f"{i}.weight",), size_bytes=size) for i, size in enumerate(sizes)
        ),
        units=tuple(str(i) for i in range(len(sizes))),
    )
    pieces = pieces_of(structure)
    inner = combinations_with_replacement(range(len(sizes) + 1), len(budgets) - 1)
    best = min(largest_share((*ends, len(sizes)), pieces, extra, budgets) for ends in inner)
    try:
        target = cut(
            PlacementStrategy.BALANCED,
            price=priced(structure, extra),
            devices=range(len(budgets)),
            budgets=budgets,
        )
    except CannotCut as error:
        assert best > 1
        assert max(n / budgets[i] for i, n in error.needed.items()) == pytest.approx(best)
        return
    used = [0] * len(budgets)
    for tensor in structure.tensors:
        used[target.device_of(tensor.names[0])] += tensor.size_bytes
    used[target.home] += extra
    assert max(u / b for u, b in zip(used, budgets, strict=True)) == pytest.approx(best)


maps = st.dictionaries(
    st.sampled_from(
        ["", "top", "top.0", "top.1", "top.10", "top.0.0", "top.1.1", "top.2", "tail", "tail.own"]
    ),
    st.sampled_from(["cpu", "cuda:0", "cuda:1", "disk"]),
    min_size=1,
)


@given(structures(), maps, st.integers(0, 30))
def test_maps_are_expanded_as_their_longest_keys_say_or_refused(
    structure: Structure, mapped: dict[str, str], extra: int
) -> None:
    price = priced(structure, extra)
    placement = ComponentDevice.from_multiple(DeviceMap.from_dict(mapped))
    try:
        (placed,) = expand(placement, price=price, devices=DEVICES, budgets=[1] * 5)
    except Refusal as refusal:
        assert refusal.reason is Reason.PLACEMENT_INVALID
        assert refusal.violations
        return
    check_charges(placed, price)
    names = [name for tensor in structure.tensors for name in tensor.names]
    assert all(any(covers(key, name) for name in names) for key in mapped)
    for tensor in structure.tensors:
        keys = [key for name in tensor.names for key in mapped if covers(key, name)]
        if not tensor.is_buffer:
            assert keys
        for name in tensor.names:
            key = max((key for key in mapped if covers(key, name)), key=len, default=None)
            if key is not None:
                wanted = mapped[key]
                assert str(DEVICES[placed.target.device_of(name)].device) == wanted
        resident = resident_device(placed.target, tensor, frozenset({DISK_AT}))
        assert resident != DISK_AT or tensor.as_filed
    kinds = {DEVICES[i].device.type for i in placed.target.devices}
    assert kinds != {DeviceType.DISK}


@given(
    st.dictionaries(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join),
        st.integers(0, 2),
        min_size=1,
    )
)
def test_enumerated_subtrees_say_the_same_and_are_the_fewest(devices: dict[str, int]) -> None:
    # Names as models have them: none is the module of another.
    leaves = {
        name: device
        for name, device in devices.items()
        if not any(other != name and covers(name, other) for other in devices)
    }
    parts = enumerated(leaves)
    for name, device in leaves.items():
        assert [found for prefix, found in parts if covers(prefix, name)] == [device]
    for prefix, device in parts:
        if prefix:
            above = prefix.rpartition(".")[0]
            below = {found for name, found in leaves.items() if covers(above, name)}
            assert below != {device}, "the subtree above would have done"
