"""Five times as many requests as a server can answer: what of its work still is of use.

MiniLM on one lane of one thread with texts of 200 words, so that a request is tens of milliseconds
of the server's processor and a fraction of one of who asks. First callers that wait for their
answers, in several numbers; the most answers a second that any number of them gets, as long as they
come within the deadline, is the peak. Then requests at random times: at half of that rate, at five
times of it, and at half again, each with a deadline. Only what is answered in its time counts,
from when it was due. Here the server's processor is what there is too little of, not memory: the
model is resident throughout.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bench.machine import written
from bench.thrash_asking import answer_at_a_pace, answer_in_turn, frame_of
from bench.thrash_figures import Answer, overload_summary, recovery_s
from modelyard import Client
from modelyard_server.demo.models import minilm_folder
from modelyard_server.demo.process import modelyard_server

__all__ = ["long_texts", "overload_figures"]

_MODEL: Final = "minilm"
_WORDS: Final = (
    "a about after all along and any are as at before between both by can city day do early "
    "every few first for from good had has have house in into is it later light long many may "
    "more most much near new no not now of often old on one other our out over own part people "
    "place right river road same see since small so some still story such than that the their "
    "them then there these they this time to town two under until up very was water way we well "
    "were what when where which who will with work year yet"
)
_TEXTS: Final = 64
_LENGTH: Final = 200
_SEED: Final = 701

DEADLINE_S: Final = 2.0
_CALLERS: Final = (4, 8, 16, 32)
_PEAK_S: Final = 5.0
_OVERLOAD: Final = 5.0
_BEFORE_S: Final = 3.0
_OVERLOAD_S: Final = 15.0
_AFTER_S: Final = 8.0
_SHARE_BESIDE: Final = 0.5

_Tell = Callable[[str], None]


def long_texts(count: int = _TEXTS, length: int = _LENGTH, seed: int = _SEED) -> list[str]:
    """Texts of so many words each, always the same ones."""
    chance, words = random.Random(seed), _WORDS.split()
    return [" ".join(chance.choices(words, k=length)) for _ in range(count)]


def overload_figures(folder: Path, tell: _Tell) -> tuple[dict[str, Any], list[list[Answer]]]:
    """Runs a server and asks it too much.

    Args:
        folder: for the server's files; exists.
        tell: is told what goes on.

    Returns:
        The figures; what became of the requests before, in and after the overload.
    """
    frames = [frame_of(_MODEL, text) for text in long_texts()]
    config = f"""
        [server]
        listen = "127.0.0.1:0"
        log_level = "warning"
        [catalog]
        durable = false
        [weights]
        store = "store"
        [roots]
        packages = {json.dumps(str(minilm_folder().parent))}
        [[devices]]
        device = "cpu"
        budget = "300MB"
        threads = 1
        [models.{_MODEL}]
        runtime = "transformers"
        task = "feature-extraction"
        root = "packages"
        folder = {json.dumps(minilm_folder().name)}
        pinned = true
        """
    with (
        modelyard_server(written(folder, config, "overload")) as server,
        Client(server.address, timeout_s=300) as client,
    ):
        client.predict(_MODEL, [long_texts(1)[0]])
        peak, callers = _peak(server.address, frames, tell)
        beside = peak * _SHARE_BESIDE
        phases = ((beside, _BEFORE_S), (peak * _OVERLOAD, _OVERLOAD_S), (beside, _AFTER_S))
        tell(f"{beside:.1f}, {phases[1][0]:.1f} and {beside:.1f} requests a second")
        answers = asyncio.run(answer_at_a_pace(server.address, frames, phases, DEADLINE_S, _SEED))
    begin_s, end_s = _BEFORE_S, _BEFORE_S + _OVERLOAD_S
    figures: dict[str, Any] = {
        "overload_peak_per_s": round(peak, 2),
        "overload_peak_callers": callers,
        "overload_deadline_s": DEADLINE_S,
        "overload_words": _LENGTH,
    }
    figures |= overload_summary(
        answers[1], begin_s=begin_s, end_s=end_s, deadline_s=DEADLINE_S, peak=peak
    )
    figures["recovery_s"] = recovery_s(answers[2], end_s=end_s, deadline_s=DEADLINE_S)
    tell(
        f"{figures['goodput_5x_per_s']:g} answers in time a second, {figures['goodput_5x']:.0%} of "
        f"the peak; {figures['overload_refused']} refused, {figures['overload_late']} late of "
        f"{figures['overload_requests']}; well again after {figures['recovery_s']:g} s"
    )
    return figures, answers


def _peak(target: str, frames: Sequence[bytes], tell: _Tell) -> tuple[float, int]:
    """The most answers a second, and by how many callers."""
    best = (0.0, 0)
    rate = 20.0
    for callers in (_CALLERS[0], *_CALLERS):
        count = max(4 * callers, int(rate * _PEAK_S))
        asked = [frames[i % len(frames)] for i in range(count)]
        seconds = answer_in_turn(target, asked, callers, 60.0)
        rate = count / seconds
        tell(f"{callers} callers: {rate:.1f} answers a second")
        # Who waits longer than the deadline would be of no use.
        if callers / rate <= DEADLINE_S:
            best = max(best, (rate, callers))
    return best
