"""Memory that comes and goes: it comes back, and where it does not that is seen and told."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support import faulty_models, tiny_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, model_table
from tests.support.server import RunningApp, eventually, running_app, told_refusal_of

from modelyard import Admin, ResidencyState

CYCLES = 30
X = np.ones(3, np.float32)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are all there is


def mapped_weights() -> int:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return sum("model.safetensors" in line for line in maps.splitlines())


async def test_thirty_loads_and_evictions_leave_nothing_behind(tmp_path: Path) -> None:
    config = CPU + ROOTS
    for index in range(2):
        tiny_models.make_tiny_bert(
            tmp_path / "store" / f"m-{index}", seed=index, num_labels=2, hidden_size=128
        )
        config += model_table(f"m-{index}", "transformers", task="text-classification")
    async with running_app(config, tmp_path) as yard:
        models = await yard.admin(Admin.list_models)
        # Room for one: each request evicts the other model.
        budget = max(model.estimated_bytes for model in models)
        await yard.admin(Admin.update_budget, "cpu", budget)
        answers: dict[str, list[float]] = {}
        threads, files = 0, 0
        for cycle in range(CYCLES):
            for model in ("m-0", "m-1"):
                prediction = await yard.client.predict(model, ["the dog ran", "i like this"])
                assert prediction.served.cold
                scores = np.asarray(prediction["probabilities"]).ravel().tolist()
                assert answers.setdefault(model, scores) == scores
                device = await yard.device()
                assert device.measured_bytes == device.resident_bytes <= budget
                # One model's file is mapped, not two, and none that has gone.
                assert mapped_weights() == 1
            if cycle == 2:
                threads, files = threading.active_count(), open_files()
        assert threading.active_count() <= threads
        assert open_files() <= files
        device = await yard.device()
        assert (device.load_count, device.eviction_count) == (2 * CYCLES, 2 * CYCLES - 1)
        assert device.peak_measured_bytes <= device.peak_accounted_bytes <= budget

        await yard.admin(Admin.unload, "m-1")
        device = await yard.device()
        assert device.reserved_bytes == device.resident_bytes == device.draining_bytes == 0
        assert device.quarantined_bytes == device.deficit_bytes == device.measured_bytes == 0
        assert mapped_weights() == 0


async def test_failed_loads_leave_nothing_behind(tmp_path: Path) -> None:
    """Weights that do not fit are mapped, found out and let go."""
    folder = tiny_models.make_tiny_bert(tmp_path / "store" / "bad", seed=1, num_labels=2)
    # Found out only after the weights were bound: the tokenizer is read last.
    (folder / "tokenizer.json").write_text("{}")
    config = "[yard]\nbackoff_initial_s = 0.001\nbackoff_max_s = 0.001\n" + CPU + ROOTS
    config += model_table("bad", "transformers", task="text-classification")
    async with running_app(config, tmp_path) as yard:

        async def attempts() -> int:
            try:
                await yard.client.predict("bad", "the dog")
            except Exception as error:
                assert getattr(error, "reason", None) == "LOAD_FAILED", error
            return (await yard.admin(Admin.stats)).load_failure_count

        async def three() -> bool:
            return await attempts() >= 3

        async def thirteen() -> bool:
            return await attempts() >= 13

        await eventually("three attempts", three)
        files = open_files()
        await eventually("thirteen attempts", thirteen)
        assert open_files() <= files
        gc.collect()
        assert mapped_weights() == 0
        device = await yard.device()
        assert (device.measured_bytes, device.reserved_bytes) == (0, 0)


@pytest.fixture
def kept() -> Iterator[None]:
    """Lets the leaked tensors go, whatever became of the test."""
    yield
    faulty_models.KEPT.clear()


async def leak(yard: RunningApp) -> None:
    await yard.client.predict("leaking", X)
    unloaded = await yard.admin(Admin.unload, "leaking")
    assert unloaded.state is ResidencyState.COLD


@pytest.mark.usefixtures("kept")
async def test_a_model_that_leaks_is_quarantined_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Negative control of this file: what does not come back is seen."""
    size_bytes = 4 * faulty_models.ROWS
    config = CPU + ROOTS + ALLOWED
    for name, factory in (("leaking", "Keeping"), ("clean", "Adding")):
        faulty_models.make_weights(tmp_path / "store" / name)
        options = {"factory": faulty_models.factory(factory)}
        config += model_table(name, "torch", options=options)
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("clean", X)
        await leak(yard)
        residency = await yard.residency("leaking")
        assert [(item.device, item.size_bytes) for item in residency.quarantined] == [
            ("devices/cpu", size_bytes)
        ]
        assert (await yard.residency("clean")).quarantined == ()
        device = await yard.device()
        assert device.quarantined_bytes == size_bytes
        assert device.measured_bytes == 2 * size_bytes
        assert any(
            "leaking" in record.getMessage() and "quarantined" in record.getMessage()
            for record in caplog.records
        )

        # It can be loaded again, and what it leaks then is counted on top.
        await leak(yard)
        assert (await yard.device()).quarantined_bytes == 2 * size_bytes
        yard.app.residency.audit()

        # What comes back late is found, and taken off the account.
        faulty_models.KEPT.clear()

        async def is_back() -> bool:
            device = await yard.device()
            return (device.quarantined_bytes, device.measured_bytes) == (0, size_bytes)

        await eventually("the quarantine is lifted", is_back)
        assert (await yard.residency("leaking")).quarantined == ()


@pytest.mark.usefixtures("kept")
async def test_quarantined_bytes_are_not_given_to_others(tmp_path: Path) -> None:
    size_bytes = 4 * faulty_models.ROWS
    faulty_models.make_weights(tmp_path / "store" / "leaking")
    config = CPU + ROOTS + ALLOWED
    options = {"factory": faulty_models.factory("Keeping")}
    config += model_table("leaking", "torch", options=options)
    config += model_table("small", "identity", options={"size_bytes": 1000})
    config += model_table("large", "identity", options={"size_bytes": 1001})
    async with running_app(config, tmp_path) as yard:
        await yard.admin(Admin.update_budget, "cpu", size_bytes + 1000)
        await leak(yard)
        assert (await yard.client.predict("small", X)).served.cold
        device = await yard.device()
        assert device.quarantined_bytes + device.resident_bytes == device.budget_bytes
        error = await told_refusal_of(lambda: yard.client.predict("large", X, timeout_s=1))
        assert error.reason == "BUDGET_EXHAUSTED"
        faulty_models.KEPT.clear()

        async def is_back() -> bool:
            return (await yard.device()).quarantined_bytes == 0

        await eventually("the quarantine is lifted", is_back)
        assert (await yard.client.predict("large", X)).served.cold
