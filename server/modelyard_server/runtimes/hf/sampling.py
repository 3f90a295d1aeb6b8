"""Chooses the next token of one text.

Not by the library's classes: those draw from the process's generator, and work on batches whose
rows want the same.
"""

from __future__ import annotations

import torch

__all__ = ["TokenSampler", "probabilities"]


def probabilities(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn, the likeliest first, and their probabilities.

    The logits are divided by the temperature; of the outcome the top_k likeliest are kept; of
    these the fewest likeliest whose probabilities sum to top_p at least. Of equal tokens that with
    the lower id counts as the likelier.

    Args:
        logits: [tokens], any float type.
        temperature: above 0.
        top_k: at least 1, or 0 for all.
        top_p: above 0, at most 1.

    Returns:
        Ids INT64 [n] and probabilities FLOAT64 [n], which sum to 1.

    Raises:
        ValueError: the logits are no numbers.
    """
    scores = logits.to(device="cpu", dtype=torch.float64)
    top = scores.max()
    if not bool(torch.isfinite(top)):
        raise ValueError("the model's scores are no numbers")
    # Below the highest all are negative, so that no temperature makes any of them overflow.
    ordered, ids = ((scores - top) / temperature).sort(descending=True, stable=True)
    if 0 < top_k < len(ids):
        ordered, ids = ordered[:top_k], ids[:top_k]
    chances = ordered.softmax(dim=-1)
    if top_p < 1.0:
        # Those before which the sum was not there yet.
        before = chances.cumsum(dim=-1) - chances
        count = max(1, int((before < top_p).sum()))
        ids, chances = ids[:count], chances[:count]
        chances = chances / chances.sum()
    return ids, chances


class TokenSampler:
    """Chooses the tokens of one text, by itself: what others draw makes no difference.

    Args:
        temperature: 0 to take the likeliest always.
        top_k: draws among so many; 0 for all.
        top_p: draws among the likeliest that have this probability together.
        seed: of the draws, any of 64 bits.
    """

    def __init__(self, *, temperature: float, top_k: int, top_p: float, seed: int) -> None:
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._generator = torch.Generator().manual_seed(seed) if temperature > 0 else None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest is taken always."""
        return self._generator is None

    def choose(self, logits: torch.Tensor) -> int:
        """The next token. One draw of the generator a token, whatever the scores are.

        Args:
            logits: [tokens], any float type.

        Raises:
            ValueError: they are no numbers.
        """
        if self._generator is None:
            return int(logits.argmax())
        ids, chances = probabilities(
            logits, temperature=self._temperature, top_k=self._top_k, top_p=self._top_p
        )
        drawn = torch.rand(1, generator=self._generator, dtype=torch.float64)
        place = int(torch.searchsorted(chances.cumsum(dim=-1), drawn, right=True))
        # The sum may be a little below 1.
        return int(ids[min(place, len(ids) - 1)])
