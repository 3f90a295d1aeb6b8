"""Streams of predictions: many requests over one call, each answered as soon as it is done.

::

    with client.stream() as stream:
        for prediction in stream.map(("sentiment", text) for text in texts):
            print(prediction)

What waits to be sent goes in one message, and what is ready comes back in one: that is most of what
a call costs, shared by many. Answers come in any order.

A stream that breaks is not opened again behind anybody's back. Items that it had not answered end
with ``StreamBroken``, or with what the server refused the stream for (``ServerDraining`` when it
stops); they may be asked again, on another stream. Leaving the ``with`` block waits for the answers
that are missing; leaving it by an exception drops them.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import grpc
import grpc.aio

from modelyard import errors
from modelyard._connection import AsyncConnection, Connection
from modelyard._predict_messages import item_request, predict_request
from modelyard._stream_items import (
    METHOD,
    StreamItems,
    broken_error,
    checked_in_flight,
    checked_linger,
    ended_error,
)
from modelyard.prediction import BatchItem, Inputs, Prediction
from modelyard.v1 import inference_service_pb2 as pb

__all__ = ["DEFAULT_MAX_IN_FLIGHT", "AsyncPredictStream", "PredictStream"]

DEFAULT_MAX_IN_FLIGHT: Final = 256
"""Items of a stream that are asked and not answered, where nobody says otherwise."""

_LOOK_S: Final = 1.0
"""How often it is looked whether the server still answers."""

_JOIN_S: Final = 5.0

_Item: TypeAlias = BatchItem | tuple[str, Inputs]


class AsyncPredictStream:
    """A stream of predictions in an asyncio program; made by ``AsyncClient.stream``.

    Any number of tasks of the client's event loop may share it. It begins with its first item.
    """

    def __init__(self, connection: AsyncConnection, *, max_in_flight: int, linger_s: float) -> None:
        settings = connection.settings
        self._connection = connection
        self._linger_s = checked_linger(linger_s)
        self._max_in_flight = checked_in_flight(max_in_flight)
        self._seats = asyncio.Semaphore(self._max_in_flight)
        self._items: StreamItems[asyncio.Future[Prediction]] = StreamItems(
            settings.target, settings.max_message_bytes
        )
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._error: errors.ModelyardError | None = None
        self._is_closed = False
        self._call: Any = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._look: asyncio.TimerHandle | None = None

    @property
    def in_flight_count(self) -> int:
        """Items that are asked and not answered."""
        return self._items.open_count

    async def predict(
        self,
        key: str,
        inputs: Inputs,
        *,
        parameters: Mapping[str, object] | None = None,
        affinity: str | None = None,
        version: str | None = None,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Ask, and wait for the answer; arguments as those of ``Client.predict``.

        Waits first while ``max_in_flight`` items are not answered. A caller that is cancelled is
        not told the answer; the item keeps its place until it has come.

        Raises:
            TypeError, ValueError: as ``Client.predict``.
            ModelyardError: the item was refused or failed, as ``Client.predict``; or the stream has
                ended (``StreamBroken``, ``ServerDraining``).
            RuntimeError: the stream or the client is closed.
        """
        request = predict_request(key, inputs, parameters, affinity, version)
        return await (await self._submit(request, timeout_s))

    async def submit(
        self,
        key: str,
        inputs: Inputs,
        *,
        parameters: Mapping[str, object] | None = None,
        affinity: str | None = None,
        version: str | None = None,
        timeout_s: float | None = None,
    ) -> asyncio.Future[Prediction]:
        """Ask, and return a future that gets what ``predict`` returns or raises.

        Waits while ``max_in_flight`` items are not answered. Raises for itself what ``predict``
        raises before anything is sent.
        """
        request = predict_request(key, inputs, parameters, affinity, version)
        return await self._submit(request, timeout_s)

    async def map(
        self, items: Iterable[_Item] | AsyncIterable[_Item], *, timeout_s: float | None = None
    ) -> AsyncIterator[Prediction | errors.ModelyardError]:
        """Ask for many items, and yield what became of each, in their order.

        Items are taken as there is room for them, so there may be any number of them. One that was
        refused or failed is yielded as its error, and the others go on.

        Args:
            items: ``BatchItem``, or ``(key, inputs)``; also an asynchronous iterator.
            timeout_s: seconds each item may take; None takes the client's.

        Raises:
            TypeError, ValueError: an item that cannot be sent.
            ModelyardError: the stream has ended; raised behind what became of the items that had
                been asked by then.
            RuntimeError: the stream or the client is closed.
        """
        window: deque[asyncio.Future[Prediction]] = deque()
        ended: errors.ModelyardError | None = None
        async for item in _each(items):
            request = item_request(item)
            try:
                window.append(await self._submit(request, timeout_s))
            except errors.ModelyardError as error:
                ended = error
                break
            while window and (window[0].done() or len(window) >= self._max_in_flight):
                yield await _outcome(window.popleft())
        while window:
            yield await _outcome(window.popleft())
        if ended is not None:
            raise ended

    async def close(self) -> None:
        """Wait for the answers that are missing, and end the stream. Idempotent."""
        self._is_closed = True
        self._news.set()
        if self._tasks:
            if self._look is None:
                self._look_after()
            await self._ended.wait()
            await asyncio.wait(self._tasks)

    async def cancel(self) -> None:
        """End the stream at once: items that are not answered end with ``StreamBroken``."""
        self._is_closed = True
        self._end(ended_error("it was cancelled"))
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            await self.close()
        else:
            await self.cancel()

    async def _submit(
        self, request: pb.PredictRequest, timeout_s: float | None
    ) -> asyncio.Future[Prediction]:
        timeout_s = self._connection.settings.call_timeout(timeout_s)
        self._open()
        await self._seats.acquire()
        try:
            self._check_open()
            future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
            self._items.add(request, timeout_s, future)
        except BaseException:
            self._seats.release()
            raise
        self._news.set()
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_S, self._look_after)
        return future

    # --- The call -----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this stream is closed: open another one")
        if self._error is not None:
            raise copy.copy(self._error)  # One that is raised remembers where.

    def _open(self) -> None:
        self._check_open()
        channel = self._connection.channel()
        if self._call is not None:
            return
        metadata = grpc.aio.Metadata(*self._connection.settings.metadata())
        # Requests are bytes already.
        method: Any = channel.stream_stream(
            METHOD, response_deserializer=pb.PredictStreamResponse.FromString
        )
        self._call = method(metadata=metadata)
        loop = asyncio.get_running_loop()
        self._tasks = (
            loop.create_task(self._send(), name="modelyard stream: send"),
            loop.create_task(self._receive(), name="modelyard stream: receive"),
        )

    async def _send(self) -> None:
        items, news, call = self._items, self._news, self._call
        try:
            while not self._ended.is_set():
                if not items.waiting_count:
                    if self._is_closed:
                        await call.done_writing()
                        return
                    news.clear()
                    await news.wait()
                    await self._linger()
                    continue
                await call.write(items.take_message())
        except (grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            # How the call ended is what the other task is told.
            if not call.done():
                raise

    async def _linger(self) -> None:
        """Waits for company."""
        if self._linger_s:
            loop = asyncio.get_running_loop()
            end_s = loop.time() + self._linger_s
            while not self._is_closed and self._items.waiting_count < self._max_in_flight:
                self._news.clear()
                try:
                    async with asyncio.timeout_at(end_s):
                        await self._news.wait()
                except TimeoutError:
                    return

    async def _receive(self) -> None:
        target = self._connection.settings.target
        error: errors.ModelyardError = ended_error("the server ended it")
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                settled = self._items.settle(response)
                settled.tell()
                for _ in response.results:
                    self._seats.release()
        except grpc.aio.AioRpcError as ended:
            error = broken_error(ended, target)
        except asyncio.CancelledError:
            # Of the call, not of this task: the client was closed, or the stream cancelled.
            error = ended_error("it was cancelled")
            if not self._call.done():
                raise
        except errors.ModelyardError as unreadable:
            error = unreadable
        finally:
            self._end(error)

    def _end(self, error: errors.ModelyardError) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._error = error
        if self._look is not None:
            self._look.cancel()
        if self._call is not None:
            self._call.cancel()  # Does nothing if it is over.
        for task in self._tasks:
            # By hand: a write to a call that was cancelled before it had begun waits for ever.
            if task is not asyncio.current_task():
                task.cancel()
        settled = self._items.fail(error)
        settled.tell()
        for future, _ in settled.outcomes:
            # Looked at: who has dropped a stream with items in it wants no report of each.
            if not future.cancelled():
                future.exception()
        # Whoever waits for a seat is to find out as well.
        for _ in range(self._max_in_flight):
            self._seats.release()
        self._news.set()

    def _look_after(self) -> None:
        """Ends the stream if the server has vanished without a word."""
        self._look = None
        if self._ended.is_set():
            return
        if self._items.is_overdue(is_closed=self._is_closed):
            self._end(ended_error("the server does not answer any more"))
        elif self._is_closed or self._items.open_count:
            self._look = asyncio.get_running_loop().call_later(_LOOK_S, self._look_after)


async def _outcome(future: asyncio.Future[Prediction]) -> Prediction | errors.ModelyardError:
    try:
        return await future
    except errors.ModelyardError as error:
        return error


async def _each(items: Iterable[_Item] | AsyncIterable[_Item]) -> AsyncIterator[_Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class PredictStream:
    """A stream of predictions; made by ``Client.stream``.

    May be shared between threads. It begins with its first item.
    """

    def __init__(self, connection: Connection, *, max_in_flight: int, linger_s: float) -> None:
        settings = connection.settings
        self._connection = connection
        self._linger_s = checked_linger(linger_s)
        self._max_in_flight = checked_in_flight(max_in_flight)
        self._items: StreamItems[Future[Prediction]] = StreamItems(
            settings.target, settings.max_message_bytes
        )
        # Guards everything below and the items. Futures are settled without it.
        self._lock = threading.Lock()
        # Each for those alone that wait for it: waking others costs more than an item does.
        self._has_news = threading.Condition(self._lock)  # For what is sent.
        self._has_room = threading.Condition(self._lock)  # For who asks.
        self._is_over = threading.Condition(self._lock)
        self._error: errors.ModelyardError | None = None
        self._is_closed = False
        self._call: Any = None
        self._threads: tuple[threading.Thread, ...] = ()

    @property
    def in_flight_count(self) -> int:
        """Items that are asked and not answered."""
        return self._items.open_count

    def predict(
        self,
        key: str,
        inputs: Inputs,
        *,
        parameters: Mapping[str, object] | None = None,
        affinity: str | None = None,
        version: str | None = None,
        timeout_s: float | None = None,
    ) -> Future[Prediction]:
        """Ask, and return a future that gets the answer; arguments as those of ``Client.predict``.

        Waits while ``max_in_flight`` items are not answered. The future cannot be cancelled. It is
        settled by a thread of the stream: what is called back there must not ask for more.

        Returns:
            A future of the prediction, or of the ``ModelyardError`` that the item was refused or
            failed with, as ``Client.predict``; or that the stream ended with (``StreamBroken``,
            ``ServerDraining``).

        Raises:
            TypeError, ValueError: as ``Client.predict``.
            ModelyardError: the stream has ended.
            RuntimeError: the stream or the client is closed.
        """
        request = predict_request(key, inputs, parameters, affinity, version)
        return self._submit(request, timeout_s)

    def map(
        self, items: Iterable[_Item], *, timeout_s: float | None = None
    ) -> Iterator[Prediction | errors.ModelyardError]:
        """Ask for many items, and yield what became of each, in their order.

        Items are taken as there is room for them, so there may be any number of them. One that was
        refused or failed is yielded as its error, and the others go on.

        Args:
            items: ``BatchItem``, or ``(key, inputs)``.
            timeout_s: seconds each item may take; None takes the client's.

        Raises:
            TypeError, ValueError: an item that cannot be sent.
            ModelyardError: the stream has ended; raised behind what became of the items that had
                been asked by then.
            RuntimeError: the stream or the client is closed.
        """
        window: deque[Future[Prediction]] = deque()
        ended: errors.ModelyardError | None = None
        for item in items:
            request = item_request(item)
            try:
                window.append(self._submit(request, timeout_s))
            except errors.ModelyardError as error:
                ended = error
                break
            while window and (window[0].done() or len(window) >= self._max_in_flight):
                yield _result(window.popleft())
        while window:
            yield _result(window.popleft())
        if ended is not None:
            raise ended

    def close(self) -> None:
        """Wait for the answers that are missing, and end the stream. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._has_news.notify_all()
            if self._threads:
                self._is_over.wait_for(lambda: self._error is not None)
        self._join()

    def cancel(self) -> None:
        """End the stream at once: items that are not answered end with ``StreamBroken``."""
        with self._lock:
            self._is_closed = True
        self._end(ended_error("it was cancelled"))
        self._join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.close()
        else:
            self.cancel()

    def _submit(self, request: pb.PredictRequest, timeout_s: float | None) -> Future[Prediction]:
        timeout_s = self._connection.settings.call_timeout(timeout_s)
        future: Future[Prediction] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._check_open()
            self._open()
            while self._items.open_count >= self._max_in_flight:
                self._has_room.wait()
                self._check_open()
            self._items.add(request, timeout_s, future)
            self._has_news.notify()
        return future

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this stream is closed: open another one")
        if self._error is not None:
            raise copy.copy(self._error)  # One that is raised remembers where.

    def _open(self) -> None:
        self._connection.check_open()
        if self._threads:
            return
        method: Any = self._connection.channel.stream_stream(
            METHOD, response_deserializer=pb.PredictStreamResponse.FromString
        )
        self._call = method(self._messages(), metadata=self._connection.settings.metadata())
        # Daemons: a stream that somebody forgot to close shall not keep the program from ending.
        self._threads = tuple(
            threading.Thread(target=target, name=f"modelyard-stream-{name}", daemon=True)
            for name, target in (("receive", self._receive), ("look", self._look_after))
        )
        for thread in self._threads:
            thread.start()

    def _messages(self) -> Iterator[bytes]:
        """What gRPC sends; asked for by a thread of its own."""
        items = self._items
        while True:
            with self._lock:
                self._has_news.wait_for(lambda: items.waiting_count or self._takes_no_more())
                if self._linger_s and items.waiting_count:
                    self._has_news.wait_for(
                        lambda: items.waiting_count >= self._max_in_flight or self._takes_no_more(),
                        self._linger_s,
                    )
                if not items.waiting_count:
                    return
                message = items.take_message()
            yield message

    def _takes_no_more(self) -> bool:
        return self._is_closed or self._error is not None

    def _receive(self) -> None:
        error: errors.ModelyardError = ended_error("the server ended it")
        try:
            for response in self._call:
                with self._lock:
                    settled = self._items.settle(response)
                    self._has_room.notify(len(response.results))
                settled.tell()
        except grpc.RpcError as ended:
            error = broken_error(ended, self._connection.settings.target)
        except errors.ModelyardError as unreadable:
            error = unreadable
        finally:
            self._end(error)

    def _end(self, error: errors.ModelyardError) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            settled = self._items.fail(error)
            # gRPC's call takes a lock when it is deleted, which must not be when the program ends.
            call, self._call = self._call, None
            for condition in (self._has_news, self._has_room, self._is_over):
                condition.notify_all()
        if call is not None:
            call.cancel()  # Does nothing if it is over.
        settled.tell()

    def _look_after(self) -> None:
        """Ends the stream if the server has vanished without a word."""
        is_overdue = False
        while not is_overdue:
            with self._lock:
                if self._is_over.wait_for(lambda: self._error is not None, _LOOK_S):
                    return
                is_overdue = self._items.is_overdue(is_closed=self._is_closed)
        self._end(ended_error("the server does not answer any more"))

    def _join(self) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)


def _result(future: Future[Prediction]) -> Prediction | errors.ModelyardError:
    try:
        return future.result()
    except errors.ModelyardError as error:
        return error
