"""Models to load in parts: one for each task and factory, with an input and what to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modelyard_server.runtimes.api import JsonValue, LoadedModel, ModelSpec, Runtime
from modelyard_server.runtimes.conversion import to_torch, to_value
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.targets import Place, Structure
from modelyard_server.runtimes.tensors import DType, TensorValue
from modelyard_server.runtimes.torch_runtime import TorchRuntime
from tests.support.part_models import FACTORIES, MIXES, WIDE, WIDTH, make_factory_model
from tests.support.tiny_models import (
    make_tiny_bert,
    make_tiny_gpt2,
    make_tiny_masked_lm,
    make_tiny_vit,
)

__all__ = [
    "MODULES",
    "TASKS",
    "TORCH",
    "TRANSFORMERS",
    "Case",
    "assert_released",
    "assert_same",
    "case_of",
    "rows",
    "text",
]

GENERATION = "text-generation"
MODULES = "tests.support.part_models"

TRANSFORMERS = TransformersRuntime()
TORCH = TorchRuntime(allowed_factories=frozenset([*FACTORIES, MIXES, WIDE]))


def text(*texts: str) -> TensorValue:
    return TensorValue(name="text", dtype=DType.TEXT, shape=(len(texts),), data=texts)


def image() -> TensorValue:
    data = bytes(index * 7 % 251 for index in range(2 * 16 * 16 * 3))
    return TensorValue(name="image", dtype=DType.UINT8, shape=(2, 16, 16, 3), data=data)


def make_classifier(folder: Path, *, seed: int) -> Path:
    return make_tiny_bert(folder, seed=seed, num_labels=3)


TASKS: dict[str, tuple[Callable[..., Path], TensorValue]] = {
    "feature-extraction": (make_tiny_bert, text("the cat sat", "good dog")),
    "text-classification": (make_classifier, text("the cat sat", "good dog")),
    "fill-mask": (make_tiny_masked_lm, text("the [MASK] sat", "good [MASK]")),
    GENERATION: (make_tiny_gpt2, text("the cat sat on", "good dog")),
    "image-classification": (make_tiny_vit, image()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and something to ask it.

    Attributes:
        runtime: what executes it.
        spec: the model.
        value: its only input.
        parameters: of a run.
    """

    runtime: Runtime
    spec: ModelSpec
    value: TensorValue
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def structure(self) -> Structure:
        """What it is made of."""
        price = self.runtime.price(self.spec)
        assert price.structure is not None
        assert price.structure.size_bytes == price.resting_bytes
        return price.structure

    def load(self, place: Place) -> LoadedModel:
        """Loads it."""
        return self.runtime.load(self.spec, place=place, stop=lambda: False)

    def answer(self, model: LoadedModel) -> tuple[TensorValue, ...]:
        """What the model, loaded in some place, makes of the input."""
        return model.run((self.value,), self.parameters)

    def expected(self) -> tuple[TensorValue, ...]:
        """What the whole model makes of it on host memory."""
        return self.answer(self.load(Place.on("cpu")))


def case_of(folder: Path, kind: str, *, name: str = "m") -> Case:
    """A model in a new folder of its name: of a task of transformers, or of a factory of torch."""
    if kind in TASKS:
        make, value = TASKS[kind]
        spec = ModelSpec(
            name=name, runtime="transformers", task=kind, folder=make(folder / name, seed=1)
        )
        # Each token is one more run: three are the first, the next and the one after that.
        parameters: dict[str, JsonValue] = {"max_new_tokens": 3} if kind == GENERATION else {}
        return Case(runtime=TRANSFORMERS, spec=spec, value=value, parameters=parameters)
    spec = ModelSpec(
        name=name,
        runtime="torch",
        folder=make_factory_model(folder / name, kind, seed=1),
        options={"factory": kind},
    )
    return Case(runtime=TORCH, spec=spec, value=rows())


def rows(sign: float = 1.0) -> TensorValue:
    """The input of every factory's module."""
    return to_value("", sign * torch.linspace(0.1, 2.0, 3 * WIDTH).view(3, WIDTH))


def assert_same(
    left: tuple[TensorValue, ...], right: tuple[TensorValue, ...], tolerance: float = 1e-5
) -> None:
    """Checks that two answers are the same, and their numbers so to a tolerance."""
    assert [(value.name, value.dtype, value.shape) for value in left] == [
        (value.name, value.dtype, value.shape) for value in right
    ]
    for one, other in zip(left, right, strict=True):
        if one.dtype is DType.TEXT:
            assert one.data == other.data
        else:
            difference = (to_torch(one).double() - to_torch(other).double()).abs().max().item()
            assert difference <= tolerance


def assert_released(model: LoadedModel) -> None:
    """Closes a model, of which nothing may be left."""
    watched = model.witnesses()
    assert all(witness.reference() is not None for witness in watched)
    model.close()
    assert all(witness.reference() is None for witness in watched)
    assert model.measured_bytes() == {}
