"""Models that are too large or misbehave: the specific error, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from tests.support import faulty_models
from tests.support.bare_calls import check_text
from tests.support.config_text import CPU, device_table, model_table
from tests.support.faulty_yards import X, torch_model, undisturbed, yard_with
from tests.support.server import eventually, refusal_of

from modelyard import Admin, ModelFailed, ModelNeverFits, ResidencyState


async def test_a_model_larger_than_its_device_is_refused_with_the_numbers(tmp_path: Path) -> None:
    config = device_table("cpu", "1MB")
    config += model_table("huge", "identity", options={"size_bytes": 1_000_001})
    async with yard_with(tmp_path, config) as yard:
        async with undisturbed(yard):
            error = await refusal_of(yard.client.predict("huge", X))
            created = await refusal_of(
                yard.admin(
                    Admin.create_model, "other", runtime="identity", options={"size_bytes": 2**40}
                )
            )
            loaded = await refusal_of(yard.admin(Admin.load, "huge"))
            pinned = await refusal_of(yard.admin(Admin.pin, "huge"))
        for refusal, needed in ((error, 1_000_001), (created, 2**40), (loaded, 1_000_001)):
            assert isinstance(refusal, ModelNeverFits)
            assert refusal.device == "devices/cpu"
            assert refusal.needed_bytes == needed
            assert refusal.budget_bytes == 1_000_000
            assert [violation.field for violation in refusal.violations] == ["devices/cpu"]
        assert isinstance(pinned, ModelNeverFits)
        assert not (await yard.residency("huge")).pinned


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ValueError", "ValueError"),
        ("SystemExit", "SystemExit"),
        ("KeyboardInterrupt", "KeyboardInterrupt"),
        ("GeneratorExit", "GeneratorExit"),
        ("StopIteration", "StopIteration"),
        ("MemoryError", "MemoryError"),
        ("recursion", "RecursionError"),
    ],
)
async def test_a_model_that_raises_fails_alone_and_opaquely(
    tmp_path: Path, kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    faulty_models.make_weights(tmp_path / "store" / "raising")
    config = CPU + torch_model("raising", "Raising", kind=kind)
    async with yard_with(tmp_path, config) as yard:
        error = await refusal_of(yard.client.predict("raising", X))
        assert isinstance(error, ModelFailed)
        assert error.exception_type == name
        assert error.error_id is not None
        assert re.fullmatch(r"[0-9a-f]{12}", error.error_id)
        assert "secret" not in str(error) + str(error.metadata)
        check_text(str(error), tmp_path)
        again = await refusal_of(yard.client.predict("raising", X))
        assert isinstance(again, ModelFailed)
        assert again.error_id != error.error_id
        residency = await yard.residency("raising")
        # Its weights are all right: it stays, and can be taken out.
        assert residency.state is ResidencyState.RESIDENT
        assert residency.lease_count == 0
        unloaded = await yard.admin(Admin.unload, "raising")
        assert unloaded.state is ResidencyState.COLD
        assert unloaded.quarantined == ()
    (record,) = (record for record in caplog.records if error.error_id in record.getMessage())
    assert "Traceback" in record.getMessage()
    assert kind == "recursion" or "secret text" in record.getMessage()


@pytest.mark.parametrize(
    "kind",
    [
        "complex",
        "sparse",
        "quantised",
        "float8",
        "meta",
        "none",
        "text",
        "nothing",
        "numbered",
        "mixed",
    ],
)
# Quantised tensors are on their way out of torch; they must not take a server with them.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantiz.*")
async def test_answers_that_cannot_be_sent_are_the_models_failure(
    tmp_path: Path, kind: str
) -> None:
    faulty_models.make_weights(tmp_path / "store" / "odd")
    async with yard_with(tmp_path, CPU + torch_model("odd", "OddOutput", kind=kind)) as yard:
        error = await refusal_of(yard.client.predict("odd", X))
        assert isinstance(error, ModelFailed)
        check_text(str(error), tmp_path)
        assert (await yard.residency("odd")).lease_count == 0


async def test_a_constructor_that_hangs_at_registration_keeps_no_other_model_from_loading(
    tmp_path: Path,
) -> None:
    faulty_models.make_weights(tmp_path / "store" / "stuck")
    config = CPU + model_table("cold", "identity", options={"size_bytes": 1000})
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            options = {
                "factory": faulty_models.factory("StuckInLoad"),
                "factory_options": {"gate": str(tmp_path / "gate")},
            }
            creation = asyncio.create_task(
                yard.admin(
                    Admin.create_model,
                    "stuck",
                    runtime="torch",
                    root="store",
                    folder="stuck",
                    options=options,
                )
            )
            await eventually("the registration is stuck", gate.is_waited_at)
            try:
                assert (await yard.client.predict("cold", X)).served.cold
            finally:
                gate.open()
                await creation
