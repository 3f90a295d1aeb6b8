from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_models import MLP_FACTORY, TinyMlp, make_tiny_mlp

from modelyard_server.runtimes.api import (
    LoadCancelled,
    LoadedModel,
    ModelFilesError,
    ModelSpec,
    OptionError,
)
from modelyard_server.runtimes.conversion import to_torch, to_value
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.runtimes.torch_runtime import TorchRuntime

HERE = "tests.unit.test_runtime_torch"


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.embed(ids))
        return result


class LooksAtValues(torch.nn.Module):
    """Cannot be built on meta: its constructor asks a tensor for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.offset = float(torch.ones(1).item())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.offset


class HangsTensorOnItself(torch.nn.Module):
    """Builds on meta, but a plain attribute would stay there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.table = torch.arange(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.table


class Answers(torch.nn.Module):
    """Answers in the form it is asked for."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.form = form

    def forward(self, a: torch.Tensor, b: torch.Tensor | None = None) -> Any:
        total = a * self.weight + (0 if b is None else b)
        forms: dict[str, Any] = {
            "dict": {"total": total, "a": a},
            "tuple": (total, a),
            "list": [total],
            "tensor": total,
            "none": None,
            "number": 3,
            "mixed": (total, 3),
            "nothing": (),
            "complex": total.to(torch.complex64),
            "the weight itself": self.weight,
        }
        return forms[self.form]


class Integers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


def broken() -> torch.nn.Module:
    raise OSError("no such thing")


def no_module() -> object:
    return 3


NAMES = ["Tied", "LooksAtValues", "HangsTensorOnItself", "Answers", "Integers", "broken"]
ALLOWED = frozenset(
    {MLP_FACTORY, f"{HERE}:no_module", f"{HERE}:missing", "no.such.module:f"}
    | {f"{HERE}:{name}" for name in NAMES}
)


def spec_of(folder: Path, factory: str, **options: Any) -> ModelSpec:
    return ModelSpec(
        name="m", runtime="torch", folder=folder, options={"factory": factory} | options
    )


def load(spec: ModelSpec) -> LoadedModel:
    """Loads, and checks that the price was right."""
    runtime = TorchRuntime(allowed_factories=ALLOWED)
    runtime.check(spec)
    price = runtime.price(spec)
    model = runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)
    assert {0: price.resting_bytes} == model.measured_bytes()
    assert price.structure is not None
    assert price.structure.size_bytes == price.resting_bytes
    assert price.peak_bytes >= price.resting_bytes
    return model


def floats(name: str, *values: float) -> TensorValue:
    return to_value(name, torch.tensor(values))


def test_it_computes_what_torch_computes(tmp_path: Path) -> None:
    folder = make_tiny_mlp(tmp_path, seed=3)
    reference = TinyMlp(scale=2.0)
    reference.load_state_dict(load_file(folder / "model.safetensors"))
    x = torch.randn(5, 8)
    (output,) = load(spec_of(folder, MLP_FACTORY, factory_options={"scale": 2.0})).run(
        (to_value("x", x),), {}
    )
    assert output.name == "output_0"
    with torch.inference_mode():
        assert torch.equal(to_torch(output), reference(x))


@pytest.mark.parametrize("saved", ["embed.weight", "head.weight", "both"])
def test_of_tied_names_one_is_enough(tmp_path: Path, saved: str) -> None:
    weight = torch.arange(40.0).view(10, 4)
    both = {"embed.weight": weight, "head.weight": weight.clone()}
    save_file(both if saved == "both" else {saved: both[saved]}, tmp_path / "model.safetensors")
    model = load(spec_of(tmp_path, f"{HERE}:Tied"))
    assert model.measured_bytes() == {0: 320 if saved == "both" else 160}
    (output,) = model.run((to_value("ids", torch.tensor([3])),), {})
    assert torch.equal(to_torch(output)[0], weight @ weight[3])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("LooksAtValues", [3.0, 5.0, 7.0]), ("HangsTensorOnItself", [2.0, 5.0, 8.0])],
)
def test_modules_that_meta_does_not_suit_are_built_for_real(
    tmp_path: Path, name: str, expected: list[float]
) -> None:
    save_file({"weight": torch.full((3,), 2.0)}, tmp_path / "model.safetensors")
    spec = spec_of(tmp_path, f"{HERE}:{name}")
    price = TorchRuntime(allowed_factories=ALLOWED).price(spec)
    assert price.peak_bytes == 2 * price.resting_bytes
    (output,) = load(spec).run((floats("", 1.0, 2.0, 3.0),), {})
    assert to_torch(output).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.float64])
def test_weights_keep_the_type_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"weight": torch.ones(3, dtype=dtype)}, tmp_path / "model.safetensors")
    model = load(spec_of(tmp_path, f"{HERE}:Integers"))
    assert model.measured_bytes() == {0: 3 * dtype.itemsize}
    (output,) = model.run((to_value("x", torch.ones(3, dtype=dtype)),), {})
    assert to_torch(output).dtype == dtype


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("form", "outputs", "names"),
    [
        ("dict", None, ["total", "a"]),
        ("dict", ["a"], ["a"]),
        ("dict", ["a", "total"], ["a", "total"]),
        ("tuple", None, ["output_0", "output_1"]),
        ("tuple", ["x", "y"], ["x", "y"]),
        ("list", ["x"], ["x"]),
        ("tensor", None, ["output_0"]),
        ("tensor", "x", ["x"]),
        ("the weight itself", None, ["output_0"]),
    ],
)
def test_outputs_are_named(
    answers: Path, form: str, outputs: list[str] | None, names: list[str]
) -> None:
    spec = spec_of(answers, f"{HERE}:Answers", factory_options={"form": form}, outputs=outputs)
    made = load(spec).run((floats("a", 1.0, 2.0, 3.0),), {})
    assert [value.name for value in made] == names


@pytest.mark.parametrize(
    ("form", "outputs"),
    [
        ("none", None),
        ("number", None),
        ("mixed", None),
        ("nothing", None),
        ("complex", None),
        ("dict", ["b"]),
        ("tuple", ["x"]),
    ],
)
def test_other_answers_are_the_models_failure(
    answers: Path, form: str, outputs: list[str] | None
) -> None:
    spec = spec_of(answers, f"{HERE}:Answers", factory_options={"form": form}, outputs=outputs)
    with pytest.raises(TypeError):
        load(spec).run((floats("a", 1.0, 2.0, 3.0),), {})


def test_inputs_are_given_by_name(answers: Path) -> None:
    model = load(spec_of(answers, f"{HERE}:Answers", factory_options={"form": "tensor"}))
    pair = (floats("b", 10.0, 10.0, 10.0), floats("a", 1.0, 2.0, 3.0))
    assert to_torch(model.run(pair, {})[0]).tolist() == [11.0, 12.0, 13.0]
    assert to_torch(model.run((floats("", 1.0, 2.0, 3.0),), {})[0]).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("inputs", [None, ["a", "b"]])
@pytest.mark.parametrize(
    "given",
    [
        (floats("c", 1.0),),
        (floats("b", 1.0),),
        (floats("a", 1.0), floats("", 1.0)),
        (floats("a", 1.0), floats("b", 1.0), floats("c", 1.0)),
        (TensorValue(name="a", dtype=DType.TEXT, shape=(1,), data=("x",)), floats("b", 1.0)),
    ],
    ids=range(5),
)
def test_inputs_that_do_not_fit_are_refused_before_the_model_runs(
    answers: Path, inputs: list[str] | None, given: tuple[TensorValue, ...]
) -> None:
    model = load(spec_of(answers, f"{HERE}:Answers", inputs=inputs))
    with pytest.raises(TensorError):
        model.run(given, {})


def test_parameters_are_refused(answers: Path) -> None:
    with pytest.raises(OptionError):
        load(spec_of(answers, f"{HERE}:Answers")).run((floats("a", 1.0),), {"seed": 1})


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({}, "factory"),
        ({"factory": "os:system"}, "factory"),
        ({"factory": 3}, "factory"),
        ({"factory": MLP_FACTORY, "factory_options": [1]}, "factory_options"),
        ({"factory": MLP_FACTORY, "inputs": ["a", "a"]}, "inputs"),
        ({"factory": MLP_FACTORY, "outputs": []}, "outputs"),
        ({"factory": MLP_FACTORY, "more": 1}, "more"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], option: str, tmp_path: Path) -> None:
    spec = ModelSpec(name="m", runtime="torch", folder=tmp_path, options=options)
    with pytest.raises(OptionError) as caught:
        TorchRuntime(allowed_factories=ALLOWED).check(spec)
    assert caught.value.option == option


def test_a_task_or_no_folder_is_refused(tmp_path: Path) -> None:
    runtime = TorchRuntime(allowed_factories=ALLOWED)
    options = {"factory": MLP_FACTORY}
    for spec in (
        ModelSpec(name="m", runtime="torch", options=options),
        ModelSpec(name="m", runtime="torch", options=options, folder=tmp_path, task="fill-mask"),
    ):
        with pytest.raises(OptionError):
            runtime.check(spec)


@pytest.mark.parametrize(
    "spec_options",
    [
        {"factory": f"{HERE}:broken"},
        {"factory": f"{HERE}:no_module"},
        {"factory": f"{HERE}:missing"},
        {"factory": "no.such.module:f"},
        {"factory": MLP_FACTORY},
        {"factory": f"{HERE}:Answers", "factory_options": {"nonsense": 1}},
        {"factory": f"{HERE}:Tied"},
    ],
    ids=str,
)
def test_a_factory_that_does_not_fit_is_the_files_error(
    answers: Path, spec_options: dict[str, Any]
) -> None:
    runtime = TorchRuntime(allowed_factories=ALLOWED)
    spec = ModelSpec(name="m", runtime="torch", folder=answers, options=spec_options)
    with pytest.raises(ModelFilesError):
        runtime.price(spec)
    with pytest.raises(ModelFilesError):
        runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)


@pytest.mark.parametrize("steps", range(4))
def test_a_load_can_be_stopped_at_every_step(tmp_path: Path, steps: int) -> None:
    runtime = TorchRuntime(allowed_factories=ALLOWED)
    spec = spec_of(make_tiny_mlp(tmp_path, seed=1), MLP_FACTORY)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > steps

    with pytest.raises(LoadCancelled):
        runtime.load(spec, place=Place.on("cpu"), stop=stop)
