from __future__ import annotations

from pathlib import Path

import pytest

from modelyard_server.runtimes.api import LoadCancelled, ModelSpec, OptionError, Price
from modelyard_server.runtimes.identity import IdentityRuntime
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorValue


def spec(**options: object) -> ModelSpec:
    return ModelSpec(name="m", runtime="identity", options=options)


def test_the_outputs_are_the_inputs() -> None:
    model = IdentityRuntime().load(spec(), place=Place.on("cpu"), stop=lambda: False)
    inputs = (
        TensorValue(name="a", dtype=DType.TEXT, shape=(1,), data=("x",)),
        TensorValue(name="b", dtype=DType.UINT8, shape=(2,), data=b"yz"),
    )
    outputs = model.run(inputs, {})
    assert outputs == inputs
    assert outputs[1] is inputs[1]
    assert model.measured_bytes() == {0: 0}


def test_its_ballast_is_held_counted_and_released() -> None:
    runtime = IdentityRuntime()
    big = spec(size_bytes=100_000.0)
    runtime.check(big)
    assert runtime.price(big) == Price(resting_bytes=100_000, peak_bytes=100_000)
    model = runtime.load(big, place=Place.on("cpu"), stop=lambda: False)
    assert model.measured_bytes() == {0: 100_000}
    watched = model.witnesses()
    assert [witness.reference() is not None for witness in watched] == [True]
    model.close()
    assert all(witness.reference() is None for witness in watched)
    assert model.measured_bytes() == {0: 0}


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        (spec(size_bytes=-1), "size_bytes"),
        (spec(size_bytes="1"), "size_bytes"),
        (spec(size_bytes=True), "size_bytes"),
        (spec(size_bytes=1.5), "size_bytes"),
        (spec(size=1), "size"),
        (ModelSpec(name="m", runtime="identity", task="fill-mask"), "task"),
        (ModelSpec(name="m", runtime="identity", folder=Path("x")), "folder"),
    ],
)
def test_wrong_options_are_named(wrong: ModelSpec, option: str) -> None:
    with pytest.raises(OptionError) as caught:
        IdentityRuntime().check(wrong)
    assert caught.value.option == option


def test_parameters_are_refused() -> None:
    model = IdentityRuntime().load(spec(), place=Place.on("cpu"), stop=lambda: False)
    with pytest.raises(OptionError):
        model.run((TensorValue(name="", dtype=DType.UINT8, shape=(), data=b"x"),), {"top_k": 1})


def test_a_load_can_be_stopped() -> None:
    with pytest.raises(LoadCancelled):
        IdentityRuntime().load(spec(size_bytes=10), place=Place.on("cpu"), stop=lambda: True)
