"""How many bytes a run takes beside the weights, for every batch, from a few that are known.

What a network computes on the way is mostly vectors, one for every token: it grows with the number
of tokens. Masks, and attention that is written out, have an element for every pair of tokens of a
text. So the bytes of a run are

    a + b * batch * length + c * batch * length^2,    a, b, c >= 0

and a few predictions tell the three numbers. What was measured then corrects them, upwards only: a
charge that is too high costs room, one that is too low costs the process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations
from types import MappingProxyType
from typing import Final, NamedTuple

__all__ = [
    "MAX_CORRECTION",
    "ActivationModel",
    "ActivationPoint",
    "RunEstimate",
    "bucket_of",
]

MAX_CORRECTION: Final = 4
"""Most by which one batch's measurement raises what is said of other batches."""


class ActivationPoint(NamedTuple):
    """What one batch takes.

    Attributes:
        batch: rows, at least 1.
        length: tokens a row, at least 1; 1 for what has no length, such as pictures of one size.
        size_bytes: peak of a run, at least 0.
    """

    batch: int
    length: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationModel:
    """Bytes of a run by rows and tokens a row. Immutable: a correction is another model.

    What it says never falls when rows or tokens are added, and is never below what it was made from
    or what was measured in the same bucket; see bucket_of.

    Attributes:
        base: a, bytes of any run.
        per_token: b, bytes of a token.
        per_pair: c, bytes of a pair of tokens of a row.
        correction: factor from measurements, from 1 to MAX_CORRECTION.
        measured: highest measurement by bucket.
    """

    base: Fraction
    per_token: Fraction
    per_pair: Fraction
    correction: Fraction = Fraction(1)
    measured: Mapping[tuple[int, int], int] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def fit(cls, points: Sequence[ActivationPoint]) -> ActivationModel:
        """Finds the numbers that are nearest to the points by least squares, none negative.

        If they miss a point from below, the base is raised until they do not.

        Args:
            points: at least two, of different numbers of tokens.

        Raises:
            ValueError: too few points, or one that no batch can be.
        """
        for point in points:
            _check(point)
        if len({point.batch * point.length for point in points}) < 2:
            raise ValueError("at least two batches of different numbers of tokens are needed")
        base, per_token, per_pair = min(
            _candidates(points), key=lambda numbers: _squared_error(numbers, points)
        )
        fitted = cls(base=base, per_token=per_token, per_pair=per_pair)
        missing = max(point.size_bytes - fitted._fitted(*point[:2]) for point in points)
        return replace(fitted, base=base + max(missing, Fraction(0)))

    @classmethod
    def unknown(cls) -> ActivationModel:
        """The model that says 0 of everything until something is measured."""
        return cls(base=Fraction(0), per_token=Fraction(0), per_pair=Fraction(0))

    def predict(self, batch: int, length: int) -> int:
        """Says what a run takes, in bytes.

        Args:
            batch: rows, at least 1.
            length: tokens a row, at least 1.

        Raises:
            ValueError: there is no such batch.
        """
        _check(ActivationPoint(batch, length, 0))
        rows, tokens = bucket_of(batch, length)
        measured = max(
            (
                size_bytes
                for (of_rows, of_tokens), size_bytes in self.measured.items()
                if of_rows <= rows and of_tokens <= tokens
            ),
            default=0,
        )
        return max(measured, math.ceil(self._fitted(batch, length) * self.correction))

    def observe(self, batch: int, length: int, measured_bytes: int) -> ActivationModel:
        """Returns the model that also knows of this measurement; itself if that says nothing new.

        In whatever order measurements come, what is known in the end is the same.

        Args:
            batch: rows of the run, at least 1.
            length: tokens a row, at least 1.
            measured_bytes: peak of the run beside weights and inputs.

        Raises:
            ValueError: there is no such batch.
        """
        _check(ActivationPoint(batch, length, measured_bytes))
        bucket = bucket_of(batch, length)
        known = max(measured_bytes, self.measured.get(bucket, -1))
        correction = max(self.correction, self._correction_for(batch, length, measured_bytes))
        if correction == self.correction and known == self.measured.get(bucket):
            return self
        measured = MappingProxyType({**self.measured, bucket: known})
        return replace(self, correction=correction, measured=measured)

    def _fitted(self, batch: int, length: int) -> Fraction:
        tokens = batch * length
        return self.base + self.per_token * tokens + self.per_pair * tokens * length

    def _correction_for(self, batch: int, length: int, measured_bytes: int) -> Fraction:
        fitted = self._fitted(batch, length)
        # Of nothing there is no multiple; the bucket remembers what was measured.
        ratio = measured_bytes / fitted if fitted else Fraction(1)
        return min(ratio, Fraction(MAX_CORRECTION))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """What is known of a model's runs before the first of them. Plain data.

    Attributes:
        key: the same for models whose runs take the same, so that one's measurements count for all
            of them; empty for a model that is like no other.
        model: of all batches; one that knows nothing if nothing could be predicted.
        largest_batch: rows of the largest batch, at least 1.
        largest_length: its tokens a row, at least 1.
    """

    key: str = ""
    model: ActivationModel = field(default_factory=ActivationModel.unknown)
    largest_batch: int = 1
    largest_length: int = 1

    @property
    def size_bytes(self) -> int:
        """What the largest batch takes; 0 if nobody knows."""
        return self.model.predict(self.largest_batch, self.largest_length)


def _check(point: ActivationPoint) -> None:
    if point.batch < 1 or point.length < 1 or point.size_bytes < 0:
        raise ValueError(
            f"no batch has {point.batch} rows of {point.length} tokens and {point.size_bytes} bytes"
        )


def bucket_of(batch: int, length: int) -> tuple[int, int]:
    """The bucket of a batch: of all whose rows and tokens have the same next powers of two.

    There are few of them, however many batches there are.

    Args:
        batch: rows, at least 1.
        length: tokens a row, at least 1.
    """
    return (batch - 1).bit_length(), (length - 1).bit_length()


def _features(point: ActivationPoint) -> tuple[int, int, int]:
    tokens = point.batch * point.length
    return 1, tokens, tokens * point.length


def _candidates(
    points: Sequence[ActivationPoint],
) -> Iterator[tuple[Fraction, Fraction, Fraction]]:
    """Least squares over every choice of the three terms, where none comes out negative.

    The best of them is the least squares under that condition. Those with fewer terms come first,
    so that of equally good ones the plainest is taken; of these, those that grow with tokens.
    """
    orders = [choice for size in (1, 2, 3) for choice in combinations((1, 0, 2), size)]
    for choice in orders:
        solved = _solve(points, choice)
        if solved is not None and min(solved) >= 0:
            numbers = dict(zip(choice, solved, strict=True))
            zero = Fraction(0)
            yield numbers.get(0, zero), numbers.get(1, zero), numbers.get(2, zero)


def _solve(points: Sequence[ActivationPoint], choice: Sequence[int]) -> list[Fraction] | None:
    """Solves the normal equations of the chosen terms exactly; None if they have many solutions."""
    features = [[_features(point)[index] for index in choice] for point in points]
    size = len(choice)
    rows = [
        [Fraction(sum(row[i] * row[j] for row in features)) for j in range(size)]
        + [Fraction(sum(row[i] * p.size_bytes for row, p in zip(features, points, strict=True)))]
        for i in range(size)
    ]
    for column in range(size):
        pivot = next((i for i in range(column, size) if rows[i][column]), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for i in range(size):
            if i != column and (factor := rows[i][column]):
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[column], strict=True)]
    return [row[size] for row in rows]


def _squared_error(
    numbers: tuple[Fraction, Fraction, Fraction], points: Sequence[ActivationPoint]
) -> Fraction:
    total = Fraction(0)
    for point in points:
        error = Fraction(-point.size_bytes)
        for number, feature in zip(numbers, _features(point), strict=True):
            error += number * feature
        total += error * error
    return total
