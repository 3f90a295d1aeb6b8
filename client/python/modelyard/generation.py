"""Text as a model generates it: iterators over its pieces.

::

    with client.generate("stories", "Once upon a time", max_new_tokens=100) as generation:
        for piece in generation:
            print(piece.text, end="", flush=True)
    print(generation.last.finish)

Closing it cancels the call, with which the server stops generating.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from modelyard._status import error_from_rpc, reading_answer
from modelyard.errors import ServerError
from modelyard.prediction import Served

__all__ = ["AsyncGeneration", "FinishReason", "Generation", "GenerationPiece"]


class FinishReason(Enum):
    """Why a generation has ended."""

    UNKNOWN = "unknown"
    """A reason this version does not know."""
    END = "end"
    """The model said that the text is at its end."""
    STOP = "stop"
    """One of the stop strings came."""
    LENGTH = "length"
    """As many tokens were generated as were asked for."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPiece:
    """The next piece of a text.

    Args:
        text: since the piece before, whole characters; may be empty in the last one.
        token_ids: generated since the piece before, by the model's vocabulary.
        finish: why the text has ended; None in all but the last piece, as what follows here.
        served: how it came about, the whole as of one run.
        prompt_token_count: tokens of the prompt.
        token_count: tokens that were generated.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    served: Served | None = None
    prompt_token_count: int | None = None
    token_count: int | None = None


class _Pieces:
    """What both iterators know: what the last piece was, and whether there are more."""

    def __init__(self, target: str, piece_from: Callable[[Any], GenerationPiece]) -> None:
        self._target = target
        self._piece_from = piece_from
        self._last: GenerationPiece | None = None
        self._is_over = False

    @property
    def last(self) -> GenerationPiece:
        """The last piece, with ``finish``, ``served`` and the numbers of tokens.

        Raises:
            RuntimeError: it has not come yet, or never will.
        """
        if self._last is None:
            raise RuntimeError("the last piece has not come: read the generation to its end")
        return self._last

    def _read(self, message: Any) -> GenerationPiece:
        with reading_answer(self._target):
            piece = self._piece_from(message)
        if piece.finish is not None:
            self._last, self._is_over = piece, True
        return piece

    def _broken(self) -> ServerError:
        return ServerError(
            f"the server at {self._target} ended the text without saying why",
            code=grpc.StatusCode.INTERNAL,
        )


class Generation(_Pieces):
    """The pieces of a text, as they come; made by ``Client.generate``. Not thread-safe."""

    def __init__(
        self, call: Any, *, target: str, piece_from: Callable[[Any], GenerationPiece]
    ) -> None:
        super().__init__(target, piece_from)
        self._call = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> GenerationPiece:
        """Wait for the next piece.

        Raises:
            StopIteration: the last one was there, or it was closed.
            ModelyardError: the server refused or failed; also after some pieces.
        """
        if self._is_over:
            raise StopIteration
        try:
            return self._read(next(self._call))
        except StopIteration:
            self.close()
            raise self._broken() from None
        except grpc.RpcError as error:
            self.close()
            raise error_from_rpc(error, target=self._target) from error
        except BaseException:
            self.close()
            raise

    def text(self) -> str:
        """Read to the end and return the text from here on. Raises as ``__next__``."""
        return "".join(piece.text for piece in self)

    def close(self) -> None:
        """Cancel what is left of it. Idempotent."""
        self._is_over = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncGeneration(_Pieces):
    """The pieces of a text, as they come; made by ``AsyncClient.generate``. For one task."""

    def __init__(
        self, call: Any, *, target: str, piece_from: Callable[[Any], GenerationPiece]
    ) -> None:
        super().__init__(target, piece_from)
        self._call = call

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GenerationPiece:
        """Wait for the next piece, as ``Generation`` does. Cancelling the task cancels the call."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            message = await self._call.read()
            if message is grpc.aio.EOF:
                raise self._broken()
            return self._read(message)
        except grpc.aio.AioRpcError as error:
            self.close()
            raise error_from_rpc(error, target=self._target) from error
        except BaseException:
            self.close()
            raise

    async def text(self) -> str:
        """Read to the end and return the text from here on. Raises as ``__anext__``."""
        return "".join([piece.text async for piece in self])

    def close(self) -> None:
        """Cancel what is left of it. Idempotent."""
        self._is_over = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
