"""A server for clients of the Open Inference Protocol, in this process but on a thread of its own.

Stock clients block, and some run threads; beside the server's loop they would stop it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from tests.support import faulty_models, tiny_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, model_table
from tests.support.server import RunningApp, running_app

__all__ = ["LABELS", "ServedApp", "byte_strings", "make_zoo", "served_app"]

T = TypeVar("T")

LABELS: Final = ["bad", "good", "neither"]
"""Classes of the model "sentiment"."""

_LIMIT_S: Final = 60.0


def byte_strings(*values: bytes | str) -> np.ndarray[Any, Any]:
    """A vector of byte strings, as clients of this protocol take them."""
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    return np.array(encoded, dtype=np.object_)


def make_zoo(base: Path) -> str:
    """A configuration with a model of every runtime and task, and some that fail.

    echo                  identity; its key "echoes" means the same
    mlp, sums             torch; of sums the options say the names
    sentiment, embedder, filler, writer, pictures
                          transformers, a task each
    raising               torch; raises ValueError
    broken                torch; its weights are no weights once `break_weights` was called
    huge                  identity; larger than the device
    stuck                 torch; waits while it runs as long as there is the gate `base / "gate"`
    """
    store = base / "store"
    tiny_models.make_tiny_mlp(store / "mlp", seed=1)
    tiny_models.make_tiny_bert(store / "sentiment", seed=2, labels=LABELS)
    tiny_models.make_tiny_bert(store / "embedder", seed=3)
    tiny_models.make_tiny_masked_lm(store / "filler", seed=4)
    tiny_models.make_tiny_gpt2(store / "writer", seed=5)
    tiny_models.make_tiny_vit(store / "pictures", seed=6)
    for name in ("sums", "raising", "broken", "stuck"):
        faulty_models.make_weights(store / name)
    adding = {"factory": faulty_models.factory("Adding")}
    return "".join(
        [
            CPU,
            ROOTS,
            ALLOWED,
            model_table("echo", "identity", keys=["echoes", "team/echo"]),
            model_table("huge", "identity", options={"size_bytes": 1 << 40}),
            model_table("mlp", "torch", options={"factory": tiny_models.MLP_FACTORY}),
            model_table(
                "sums",
                "torch",
                options=adding | {"inputs": ["x"], "outputs": ["y"], "batch": True},
            ),
            model_table(
                "raising",
                "torch",
                options={
                    "factory": faulty_models.factory("Raising"),
                    "factory_options": {"kind": "ValueError"},
                },
            ),
            model_table("broken", "torch", options=adding),
            model_table(
                "stuck",
                "torch",
                options={
                    "factory": faulty_models.factory("StuckInRun"),
                    "factory_options": {"gate": base / "gate"},
                },
            ),
            model_table("sentiment", "transformers", task="text-classification"),
            model_table("embedder", "transformers", task="feature-extraction"),
            model_table("filler", "transformers", task="fill-mask"),
            model_table("writer", "transformers", task="text-generation"),
            model_table("pictures", "transformers", task="image-classification"),
        ]
    )


class ServedApp:
    """An application that serves on another thread. See served_app.

    Attributes:
        target: its address.
        base: folder of its roots.
    """

    def __init__(self, base: Path) -> None:
        self.target = ""
        self.base = base
        self.yard: RunningApp
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._ready = threading.Event()

    def on_loop(self, question: Callable[[RunningApp], Coroutine[Any, Any, T]]) -> T:
        """Asks the application itself, on its own thread."""
        return asyncio.run_coroutine_threadsafe(question(self.yard), self._loop).result(_LIMIT_S)

    def break_weights(self, name: str) -> None:
        """Puts something else in the place of a model's weights."""
        file = self.base / "store" / name / "model.safetensors"
        file.unlink()
        file.write_bytes(b"no weights")

    async def _serve(self, config_text: str) -> None:
        async with running_app(config_text, self.base) as yard:
            self.yard, self.target = yard, yard.target
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self._ready.set()
            await self._stop.wait()

    @contextmanager
    def _running(self, config_text: str) -> Iterator[None]:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(self._serve(config_text))
            except BaseException as error:
                failures.append(error)
            finally:
                self._ready.set()

        thread = threading.Thread(target=run, name="served app")
        thread.start()
        self._ready.wait()
        try:
            if not failures:
                yield
        finally:
            if self.target:
                self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()
        if failures:
            raise failures[0]


@contextmanager
def served_app(config_text: str, base: Path) -> Iterator[ServedApp]:
    """Runs an application on a thread of its own, with the checks of running_app at the end."""
    app = ServedApp(base)
    with app._running(config_text):
        yield app
