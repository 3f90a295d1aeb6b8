"""Lets go of what an exception keeps alive."""

from __future__ import annotations

import traceback

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
        # Frames that still run cannot be cleared and are left alone.
        traceback.clear_frames(current.__traceback__)
        pending += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            pending += current.exceptions
