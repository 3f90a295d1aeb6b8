"""Tests of models in parts that hold on any two accelerators, without a server.

A subclass whose name begins with Test has them run; it needs a fixture `accelerators`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

from modelyard_server.runtimes.api import LoadedModel
from modelyard_server.runtimes.targets import Place, Structure, Target, staging_bytes
from modelyard_server.runtimes.tensors import TensorError
from tests.support.part_cases import (
    MODULES,
    TASKS,
    assert_released,
    assert_same,
    case_of,
    rows,
)
from tests.support.part_devices import (
    FIRST,
    HOST,
    ON_DISK,
    SECOND,
    Accelerators,
    no_collector,
    nothing_is_left,
    one_thread,
)
from tests.support.part_models import FACTORIES, charges, cut, place_of

__all__ = ["PartsOnAccelerators"]

DISK = frozenset({ON_DISK})

WAYS: tuple[tuple[tuple[int, ...], Literal["blocks", "units", "tensors"]], ...] = (
    ((FIRST,), "blocks"),
    ((FIRST, SECOND), "blocks"),
    ((ON_DISK,), "blocks"),
    ((SECOND, ON_DISK, HOST, FIRST), "blocks"),
    ((SECOND, SECOND, FIRST), "units"),
    ((ON_DISK, SECOND, HOST, FIRST), "units"),
    ((HOST, FIRST, SECOND, ON_DISK), "tensors"),
)
"""What is dealt out to which devices; the rest stays at home."""


class PartsOnAccelerators:
    """See the module."""

    @pytest.fixture(autouse=True)
    def released(self, accelerators: Accelerators) -> Iterator[None]:
        """Checks that what a test loaded has gone, by reference counts alone."""
        with nothing_is_left(accelerators), no_collector(), one_thread():
            yield

    @pytest.mark.parametrize("home", [HOST, FIRST, SECOND])
    @pytest.mark.parametrize("kind", [*TASKS, *FACTORIES])
    def test_a_model_over_devices_answers_as_on_one_and_holds_what_it_is_charged(
        self, tmp_path: Path, accelerators: Accelerators, kind: str, home: int
    ) -> None:
        case = case_of(tmp_path, kind)
        structure, expected = case.structure, case.expected()
        for over, by in WAYS:
            target = cut(structure, home=home, over=over, by=by)
            place = place_of(target, accelerators.torch_devices)
            model = case.load(place)
            charged = charges(structure, place)
            assert model.measured_bytes() == charged
            accelerators.assert_holds(held_of(charged, structure, target))
            for _ in range(2):
                assert_same(case.answer(model), expected, accelerators.tolerance)
            assert model.measured_bytes() == charged
            accelerators.assert_holds(held_of(charged, structure, target))
            close(model, kind)
            accelerators.assert_holds({})

    @pytest.mark.parametrize(
        "kind", ["feature-extraction", "text-generation", f"{MODULES}:FailsInside"]
    )
    def test_a_kept_failure_keeps_nothing_on_any_device(
        self, tmp_path: Path, accelerators: Accelerators, kind: str
    ) -> None:
        case = case_of(tmp_path, kind)
        structure, value = case.structure, case.value
        target = cut(structure, home=FIRST, over=(ON_DISK, SECOND))
        place = place_of(target, accelerators.torch_devices)
        model = case.load(place)
        held = held_of(charges(structure, place), structure, target)
        if kind in TASKS:
            root = model.witnesses()[0].reference()
            assert root is not None
            for module in root.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    # A width that never fits: the failure comes from deep inside.
                    module.normalized_shape = (1_000,)
            del root, module
        else:
            value = rows(-1.0)
        with pytest.raises((RuntimeError, ArithmeticError)) as caught:
            model.run((value,), case.parameters)
        # What was brought in from the disk is gone again.
        accelerators.assert_holds(held)
        assert_released(model)
        accelerators.assert_holds({})
        assert caught.value.__traceback__ is not None

    @pytest.mark.parametrize(
        ("kind", "path"),
        [
            ("image-classification", "vit.layers"),
            (f"{MODULES}:Residual", "layers"),
            (f"{MODULES}:Residual", "last"),
            (f"{MODULES}:Lists", "layers"),
            (f"{MODULES}:Lists", "scales"),
            (f"{MODULES}:Encodes", "encoder.layers"),
            (f"{MODULES}:Attends", "attention.out_proj"),
        ],
    )
    def test_lists_and_parts_that_are_never_called_may_be_mapped_as_wholes(
        self, tmp_path: Path, accelerators: Accelerators, kind: str, path: str
    ) -> None:
        case = case_of(tmp_path, kind)
        structure, expected = case.structure, case.expected()
        for home, elsewhere in ((HOST, FIRST), (FIRST, SECOND), (FIRST, HOST), (SECOND, ON_DISK)):
            for parts in ((("", home), (path, elsewhere)), (("", elsewhere), (path, home))):
                place = place_of(Target(home=home, parts=parts), accelerators.torch_devices)
                model = case.load(place)
                assert model.measured_bytes() == charges(structure, place)
                assert_same(case.answer(model), expected, accelerators.tolerance)
                assert_released(model)

    @pytest.mark.parametrize("kind", ["text-generation", f"{MODULES}:Ties"])
    def test_a_whole_model_on_a_device_has_its_tied_weights_once(
        self, tmp_path: Path, accelerators: Accelerators, kind: str
    ) -> None:
        case = case_of(tmp_path, kind)
        size_bytes = case.runtime.price(case.spec).resting_bytes
        model = case.load(Place.on(accelerators.torch_devices[FIRST]))
        assert model.measured_bytes() == {0: size_bytes}
        accelerators.assert_holds({FIRST: size_bytes})
        assert_released(model)

    def test_a_bad_request_is_refused_on_devices_as_anywhere(
        self, tmp_path: Path, accelerators: Accelerators
    ) -> None:
        case = case_of(tmp_path, "feature-extraction")
        target = cut(case.structure, home=SECOND, over=(FIRST,))
        place = place_of(target, accelerators.torch_devices)
        model = case.load(place)
        with pytest.raises(TensorError):
            model.run((rows(),), {})
        accelerators.assert_holds(charges(case.structure, place))
        assert_released(model)


def held_of(charged: dict[int, int], structure: Structure, target: Target) -> dict[int, int]:
    """What devices hold of what they are charged: the rest is kept free for what visits home."""
    held = dict(charged)
    held[target.home] -= staging_bytes(structure, target, DISK)
    return held


def close(model: LoadedModel, kind: str) -> None:
    """Closes a model, of which nothing may be left."""
    if kind.endswith(":normed"):
        # A cycle of torch's own; the engine collects before it gives up.
        model.close()
        gc.collect()
    else:
        assert_released(model)
