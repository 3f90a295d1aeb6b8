"""Real servers on loopback for the keyed operations: real models, real loads, real failures."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, device_table, model_table
from tests.support.server import RunningApp, eventually, running_app

from modelyard import Admin, AsyncClient, LoadFailed, ModelyardError, Prediction
from modelyard_server.execution.thread_engine import ThreadEngine

__all__ = [
    "answers_by_key",
    "answers_of_a_model_that_drops_rows",
    "anywhere",
    "concurrent_requests_for_one_model",
    "fail_then_retry",
    "most_resident_at_once",
    "overlapping_loads",
    "two_budgets",
]

T = TypeVar("T")

_STEP = 1000.0
"""What model number i adds, times i: the answer says which model gave it."""

_ONE = np.ones(1, np.float32)


def anywhere() -> Path:
    """A folder that is there, for configurations that name none."""
    return Path(tempfile.gettempdir())


def _run(body: Callable[[Path], Awaitable[T]]) -> T:
    """Runs a coroutine in a folder of its own."""

    async def run(base: Path) -> T:
        return await body(base)

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(Path(folder)))


def _adders(base: Path, names: Sequence[str]) -> str:
    """Models that add 1000, 2000, ... in the order of their names."""
    config = ROOTS + ALLOWED
    for number, name in enumerate(names, start=1):
        faulty_models.make_weights(base / "store" / name, value=number * _STEP)
        config += model_table(name, "torch", options={"factory": faulty_models.factory("Adding")})
    return config


@asynccontextmanager
async def _yard_for_one(base: Path, config: str, model: str) -> AsyncIterator[RunningApp]:
    """A server whose budget is what one of its models, all of one size, is charged."""
    async with running_app(device_table("cpu", "64MB") + config, base) as yard:
        size_bytes = (await yard.admin(lambda admin: admin.get_model(model))).estimated_bytes
        await yard.admin(lambda admin: admin.update_budget("cpu", size_bytes))
        yield yard


def _told(prediction: Prediction, names: Sequence[str]) -> str:
    """ "A:1": which model answered, by what it added, and to what."""
    value = float(np.asarray(prediction.only).reshape(-1)[0])
    name = names[int(value // _STEP) - 1]
    if prediction.served.model != f"models/{name}":
        raise RuntimeError(f"{name} has answered, and served says {prediction.served.model}")
    return f"{name.upper()}:{value % _STEP:g}"


def answers_by_key(
    mappings: Mapping[str, Sequence[str]], items: Sequence[tuple[str, float]]
) -> list[list[str]]:
    """One call of many keys: for each item its key and what became of it, in the order of the call.

    Args:
        mappings: keys by the name of their model.
        items: key and input.

    Returns:
        Key and "A:1" for an answer (see `_told`), or the reason there is none.
    """
    names = list(mappings)

    async def body(base: Path) -> list[list[str]]:
        config = CPU + _adders(base, names)
        config += "".join(
            f'\n[[routes]]\nid = "route-{name}"\nkeys = [{", ".join(map(repr, keys))}]\n'
            f'model = "{name}"\n'
            for name, keys in mappings.items()
        )
        async with running_app(config, base) as yard:
            results = await yard.client.predict_batch(
                [(key, np.array([value], np.float32)) for key, value in items]
            )
        return [
            [key, _told(result, names) if isinstance(result, Prediction) else str(result.reason)]
            for (key, _), result in zip(items, results, strict=True)
        ]

    return _run(body)


def answers_of_a_model_that_drops_rows(items: Sequence[tuple[str, float]]) -> list[list[Any]]:
    """Requests that share a run of a model which answers for the first of its rows alone.

    Returns:
        For each item its name and what it was answered.
    """

    async def body(base: Path) -> list[list[Any]]:
        for name in ("dropping", "stuck"):
            faulty_models.make_weights(base / "store" / name, value=0.0)
        config = CPU + ROOTS + ALLOWED
        options: dict[str, object] = {"factory": faulty_models.factory("Dropping"), "batch": True}
        config += model_table("dropping", "torch", options=options)
        stuck = {
            "factory": faulty_models.factory("StuckInRun"),
            "factory_options": {"gate": str(base / "gate")},
        }
        config += model_table("stuck", "torch", options=stuck)
        async with AsyncExitStack() as stack:
            yard = await stack.enter_async_context(running_app(config, base))
            await yard.client.predict("dropping", _ONE)
            gate = stack.enter_context(faulty_models.closed_gate(base / "gate"))
            held = asyncio.create_task(yard.client.predict("stuck", _ONE))
            await eventually("the lane is busy", gate.is_waited_at)
            asked = [
                asyncio.create_task(yard.client.predict("dropping", np.array([value], np.float32)))
                for _, value in items
            ]

            async def all_there() -> bool:
                stats = await yard.admin(lambda admin: admin.stats())
                return stats.active_request_count == len(items) + 1

            await eventually("all wait for the lane", all_there)
            gate.open()
            answers = await asyncio.gather(*asked)
            await held
            engine = yard.app.engine
            assert isinstance(engine, ThreadEngine)
            # Otherwise nothing was dropped, and nothing shown.
            assert engine.figures.request_count > engine.figures.batch_count, engine.figures
        return [
            [name, np.asarray(answer.only).tolist()[0]]
            for (name, _), answer in zip(items, answers, strict=True)
        ]

    return _run(body)


def fail_then_retry(events: Sequence[tuple[str, bool]]) -> list[str]:
    """Requests with room for one model; some find their model's file gone.

    Args:
        events: the model, and whether its file is gone at that time.

    Returns:
        For each event "hit", "load", or the class of the error.
    """
    names = list(dict.fromkeys(name for name, _ in events))

    async def body(base: Path) -> list[str]:
        config = _adders(base, names) + "\n[yard]\nbackoff_initial_s = 0.001\n"
        told: list[str] = []
        async with _yard_for_one(base, config, names[0]) as yard:
            for name, is_gone in events:
                file = base / "store" / name / "model.safetensors"
                if not is_gone:
                    told.append(await _retried(yard, name))
                    continue
                content = file.read_bytes()
                file.unlink()
                try:
                    await yard.client.predict(name, _ONE)
                    told.append("answered without its file")
                except ModelyardError as error:
                    told.append(type(error).__name__)
                await yard.at_rest()
                device = await yard.device()
                # A failed load leaves no trace of itself.
                assert device.reserved_bytes == device.resident_bytes == 0, device
                file.write_bytes(content)
        return told

    return _run(body)


async def _retried(yard: RunningApp, name: str) -> str:
    """Asks until the rest after a failed load is over, as the error says."""

    async def answer() -> Prediction | None:
        try:
            return await yard.client.predict(name, _ONE)
        except LoadFailed as error:
            if error.retry_after_s is None:
                raise
            return None

    prediction: Prediction = await eventually(f"{name} is answered", answer)
    return "load" if prediction.served.cold else "hit"


def overlapping_loads(names: Sequence[str]) -> list[str]:
    """Requests for cold models with room for one, all made while the first is being loaded.

    Returns:
        For each "answered", or the class of the error.
    """

    async def body(base: Path) -> list[str]:
        for name in names:
            faulty_models.make_weights(base / "store" / name)
        config = ROOTS + ALLOWED
        for name in names:
            options = {
                "factory": faulty_models.factory("StuckInLoad"),
                "factory_options": {"gate": str(base / "gate")},
            }
            config += model_table(name, "torch", options=options)
        async with _yard_for_one(base, config, names[0]) as yard:
            with faulty_models.closed_gate(base / "gate") as gate:
                asked = []
                for number, name in enumerate(names, start=1):
                    asked.append(asyncio.create_task(yard.client.predict(name, _ONE)))
                    waiting = partial(_has_waiting, yard, number)
                    await eventually("it waits", waiting)
                await eventually("one is being loaded", gate.is_waited_at)
                gate.open()
                results = await asyncio.gather(*asked, return_exceptions=True)
            device = await yard.device()
            assert device.peak_accounted_bytes <= device.budget_bytes, device
        return [
            type(result).__name__ if isinstance(result, BaseException) else "answered"
            for result in results
        ]

    return _run(body)


def _has_waiting(yard: RunningApp, count: int) -> bool:
    return yard.app.residency.waiting_count == count


def most_resident_at_once(room_for: int, callers: int) -> float:
    """As many callers as are said, each for a model of its own, with room for some models.

    Returns:
        How many models' bytes were held at the most.
    """
    names = [f"m{number}" for number in range(callers)]

    async def body(base: Path) -> float:
        async with _yard_for_one(base, _adders(base, names), names[0]) as yard:
            one = (await yard.device()).budget_bytes
            await yard.admin(lambda admin: admin.update_budget("cpu", room_for * one))

            async def call(name: str) -> None:
                async with AsyncClient(yard.target, identity=name) as client:
                    for other in (name, names[0], name):
                        await client.predict(other, _ONE)

            await asyncio.gather(*map(call, names))
            return (await yard.device()).peak_accounted_bytes / one

    return _run(body)


def concurrent_requests_for_one_model(name: str, count: int) -> dict[str, object]:
    """Requests for one cold model, all at once.

    Returns:
        `instances`, how many models' bytes are held, and `loads`, the names of what was loaded.
    """

    async def body(base: Path) -> dict[str, object]:
        async with running_app(CPU + _adders(base, [name]), base) as yard:
            await asyncio.gather(*(yard.client.predict(name, _ONE) for _ in range(count)))
            model = await yard.admin(lambda admin: admin.get_model(name))
            residency, device = await yard.residency(name), await yard.device()
            return {
                "instances": device.resident_bytes / model.estimated_bytes,
                "loads": [name] * residency.load_count,
            }

    return _run(body)


def two_budgets(budgets: Sequence[int]) -> list[int]:
    """A server of several devices, each filled with models of its own.

    Args:
        budgets: how many models each device has room for.

    Returns:
        How many are resident on each after one more than that was asked for on each.
    """
    names = [f"d{device}-{number}" for device, n in enumerate(budgets) for number in range(n + 1)]

    async def body(base: Path) -> list[int]:
        config = ROOTS + ALLOWED
        for name in names:
            faulty_models.make_weights(base / "store" / name, value=1.0)
            config += model_table(
                name,
                "torch",
                device=f"cuda:{name[1 : name.index('-')]}",
                options={"factory": faulty_models.factory("Adding")},
            )
        devices = [f"cuda:{device}" for device in range(len(budgets))]
        config += "".join(device_table(device, "8MB", logical=True) for device in devices)
        async with running_app(config, base) as yard:
            one = (await yard.admin(lambda admin: admin.get_model(names[0]))).estimated_bytes
            for device, count in zip(devices, budgets, strict=True):
                await yard.admin(Admin.update_budget, device, count * one)
            for name in names:
                await yard.client.predict(name, _ONE)
            await yard.at_rest()
            held = [await yard.device(device) for device in devices]
            return [device.resident_bytes // one for device in held]

    return _run(body)
