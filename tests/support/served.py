"""A server beside the test: for blocking callers, which cannot share a loop with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from tests.support.server import RunningApp, running_app

__all__ = ["served_app"]

_START_S = 60.0
_STOP_S = 60.0


@contextmanager
def served_app(config_text: str, base: Path) -> Iterator[RunningApp]:
    """Runs an application on a loop and in a thread of its own; checks what it leaves behind.

    Args: as those of running_app.

    Raises:
        AssertionError: what running_app finds at the end, or it did not end.
    """
    started: Future[tuple[RunningApp, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with running_app(config_text, base) as yard:
            started.set_result((yard, asyncio.get_running_loop(), stop))
            await stop.wait()

    ended: Future[None] = Future()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            ended.set_exception(error)
        else:
            ended.set_result(None)

    thread = threading.Thread(target=run, name="served-app")
    thread.start()
    yard, loop, stop = started.result(_START_S)
    try:
        yield yard
    finally:
        loop.call_soon_threadsafe(stop.set)
        ended.result(_STOP_S)
        thread.join()
