"""What is done when a worker dies: the books are put right, and what it held comes back.

The models that it held have lost their memory. Those that had nothing to do with its death are
loaded again at once. A model that was running or being loaded when it died is a suspect, and gets a
strike; several suspects share one, since nobody can tell who it was. Too many strikes within the
window, and the model is barred: not loaded any more, until an operator asks for it by hand.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from fractions import Fraction

from modelyard_server.errors import Refusal
from modelyard_server.execution.engine import WorkerDeath
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import ModelHandle

__all__ = ["Recovery"]

logger = logging.getLogger(__name__)

_WINDOW_S = 600.0


class Recovery:
    """Puts the residency right after a worker's death. Methods on the event loop's thread.

    Args:
        residency: whose models the workers hold.
        strikes: how many bar a model.
        now_s: the clock; monotonic.
    """

    def __init__(
        self,
        residency: Residency,
        *,
        strikes: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residency = residency
        self._most = strikes
        self._now_s = now_s
        # By the yard's id: a model that is changed or registered anew starts without any.
        self._strikes: dict[int, deque[tuple[float, Fraction]]] = {}

    def on_death(self, death: WorkerDeath) -> None:
        """A worker has died."""
        suspects = [
            handle
            for core_id in death.suspects
            if (handle := self._residency.handle_of(core_id)) is not None
        ]
        for handle in suspects:
            self._strike(handle, Fraction(1, len(suspects)), death.cause)
        names = ", ".join(handle.name for handle in suspects) or "none"
        logger.error(
            "a worker died (%s); it held %d models; running or loading: %s",
            death.cause,
            len(death.models),
            names,
        )
        for handle in self._residency.lost(death.models):
            if handle not in suspects or self._residency.use(handle).pinned:
                self._reload(handle)

    def forgive(self, handle: ModelHandle) -> None:
        """An operator asks for a model by hand: its strikes are forgotten."""
        handle.barred_text = ""
        self._strikes.pop(handle.core_id, None)

    def _strike(self, handle: ModelHandle, weight: Fraction, cause: str) -> None:
        now_s = self._now_s()
        for core_id in [one for one in self._strikes if self._residency.handle_of(one) is None]:
            del self._strikes[core_id]
        strikes = self._strikes.setdefault(handle.core_id, deque())
        strikes.append((now_s, weight))
        while strikes[0][0] < now_s - _WINDOW_S:
            strikes.popleft()
        if sum(weight for _, weight in strikes) >= self._most and not handle.barred_text:
            handle.barred_text = (
                f"it brought its worker down {len(strikes)} times, the last time so: {cause}; "
                "load it by hand to try again"
            )
            logger.error("%s is not loaded any more: %s", handle.name, handle.barred_text)

    def _reload(self, handle: ModelHandle) -> None:
        if handle.barred_text:
            return
        try:
            self._residency.want(handle)
        except Refusal as refusal:
            logger.warning("%s cannot be loaded again: %s", handle.name, refusal)
