"""Which branch an affinity has: weighted rendezvous hashing, the same on every server. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

__all__ = ["choose"]

_SCALE = 2.0**64


def choose(salt: str, branches: Sequence[tuple[str, float]], affinity: str) -> int:
    """The position of the branch that an affinity has.

    Each branch draws a number u from the affinity, evenly between 0 and 1, and the one with the
    highest -weight / ln(u) is chosen: with the odds of its weight. Of an affinity nothing changes
    but the scores of branches whose weights do, so no more affinities move than have to.

    Args:
        salt: splits of one salt choose alike.
        branches: of each its name and weight; a weight of 0 is never chosen.
        affinity: what the choice goes by.

    Raises:
        ValueError: every weight is 0.
    """
    best, best_score = -1, 0.0
    for i, (name, weight) in enumerate(branches):
        if weight <= 0:
            continue
        text = f"{salt}\0{name}\0{affinity}".encode()
        number = int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
        u = (number + 0.5) / _SCALE
        # A number at the very end is rounded to 1, whose logarithm is 0.
        score = math.inf if u >= 1.0 else -weight / math.log(u)
        if score > best_score:
            best, best_score = i, score
    if best < 0:
        raise ValueError("every branch has a weight of 0")
    return best
