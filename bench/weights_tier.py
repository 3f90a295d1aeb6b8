"""The host tier: what copies take to make and to load from, and what a server makes of that.

loads     An engine of threads with one logical device. In each round a model of 438 MB is loaded
          off the disk, from the page cache and from a copy, with a first inference each; the copy
          is made before its round's last load, and dropped after it. Which of the two loads from
          files comes first, and which of them is copied, alternates.
cold      Two servers, one with a tier and one without, each with two models of which its device
          holds one. They are asked in turn, and every file is thrown out of the page cache before
          its model is asked. What is copied is the server's decision.
warm      A server with a tier whose files are all in the page cache. Once it has made a copy and
          loaded from it, it knows that this is no way to save time, and should make none.

The first load of an architecture in a worker takes seconds, of which later ones take none. In each
server it is that of a third model, so that what loads of the two others take are their own prices.
At the end of a round a small model evicts the last one, as another model would: a file that one
server has mapped cannot be thrown out for the other.
Logical devices use mapped files where they lie, so that a load from the page cache copies nothing,
and a load from a copy all of it. An accelerator, to which everything is copied in any case, stands
better with a tier than these figures say, and so does a slower disk.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.machine import written
from bench.weights_cache import cold_read_s, drop, warm
from bench.weights_figures import paired_ratio
from bench.weights_loads import TEXT, TOLERANCE, Tell, packs_of, spec_of, text_input
from bench.weights_models import (
    BASE,
    SMALL,
    TINY,
    WeightsModel,
    filed_bytes,
    make_encoders,
    offline,
)
from modelyard import Admin, Client, HostTier
from modelyard_server.demo.process import modelyard_server

__all__ = ["LoadRounds", "rounds_figures", "tier_figures"]

_DEVICE: Final = "cuda:0"
_HEAD: Final = "cuda-0"
_PADDING_BYTES: Final = 1 << 20
"""More than a server reserves for the pages of two first copies."""
_FIRST: Final = "tier-first"
_SMALL: Final = "tier-small"
_TRYING_ROUNDS: Final = 3
_START_S: Final = 300.0
_GB: Final = 1e9

_Answer = np.ndarray[Any, np.dtype[np.float32]]


def tier_figures(folder: Path, quick: bool, tell: Tell) -> dict[str, Any]:
    """Loads from copies and from files, and asks servers with and without a tier.

    Args:
        folder: for models, stores and servers; exists.
        quick: models of 45 MB, and fewer rounds.
        tell: is told what goes on.
    """
    tell("making models")
    models = make_encoders(folder / "models", SMALL if quick else BASE, ["tier-a", "tier-b"])
    _name_again(models[0].folder, _FIRST)
    right = _RightAnswers(models)
    figures = asyncio.run(_loads(folder / "store", models, right, 3 if quick else 6, tell))
    make_encoders(folder / "models", TINY, [_SMALL])
    figures |= _cold(folder, models, right, 3 if quick else 6, tell)
    figures |= _warm(folder, models, right, 3 if quick else 4, tell)
    return figures | {
        "tier_model_bytes": filed_bytes(models[0].folder),
        "answers_wrong": right.wrong,
        "tier_answers_compared": right.compared,
    }


def _name_again(folder: Path, name: str) -> None:
    """Makes a model of another's files, on the same place of the disk."""
    other = folder.with_name(name)
    other.mkdir()
    for file in folder.iterdir():
        os.link(file, other / file.name)


class _RightAnswers:
    """What plain transformers answers, and how often somebody else did not.

    Attributes:
        compared: answers so far.
        wrong: those of them that were not right.
    """

    def __init__(self, models: Sequence[WeightsModel]) -> None:
        self.compared = 0
        self.wrong = 0
        self._answers = {model.name: _library_answer(model) for model in models}

    def check(self, model: WeightsModel, answer: _Answer) -> None:
        """Compares an answer to TEXT."""
        self.compared += 1
        apart = np.abs(answer.ravel() - self._answers[model.name]).max()
        self.wrong += not apart <= TOLERANCE


def _library_answer(model: WeightsModel) -> _Answer:
    import torch

    library = offline()
    tokens = library.AutoTokenizer.from_pretrained(model.folder)([TEXT], return_tensors="pt")
    kind = library.AutoModelForSequenceClassification
    module = kind.from_pretrained(model.folder, local_files_only=True).eval()
    with torch.inference_mode():
        answer: _Answer = module(**tokens).logits.softmax(-1).numpy().ravel()
    return answer


def _packs(store: Path, models: Sequence[WeightsModel]) -> dict[str, list[Path]]:
    """The files of a store that models are loaded from."""
    from modelyard_server.weights.store import WeightStore

    opened = WeightStore.open(store)
    try:
        return {model.name: packs_of(opened, model) for model in models}
    finally:
        opened.close()


# --- Loads --------------------------------------------------------------------------------------


@dataclass(slots=True)
class LoadRounds:
    """What was measured in each round, in seconds. Sources are called what LoadSource calls them.

    Attributes:
        load: by where the weights came from.
        to_first: load and first inference, by the same.
        keep: making the copy.
        gb: size of the copy, in GB.
    """

    load: dict[str, list[float]] = field(default_factory=dict)
    to_first: dict[str, list[float]] = field(default_factory=dict)
    keep: list[float] = field(default_factory=list)
    gb: list[float] = field(default_factory=list)

    def add(self, source: str, load_s: float, to_first_s: float) -> None:
        """Adds a load."""
        self.load.setdefault(source, []).append(load_s)
        self.to_first.setdefault(source, []).append(to_first_s)


async def _loads(
    store: Path, models: Sequence[WeightsModel], right: _RightAnswers, count: int, tell: Tell
) -> dict[str, Any]:
    from modelyard_server.execution.engine import EngineDevice
    from modelyard_server.execution.thread_engine import ThreadEngine
    from modelyard_server.runtimes.registry import make_runtimes
    from modelyard_server.weights.store import WeightStore

    offline()
    opened = WeightStore.open(store)
    device = EngineDevice(name=_HEAD, torch_device="cpu", threads=1)
    engine = ThreadEngine(devices=[device], runtimes=make_runtimes(frozenset(), store=opened))
    await engine.start(["transformers"])
    rounds, warming = LoadRounds(), LoadRounds()
    try:
        for model in models:
            # As registering it does: it is in the store afterwards.
            await engine.price(spec_of(model))
        packs = _packs(store, models)
        for files in packs.values():
            # Who keeps the machine's disk may have a cache too: the same for all that follow.
            cold_read_s(files)
        bench = _Loads(engine, right)
        for number in range(-len(models), count):
            model = models[number % len(models)]
            into = rounds if number >= 0 else warming
            await bench.round(model, packs[model.name], into, cold_first=bool(number % 2))
            tell(f"loads: round {number + 1} of {count}" if number >= 0 else "loads: warming up")
    finally:
        await engine.stop(30)
        opened.close()
    return rounds_figures(rounds)


class _Loads:
    """Loads models, each of a round's times from another place."""

    def __init__(self, engine: Any, right: _RightAnswers) -> None:
        self._engine = engine
        self._right = right

    async def round(
        self, model: WeightsModel, packs: Sequence[Path], into: LoadRounds, *, cold_first: bool
    ) -> None:
        """Two loads from files, the second of which leaves a copy, and one from there."""
        for source in ("storage", "page cache") if cold_first else ("page cache", "storage"):
            if source == "storage":
                drop(packs)
            else:
                warm(packs)
            await self._load(model, source, into)
            is_second = (source == "storage") is not cold_first
            unloaded = await self._engine.unload(0, keep=is_second)
            if is_second:
                into.keep.append(unloaded.keep_s)
                into.gb.append(self._engine.copies.measured_bytes / _GB)
        await self._load(model, "copy", into)
        await self._engine.unload(0)
        if not await self._engine.drop_copy(0):
            raise RuntimeError(f"the copy of {model.name} does not go")

    async def _load(self, model: WeightsModel, source: str, into: LoadRounds) -> None:
        from modelyard_server.runtimes.targets import Target

        began = time.perf_counter()
        loaded = await self._engine.load(0, spec_of(model), Target.whole(0))
        load_s = time.perf_counter() - began
        if loaded.source.value != source:
            raise RuntimeError(f"{model.name} came from {loaded.source.value}, not from {source}")
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._engine.run(0, [text_input()], {}, done.set_result)
        outcome = await done
        into.add(source, load_s, time.perf_counter() - began)
        if not isinstance(outcome, tuple):
            raise RuntimeError(f"{model.name} did not answer: {outcome!r}")
        (output,) = (output for output in outcome if output.name == "probabilities")
        self._right.check(model, np.frombuffer(output.data, np.float32))


def rounds_figures(rounds: LoadRounds) -> dict[str, Any]:
    """How many times faster a load from a copy is than others, and what making the copy takes."""
    load, to_first = rounds.load, rounds.to_first
    per_gb = [keep / gb for keep, gb in zip(rounds.keep, rounds.gb, strict=True)]
    figures = {
        "promotion_vs_cold": round(paired_ratio(load["storage"], load["copy"]), 3),
        "promotion_vs_cache": round(paired_ratio(load["page cache"], load["copy"]), 3),
        "promotion_ttfi_vs_cold": round(paired_ratio(to_first["storage"], to_first["copy"]), 3),
        "promotion_ttfi_vs_cache": round(paired_ratio(to_first["page cache"], to_first["copy"]), 3),
        "demote_seconds_per_gb": round(statistics.median(per_gb), 3),
        "demote_ms": _ms(rounds.keep),
    }
    for source, name in (("storage", "cold"), ("page cache", "cache"), ("copy", "copy")):
        figures[f"tier_{name}_load_ms"] = _ms(load[source])
        figures[f"tier_{name}_ttfi_ms"] = _ms(to_first[source])
    return figures


# --- Servers ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """A running server with two models for a device that holds one.

    Attributes:
        admin: of it.
        client: of it.
        models: that it has.
        packs: files of each.
        right: what they answer.
    """

    admin: Admin
    client: Client
    models: Sequence[WeightsModel]
    packs: Mapping[str, Sequence[Path]]
    right: _RightAnswers

    def round_s(self, *, cold: bool) -> float:
        """Asks each model once, which evicts the other one; seconds of these requests alone."""
        total_s = 0.0
        for model in self.models:
            (drop if cold else warm)(self.packs[model.name])
            began = time.perf_counter()
            outputs = self.client.predict(model.name, [TEXT])
            total_s += time.perf_counter() - began
            self.right.check(model, np.asarray(outputs["probabilities"], np.float32))
        self.client.predict(_SMALL, [TEXT])
        self.admin.unload(_SMALL)
        return total_s

    @property
    def tier(self) -> HostTier:
        """What it tells of its tier.

        Raises:
            RuntimeError: it has none, or holds more there than it may.
        """
        tier = self.admin.stats().host_tier
        if tier is None:
            raise RuntimeError("the server has no host tier")
        if tier.peak_bytes > tier.budget_bytes:
            raise RuntimeError(f"the host tier was over its budget: {tier}")
        return tier


@contextmanager
def _running(
    folder: Path,
    name: str,
    right: _RightAnswers,
    models: Sequence[WeightsModel],
    *,
    has_tier: bool,
) -> Iterator[_Server]:
    size_bytes = filed_bytes(models[0].folder)
    config = f"""
        [server]
        listen = "127.0.0.1:0"
        log_level = "warning"
        [catalog]
        durable = false
        [weights]
        store = "store"
        [engine]
        kind = "process"
        [roots]
        models = "models"
        [[devices]]
        device = "{_DEVICE}"
        budget = {size_bytes + filed_bytes(folder / "models" / _SMALL) // 2}
        logical = true
        """
    if has_tier:
        budget_bytes = len(models) * size_bytes + _PADDING_BYTES
        config += f"\n[host_tier]\nbudget = {budget_bytes}\n"
    for model in (_FIRST, _SMALL, *(model.name for model in models)):
        config += (
            f'\n[models.{model}]\nruntime = "transformers"\ntask = "{models[0].task}"\n'
            f'root = "models"\nfolder = "{model}"\ndevice = "{_DEVICE}"\n'
        )
    with (
        modelyard_server(written(folder, config, name)) as server,
        Admin(server.address, timeout_s=_START_S) as admin,
        Client(server.address, timeout_s=_START_S) as client,
    ):
        client.predict(_FIRST, [TEXT])
        admin.unload(_FIRST)
        packs = _packs(folder / "store", models)
        yield _Server(admin=admin, client=client, models=models, packs=packs, right=right)


def _cold(
    folder: Path, models: Sequence[WeightsModel], right: _RightAnswers, count: int, tell: Tell
) -> dict[str, Any]:
    tell("starting a server with a tier and one without")
    with ExitStack() as stack:
        with_tier, without = (
            stack.enter_context(_running(folder, name, right, models, has_tier=name == "tier"))
            for name in ("tier", "none")
        )
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(-1, count):
            for has_tier in (True, False) if number % 2 else (False, True):
                took_s = (with_tier if has_tier else without).round_s(cold=True)
                if number >= 0:
                    seconds[has_tier].append(took_s)
            tell(
                f"cold: round {number + 1} of {count}, {with_tier.tier.promotion_count} from copies"
            )
        tier = with_tier.tier
    asked = len(models) * count
    return {
        "tier_rps_vs_none": round(paired_ratio(seconds[False], seconds[True]), 3),
        "tier_rps": round(asked / sum(seconds[True]), 2),
        "none_rps": round(asked / sum(seconds[False]), 2),
        "tier_cold_requests": asked,
        "tier_cold_demotions": tier.kept_count,
        "tier_cold_promotions": tier.promotion_count,
    }


def _warm(
    folder: Path, models: Sequence[WeightsModel], right: _RightAnswers, count: int, tell: Tell
) -> dict[str, Any]:
    tell("starting a server with a tier, and all files in the page cache")
    with _running(folder, "warm", right, models, has_tier=True) as server:
        for _ in range(_TRYING_ROUNDS):
            server.round_s(cold=False)
        tried = server.tier
        if not tried.promotion_count:
            raise RuntimeError("no load came from a copy: what that takes is not known")
        for model in models:
            # Its copy goes too.
            server.admin.unload(model.name)
        for number in range(count):
            server.round_s(cold=False)
            tell(f"warm: round {number + 1} of {count}")
        tier = server.tier
    return {
        "tier_warm_copies_tried": tried.kept_count,
        "tier_warm_copies": tier.kept_count - tried.kept_count,
        "tier_warm_evictions": len(models) * count,
    }


def _ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)
