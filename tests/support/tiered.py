"""Servers with a host tier over two logical devices, and small models that move between them.

tier_config       a configuration: devices that hold one model each, a tier for so many copies
make_layers       files of models that have nothing in common, and what they answer
create_layers     registers some of them
answer_of         what a model answers
tier_of           what a server tells of its tier, checked
copies_of         models that have a copy
steady_times      every load and every copy takes what the test says, whatever it really took
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modelyard import Admin, CopyState, HostTier
from modelyard_server.execution.engine import Loaded, Unloaded
from modelyard_server.residency.actions import Actions
from modelyard_server.residency.values import ModelHandle
from modelyard_server.runtimes.api import LoadSource
from modelyard_server.runtimes.targets import Target
from tests.support.config_text import device_table, toml
from tests.support.server import RunningApp, eventually
from tests.support.tiny_models import MLP_FACTORY, TinyMlp, make_tiny_mlp

__all__ = [
    "COPY_BYTES",
    "MODEL_BYTES",
    "PADDING_BYTES",
    "ROWS",
    "answer_of",
    "copies_of",
    "create_layers",
    "layers_answer",
    "make_layers",
    "steady_times",
    "tier_config",
    "tier_of",
]

_SIZES: dict[str, Any] = {"inputs": 31, "hidden": 32, "outputs": 16384}
"""Chosen so that a copy, whose memory is whole pages, is as large as its tensors."""

ROWS = np.linspace(-1.0, 1.0, 2 * 31, dtype=np.float32).reshape(2, 31)
"""What the models are asked."""

COPY_BYTES = 4 * (31 * 32 + 32 + 32 * 16384 + 16384)
"""What is in a model's file."""

MODEL_BYTES = COPY_BYTES + 4 * 16384
"""With a buffer that is in no file."""

PADDING_BYTES = 256 << 10
"""What is reserved beyond a model's bytes for a copy that has not been measured yet."""

_PEAK_BYTES = MODEL_BYTES + COPY_BYTES
"""What a load is priced at: the runtime may hold a state dict beside the module."""

SECONDS: Mapping[LoadSource, float] = {
    LoadSource.STORAGE: 2.0,
    LoadSource.PAGE_CACHE: 1.0,
    LoadSource.COPY: 0.125,
}
"""What loads take by `steady_times`."""


def tier_config(
    base: Path,
    *,
    engine: str = "thread",
    copies: float,
    models_per_device: int = 1,
    devices: tuple[str, ...] = ("cuda:0", "cuda:1"),
) -> str:
    """The text of a configuration.

    Args:
        base: folder of its models.
        engine: "thread" or "process".
        copies: how many models' copies the tier has room for.
        models_per_device: how many models each device has room for.
        devices: logical ones.
    """
    (base / "models").mkdir(exist_ok=True)
    text = '\n[roots]\nmodels = "models"\n\n[weights]\nstore = "store"\n'
    text += f"\n[runtimes.torch]\nallowed_factories = {toml([MLP_FACTORY])}\n"
    text += f'\n[engine]\nkind = "{engine}"\n'
    text += f"\n[host_tier]\nbudget = {int(copies * MODEL_BYTES) + PADDING_BYTES}\n"
    for device in devices:
        budget = (models_per_device - 1) * MODEL_BYTES + _PEAK_BYTES
        text += device_table(device, budget, logical=True, threads=1)
    return text


def make_layers(base: Path, names: str) -> dict[str, np.ndarray[Any, Any]]:
    """Writes models, a letter each; returns what they answer to ROWS."""
    answers = {}
    for seed, name in enumerate(names):
        folder = base / "models" / name
        make_tiny_mlp(folder, seed=seed, **_SIZES)
        answers[name] = layers_answer(folder)
    return answers


def layers_answer(folder: Path) -> np.ndarray[Any, Any]:
    """What the module itself answers to ROWS."""
    module = TinyMlp(**_SIZES)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(ROWS)))


async def create_layers(yard: RunningApp, names: str, *, device: str = "cuda:0") -> None:
    """Registers models, a letter each, on one device."""
    for name in names:
        await yard.admin(
            Admin.create_model,
            name,
            runtime="torch",
            root="models",
            folder=name,
            options={"factory": MLP_FACTORY, "factory_options": dict(_SIZES)},
            placement=device,
        )


async def answer_of(yard: RunningApp, model: str) -> np.ndarray[Any, Any]:
    """What a model answers to ROWS."""
    outputs = await yard.client.predict(model, ROWS, timeout_s=60)
    (answer,) = outputs.values()
    return np.asarray(answer)


async def tier_of(yard: RunningApp) -> HostTier:
    """What the server tells of its tier once nothing moves, checked against the models' copies."""
    await yard.at_rest()

    async def at_rest() -> HostTier | None:
        tier = (await yard.admin(Admin.stats)).host_tier
        assert tier is not None
        assert tier.accounted_bytes <= tier.budget_bytes, tier
        assert tier.peak_bytes <= tier.budget_bytes, tier
        return None if tier.reserved_bytes or tier.draining_bytes else tier

    tier: HostTier = await eventually("no copy is being made or dropped", at_rest)
    yard.app.residency.audit()
    residencies = await yard.admin(Admin.list_residencies)
    kept = [each for each in residencies if each.copy_state is CopyState.KEPT]
    assert tier.copy_count == len(kept)
    assert tier.resident_bytes == tier.measured_bytes
    assert tier.kept_count - tier.dropped_count == tier.copy_count
    own_bytes = sum(each.copy_bytes for each in kept)
    assert own_bytes <= tier.resident_bytes
    assert own_bytes == tier.resident_bytes or tier.saved_bytes > 0
    assert all(each.copy_bytes == 0 for each in residencies if each not in kept)
    return tier


async def copies_of(yard: RunningApp) -> str:
    """Models that have a copy, once nothing moves; a letter each."""
    await tier_of(yard)
    residencies = await yard.admin(Admin.list_residencies)
    return "".join(
        each.model.removeprefix("models/")
        for each in residencies
        if each.copy_state is CopyState.KEPT
    )


@contextmanager
def steady_times(*, slow: str = "", fast: str = "") -> Iterator[None]:
    """Says what loads take, by where the weights came from; making a copy takes 0.01 s.

    Whether a copy pays then follows from the rules, and not from how busy the machine is.

    Args:
        slow: models, a letter each, whose loads from files take eight times as long as others'.
        fast: models whose loads from files take as long as those from copies.
    """
    loaded, unloaded = Actions.loaded, Actions.unloaded

    def steady_loaded(
        self: Actions, handle: ModelHandle, target: Target, outcome: Loaded, took_s: float
    ) -> None:
        seconds = SECONDS[outcome.source]
        if outcome.source is not LoadSource.COPY:
            if handle.name in slow:
                seconds *= 8
            if handle.name in fast:
                seconds = SECONDS[LoadSource.COPY]
        loaded(self, handle, target, outcome, seconds)

    def steady_unloaded(self: Actions, handle: ModelHandle, outcome: Unloaded) -> Mapping[int, int]:
        steady = Unloaded(
            freed=outcome.freed,
            kept_bytes=outcome.kept_bytes,
            keep_s=0.0 if outcome.kept_bytes is None else 0.01,
            refused_bytes=outcome.refused_bytes,
        )
        return unloaded(self, handle, steady)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Actions, "loaded", steady_loaded)
        patch.setattr(Actions, "unloaded", steady_unloaded)
        yield
