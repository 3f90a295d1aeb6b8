"""What runs take, through the whole server: predicted, measured while it serves, corrected.

Of models whose runs take more than was said, in threads and in worker processes.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.config_text import CPU, ROOTS, model_table, toml
from tests.support.faulty_models import make_weights
from tests.support.measured_modules import FACTORIES
from tests.support.server import RunningApp, eventually, refusal_of, running_app
from tests.support.tiny_models import make_tiny_bert

from modelyard import Admin, ModelFailed
from modelyard_server.runtimes.hf import activations
from modelyard_server.weights.activation_model import ActivationModel

ENGINES = pytest.mark.parametrize("engine", ["thread", "process"])
ALLOWED = f"\n[runtimes.torch]\nallowed_factories = {toml(list(FACTORIES))}\n"

WIDTH = 1 << 16
ROW_BYTES = WIDTH * 4
"""What a row of the spending model takes, but for a few bytes."""


def engine_table(kind: str) -> str:
    return f'\n[engine]\nkind = "{kind}"\n'


def spending(width: int = WIDTH) -> dict[str, Any]:
    return {"factory": FACTORIES[0], "factory_options": {"width": width}}


def rows(count: int, value: float = 1.0) -> dict[str, Any]:
    return {"x": np.full((count, 4), value, dtype=np.float32)}


async def said(yard: RunningApp, model: str) -> int:
    """What the operator is told that runs take."""
    return (await yard.admin(Admin.get_model, model)).estimated_activation_bytes


def is_what(count: int, size_bytes: int) -> bool:
    """True if it is what a run of the spending model with so many rows takes."""
    return count * ROW_BYTES <= size_bytes < 1.01 * count * ROW_BYTES


@ENGINES
async def test_models_that_take_more_than_was_said_are_corrected(
    tmp_path: Path, engine: str
) -> None:
    config = ROOTS + ALLOWED + engine_table(engine) + CPU
    for name in ("a", "b", "other"):
        make_weights(tmp_path / "store" / name, value=float(ord(name[0])))
    config += model_table("a", "torch", options=spending())
    config += model_table("b", "torch", options=spending())
    config += model_table("other", "torch", options=spending(width=8))
    async with running_app(config, tmp_path) as yard:
        assert [await said(yard, name) for name in ("a", "b", "other")] == [0, 0, 0]

        answer = await yard.client.predict("a", rows(4), timeout_s=60)
        np.testing.assert_array_equal(answer["output_0"], np.full((4, 4), 1.0 + ord("a")))
        assert is_what(4, await said(yard, "a"))
        # Whose runs take the same, though none of them has run.
        assert is_what(4, await said(yard, "b"))
        assert await said(yard, "other") == 0

        await yard.client.predict("b", rows(1), timeout_s=60)
        assert is_what(4, await said(yard, "b"))
        await yard.client.predict("b", rows(16), timeout_s=60)
        assert is_what(16, await said(yard, "a"))

        # One that comes later starts with what is known, and so does one that comes back.
        make_weights(tmp_path / "store" / "late")
        await yard.admin(
            Admin.create_model,
            "late",
            runtime="torch",
            root="store",
            folder="late",
            options=spending(),
        )
        assert is_what(16, await said(yard, "late"))
        await yard.admin(Admin.unload, "a")
        await yard.client.predict("a", rows(2), timeout_s=60)
        assert is_what(16, await said(yard, "a"))


@ENGINES
async def test_a_run_that_fails_is_not_counted(tmp_path: Path, engine: str) -> None:
    make_weights(tmp_path / "store" / "a")
    config = ROOTS + ALLOWED + engine_table(engine) + CPU
    config += model_table("a", "torch", options=spending())
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("a", rows(1), timeout_s=60)
        # Spends, then fails; and one that does not fit, which spends nothing.
        error = await refusal_of(yard.client.predict("a", rows(64, value=-1.0), timeout_s=60))
        assert isinstance(error, ModelFailed)
        await refusal_of(yard.client.predict("a", {"no": np.ones(64, np.float32)}, timeout_s=60))
        assert is_what(1, await said(yard, "a"))
        # What it would have told, the next one like it tells.
        await yard.client.predict("a", rows(64), timeout_s=60)
        assert is_what(64, await said(yard, "a"))


async def test_what_was_measured_outlives_the_worker(tmp_path: Path) -> None:
    make_weights(tmp_path / "store" / "a")
    config = ROOTS + ALLOWED + engine_table("process") + CPU
    config += model_table("a", "torch", options=spending())
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("a", rows(8), timeout_s=60)
        before = dict(yard.app.engine.pids)
        pid = next(pid for name, pid in before.items() if name.startswith("models"))
        os.kill(pid, signal.SIGKILL)
        await eventually("another worker is there", lambda: _other(yard, before), 60)
        await yard.client.predict("a", rows(1), timeout_s=60)
        assert is_what(8, await said(yard, "a"))


def _other(yard: RunningApp, before: dict[str, int]) -> bool:
    now = yard.app.engine.pids
    return now.keys() == before.keys() and any(now[name] != pid for name, pid in before.items())


@ENGINES
async def test_what_is_predicted_right_stays(tmp_path: Path, engine: str) -> None:
    config = ROOTS + engine_table(engine) + CPU
    make_tiny_bert(tmp_path / "store" / "m", seed=1, num_labels=3)
    options = {"batch_size": 8, "max_length": 64}
    config += model_table("m", "transformers", task="text-classification", options=options)
    async with running_app(config, tmp_path) as yard:
        predicted = await said(yard, "m")
        assert predicted > 0
        await yard.client.predict("m", ["a dog ran", "the cat sat on the mat"], timeout_s=60)
        after_short = await said(yard, "m")
        assert predicted <= after_short <= 1.05 * predicted
        await yard.client.predict("m", ["the cat sat on the mat " * 20] * 8, timeout_s=60)
        assert after_short <= await said(yard, "m") <= 1.05 * predicted


async def test_a_prediction_that_is_far_too_low_is_corrected_by_the_first_short_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = activations.model_for_task

    def tenth(*arguments: Any) -> ActivationModel | None:
        model = predict(*arguments)
        assert model is not None
        return replace(
            model,
            base=model.base / 10,
            per_token=model.per_token / 10,
            per_pair=model.per_pair / 10,
        )

    monkeypatch.setattr(activations, "model_for_task", tenth)
    config = ROOTS + CPU
    options = {"batch_size": 8, "max_length": 64}
    for seed, name in enumerate(("m", "sister")):
        make_tiny_bert(tmp_path / "store" / name, seed=seed, num_labels=3)
        config += model_table(name, "transformers", task="text-classification", options=options)
    async with running_app(config, tmp_path) as yard:
        predicted = await said(yard, "m")
        await yard.client.predict("m", ["a dog ran"], timeout_s=60)
        corrected = await said(yard, "m")
        assert corrected == await said(yard, "sister")
        # By four at most, whatever one run says of others.
        assert corrected == pytest.approx(4 * predicted, rel=0.01)
        await yard.client.predict("sister", ["the cat sat on the mat " * 20] * 8, timeout_s=60)
        measured = await said(yard, "m")
        assert measured == await said(yard, "sister")
        assert measured == pytest.approx(10 * predicted, rel=0.1)
