"""What a model remembers of several texts, as one cache whose rows join and leave.

The rows lie with their ends side by side: a text that is shorter than the longest is filled up
before its beginning, as batches of prompts are, and the filling is masked. So every row goes on at
the same place, and a step of all of them is one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["CacheRow", "KvBatch", "gather", "is_plain"]


def is_plain(cache: object, rows: int, width: int) -> bool:
    """Whether a cache is keys and values of every token in every layer, and nothing else.

    Those of models with windows, states or layers without a cache of their own are not.

    Args:
        cache: that a model has returned.
        rows: of the batch it has read.
        width: tokens a row that it has read.
    """
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer
        and _has(layer.keys, rows, width)
        and _has(layer.values, rows, width)
        for layer in cache.layers
    )


def _has(part: torch.Tensor | None, rows: int, width: int) -> bool:
    if part is None or part.dim() != 4:
        return False
    return part.shape[0] == rows and part.shape[2] == width


class KvBatch:
    """A cache of the library, and how much of each of its rows is a text. Not thread-safe.

    Args:
        cache: see is_plain.
        lengths: tokens of each row; the longest is the cache's width.
    """

    def __init__(self, cache: Any, lengths: Sequence[int]) -> None:
        self.cache = cache
        self.lengths = list(lengths)

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def mask(self, device: str, *, more: int = 0) -> torch.Tensor:
        """INT64 [rows, tokens], 1 for tokens and 0 for filling.

        Args:
            device: where to.
            more: tokens that every row is to get.
        """
        width = self.width
        place = torch.arange(width + more).unsqueeze(0)
        begins = torch.tensor([[width - length] for length in self.lengths])
        return (place >= begins).to(torch.int64).to(device)

    def note_step(self) -> None:
        """Says that every row has got a token."""
        self.lengths = [length + 1 for length in self.lengths]

    def undo_step(self) -> None:
        """Takes back what a step has added that failed half way."""
        width = self.width
        for layer in self.cache.layers:
            if layer.keys.shape[-2] > width:
                layer.keys = layer.keys[..., :width, :]
            if layer.values.shape[-2] > width:
                layer.values = layer.values[..., :width, :]

    @property
    def size_bytes(self) -> int:
        """Of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


@dataclass(frozen=True, slots=True)
class CacheRow:
    """A row of a batch."""

    batch: KvBatch
    row: int

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.batch.lengths[self.row]


def gather(rows: Sequence[CacheRow]) -> KvBatch:
    """A batch of some rows of others, which are not changed. No wider than it has to be.

    Args:
        rows: at least one, of caches of one model.
    """
    width = max(row.length for row in rows)
    first = rows[0].batch.cache
    made = copy.copy(first)
    made.layers = []
    for index, like in enumerate(first.layers):
        layer = type(like)()
        keys = _side_by_side([(_layer(row, index).keys, row) for row in rows], width)
        values = _side_by_side([(_layer(row, index).values, row) for row in rows], width)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        made.layers.append(layer)
    return KvBatch(made, [row.length for row in rows])


def _layer(row: CacheRow, index: int) -> Any:
    return row.batch.cache.layers[index]


def _side_by_side(parts: Sequence[tuple[torch.Tensor, CacheRow]], width: int) -> torch.Tensor:
    like = parts[0][0]
    # Zeros and not just any numbers: what is masked counts for nothing, unless it is no number.
    made = like.new_zeros((len(parts), like.shape[1], width, like.shape[3]))
    for place, (part, row) in enumerate(parts):
        made[place, :, width - row.length :] = part[row.row, :, part.shape[2] - row.length :]
    return made
