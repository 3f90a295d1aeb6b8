"""What a placement means: which devices, in which order, what on which of them, at which charge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from modelyard.devices import ComponentDevice, Device, DeviceMap
from modelyard.placements import Placement, PlacementLike, read_placement
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placement import PlacedAs, effective_placement, expand
from modelyard_server.errors import Code, Reason, Refusal
from modelyard_server.runtimes.api import Price
from modelyard_server.runtimes.targets import DISK, Structure, Target, TensorPart

CPU, CUDA_1, XPU, CUDA_0, MPS, ON_DISK = range(6)


def managed(*texts: str) -> list[ManagedDevice]:
    return [
        ManagedDevice(
            name=f"devices/{text.replace(':', '-')}",
            device=Device.from_str(text),
            logical=True,
            torch_device=DISK if text == "disk" else "cpu",
            threads=1,
            total_bytes=1000,
            budget_bytes=1000,
        )
        for text in texts
    ]


DEVICES = managed("cpu", "cuda:1", "xpu:0", "cuda:0", "mps:0", "disk")

LAYERS = tuple(range(12))


def part(
    name: str, size_bytes: int, *, others: Sequence[str] = (), filed: bool = True
) -> TensorPart:
    return TensorPart(names=(name, *others), size_bytes=size_bytes, as_filed=filed)


ENCODER = Structure(
    tensors=(
        part("embeddings.word.weight", 40, others=("head.decoder.weight",)),
        TensorPart(
            names=("embeddings.position_ids",), size_bytes=8, is_buffer=True, as_filed=False
        ),
        *(part(f"encoder.layer.{i}.dense.weight", 10) for i in LAYERS),
        part("head.bias", 2),
    ),
    blocks=("embeddings", *(f"encoder.layer.{i}" for i in LAYERS)),
    units=(
        "embeddings.word",
        "embeddings",
        *(f"encoder.layer.{i}.dense" for i in LAYERS),
        "head",
    ),
)
"""A tied embedding of 40 bytes, 12 layers of 10, a head of 2, and a buffer of 8: 170 bytes."""

PRICE = Price(resting_bytes=170, peak_bytes=175, structure=ENCODER)


def placed(
    placement: PlacementLike,
    *,
    price: Price | None = PRICE,
    devices: Sequence[ManagedDevice] = DEVICES,
    budgets: Sequence[int] = (),
) -> tuple[PlacedAs, ...]:
    read: Placement | None = read_placement(placement)
    return expand(
        read,
        price=price,
        devices=devices,
        budgets=budgets or [managed.budget_bytes for managed in devices],
    )


def homes(placement: PlacementLike, devices: Sequence[ManagedDevice] = DEVICES) -> tuple[int, ...]:
    """Where a placement of whole models has its alternatives."""
    found = placed(placement, devices=devices)
    for each in found:
        home = each.target.home
        assert each.target == Target.whole(home)
        assert each.charges == {home: PRICE.peak_bytes}
        assert each.prefixes == {home: ("",)}
    return tuple(each.target.home for each in found)


def refusal(placement: PlacementLike, **given: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        placed(placement, **given)  # type: ignore[arg-type]
    return caught.value


def the_only(placement: PlacementLike, **given: object) -> PlacedAs:
    (only,) = placed(placement, **given)  # type: ignore[arg-type]
    return only


class TestWholeModels:
    @pytest.mark.parametrize("placement", [None, "auto", {"strategy": "auto"}])
    def test_without_a_choice_every_device_that_runs_will_do_accelerators_first(
        self, placement: PlacementLike
    ) -> None:
        assert homes(placement) == (CUDA_1, CUDA_0, XPU, MPS, CPU)

    def test_auto_among_some_keeps_their_order(self) -> None:
        assert homes({"strategy": "auto", "devices": ["cpu", "cuda:0"]}) == (CPU, CUDA_0)

    def test_auto_among_kinds_takes_each_device_once(self) -> None:
        among = {"strategy": "auto", "devices": ["cuda:0", "cuda"]}
        assert homes(among) == (CUDA_0, CUDA_1)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("cuda:0", (CUDA_0,)),
            ("cuda:1", (CUDA_1,)),
            ("cuda", (CUDA_1, CUDA_0)),
            ("cpu", (CPU,)),
            ("cpu:0", (CPU,)),
            ("xpu", (XPU,)),
            ("mps", (MPS,)),
        ],
    )
    def test_a_device_is_itself_and_a_kind_is_any_of_its_kind(
        self, text: str, expected: tuple[int, ...]
    ) -> None:
        assert homes(text) == expected

    @pytest.mark.parametrize(
        "placement",
        ["cuda:2", "cpu:3", "xpu:1", {"strategy": "auto", "devices": ["cpu", "cuda:2"]},
         {"encoder": "cuda:2", "": "cpu"}],
    )  # fmt: skip
    def test_a_device_the_server_has_not_is_refused_with_those_it_has(
        self, placement: PlacementLike
    ) -> None:
        found = refusal(placement)
        assert found.reason is Reason.PLACEMENT_INVALID
        assert found.code is Code.FAILED_PRECONDITION
        assert "no device" in found.text
        assert "cpu, cuda:1, xpu:0, cuda:0, mps:0, disk" in found.text
        assert [v.field for v in found.violations] == ["placement"]

    def test_the_only_device_is_the_choice(self) -> None:
        assert homes(None, managed("cpu")) == (0,)

    def test_a_model_that_cannot_be_priced_is_placed_and_charges_nothing(self) -> None:
        (cuda_1, *_) = placed(None, price=None)
        assert cuda_1.charges == {CUDA_1: 0}


class TestMaps:
    def test_the_longest_whole_component_wins_and_the_empty_key_is_the_rest(self) -> None:
        found = the_only({"encoder.layer.1": "cuda:0", "": "cpu"})
        target = found.target
        assert target.device_of("encoder.layer.1.dense.weight") == CUDA_0
        for name in ("encoder.layer.10.dense.weight", "encoder.layer.11.dense.weight", "head.bias"):
            assert target.device_of(name) == CPU
        assert found.charges == {CUDA_0: 10 + 5, CPU: 160}

    def test_home_is_the_device_of_the_first_key_that_is_no_disk(self) -> None:
        layers = {f"encoder.layer.{i}": "disk" for i in LAYERS}
        found = the_only({**layers, "head": "cpu", "embeddings": "cpu", "encoder": "cuda:0"})
        assert found.target.home == CPU

    def test_a_target_has_no_overlapping_prefixes(self) -> None:
        found = the_only({"encoder": "cpu", "encoder.layer.3": "cuda:0", "": "cuda:1"})
        parts = [prefix for prefix, _ in found.target.parts]
        assert parts == [
            "embeddings",
            "head",
            *(f"encoder.layer.{i}" for i in LAYERS),
        ]
        assert found.prefixes[CUDA_0] == ("encoder.layer.3",)
        assert found.prefixes[CUDA_1] == ("embeddings", "head")

    def test_what_is_together_is_named_by_its_subtree(self) -> None:
        found = the_only({f"encoder.layer.{i}": "cpu" for i in LAYERS} | {"": "cuda:0"})
        assert found.prefixes == {CUDA_0: ("embeddings", "head"), CPU: ("encoder",)}

    def test_keys_may_name_a_single_tensor(self) -> None:
        found = the_only({"": "cpu", "head.bias": "cuda:0"})
        assert found.target.device_of("head.bias") == CUDA_0

    def test_charges_are_resting_peak_extra_and_staging_to_the_byte(self) -> None:
        found = the_only({"": "cpu", "encoder": "disk"})
        # 40 + 8 + 2 resting, 5 while loading, 10 for the largest unit that comes from the disk.
        assert found.charges == {CPU: 65, ON_DISK: 120}
        assert found.prefixes[ON_DISK] == ("encoder",)

    def test_a_buffer_that_the_file_has_not_stays_home_when_its_module_is_on_the_disk(self) -> None:
        found = the_only({"": "disk", "encoder": "cpu"})
        assert found.charges[ON_DISK] == 42
        assert found.charges[CPU] == 120 + 8 + 5 + 42

    @pytest.mark.parametrize("text", ["cuda:0", "cpu"])
    def test_a_map_of_one_device_is_that_device(self, text: str) -> None:
        whole = the_only({"embeddings": text, "encoder": text, "head": text})
        assert whole == the_only(text)

    def test_a_map_of_one_kind_is_any_of_that_kind(self) -> None:
        assert homes({"": "cuda"}) == (CUDA_1, CUDA_0)

    def test_a_kind_in_a_map_of_several_is_its_first_ordinal(self) -> None:
        found = the_only({"encoder": "cuda", "": "cpu"})
        assert found.target.devices == (CUDA_0, CPU)
        one_xpu = managed("cpu", "xpu:3")
        assert the_only({"encoder": "xpu", "": "cpu"}, devices=one_xpu).target.home == 1

    def test_devices_of_a_map_that_are_one_place_are_one(self) -> None:
        assert the_only({"encoder": "cpu:0", "": "cpu"}).target == Target.whole(CPU)
        assert the_only({"encoder": "cuda", "": "cuda:0"}).target == Target.whole(CUDA_0)

    def test_uncovered_parameters_are_named_and_counted(self) -> None:
        found = refusal({"embeddings": "cpu", "encoder.layer.0": "cuda:0"})
        assert found.reason is Reason.PLACEMENT_INVALID
        assert "no key covers 12 of 14 parameters: encoder.layer.1.dense.weight," in found.text
        assert "and 7 more" in found.text

    def test_keys_that_match_nothing_are_named_with_what_they_may_have_meant(self) -> None:
        found = refusal({"embedding": "cpu", "encoder.layr.3": "cuda:0", "": "cpu"})
        assert "key 'embedding' matches nothing in the model; did you mean 'embeddings'?" in (
            found.text
        )
        assert "'encoder.layr.3'" in found.text
        assert "did you mean 'encoder.layer.3'?" in found.text
        assert [v.field for v in found.violations] == ["placement", "placement"]

    def test_part_of_a_component_is_no_prefix(self) -> None:
        found = refusal({"enc": "cuda:0", "encoder.layer.": "cuda:0", "": "cpu"})
        assert "key 'enc' matches nothing" in found.text
        assert "key 'encoder.layer.' matches nothing" in found.text

    def test_a_model_in_parts_is_in_one_worker(self) -> None:
        devices = managed("cpu", "cuda:0", "cuda:1", "disk")
        devices[2] = replace(devices[2], worker="other")
        parts = {"encoder": "cuda:1", "": "cpu"}
        caught = refusal(parts, devices=devices)
        assert caught.reason is Reason.PLACEMENT_INVALID
        assert "worker processes models and other" in caught.text
        assert len(placed({"encoder": "cuda:0", "": "cpu"}, devices=devices)) == 1
        # The disk is of every worker.
        assert len(placed({"encoder": "disk", "": "cuda:1"}, devices=devices)) == 1
        assert len(placed(None, devices=devices)) == 3  # Whole, it may be in any of them.

    def test_an_automatic_cut_stays_in_the_worker_of_the_first_device(self) -> None:
        devices = managed("cuda:0", "cuda:1", "cuda:2")
        devices[1] = replace(devices[1], worker="other")
        (way,) = placed("balanced", devices=devices, budgets=[120, 1000, 120])
        assert set(way.charges) == {0, 2}

    def test_both_kinds_of_mistake_are_told_at_once(self) -> None:
        found = refusal({"encodr": "cpu", "embeddings": "cpu"})
        assert len(found.violations) == 2

    def test_a_flood_of_wrong_keys_makes_a_short_text(self) -> None:
        found = refusal({f"{i}.{'x' * 500}": "cpu" for i in range(5000)} | {"": "cuda:0"})
        assert "4995 more keys match nothing" in found.text
        assert len(found.text) < 2000

    def test_a_map_of_one_device_is_checked_as_well(self) -> None:
        assert "'encodr'" in refusal({"encodr": "cpu", "": "cpu"}).text
        assert "no key covers 12 of 14" in refusal({"embeddings": "cpu", "head": "cpu"}).text

    def test_a_tied_parameter_on_two_devices_is_refused_with_both_its_names(self) -> None:
        found = refusal({"head": "cuda:0", "": "cpu"})
        assert found.reason is Reason.PLACEMENT_INVALID
        for word in ("embeddings.word.weight", "head.decoder.weight", "cpu", "cuda:0"):
            assert word in found.text

    def test_a_tied_parameter_is_covered_by_any_of_its_names(self) -> None:
        found = the_only({"encoder": "cpu", "head": "cuda:0"})
        assert found.target.device_of("embeddings.word.weight") == CUDA_0

    def test_buffers_that_no_key_covers_go_with_their_module(self) -> None:
        found = the_only({"embeddings.word": "cuda:0", "encoder": "cpu", "head": "cuda:0"})
        assert found.target.device_of("embeddings.position_ids") == CUDA_0

    def test_a_parameter_that_the_file_has_in_another_form_cannot_be_on_the_disk(self) -> None:
        structure = Structure(tensors=(part("a.weight", 4), part("b.weight", 4, filed=False)))
        price = Price(resting_bytes=8, peak_bytes=8, structure=structure)
        found = refusal({"a": "cpu", "b": "disk"}, price=price)
        assert found.reason is Reason.PLACEMENT_INVALID
        assert "b.weight cannot be on the disk" in found.text
        assert the_only({"a": "disk", "b": "cpu"}, price=price).charges == {CPU: 8, ON_DISK: 4}

    @pytest.mark.parametrize("price", [PRICE, None, Price(resting_bytes=1, peak_bytes=1)])
    def test_a_map_of_the_disk_alone_is_refused(self, price: Price | None) -> None:
        found = refusal({"encoder": "disk", "": "disk"}, price=price)
        assert found.reason is Reason.PLACEMENT_INVALID
        assert "nothing can run" in found.text

    def test_an_empty_map_is_refused(self) -> None:
        found = refusal(ComponentDevice.from_multiple(DeviceMap({})))
        assert found.reason is Reason.PLACEMENT_INVALID

    def test_a_runtime_that_cannot_split_takes_no_map_but_of_the_whole(self) -> None:
        price = Price(resting_bytes=10, peak_bytes=12)
        for device_map in ({"encoder": "cpu", "": "cuda:0"}, {"any": "cpu"}):
            found = refusal(device_map, price=price)
            assert found.reason is Reason.PLACEMENT_INVALID
            assert "cannot split" in found.text
        assert the_only({"": "cpu"}, price=price).charges == {CPU: 12}

    def test_a_map_without_a_price_is_kept_as_it_is(self) -> None:
        found = the_only({"nobody.knows": "cuda:0", "": "cpu"}, price=None)
        assert found.target.parts == (("nobody.knows", CUDA_0), ("", CPU))
        assert found.charges == {CUDA_0: 0, CPU: 0}


class TestAutomaticCuts:
    def budgets(self, **given: int) -> list[int]:
        names = {"cpu": CPU, "cuda_1": CUDA_1, "cuda_0": CUDA_0, "disk": ON_DISK}
        budgets = [0] * len(DEVICES)
        for name, budget in given.items():
            budgets[names[name]] = budget
        return budgets

    def test_balanced_shares_by_budget_and_sequential_fills(self) -> None:
        among = {"devices": ["cuda:0", "cpu"]}
        budgets = self.budgets(cuda_0=200, cpu=200)
        balanced = the_only({"strategy": "balanced", **among}, budgets=budgets)
        # 50 with what is tied to it, then three layers with the 5 of the load beside them.
        assert balanced.charges == {CUDA_0: 85, CPU: 90}
        sequential = the_only({"strategy": "sequential", **among}, budgets=budgets)
        assert sequential == the_only("cuda:0")

    def test_sequential_leaves_room_on_the_home_device_for_what_loading_needs(self) -> None:
        budgets = self.budgets(cuda_0=100, cpu=80)
        found = the_only({"strategy": "sequential", "devices": ["cuda:0", "cpu"]}, budgets=budgets)
        assert found.charges == {CUDA_0: 95, CPU: 80}

    def test_what_fits_nowhere_goes_to_the_disk_if_that_is_last(self) -> None:
        budgets = self.budgets(cuda_0=100, cpu=30, disk=1000)
        among = {"strategy": "sequential", "devices": ["cuda:0", "cpu", "disk"]}
        found = the_only(among, budgets=budgets)
        # 50 + 3 x 10 on the first, with 5 for the load and 10 for a layer that visits.
        assert found.charges == {CUDA_0: 95, CPU: 30, ON_DISK: 60}
        assert found.target.home == CUDA_0

    @pytest.mark.parametrize("strategy", ["balanced", "sequential"])
    def test_without_the_disk_it_is_refused_with_the_numbers(self, strategy: str) -> None:
        budgets = self.budgets(cuda_0=100, cpu=30)
        found = refusal({"strategy": strategy, "devices": ["cuda:0", "cpu"]}, budgets=budgets)
        assert found.reason is Reason.MODEL_NEVER_FITS
        assert {v.field for v in found.violations} == {"devices/cuda-0", "devices/cpu"}
        assert found.metadata["budget_bytes"] in ("100", "30")
        assert int(found.metadata["needed_bytes"]) > int(found.metadata["budget_bytes"])
        assert "175 bytes" in found.text

    def test_without_devices_all_but_the_disk_take_part(self) -> None:
        found = the_only("balanced", budgets=[200] * 6)
        assert found.target.home == CUDA_1
        assert ON_DISK not in found.target.devices

    @pytest.mark.parametrize("strategy", ["balanced", "sequential"])
    def test_on_one_device_a_cut_is_the_whole_model(self, strategy: str) -> None:
        found = the_only({"strategy": strategy, "devices": ["cpu"]})
        assert found == the_only("cpu")

    def test_a_model_that_cannot_be_cut_is_one_piece(self) -> None:
        price = Price(resting_bytes=10, peak_bytes=12)
        among = {"devices": ["cuda:0", "cpu"]}
        budgets = self.budgets(cuda_0=12, cpu=100)
        assert the_only(
            {"strategy": "sequential", **among}, price=price, budgets=budgets
        ).charges == {CUDA_0: 12}
        assert the_only(
            {"strategy": "balanced", **among}, price=price, budgets=budgets
        ).charges == {CPU: 12}
        found = refusal(
            {"strategy": "balanced", **among},
            price=price,
            budgets=self.budgets(cuda_0=11, cpu=5),
        )
        assert found.reason is Reason.MODEL_NEVER_FITS

    def test_a_cut_without_a_price_waits_on_the_first_device(self) -> None:
        found = the_only({"strategy": "balanced", "devices": ["cpu", "cuda:0"]}, price=None)
        assert (found.target, found.charges) == (Target.whole(CPU), {CPU: 0})

    def test_what_cannot_be_on_the_disk_is_named_when_it_would_have_to(self) -> None:
        structure = Structure(tensors=(part("a.weight", 4), part("b.weight", 4, filed=False)))
        found = refusal(
            {"strategy": "sequential", "devices": ["cpu", "disk"]},
            price=Price(resting_bytes=8, peak_bytes=8, structure=structure),
            budgets=self.budgets(cpu=7, disk=100),
        )
        assert found.reason is Reason.MODEL_NEVER_FITS
        assert "b.weight would have to be on the disk" in found.text or "8 bytes" in found.text


CUDA = read_placement("cuda:1")


class TestDeviceMapOption:
    def test_without_the_option_the_placement_holds(self) -> None:
        assert effective_placement(CUDA, {"dtype": "float32"}) == (CUDA, {"dtype": "float32"}, ())

    @pytest.mark.parametrize("name", ["device_map", "device"])
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, None),
            (0, "cuda:0"),
            (1.0, "cuda:1"),
            ("cpu", "cpu"),
            ("auto", "auto"),
            ("balanced", "balanced"),
            ("sequential", "sequential"),
            ({"": 0}, {"": "cuda:0"}),
            ({"encoder": 1.0, "": "cpu"}, {"encoder": "cuda:1", "": "cpu"}),
            ({"encoder": "disk", "": "cpu"}, {"encoder": "disk", "": "cpu"}),
        ],
    )
    def test_the_option_beats_the_placement_by_presence_with_a_warning(
        self, name: str, value: object, expected: PlacementLike
    ) -> None:
        chosen, rest, (warning,) = effective_placement(CUDA, {name: value, "dtype": "float32"})
        assert chosen == read_placement(expected)
        assert rest == {"dtype": "float32"}
        assert f"option {name} beats" in warning
        assert "cuda:1" in warning

    def test_nothing_is_beaten_where_nothing_was_said(self) -> None:
        assert effective_placement(None, {"device_map": "cpu"}) == (read_placement("cpu"), {}, ())

    def test_options_are_left_as_they_were(self) -> None:
        options: Mapping[str, object] = {"device_map": "cpu", "dtype": "float32"}
        effective_placement(None, options)
        assert options == {"device_map": "cpu", "dtype": "float32"}

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ("gpu0", "Unknown device type"),
            ("meta", "Unknown device type"),
            ("balanced_low_0", "balanced_low_0 is not supported"),
            ("disk", "disk"),
            (-1, '"cpu"'),
            (128, "0 to 127"),
            (1.5, "number of a cuda device"),
            (True, "True"),
            ([0, 1], "table of parts"),
            ({}, "at least one part"),
            ({"a": None}, "'a'"),
            ({"a": True}, "'a'"),
            ({"a": 1.5}, "'a'"),
            ({"a": "meta"}, "'a'"),
            ({"a": "auto"}, "'a'"),
        ],
    )
    def test_what_says_no_placement_is_an_invalid_field(self, value: object, text: str) -> None:
        with pytest.raises(Refusal) as caught:
            effective_placement(CUDA, {"device_map": value})
        assert caught.value.reason is Reason.INVALID_FIELD
        assert [v.field for v in caught.value.violations] == ["model.options.device_map"]
        assert text in caught.value.text

    def test_both_at_once_are_refused(self) -> None:
        with pytest.raises(Refusal, match="one of them") as caught:
            effective_placement(None, {"device_map": None, "device": None})
        assert [v.field for v in caught.value.violations] == ["model.options.device_map"]
