from __future__ import annotations

import errno
from pathlib import Path

import pytest

from modelyard_server.runtimes import identity
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


def test_what_no_memory_can_hold_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def mmap(*_: object, **__: object) -> None:
        # A machine that promises more than it has would be filled before it said so.
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(identity, "mmap", mmap)
    with pytest.raises(MemoryError, match="no 1000 bytes: Cannot allocate memory"):
        IdentityRuntime().load(spec(size_bytes=1000), place=Place.on("cpu"), stop=lambda: False)


def test_a_load_can_be_stopped_while_memory_is_filled() -> None:
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 3

    with pytest.raises(LoadCancelled):
        IdentityRuntime().load(spec(size_bytes=8 << 20), place=Place.on("cpu"), stop=stop)
    assert len(asked) == 4


def test_on_another_device_its_ballast_is_a_tensor_of_that_device() -> None:
    model = IdentityRuntime().load(
        spec(size_bytes=1000), place=Place.on("meta"), stop=lambda: False
    )
    assert model.measured_bytes() == {0: 1000}
    assert len(model.witnesses()) == 1
    model.close()
    assert model.measured_bytes() == {0: 0}
