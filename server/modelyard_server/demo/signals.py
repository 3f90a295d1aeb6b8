"""Inputs for the models that read tensors, made of arithmetic, and how to read their answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "crossword_picture",
    "describe_picture",
    "describe_pitch",
    "honeycomb_picture",
    "sine_frames",
    "wall_clock_picture",
]

_SIDE = 224
_SAMPLE_RATE_HZ = 16_000
_FRAME_SAMPLES = 1024
_CENTS_PER_BIN = 20.0
_FIRST_BIN_CENTS = 1997.3794084376191
"""Cents above 10 Hz of CREPE's lowest pitch, 31.7 Hz (Kim et al. 2018)."""

_CLASS_NAMES = {
    409: "analog clock",
    599: "honeycomb",
    646: "maze",
    892: "wall clock",
    918: "crossword puzzle",
}
"""Names of those of the 1,000 ImageNet classes that the pictures here are likely to be given."""


def sine_frames(*frequencies_hz: float) -> NDArray[np.float32]:
    """One frame of a pure tone for each frequency: float32 [n, 1024], mean 0, deviation 1."""
    seconds = np.arange(_FRAME_SAMPLES) / _SAMPLE_RATE_HZ
    tones = np.sin(2 * np.pi * np.asarray(frequencies_hz)[:, None] * seconds)
    tones -= tones.mean(axis=1, keepdims=True)
    tones /= tones.std(axis=1, keepdims=True)
    return tones.astype(np.float32)


def describe_pitch(activation: NDArray[np.float32]) -> str:
    """The frequency CREPE heard, from one frame's activations [360].

    The mean of the pitches around the strongest one, weighted by their activations, as in the
    paper.
    """
    best = int(activation.argmax())
    near = np.arange(max(best - 4, 0), min(best + 5, len(activation)))
    weights = activation[near].astype(np.float64)
    cents = (weights * (_CENTS_PER_BIN * near + _FIRST_BIN_CENTS)).sum() / weights.sum()
    return f"{10 * 2 ** (cents / 1200):.0f} Hz ({activation[best]:.0%})"


def describe_picture(logits: NDArray[np.float32]) -> str:
    """The class a picture was given, from its logits [1000], and its probability."""
    odds = np.exp(logits.astype(np.float64) - logits.max())
    best = int(odds.argmax())
    return f"{_CLASS_NAMES.get(best, f'class {best}')} ({odds[best] / odds.sum():.0%})"


def wall_clock_picture() -> NDArray[np.float32]:
    """A clock on a wall that shows ten past ten: float32 [1, 3, 224, 224] in [-1, 1]."""
    across, down = _offsets_from_centre()
    radius = np.hypot(across, down)
    picture = _canvas((178, 160, 130))
    for limit, colour in ((96, (60, 35, 20)), (90, (110, 70, 40)), (82, (245, 243, 235))):
        picture[radius < limit] = colour

    def draw_bar(turn: float, start: float, end: float, half_width: float) -> None:
        angle = 2 * np.pi * turn
        along = across * np.sin(angle) - down * np.cos(angle)
        beside = across * np.cos(angle) + down * np.sin(angle)
        picture[(along > start) & (along < end) & (abs(beside) < half_width)] = (18, 18, 18)

    for minute in range(60):
        hour_mark = minute % 5 == 0
        draw_bar(minute / 60, 66 if hour_mark else 74, 79, 2.2 if hour_mark else 0.8)
    draw_bar((10 + 10 / 60) / 12, -10, 44, 3.5)
    draw_bar(10 / 60, -10, 64, 2.2)
    picture[radius < 5] = (150, 20, 20)
    return _as_input(picture)


def honeycomb_picture() -> NDArray[np.float32]:
    """Cells of a honeycomb: float32 [1, 3, 224, 224] in [-1, 1]."""
    down, across = np.mgrid[0:_SIDE, 0:_SIDE]
    centres = [
        (24 * column + 12 * (row % 2), 21 * row)
        for column in range(-1, 11)
        for row in range(-1, 12)
    ]
    distances = np.stack([np.hypot(across - x, down - y) for x, y in centres])
    nearest, second = np.partition(distances, 1, axis=0)[:2]
    # How far a point is from the border between its two nearest centres.
    depth = second - nearest
    picture = _canvas((120, 70, 10))
    picture[depth > 4] = (220, 150, 30)
    picture[depth > 14] = (240, 180, 70)
    return _as_input(picture)


def crossword_picture() -> NDArray[np.float32]:
    """A grid with black squares and small marks: float32 [1, 3, 224, 224] in [-1, 1]."""
    cell = 16
    black = np.random.default_rng(1).random((_SIDE // cell, _SIDE // cell)) < 0.2
    picture = _canvas((255, 255, 255))
    for row, column in np.ndindex(*black.shape):
        square = picture[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        if black[row, column]:
            square[:] = 0
        else:
            square[5:12, 7:9] = 60
    picture[::cell] = 0
    picture[:, ::cell] = 0
    return _as_input(picture)


def _canvas(colour: tuple[int, int, int]) -> NDArray[np.float64]:
    return np.full((_SIDE, _SIDE, 3), colour, dtype=np.float64)


def _offsets_from_centre() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    down, across = np.mgrid[0:_SIDE, 0:_SIDE] - (_SIDE - 1) / 2
    return across, down


def _as_input(picture: NDArray[np.float64]) -> NDArray[np.float32]:
    scaled = picture.transpose(2, 0, 1)[None] / 127.5 - 1
    return np.ascontiguousarray(scaled, dtype=np.float32)
