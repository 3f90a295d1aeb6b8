"""Lets go of what an exception keeps alive."""

from __future__ import annotations

import gc
import traceback
from types import CellType, TracebackType

__all__ = ["forget_frames"]


def forget_frames(error: BaseException) -> None:
    """Clears the local variables of the finished frames that an exception remembers.

    An exception that somebody keeps (a future, a log record) keeps its frames, their `self`, and so
    a whole model. The traceback stays readable: it needs line numbers only.

    Args:
        error: the exception, at the moment it leaves the last frame that needs its locals. Those
            that led to it are cleared as well.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        _empty_cells(current.__traceback__)
        # Frames that still run cannot be cleared and are left alone.
        traceback.clear_frames(current.__traceback__)
        pending += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            pending += current.exceptions


def _empty_cells(trace: TracebackType | None) -> None:
    """Empties the variables that torch's call of a module with hooks shares with a closure.

    The closure is a function that its own frame keeps even when it is cleared, and one of the
    variables is the module. No other call shares them, and nobody calls the closure again.
    """
    while trace is not None:
        frame = trace.tb_frame
        if (
            frame.f_code.co_name == "_call_impl"
            and frame.f_globals.get("__name__") == "torch.nn.modules.module"
        ):
            # A frame that still runs shows nothing here.
            for value in gc.get_referents(frame):
                if isinstance(value, CellType):
                    del value.cell_contents
        trace = trace.tb_next
