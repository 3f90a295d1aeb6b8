"""What models' runs take beside the weights: predicted when a model is registered, then corrected.

Measurements come from wherever models run and correct the figure upwards, never downwards: what was
predicted is an upper bound, for the largest batch that a model may be asked for, and no run that
took less says that none will take it. The figure is one for all models whose runs take the same.
It lives here, since workers come and go, and as long as the server does.

On the event loop's thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from modelyard_server.runtimes.api import Price
from modelyard_server.weights.activation_model import ActivationPoint, RunEstimate
from modelyard_server.weights.store.recent import Recent

__all__ = ["RunFigure", "RunFigures"]

_MAX_FIGURES: Final = 4_096
"""Of so many kinds of models the figure outlives the last of them."""

_MOST_BYTES: Final = 2**63 - 1


class RunFigure:
    """What runs take of models that are alike in this.

    Args:
        predicted_bytes: of the largest batch; 0 if nobody knows.
        estimate: of all batches.
    """

    def __init__(self, predicted_bytes: int = 0, estimate: RunEstimate | None = None) -> None:
        self._estimate = estimate or RunEstimate()
        self._model = self._estimate.model
        self._size_bytes = min(predicted_bytes, _MOST_BYTES)

    @property
    def size_bytes(self) -> int:
        """What a run of the largest batch takes; no less than any run took; 0 if nobody knows."""
        return self._size_bytes

    def observe(self, points: Sequence[ActivationPoint]) -> None:
        """Learns from runs; see ActivationModel.observe."""
        for point in points:
            self._model = self._model.observe(*point)
        largest = self._model.predict(self._estimate.largest_batch, self._estimate.largest_length)
        # Also of batches that are larger than the largest was thought to be.
        most = max(self._model.measured.values(), default=0)
        self._size_bytes = max(self._size_bytes, min(max(largest, most), _MOST_BYTES))


class RunFigures:
    """The figures, by the key of estimates."""

    def __init__(self) -> None:
        self._figures: Recent[str, RunFigure] = Recent(_MAX_FIGURES)

    def of(self, price: Price | None) -> RunFigure:
        """The figure of a model.

        Args:
            price: of its files; None if they are broken now.
        """
        if price is None:
            return RunFigure()
        figure = RunFigure(price.activation_bytes, price.runs)
        if price.runs is None or not price.runs.key:
            return figure
        return self._figures.setdefault(price.runs.key, figure)
