"""More models than there is room for, on a real server: how often it loads, and what it gets done.

Encoders of 21 MB with weights of their own, in worker processes on one CPU device, asked over
sockets of this machine. Round robin: five models with room for four, in turn, 20 requests in
flight, where LRU loads for every one. Zipf(1.0): twenty models with room for five, 64 in flight, by
the default server and by one with LRU and strict order of arrival, in turn. Loads are those that
the servers count. Their files are in the page cache, so a load takes milliseconds; how many is
among the figures. Both servers batch; who serves one request after the other has nothing to batch.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

from bench.machine import written
from bench.thrash_asking import answer_in_turn, frame_of, zipf_draws
from bench.weights_models import CLASSIFY, Encoder, filed_bytes, make_encoders
from modelyard import Admin, Client
from modelyard_server.demo.process import modelyard_server

__all__ = ["ENCODER", "served_figures"]

ENCODER: Final = Encoder(name="BERT of 21 MB", hidden=144, layers=3, heads=4)

_FIRST: Final = "first"
"""Loaded before anything is counted: the first load of an architecture in a worker takes seconds,
of which others take none."""
_TEXT: Final = "the committee could not agree on a date for the next meeting"
_DEADLINE_S: Final = 60.0
_START_S: Final = 300.0

_TURN_MODELS: Final = 5
_TURN_ROOM: Final = 4
_TURN_REQUESTS: Final = 200
_TURN_CALLERS: Final = 20

_ZIPF_MODELS: Final = 20
_ZIPF_ROOM: Final = 5
_ZIPF_CALLERS: Final = 64
_ZIPF_REQUESTS: Final = 800
_ZIPF_ROUNDS: Final = 3
_SEED: Final = 601

_Tell = Callable[[str], None]


def served_figures(folder: Path, tell: _Tell) -> dict[str, Any]:
    """Runs servers and asks them.

    Args:
        folder: for models and servers; exists.
        tell: is told what goes on.
    """
    tell(f"making {_ZIPF_MODELS + 1} models")
    names = [f"model-{i:02}" for i in range(_ZIPF_MODELS)]
    make_encoders(folder / "models", ENCODER, [_FIRST, *names])
    size_bytes = filed_bytes(folder / "models" / _FIRST)
    figures: dict[str, Any] = {"served_model_bytes": size_bytes}
    figures |= _round_robin(folder, names[:_TURN_MODELS], tell)
    figures |= _zipf(folder, names, tell)
    return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """What a server did while requests were answered.

    Args:
        requests: how many.
        seconds: from the first to the last answer.
        loads: that it counted.
        load_s: seconds that those took together.
    """

    requests: int
    seconds: float
    loads: int
    load_s: float


class _Server:
    """A running server, and how to ask it."""

    def __init__(self, address: str, admin: Admin) -> None:
        self._address = address
        self._admin = admin

    def answer(self, models: Sequence[str], callers: int) -> _Round:
        """Have it answer a request for each of some models, in order, several at once."""
        frames = [frame_of(model, _TEXT) for model in models]
        before = self._admin.stats()
        seconds = answer_in_turn(self._address, frames, callers, _DEADLINE_S)
        after = self._admin.stats()
        return _Round(
            requests=len(frames),
            seconds=seconds,
            loads=after.load_count - before.load_count,
            load_s=after.load_s - before.load_s,
        )


@contextmanager
def _running(
    folder: Path, name: str, models: Sequence[str], room: int, yard: str = ""
) -> Iterator[_Server]:
    """A server with room for some of its models, and a half that is of no use."""
    size_bytes = filed_bytes(folder / "models" / _FIRST)
    config = f"""
        [server]
        listen = "127.0.0.1:0"
        log_level = "warning"
        default_deadline_s = {_DEADLINE_S}
        [catalog]
        durable = false
        [weights]
        store = "store"
        [yard]
        {yard}
        [roots]
        models = "models"
        [[devices]]
        device = "cpu"
        budget = {room * size_bytes + size_bytes // 2}
        threads = 1
        """
    for model in (_FIRST, *models):
        config += (
            f'\n[models.{model}]\nruntime = "transformers"\ntask = {json.dumps(CLASSIFY)}\n'
            f'root = "models"\nfolder = "{model}"\n'
        )
    with (
        modelyard_server(written(folder, config, name)) as server,
        Admin(server.address, timeout_s=_START_S) as admin,
        Client(server.address, timeout_s=_START_S) as client,
    ):
        client.predict(_FIRST, [_TEXT])
        admin.unload(_FIRST)
        yield _Server(server.address, admin)


def _round_robin(folder: Path, models: Sequence[str], tell: _Tell) -> dict[str, Any]:
    asked = list(islice(cycle(models), _TURN_REQUESTS))
    with _running(folder, "turns", models, _TURN_ROOM) as server:
        found = server.answer(asked, _TURN_CALLERS)
    with _running(folder, "turns-lru", models, _TURN_ROOM, _LRU_FIFO) as server:
        by_lru = server.answer(asked, _TURN_CALLERS)
    tell(f"round robin: {found.loads} loads for {found.requests} requests, {by_lru.loads} by LRU")
    return {
        "round_robin_loads": found.loads,
        "round_robin_rps": round(found.requests / found.seconds, 1),
        "round_robin_lru_fifo_loads": by_lru.loads,
        "round_robin_lru_fifo_rps": round(by_lru.requests / by_lru.seconds, 1),
    }


_LRU_FIFO: Final = 'policy = "lru"\norder = "fifo"'


def _zipf(folder: Path, models: Sequence[str], tell: _Tell) -> dict[str, Any]:
    rounds: dict[str, list[_Round]] = {"default": [], "lru_fifo": []}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(_running(folder, name, models, _ZIPF_ROOM, yard))
            for name, yard in (("default", ""), ("lru_fifo", _LRU_FIFO))
        }
        for number in range(_ZIPF_ROUNDS + 1):
            # A round more than count: the first finds everything empty.
            asked = zipf_draws(models, 1.0, _ZIPF_REQUESTS, _SEED + number)
            for name in sorted(servers, reverse=number % 2 == 1):
                found = servers[name].answer(asked, _ZIPF_CALLERS)
                if number:
                    rounds[name].append(found)
                tell(
                    f"zipf, round {number} of {_ZIPF_ROUNDS}, {name}: "
                    f"{found.requests / found.seconds:.0f} requests/s, {found.loads} loads"
                )
    ratios = [
        slow.seconds / fast.seconds
        for fast, slow in zip(rounds["default"], rounds["lru_fifo"], strict=True)
    ]
    figures: dict[str, Any] = {"zipf_rps_vs_lru_fifo": round(statistics.median(ratios), 3)}
    for name, suffix in (("default", ""), ("lru_fifo", "_lru_fifo")):
        of = rounds[name]
        loads, requests = sum(one.loads for one in of), sum(one.requests for one in of)
        seconds = statistics.median(one.seconds for one in of)
        load_s = sum(one.load_s for one in of)
        figures[f"zipf_rps{suffix}"] = round(_ZIPF_REQUESTS / seconds, 1)
        figures[f"zipf_loads_per_request{suffix}"] = round(loads / requests, 4)
        figures[f"zipf_load_ms{suffix}"] = round(load_s / max(1, loads) * 1e3, 2)
    return figures
