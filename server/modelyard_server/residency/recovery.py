"""What is done when a worker dies: the books are put right, and what it held comes back.

The models that it held have lost their memory. Those that had nothing to do with its death are
loaded again at once. A model that was running or being loaded when it died is a suspect, and gets
its part of one strike; `suspicion` says how much that is. Who is cleared of it comes back at once,
too. Too many strikes within the window, and the model is barred: not loaded any more, until an
operator asks for it by hand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from fractions import Fraction

from modelyard_server.errors import Refusal
from modelyard_server.execution.engine import WorkerDeath
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.suspicion import Suspicion
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
        time_of_day: what the time is, for people.
    """

    def __init__(
        self,
        residency: Residency,
        *,
        strikes: int,
        now_s: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._residency = residency
        self._now_s = now_s
        self._time_of_day = time_of_day
        # By the yard's id: a model that is changed or registered anew starts without any.
        self._suspicion = Suspicion(limit=strikes, window_s=_WINDOW_S)

    def on_death(self, death: WorkerDeath) -> None:
        """A worker has died."""
        suspects = self._known(death.suspects)
        barred = self._suspicion.died(
            self._now_s(),
            suspects,
            {
                core_id: handle.finished_runs
                for core_id, handle in self._known([*self._suspicion.models, *suspects]).items()
            },
        )
        parts = self._suspicion.blame()[-1] if suspects else {}
        logger.error(
            "a worker died (%s); it held %d models; running or loading: %s",
            death.cause,
            len(death.models),
            _named(suspects, parts),
        )
        for core_id in barred:
            self._bar(suspects[core_id], death.cause)
        self._residency.copies_lost(death.copies)
        for handle in self._residency.lost(death.models):
            if handle.core_id not in parts or self._residency.use(handle).pinned:
                self._reload(handle)

    def forgive(self, handle: ModelHandle) -> None:
        """An operator asks for a model by hand: its strikes and its failed loads are forgotten."""
        handle.barred_text = ""
        self._suspicion.forgive(handle.core_id)
        self._residency.forgive(handle)

    def _known(self, core_ids: Iterable[int]) -> dict[int, ModelHandle]:
        return {
            core_id: handle
            for core_id in core_ids
            if (handle := self._residency.handle_of(core_id)) is not None
        }

    def _bar(self, handle: ModelHandle, cause: str) -> None:
        if handle.barred_text:
            return
        parts = self._suspicion.parts(handle.core_id)
        what = (
            f"it brought its worker down {len(parts)} times"
            if sum(parts) == len(parts)
            else f"it was running or being loaded the {len(parts)} times that its worker died"
        )
        handle.barred_text = (
            f"{what} in {_WINDOW_S / 60:.0f} minutes, the last time so: {cause}; not loaded any "
            f"more since {self._time_of_day():%Y-%m-%d %H:%M:%S} UTC; load it by hand to try again "
            f"(modelyard load {handle.name})"
        )
        logger.error("%s is barred: %s", handle.name, handle.barred_text)

    def _reload(self, handle: ModelHandle) -> None:
        if handle.barred_text:
            return
        try:
            self._residency.want(handle)
        except Refusal as refusal:
            logger.warning("%s cannot be loaded again: %s", handle.name, refusal)


def _named(suspects: Mapping[int, ModelHandle], parts: Mapping[int, Fraction]) -> str:
    """The suspects of a death; of several, what part of the strike each gets."""
    if len(suspects) < 2:
        return "".join(handle.name for handle in suspects.values()) or "none"
    return ", ".join(
        f"{handle.name} ({float(parts.get(core_id, 0)):.0%})"
        for core_id, handle in suspects.items()
    )
