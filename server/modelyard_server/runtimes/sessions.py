"""Generations as runs: what the server and a model that generates say to each other.

A generation is a session inside the loaded model, and goes on by runs: one opens it, others ask for
the next tokens, and one closes it that has not ended by itself. They are runs like all others, with
one parameter that no client can send (RESERVED; see execution/dispatch.py). What is said is plain
data, so that it crosses the engine seam. Needs neither torch nor a model.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from modelyard_server.runtimes.api import JsonValue, OptionError
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.tensors import DType, TensorValue

__all__ = [
    "MOST_AT_ONCE",
    "MOST_STOPS",
    "RESERVED",
    "SESSION",
    "Closing",
    "Command",
    "Finish",
    "Going",
    "Opening",
    "SessionAnswer",
    "SessionState",
    "is_reserved",
    "read_command",
]

RESERVED: Final = "modelyard."
"""Parameters whose names begin like this are the server's own: none comes from a client."""

SESSION: Final = f"{RESERVED}session"
"""The parameter that makes a run one of a session."""

MOST_AT_ONCE: Final = 8
"""Most tokens that a run of a session is asked for."""

MOST_STOPS: Final = 16
"""Most texts that end a generation."""

_MOST_ID: Final = 64
_MOST_TOKENS: Final = 2**31 - 1
_MOST_TEMPERATURE: Final = 10.0


def is_reserved(parameters: Mapping[str, JsonValue]) -> str | None:
    """The first of some parameters that only the server may give; None if there is none."""
    return next((name for name in parameters if name.startswith(RESERVED)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Begins a session. The run's one input is the prompt, a TEXT tensor of shape [1].

    Attributes:
        id: what the session is called; nobody can guess it.
        max_new_tokens: most tokens to generate; None for a usual number, or what the model's
            context leaves if that is less.
        temperature: 0 takes the likeliest token always.
        top_k: draws among so many; 0 for all.
        top_p: draws among the likeliest that have this probability together; 1 for all.
        seed: of the draws.
        stops: texts that end it.
    """

    id: str
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()

    def parameters(self) -> dict[str, JsonValue]:
        """The parameters of its run."""
        return {
            SESSION: {
                "open": self.id,
                "max_new_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "top_k": self.top_k,
                "top_p": self.top_p,
                "seed": self.seed,
                "stops": list(self.stops),
            }
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """Asks a session for the next tokens.

    Attributes:
        id: of the session.
        most: so many are waited for, 1 to MOST_AT_ONCE; more come if they are there already, and
            fewer if others of the run want fewer.
    """

    id: str
    most: int

    def parameters(self) -> dict[str, JsonValue]:
        """The parameters of its run."""
        return {SESSION: {"go": self.id, "most": self.most}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """Ends a session, whether it is there or not.

    Attributes:
        id: of the session.
    """

    id: str

    def parameters(self) -> dict[str, JsonValue]:
        """The parameters of its run."""
        return {SESSION: {"close": self.id}}


Command = Opening | Going | Closing


def read_command(parameters: Mapping[str, JsonValue]) -> Command | None:
    """What a run with these parameters is to do.

    Returns:
        None if it is no run of a session.

    Raises:
        OptionError: it is one, and cannot be read.
    """
    if SESSION not in parameters:
        return None
    reader = OptionReader(parameters)
    said = OptionReader(reader.table(SESSION))
    reader.finish()
    command: Command
    if (identity := _identity(said, "open")) is not None:
        command = Opening(
            id=identity,
            max_new_tokens=said.integer("max_new_tokens", None, low=1, high=_MOST_TOKENS),
            temperature=said.number("temperature", 0.0, low=0.0, high=_MOST_TEMPERATURE) or 0.0,
            top_k=said.integer("top_k", 0, low=0, high=_MOST_TOKENS) or 0,
            top_p=_top_p(said),
            seed=said.integer("seed", 0, low=-(2**63), high=2**63 - 1) or 0,
            stops=_stops(said),
        )
    elif (identity := _identity(said, "go")) is not None:
        most = said.integer("most", 1, low=1, high=MOST_AT_ONCE) or 1
        command = Going(id=identity, most=most)
    elif (identity := _identity(said, "close")) is not None:
        command = Closing(id=identity)
    else:
        raise OptionError(SESSION, "says nothing that is known here")
    said.finish()
    return command


def _identity(said: OptionReader, name: str) -> str | None:
    identity = said.text(name)
    if identity is not None and not 1 <= len(identity) <= _MOST_ID:
        raise OptionError(name, f"must have 1 to {_MOST_ID} characters")
    return identity


def _top_p(said: OptionReader) -> float:
    top_p = said.number("top_p", 1.0, low=0.0, high=1.0)
    if not top_p:
        raise OptionError("top_p", "must be above 0")
    return top_p


def _stops(said: OptionReader) -> tuple[str, ...]:
    given = said.list_of_texts("stops")
    if len(given) > MOST_STOPS or not all(given):
        raise OptionError("stop", f"must be at most {MOST_STOPS} texts, none of them empty")
    return given


class Finish(enum.IntEnum):
    """Why a generation has ended; the numbers of modelyard.v1.FinishReason."""

    NOT = 0
    END = 1
    STOP = 2
    LENGTH = 3


class SessionState(enum.IntEnum):
    """What became of a run of a session."""

    OK = 0
    FULL = 1
    """It was not opened: the model has as many as it may have. Another time it may be."""
    GONE = 2
    """There is no such session: it was not used for long, or the model is another one by now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionAnswer:
    """What a run of a session gave.

    Attributes:
        state: if it is not OK, all else means nothing.
        token_ids: generated since the last answer.
        text: that can be told since the last answer, which may be less than the tokens': what may
            be the beginning of a stop text, or of a character, is kept until that is known.
        finish: why it has ended, with which the session is gone; NOT if it goes on.
        prompt_token_count: tokens of the prompt, those included that the tokenizer adds.
        token_count: tokens generated so far, the last one included that said so if it is at its
            end, and those of the stop text.
    """

    state: SessionState = SessionState.OK
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish: Finish = Finish.NOT
    prompt_token_count: int = 0
    token_count: int = 0

    def values(self) -> tuple[TensorValue, ...]:
        """As the outputs of a run."""
        return (
            TensorValue(name="text", dtype=DType.TEXT, shape=(1,), data=(self.text,)),
            _integers("token_ids", self.token_ids),
            _integers(
                "figures", (self.state, self.finish, self.prompt_token_count, self.token_count)
            ),
        )

    @classmethod
    def of(cls, values: Sequence[TensorValue]) -> SessionAnswer:
        """From the outputs of a run.

        Raises:
            ValueError: they are no answer of a session.
        """
        text, token_ids, figures = values
        state, finish, prompt_token_count, token_count = _numbers(figures)
        (shown,) = text.data
        if not isinstance(shown, str):
            raise ValueError("the text of a session is none")
        return cls(
            state=SessionState(state),
            token_ids=_numbers(token_ids),
            text=shown,
            finish=Finish(finish),
            prompt_token_count=prompt_token_count,
            token_count=token_count,
        )


def _integers(name: str, numbers: Sequence[int]) -> TensorValue:
    data = struct.pack(f"<{len(numbers)}q", *numbers)
    return TensorValue(name=name, dtype=DType.INT64, shape=(len(numbers),), data=data)


def _numbers(value: TensorValue) -> tuple[int, ...]:
    if not isinstance(value.data, bytes):
        raise ValueError("numbers of a session are none")
    return struct.unpack(f"<{len(value.data) // 8}q", value.data)
