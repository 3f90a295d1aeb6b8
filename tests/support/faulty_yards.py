"""Servers with models that break, and others beside them that must not notice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from modelyard import Admin
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, ROOTS, model_table
from tests.support.server import RunningApp, running_app

__all__ = ["X", "stuck_model", "torch_model", "undisturbed", "yard_with"]

X = np.ones(3, np.float32)


def torch_model(name: str, factory: str, **factory_options: object) -> str:
    """A model of one of tests.support.faulty_models, in the folder of its name."""
    options: dict[str, object] = {"factory": faulty_models.factory(factory)}
    if factory_options:
        options["factory_options"] = factory_options
    return model_table(name, "torch", options=options)


def stuck_model(base: Path, factory: str) -> str:
    """The model "stuck", which waits at the gate in the file "gate"; see faulty_models."""
    faulty_models.make_weights(base / "store" / "stuck", value=3.0)
    return torch_model("stuck", factory, gate=base / "gate")


@asynccontextmanager
async def yard_with(tmp_path: Path, config: str) -> AsyncIterator[RunningApp]:
    """A yard with the models "good" (torch, 4 KiB) and "echo", both resident."""
    faulty_models.make_weights(tmp_path / "store" / "good", value=2.0)
    config += ROOTS + ALLOWED + torch_model("good", "Adding")
    config += model_table("echo", "identity", options={"size_bytes": 1000})
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("good", X)
        await yard.client.predict("echo", X)
        yield yard
        # Whatever happened: the others are where they were and answer as they did.
        good, echo = await yard.client.predict("good", X), await yard.client.predict("echo", X)
        assert not good.served.cold
        assert not echo.served.cold
        np.testing.assert_array_equal(good.only, X + 2)


@asynccontextmanager
async def undisturbed(yard: RunningApp) -> AsyncIterator[None]:
    """Checks that nothing was loaded, evicted or is held that was not before."""

    async def state() -> tuple[object, ...]:
        devices = await yard.admin(Admin.list_devices)
        residencies = await yard.admin(Admin.list_residencies)
        return devices, residencies

    before = await state()
    yield
    await yard.at_rest()
    assert await state() == before
