"""A process that loads and evicts all day: what is left of it when it is empty.

An engine of threads with two logical devices, and on each of them a load, an inference and an
unload, over and over, of models of several sizes. After every pair of cycles nothing is loaded, and
the resident set is read then. The baseline is the process after every model has been loaded and run
on both devices at once, and has gone: what libraries make for themselves in their first runs is in
it, and so are the templates of all architectures.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.weights_figures import over_pct, slope_per_100
from bench.weights_loads import Tell, spec_of, text_input
from bench.weights_models import (
    BASE,
    SMALL,
    TINY,
    WeightsModel,
    make_encoders,
    make_minilms,
    offline,
)

__all__ = ["cycle_figures"]

_DEVICES: Final = 2
_WARM_ROUNDS: Final = 3
_SETTLED_PAIRS: Final = 10
"""Of the last pairs of cycles the median is taken as what the end is."""
_MB: Final = 1e6


def cycle_figures(folder: Path, quick: bool, tell: Tell) -> dict[str, Any]:
    """Runs the cycles.

    Args:
        folder: for models and the store; exists.
        quick: fewer cycles, and no model of 438 MB.
        tell: is told what goes on.
    """
    tell("making models")
    models = [
        *make_encoders(folder, TINY, ["tiny-a", "tiny-b"]),
        *make_encoders(folder, SMALL, ["mini-a"]),
        *make_minilms(folder, ["minilm-a", "minilm-b"]),
    ]
    if not quick:
        models += make_encoders(folder, BASE, ["base-a", "base-b"])
    return asyncio.run(_run(folder / "weights", models, 100 if quick else 1000, tell))


async def _run(
    store: Path, models: Sequence[WeightsModel], cycles: int, tell: Tell
) -> dict[str, Any]:
    from modelyard_server.execution.discipline import settle_process
    from modelyard_server.execution.engine import EngineDevice
    from modelyard_server.execution.thread_engine import ThreadEngine
    from modelyard_server.observability.process import read_process_memory
    from modelyard_server.runtimes.registry import make_runtimes
    from modelyard_server.weights.store import WeightStore

    offline()
    opened = WeightStore.open(store)
    devices = [
        EngineDevice(name=f"logical-{i}", torch_device="cpu", threads=1) for i in range(_DEVICES)
    ]
    engine = ThreadEngine(devices=devices, runtimes=make_runtimes(frozenset(), store=opened))
    await engine.start(["transformers"])
    try:
        for model in models:
            await engine.price(spec_of(model))
        for number in range(_WARM_ROUNDS):
            for shift in range(len(models)):
                await _pair(engine, models, shift, shift + number)
        baseline = settle_process()
        before = read_process_memory()
        resident = []
        for pair in range(cycles // _DEVICES):
            # Each model meets each other one, and itself.
            await _pair(engine, models, pair, pair + 1 + pair // len(models))
            resident.append(read_process_memory().resident_bytes)
            if (pair + 1) % 25 == 0:
                tell(f"{_DEVICES * (pair + 1)} of {cycles} cycles")
        after = read_process_memory()
    finally:
        await engine.stop(30)
        opened.close()
    last = resident[len(resident) // 2 :]
    end = statistics.median(resident[-_SETTLED_PAIRS:])
    return {
        "rss_over_baseline_pct": round(over_pct(end, baseline.resident_bytes), 2),
        "rss_over_baseline_most_pct": round(over_pct(max(last), baseline.resident_bytes), 2),
        # A pair is a step, and two cycles.
        "rss_slope_mb_per_100": round(slope_per_100(last) / _DEVICES / _MB, 3),
        "rss_baseline_mb": round(baseline.resident_bytes / _MB, 1),
        "rss_end_mb": round(end / _MB, 1),
        "fds_growth": after.open_files - before.open_files,
        "threads_growth": after.threads - before.threads,
        "maps_growth": after.mappings - before.mappings,
        "load_evict_cycles": _DEVICES * len(resident),
    }


async def _pair(engine: Any, models: Sequence[WeightsModel], one: int, other: int) -> None:
    """A cycle on each device, at the same time."""
    async with asyncio.TaskGroup() as group:
        for device, index in enumerate((one, other)):
            model = models[index % len(models)]
            group.create_task(_cycle(engine, device, model), name=f"cycle on {device}")


async def _cycle(engine: Any, device: int, model: WeightsModel) -> None:
    from modelyard_server.runtimes.targets import Target

    await engine.load(device, spec_of(model), Target.whole(device))
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    engine.run(device, [text_input()], {}, done.set_result)
    outcome = await done
    if not isinstance(outcome, tuple):
        raise RuntimeError(f"{model.name} did not answer: {outcome!r}")
    back = (await engine.unload(device)).freed
    if engine.memory(device).measured_bytes or not any(back.values()):
        raise RuntimeError(f"{model.name} is not gone: {dict(back)}")
