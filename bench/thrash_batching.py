"""What sharing runs brings: MiniLM on one lane of one thread, with batching and without.

Two servers, asked in turn; see bench/batching.py. The texts are always the same: short sentences of
common words, drawn from a seed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bench.batching import both_servers, measured

__all__ = ["TEXTS_SAID", "batching_figures", "short_texts"]

_WORDS: Final = (
    "always answer apple bank before bird book bring buy car child city clean close cold come "
    "cook cup dark day door dream drink east eat every eye fall family far fast find fire fish "
    "fly friend garden give glass go green hand happy help home horse house ice keep kind know "
    "lake late laugh leave letter light listen little live long look lost love make market meet "
    "milk money morning mother move music near never new night north old open paper park play "
    "quick quiet rain read red ride river road run sea sell shop short show sing sister sleep "
    "slow small snow song south spring stand star stay stone stop story street strong summer sun "
    "table talk tall tea tell tree turn under village visit wait walk warm wash watch water west "
    "wind window winter wood word work write yellow young"
)
_COUNT: Final = 64
_FEWEST: Final = 3
_MOST: Final = 12
_SEED: Final = 801
_ROUNDS: Final = 5

TEXTS_SAID: Final = f"{_COUNT} sentences of {_FEWEST} to {_MOST} words, seed {_SEED}"


def short_texts() -> tuple[str, ...]:
    """The sentences."""
    chance, words = random.Random(_SEED), _WORDS.split()
    return tuple(
        " ".join(chance.choices(words, k=chance.randint(_FEWEST, _MOST))) for _ in range(_COUNT)
    )


def batching_figures(folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Asks both servers.

    Args:
        folder: for their files; exists.
        tell: is told what goes on.
    """
    tell(TEXTS_SAID)
    with both_servers(folder, argparse.Namespace(engine="process")) as servers:
        found = asyncio.run(measured(servers, _ROUNDS, short_texts(), tell))
    # There it is a ratio of rates; here, of seconds.
    alone = found.pop("batching_c1")
    return {**found, "batching_c1": round(1 / alone, 3), "batching_texts": TEXTS_SAID}
