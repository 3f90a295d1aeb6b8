"""A server inside another program's process, called without a port.

The very application that `modelyard serve` runs, on an event loop and a thread of its own. Calls
carry the same bytes to the same handlers as over a connection, so everything that clients can ask
for can be asked here; only streams cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Final, TypeAlias, TypeVar

import grpc

from modelyard_server.app import Application, build
from modelyard_server.config import Config
from modelyard_server.services.handler import draining, new_error_id
from modelyard_server.services.status import defect_reply, reply_of
from modelyard_server.transport.api import Call, Duplex, Handler, StatusReply, Streaming

__all__ = ["EmbeddedServer", "Failure"]

logger = logging.getLogger(__name__)

_GRACE_S: Final = 5.0
_LATE_S: Final = 1.0
"""What a handler, which keeps to the deadline by itself, may be late before its caller is told."""

T = TypeVar("T")

Failure: TypeAlias = tuple[int, str, bytes]
"""A call that ends without a message: status code, text, and a serialized google.rpc.Status."""


class EmbeddedServer:
    """A server of this process.

    May be called from any thread but its own. Does not touch the settings of the process (signals,
    logging, allocator), which belong to the program that it is in.

    Args:
        config: what it is; `server.listen` is not looked at.

    Raises:
        DeviceMissing, BudgetImpossible, StoreError, Refusal: as `app.build` and
            `Application.begin`; nothing is left running.
    """

    def __init__(self, config: Config) -> None:
        self._loop = asyncio.new_event_loop()
        self._app: Application | None = None
        self._closing = threading.Lock()
        self._is_closed = False
        # On the loop's thread only.
        self._answering: set[asyncio.Task[Any]] = set()
        self.thread = threading.Thread(
            target=self._loop.run_forever, name="embedded yard", daemon=True
        )
        self.thread.start()
        try:
            self._app = self._run(_started(config))
        except BaseException:
            self._end_loop()
            raise

    def call(
        self,
        path: str,
        body: bytes,
        timeout_s: float | None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> bytes | Failure:
        """Makes one call and waits for its answer.

        Args:
            path: as gRPC writes it: "/modelyard.v1.InferenceService/Predict".
            body: the request message, serialized.
            timeout_s: how long the caller will wait; None for as long as it takes.
            metadata: as it would come with the call.
        """
        app = self._app
        _, _, rest = path.partition("/")
        service, _, method = rest.partition("/")
        handler = None if app is None else app.handlers.get(service, {}).get(method)
        if app is None or self._is_closed:
            return _failure(reply_of(draining()))
        if handler is None or isinstance(handler, Streaming | Duplex):
            return grpc.StatusCode.UNIMPLEMENTED.value[0], f"{path} cannot be called here", b""
        call = Call(body, lambda: metadata, timeout_s)
        future: Future[bytes | Failure] = asyncio.run_coroutine_threadsafe(
            self._answer(handler, call), self._loop
        )
        try:
            return future.result(None if timeout_s is None else timeout_s + _LATE_S)
        except TimeoutError:
            future.cancel()
            return grpc.StatusCode.DEADLINE_EXCEEDED.value[0], "the call took too long", b""
        except CancelledError:
            return _failure(reply_of(draining()))
        except BaseException:
            # The calling thread is to end; what it asked for is of no use to anybody.
            future.cancel()
            raise

    def close(self, grace_s: float = _GRACE_S) -> bool:
        """Answers what runs, gives everything back, and ends the thread. Idempotent.

        Args:
            grace_s: how long running calls have, and after them what runs without a caller.

        Returns:
            False if something still runs: a model or a loader that hangs.
        """
        with self._closing:
            if self._is_closed:
                return True
            self._is_closed = True
        settled = False
        if self._app is not None:
            with contextlib.suppress(TimeoutError):
                settled = self._run(self._stopped(self._app, grace_s), timeout_s=5 * grace_s + 5)
        self._end_loop()
        return settled

    async def _answer(self, handler: Handler, call: Call) -> bytes | Failure:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            reply = await handler(call)
        except Exception:
            error_id = new_error_id()
            logger.exception("defect %s: a call from this process", error_id)
            reply = defect_reply(error_id)
        finally:
            self._answering.discard(task)
        return reply if isinstance(reply, bytes) else _failure(reply)

    async def _stopped(self, app: Application, grace_s: float) -> bool:
        if self._answering:
            await asyncio.wait(self._answering, timeout=grace_s)
        return await app.stop(grace_s)

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def _end_loop(self) -> None:
        with contextlib.suppress(TimeoutError):
            self._run(_cleared(), timeout_s=_GRACE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.thread.join(_GRACE_S)
        if not self.thread.is_alive():
            self._loop.close()


async def _cleared() -> None:
    """Ends what is left on the running loop, as `asyncio.run` does."""
    loop = asyncio.get_running_loop()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


async def _started(config: Config) -> Application:
    app = build(config, connected=False)
    try:
        await app.begin()
    except BaseException:
        await app.stop(0)
        raise
    return app


def _failure(reply: StatusReply) -> Failure:
    return reply.code, reply.text, reply.details
