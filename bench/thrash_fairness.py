"""Clients of very different demand on one lane: who has how many turns, and who waits for whom.

MiniLM on one lane of one thread, texts of 24 words, and two servers one after the other: one that
runs each request alone, and one that runs eight together, fewer than wait. Each client has its own
connections and keeps so many requests in flight, each of which is followed by another as soon as it
is answered. Clients are told apart by their identities; to compare, the same clients ask once more
with one identity for all, and then the line is one of order of arrival.

    quiet    64 requests in flight of one client, and one at a time of another
    shares   eight clients with 1, 2, 4 ... 128 in flight
    callers  64 in flight of one client, and four times as many clients as a run has rows that ask
             one at a time: they leave the line with each question, and must not be new each time
    models   64 in flight for one model, and one at a time for another one on the same lane

What counts is the order of answers, as this process sees them, and not seconds: how many answers
of the flood come between a question of the quiet client and its answer, and whose the answers are
while nobody's line runs dry. So what else the machine does changes little. Every answer is compared
with that of a request that was alone.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.batching import check
from bench.load import connected
from bench.machine import written
from bench.thrash_asking import frame_of
from bench.thrash_figures import Turn, answers_of, fair_shares, fairness_summary, jain, passed_by
from bench.thrash_overload import long_texts
from modelyard import Client
from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.demo.models import minilm_folder
from modelyard_server.demo.process import modelyard_server

__all__ = ["BACKLOGGED", "DEMANDS", "FLOOD", "ROWS", "Asker", "demand_askers", "fairness_figures"]

ROWS: Final = (1, 8)
"""Most rows of a run, of each server."""
DEMANDS: Final = tuple(2**i for i in range(8))
"""Requests in flight of each of the eight clients."""
BACKLOGGED: Final = 4
"""Who has so many in flight has some in line at every moment: a run of eight has one of each
client, and while another one is under way a second run may begin."""
FLOOD: Final = 64
"""Requests in flight of a client that floods."""

_MODEL: Final = "minilm"
_OTHER: Final = "minilm-too"
_IDENTITY: Final = "x-modelyard-identity"
_EVERYBODY: Final = "everybody"
_PER_CONNECTION: Final = 64
_DEADLINE_S: Final = 120.0
_TEXTS: Final = 64
_LENGTH: Final = 24

_ROUNDS: Final = 2
_ASKED_ALONE: Final = 20
_ASKED_BESIDE: Final = 12
_ASKED_BEHIND: Final = 4
"""Where a flood is before each question, and an answer takes that long."""
_ANSWERS_EACH: Final = 50
_CALLERS_A_ROW: Final = 4
_CALLERS_TURNS: Final = 20

_Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """A client that keeps requests in flight.

    Attributes:
        client: its name in the figures.
        in_flight: how many requests, at every moment.
        model: that it asks.
        begins: once there have been so many answers to others.
    """

    client: str
    in_flight: int
    model: str = _MODEL
    begins: int = 0


_QUIET: Final = Asker(client="quiet", in_flight=1)
_QUIET_BESIDE: Final = Asker(client="quiet", in_flight=1, begins=FLOOD)
_QUIET_ELSEWHERE: Final = Asker(client="quiet", in_flight=1, model=_OTHER, begins=FLOOD)
_LOUD: Final = Asker(client="flood", in_flight=FLOOD)


def demand_askers() -> list[Asker]:
    """The eight clients, named by how many requests each has in flight."""
    return [Asker(client=str(demand), in_flight=demand) for demand in DEMANDS]


def fairness_figures(
    folder: Path, tell: _Tell
) -> tuple[dict[str, Any], dict[int, dict[str, dict[str, int]]]]:
    """Runs two servers and has them asked.

    Args:
        folder: for their files; exists.
        tell: is told what goes on.

    Returns:
        The figures; by rows of a run, and then by "own" or "shared" identity, the answers of each
        of the eight clients.

    Raises:
        grpc.aio.AioRpcError: a request was not answered.
        RuntimeError: an answer was wrong.
    """
    figures: dict[str, Any] = {}
    shares: dict[int, dict[str, dict[str, int]]] = {}
    for rows in ROWS:
        with modelyard_server(written(folder, _config(rows), f"rows-{rows}")) as server:
            asking = _Asking(server.address, tell)
            found = _quiet(asking, rows) | _models(asking, rows)
            shares[rows], of_shares = _shares(asking, rows)
            found |= of_shares | _callers(asking, rows)
            figures |= {f"fairness_{name}_rows_{rows}": value for name, value in found.items()}
    return figures | fairness_summary(figures, ROWS), shares


def _config(rows: int) -> str:
    source = minilm_folder()
    config = f"""
        [server]
        listen = "127.0.0.1:0"
        log_level = "warning"
        [catalog]
        durable = false
        [engine]
        max_batch_rows = {rows}
        [weights]
        store = "store"
        [roots]
        packages = {json.dumps(str(source.parent))}
        [[devices]]
        device = "cpu"
        budget = "600MB"
        threads = 1
        """
    for model in (_MODEL, _OTHER):
        config += f"""
        [models.{model}]
        runtime = "transformers"
        task = "feature-extraction"
        root = "packages"
        folder = {json.dumps(source.name)}
        pinned = true
        """
    return config


# --- What is asked


class _Asking:
    """Asks one server, and knows what is right.

    Args:
        address: of the server.
        tell: is told what goes on.
    """

    def __init__(self, address: str, tell: _Tell) -> None:
        self.tell = tell
        self._address = address
        texts = long_texts(_TEXTS, _LENGTH)
        with Client(address, timeout_s=300) as client:
            client.predict(_OTHER, [texts[0]])
            self._right = {
                text: np.asarray(client.predict(_MODEL, [text])["embedding"]) for text in texts
            }
        self._frames = {
            model: [(text, frame_of(model, text)) for text in texts] for model in (_MODEL, _OTHER)
        }

    def turns(
        self, askers: Sequence[Asker], is_over: Callable[[Mapping[str, int]], bool], identity: str
    ) -> list[Turn]:
        """Have askers ask until it is over, and look at all answers.

        Args:
            askers: clients.
            is_over: from how many answers each client has had.
            identity: of all of them; empty if each has its own.

        Returns:
            The answers in the order in which they came, but for those that came after it was over.
        """
        return asyncio.run(self._turns(askers, is_over, identity))

    async def _turns(
        self, askers: Sequence[Asker], is_over: Callable[[Mapping[str, int]], bool], identity: str
    ) -> list[Turn]:
        turns: list[Turn] = []
        answers: list[tuple[str, pb.PredictResponse]] = []
        counts = dict.fromkeys((asker.client for asker in askers), 0)
        starts = {asker.begins: asyncio.Event() for asker in askers}
        ends: list[int] = []

        async def caller(asker: Asker, predict: Any, frames: Any) -> None:
            metadata = ((_IDENTITY, identity or asker.client),)
            await starts[asker.begins].wait()
            while not ends:
                text, frame = next(frames)
                asked, began = len(turns), time.perf_counter()
                response = await predict(frame, timeout=_DEADLINE_S, metadata=metadata)
                seconds = time.perf_counter() - began
                turns.append(Turn(client=asker.client, asked=asked, seconds=seconds))
                answers.append((text, response))
                counts[asker.client] += 1
                for begins, start in starts.items():
                    if len(turns) >= begins:
                        start.set()
                if not ends and is_over(counts):
                    ends.append(len(turns))

        if 0 in starts:
            starts[0].set()
        connections = [-(-asker.in_flight // _PER_CONNECTION) for asker in askers]
        async with connected(self._address, sum(connections)) as predicts:
            left = iter(predicts)
            async with asyncio.TaskGroup() as group:
                for asker, count in zip(askers, connections, strict=True):
                    own = [next(left) for _ in range(count)]
                    frames = cycle(self._frames[asker.model])
                    for i in range(asker.in_flight):
                        group.create_task(caller(asker, own[i % count], frames))
        check(answers, self._right)
        return turns[: ends[0]]


def _has_had(client: str, answers: int, counts: Mapping[str, int]) -> bool:
    return counts[client] >= answers


def _have_had(answers: int, counts: Mapping[str, int]) -> bool:
    return sum(counts.values()) >= answers


def _quiet(asking: _Asking, rows: int) -> dict[str, float]:
    """One that asks one at a time: alone, beside a flood, and in one line with it."""
    seconds: dict[str, list[float]] = {"alone": [], "own": [], "shared": []}
    passed: dict[str, list[int]] = {"own": [], "shared": []}
    for number in range(_ROUNDS):
        turns = asking.turns([_QUIET], partial(_has_had, "quiet", _ASKED_ALONE), "")
        seconds["alone"] += [turn.seconds for turn in turns]
        # Who comes first changes: the one after it finds the machine as it left it.
        for name in sorted(passed, reverse=number % 2 == 1):
            is_shared = name == "shared"
            asked = _ASKED_BEHIND if is_shared else _ASKED_BESIDE
            turns = asking.turns(
                [_LOUD, _QUIET_BESIDE],
                partial(_has_had, "quiet", asked),
                _EVERYBODY if is_shared else "",
            )
            seconds[name] += [turn.seconds for turn in turns if turn.client == "quiet"]
            passed[name] += passed_by(turns, "quiet", "flood")
    alone = statistics.median(seconds["alone"])
    figures = {"quiet_alone_ms": round(alone * 1e3, 2)}
    for name, suffix in (("own", ""), ("shared", "_shared")):
        figures[f"quiet_runs{suffix}"] = round(statistics.median(passed[name]) / rows, 3)
        figures[f"quiet_runs_worst{suffix}"] = round(max(passed[name]) / rows, 3)
        ratio = statistics.median(seconds[name]) / alone
        figures[f"quiet_wait_ratio{suffix}"] = round(ratio, 2)
    asking.tell(
        f"runs of {rows}: the flood has {figures['quiet_runs']:g} runs before a quiet client's "
        f"answer, {figures['quiet_runs_shared']:g} under one identity"
    )
    return figures


def _models(asking: _Asking, rows: int) -> dict[str, float]:
    """One that asks one at a time for a model that nobody else wants, on a flooded lane."""
    asked = _ROUNDS * _ASKED_BEHIND
    turns = asking.turns([_LOUD, _QUIET_ELSEWHERE], partial(_has_had, "quiet", asked), "")
    passed = passed_by(turns, "quiet", "flood")
    later = passed_by(turns, "quiet", "flood", later=True)
    asking.tell(
        f"runs of {rows}: the flood of another model has {statistics.median(passed):g} answers "
        "before a quiet client's"
    )
    return {
        "other_model_answers": round(statistics.median(passed), 1),
        "other_model_answers_worst": max(passed),
        "other_model_later": max(later),
    }


def _shares(asking: _Asking, rows: int) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """Eight clients, each with twice as many in flight as the one before."""
    askers, begins = demand_askers(), sum(DEMANDS)
    backlogged = [asker.client for asker in askers if asker.in_flight >= BACKLOGGED]
    shares: dict[str, dict[str, int]] = {}
    figures: dict[str, float] = {}
    for name, suffix in (("own", ""), ("shared", "_shared")):
        turns = asking.turns(
            askers,
            partial(_have_had, begins + _ANSWERS_EACH * len(askers)),
            _EVERYBODY if name == "shared" else "",
        )
        # The first are of a line that was filled in some order of its own.
        found = answers_of(turns[begins:], [asker.client for asker in askers])
        shares[name] = found
        figures[f"jain{suffix}"] = round(jain([found[client] for client in backlogged]), 4)
        figures[f"jain_all{suffix}"] = round(jain(list(found.values())), 4)
    asking.tell(
        f"runs of {rows}: Jain's index {figures['jain']:g}, {figures['jain_shared']:g} under one "
        f"identity; answers {list(shares['own'].values())} and {list(shares['shared'].values())}"
    )
    return shares, figures


def _callers(asking: _Asking, rows: int) -> dict[str, float]:
    """One with a line, beside more that ask one at a time than a run has room for."""
    callers = [
        Asker(client=f"caller {i}", in_flight=1, begins=FLOOD) for i in range(_CALLERS_A_ROW * rows)
    ]
    clients = len(callers) + 1
    begins = FLOOD + clients
    turns = asking.turns(
        [_LOUD, *callers], partial(_have_had, begins + _CALLERS_TURNS * clients), ""
    )
    share = fair_shares(answers_of(turns[begins:], ["flood", *(one.client for one in callers)]))
    asking.tell(
        f"runs of {rows}: who has {FLOOD} in flight has {share['flood']:.0%} of an equal share "
        f"beside {len(callers)} who ask one at a time"
    )
    return {
        "line_share": round(share["flood"], 3),
        "callers": len(callers),
    }
