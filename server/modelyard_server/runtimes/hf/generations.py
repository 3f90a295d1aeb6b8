"""Generations of one loaded model: sessions that are gone on with together.

A session is a prompt and what was generated of it, with what the model remembers of both. It is
opened by one run and gone on with by others (see runtimes/sessions.py), each a few tokens long, so
that between them the lane serves whoever else waits. What runs together is not what was asked for
at the same moment, though. Callers come back a moment after they were answered, and a lane that
took only those who are there would run one half of them while the other half comes back, for ever.
So a run takes everybody along who has not much lying ready: all sessions go on in one pass, step by
step, and who comes a moment later finds the tokens there. What lies ready is bounded by two runs'
tokens: a reader that does not read stops its session.

What the model remembers is in batches (kv_batch.py), which sessions join when they run together and
leave when they end. A model whose memory is of another kind (windows, states) has its sessions gone
on with one by one; one that has none that can be passed on reads its text anew for every token.

Bounds: MOST_SESSIONS; and together the sessions may become so long as the largest batch that the
model answers otherwise, which is what its price knows. One that nobody has asked for in IDLE_S is
dropped: the server closes what it opens, so that is for a server that has forgotten.

In the lane's thread only, but for `clear`, which comes when nothing runs any more.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from time import monotonic
from typing import Any, Final

import torch
from tokenizers import Encoding
from transformers.cache_utils import Cache

from modelyard_server.runtimes.api import OptionError, Prepared
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.hf.kv_batch import CacheRow, KvBatch, gather, is_plain
from modelyard_server.runtimes.hf.requests import texts_of
from modelyard_server.runtimes.hf.sampling import TokenSampler
from modelyard_server.runtimes.hf.tokenizing import TextTokenizer
from modelyard_server.runtimes.sessions import (
    MOST_AT_ONCE,
    Closing,
    Command,
    Going,
    Opening,
    SessionAnswer,
    SessionState,
)
from modelyard_server.runtimes.tensors import TensorValue
from modelyard_server.runtimes.written_text import WrittenText

__all__ = ["IDLE_S", "MOST_SESSIONS", "Generations"]

logger = logging.getLogger(__name__)

MOST_SESSIONS: Final = 64
"""Sessions of one model at a time."""

IDLE_S: Final = 600.0
"""A session that was not asked for anything for so long is dropped."""

_USUAL_NEW_TOKENS: Final = 64
_MOST_SECONDS: Final = 0.1
"""A pass of several steps ends after the first that takes it beyond this: others wait for the lane,
and who reads along likes to have tokens one by one where they are slow."""

_TOKEN_BYTES: Final = 24
_PROMPT_PASS_TOKENS: Final = 32
_ALWAYS: Final = 1 << 20
"""Cost of a pass of one's own, in steps: it is never worth it, for all of the weights are read for
a step, and next to nothing for a row of it."""

_RUNS_ALONE: Final = 64
"""Runs for which nobody is taken along after one that failed."""

_CACHES: Final = ("cache", "past_key_values")
"""What the library's versions call a cache, as an argument and in the outcome."""


@dataclass(eq=False, slots=True)
class _Group:
    """Sessions that have a row each of one batch, in the same order."""

    batch: KvBatch
    sessions: list[_Session]

    @property
    def staying(self) -> list[_Session]:
        """Those that have not left, and go on."""
        return [session for session in self.sessions if session.group is self and session.goes_on]

    def row_of(self, session: _Session) -> CacheRow:
        return CacheRow(self.batch, self.sessions.index(session))


@dataclass(eq=False, slots=True)
class _Session:
    """A session.

    Attributes:
        id: what it is called.
        text: what was generated.
        sampler: chooses its tokens.
        ids: of the prompt and what was generated; all but the last one the model has read.
        most_cells: tokens that it may come to, the prompt's included.
        group: where its row is; None if it has none.
        cache: what the model remembers if that is of another kind; None if nothing.
        broken: why it cannot go on.
        used_s: when it was asked for something last.
    """

    id: str
    text: WrittenText
    sampler: TokenSampler
    ids: list[int]
    most_cells: int
    group: _Group | None = None
    cache: Any = None
    broken: BaseException | None = None
    used_s: float = 0.0

    @property
    def goes_on(self) -> bool:
        return not self.text.finish and self.broken is None


@dataclass(frozen=True, slots=True)
class _Prompt:
    command: Opening
    encoding: Encoding
    most: int


@dataclass(slots=True)
class _Asked:
    """A run that asks for tokens of a session."""

    session: _Session
    most: int


@dataclass(frozen=True, slots=True)
class _Forward:
    """What a model's forward takes."""

    cache: str
    positions: bool
    use_cache: bool
    keep: bool


class Generations:
    """The sessions of one model.

    Args:
        tokenizer: of the model.
        batch_size: most rows of one pass.
        max_length: most tokens of a text, what is generated included.
        end_ids: tokens that say that a text is at its end.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        batch_size: int,
        max_length: int,
        end_ids: Collection[int],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._max_length = max_length
        self._end_ids = frozenset(end_ids)
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._is_plain: bool | None = None
        self._alone = 0
        self._left_groups: list[_Group] = []

    @property
    def count(self) -> int:
        """Sessions that there are."""
        return len(self._sessions)

    @property
    def cache_bytes(self) -> int:
        """What the model remembers of all of them, as far as it lies in batches."""
        groups = {id(s.group): s.group for s in self._sessions.values() if s.group is not None}
        return sum(group.batch.size_bytes for group in groups.values())

    def clear(self) -> None:
        """Drops all of them."""
        # One by one: sessions and groups know each other, and what the model remembers is not to
        # stay until somebody looks for such.
        for identity in list(self._sessions):
            self._drop(identity)
        self._left_groups.clear()

    def prepare(self, command: Command, inputs: Sequence[TensorValue]) -> Prepared:
        """Makes a run ready.

        Args:
            command: what it is to do.
            inputs: the prompt, if it opens a session.

        Raises:
            TensorError: the prompt has no tokens for the model.
            OptionError: it is too long: "prompt", or "max_new_tokens" if that is what does not fit.
        """
        if isinstance(command, Opening):
            return self._prepare_prompt(command, inputs)
        return Prepared(
            key="go",
            rows=1,
            width=command.most if isinstance(command, Going) else 1,
            most_rows=self._batch_size,
            pass_cost=_ALWAYS,
            content=command,
        )

    def _prepare_prompt(self, command: Opening, inputs: Sequence[TensorValue]) -> Prepared:
        name, texts = texts_of(inputs)
        if len(texts) != 1:
            raise OptionError("prompt", "must be one text")
        encoding, is_whole = self._tokenizer.encode_whole(name, texts[0], most=self._max_length)
        count, room = len(encoding), self._max_length - len(encoding)
        if room < 1:
            known = str(count) if is_whole else f"more than {self._max_length}"
            raise OptionError(
                "prompt",
                f"has {known} tokens; the model's context has {self._max_length}, of which at "
                "least 1 is for what is generated",
            )
        most = command.max_new_tokens
        if most is not None and most > room:
            raise OptionError(
                "max_new_tokens",
                f"is {most}; the prompt has {count} tokens, and the model's context of "
                f"{self._max_length} leaves {room}",
            )
        return Prepared(
            key="open",
            rows=1,
            width=count,
            row_bytes=count * _TOKEN_BYTES,
            most_rows=self._batch_size,
            pass_cost=_PROMPT_PASS_TOKENS,
            content=_Prompt(command, encoding, most or min(_USUAL_NEW_TOKENS, room)),
        )

    def run(
        self,
        requests: Sequence[Prepared],
        module: Any,
        *,
        device: str,
        measured: Callable[[int, int], AbstractContextManager[None]],
    ) -> list[tuple[TensorValue, ...]]:
        """Does what some runs ask for, together.

        If it raises, each can be run again alone: what was generated meanwhile is there then.

        Args:
            requests: made by prepare, of one key.
            module: the model. It is not kept.
            device: where its inputs go.
            measured: to be entered for a pass of so many rows and tokens a row.

        Returns:
            The outputs of each.

        Raises:
            Exception: the model's failure.
        """
        self._drop_idle()
        contents = [request.content for request in requests]
        steps = _Steps(module, device)
        if all(isinstance(content, _Prompt) for content in contents):
            answers = self._open(contents, steps, measured)
        else:
            answers = self._go(contents, steps)
        self._let_go_of_rows()
        return [answer.values() for answer in answers]

    # --- Opening ------------------------------------------------------------------------------

    def _open(
        self,
        prompts: Sequence[_Prompt],
        steps: _Steps,
        measured: Callable[[int, int], AbstractContextManager[None]],
    ) -> list[SessionAnswer]:
        opened: list[tuple[_Session, Encoding] | None] = []
        for prompt in prompts:
            # It is there already if it is opened again, after the run that did so had failed.
            self._drop(prompt.command.id)
            new = [session for session, _ in filter(None, opened)]
            session = self._new_session(prompt)
            fits = self._has_room(new, session)
            opened.append((session, prompt.encoding) if fits else None)
        left = list(filter(None, opened))
        try:
            while left:
                # Of the first one nobody knows whether it can be read together with others.
                count = len(left) if self._is_plain else 1
                part, left = left[:count], left[count:]
                with measured(len(part), max(len(encoding) for _, encoding in part)):
                    self._read([session for session, _ in part], [e for _, e in part], steps)
            for session, _ in filter(None, opened):
                if session.broken is not None:
                    raise session.broken
        except BaseException:
            for session, _ in filter(None, opened):
                session.group = None  # See clear.
            raise
        return [
            SessionAnswer(state=SessionState.FULL) if entry is None else self._enter(entry[0])
            for entry in opened
        ]

    def _new_session(self, prompt: _Prompt) -> _Session:
        command, ids = prompt.command, list(prompt.encoding.ids)
        return _Session(
            id=command.id,
            text=WrittenText(
                self._tokenizer.decode,
                prompt_token_count=len(ids),
                most=prompt.most,
                end_ids=self._end_ids,
                stops=command.stops,
            ),
            sampler=TokenSampler(
                temperature=command.temperature,
                top_k=command.top_k,
                top_p=command.top_p,
                seed=command.seed,
            ),
            ids=ids,
            most_cells=len(ids) + prompt.most,
        )

    def _has_room(self, new: Sequence[_Session], session: _Session) -> bool:
        there = [*self._sessions.values(), *new]
        cells = sum(other.most_cells for other in there) + session.most_cells
        return len(there) < MOST_SESSIONS and cells <= self._batch_size * self._max_length

    def _read(
        self, sessions: Sequence[_Session], encodings: Sequence[Encoding], steps: _Steps
    ) -> None:
        """Reads prompts and chooses the first token of each."""
        tokens = self._tokenizer.batch(encodings, device=steps.device, pad_left=True)
        rows, width = tokens.ids.shape
        logits, cache = steps.forward(tokens.ids, tokens.mask, None)
        if self._is_plain is None:
            self._is_plain = steps.takes.positions and is_plain(cache, rows, width)
        if self._is_plain:
            group = _Group(KvBatch(cache, [len(session.ids) for session in sessions]), [])
            for session in sessions:
                group.sessions.append(session)
                session.group = group
        else:
            (session,) = sessions
            session.cache = cache
        _choose(sessions, logits)

    def _enter(self, session: _Session) -> SessionAnswer:
        session.used_s = self._clock()
        self._sessions[session.id] = session
        return self._answer(session)

    # --- Going on -----------------------------------------------------------------------------

    def _go(self, commands: Sequence[Command], steps: _Steps) -> list[SessionAnswer]:
        asked: list[_Asked] = []
        for command in commands:
            if isinstance(command, Closing):
                self._drop(command.id)
            elif isinstance(command, Going) and command.id in self._sessions:
                asked.append(_Asked(self._sessions[command.id], command.most))
        lacking = [a for a in asked if a.session.goes_on and not a.session.text.untold_count]
        if lacking:
            self._advance(lacking, steps)
        for one in asked:
            if one.session.broken is not None:
                if len(commands) == 1:
                    self._drop(one.session.id)
                raise one.session.broken
        return [self._answer_to(command) for command in commands]

    def _answer_to(self, command: Command) -> SessionAnswer:
        if isinstance(command, Closing):
            return SessionAnswer()
        session = self._sessions.get(command.id)
        if session is None:
            return SessionAnswer(state=SessionState.GONE)
        session.used_s = self._clock()
        return self._answer(session)

    def _answer(self, session: _Session) -> SessionAnswer:
        answer = session.text.take()
        if answer.finish:
            self._drop(session.id)
        return answer

    def _advance(self, lacking: Sequence[_Asked], steps: _Steps) -> None:
        """Goes on with sessions that have nothing lying ready, and with others as well."""
        count = min(one.most for one in lacking)
        rows: list[_Session] = []
        for one in lacking:
            session = one.session
            if session.group is None:
                self._advance_alone(session, count, steps)
            elif session not in rows:
                rows.append(session)
        for part in _alike(rows):
            self._advance_in_company(part, count, steps)

    def _advance_in_company(self, rows: list[_Session], count: int, steps: _Steps) -> None:
        company = self._company(rows)
        if company:
            try:
                self._advance_rows([*rows, *company], rows, count, steps)
                return
            except Exception as error:
                # Perhaps it was one of those whom nobody has asked for.
                forget_frames(error)
                logger.info("sessions that went on together failed (%s)", type(error).__name__)
                self._alone = _RUNS_ALONE
            rows = [row for row in rows if row.goes_on and not row.text.untold_count]
            if not rows:
                return
        self._advance_rows(rows, rows, count, steps)

    def _company(self, rows: Sequence[_Session]) -> list[_Session]:
        """Sessions that go on along with others, as far as they have not much lying ready."""
        if self._alone:
            self._alone -= 1
            return []
        company: list[_Session] = []
        for session in self._sessions.values():
            if len(rows) + len(company) >= self._batch_size:
                break
            if (
                session.group is not None
                and session.goes_on
                and session.text.untold_count < MOST_AT_ONCE
                and session not in rows
                and _is_dense([*rows, *company, session])
            ):
                company.append(session)
        return company

    def _advance_rows(
        self, sessions: Sequence[_Session], wanted: Sequence[_Session], count: int, steps: _Steps
    ) -> None:
        end_s = self._clock() + _MOST_SECONDS
        group = self._together(sessions)
        for _ in range(count):
            steps.advance(group)
            for session in group.sessions:
                if not session.goes_on:
                    self._leave(session)
            left = group.staying
            if not any(session in wanted for session in left) or self._clock() >= end_s:
                break
            group = self._together(left)

    def _together(self, sessions: Sequence[_Session]) -> _Group:
        """The group of exactly these sessions. Those that they leave behind stay together."""
        sources = list({id(s.group): s.group for s in sessions if s.group is not None}.values())
        if len(sources) == 1 and len(sources[0].sessions) == len(sessions):
            return sources[0]
        made = _Group(gather([_row_of(session) for session in sessions]), list(sessions))
        left = []
        for source in sources:
            stay = [s for s in source.staying if s not in sessions]
            left.append((source, gather([_row_of(s) for s in stay]) if stay else None, stay))
        # Nothing has changed until here, where nothing fails any more.
        for source, batch, stay in left:
            if batch is not None:
                source.batch, source.sessions = batch, stay
        for session in made.sessions:
            session.group = made
        return made

    def _advance_alone(self, session: _Session, count: int, steps: _Steps) -> None:
        end_s = self._clock() + _MOST_SECONDS
        for _ in range(count):
            try:
                steps.advance_alone(session)
            except Exception as error:
                # What it remembers may be half of one token and half of the next.
                forget_frames(error)
                session.broken = error
            if not session.goes_on or self._clock() >= end_s:
                return

    # --- Leaving ------------------------------------------------------------------------------

    def _drop(self, identity: str) -> None:
        session = self._sessions.pop(identity, None)
        if session is not None:
            self._leave(session)

    def _leave(self, session: _Session) -> None:
        """Says that a session needs its row no more."""
        if session.group is not None:
            self._left_groups.append(session.group)
            session.group = None

    def _let_go_of_rows(self) -> None:
        """Gives back the memory of those that have left."""
        groups = {id(group): group for group in self._left_groups}.values()
        self._left_groups = []
        for group in groups:
            stay = group.staying
            if stay and len(stay) < len(group.sessions):
                try:
                    batch = gather([group.row_of(session) for session in stay])
                except Exception as error:
                    # No room for it. The rows stay until the others are gathered for a pass, and
                    # that answers are there already is worth more.
                    forget_frames(error)
                    logger.info("rows were not let go of (%s)", type(error).__name__)
                    continue
                group.batch, group.sessions = batch, stay

    def _drop_idle(self) -> None:
        since_s = self._clock() - IDLE_S
        for session in [s for s in self._sessions.values() if s.used_s < since_s]:
            logger.warning("a generation that nobody asked for in %.0f s was dropped", IDLE_S)
            self._drop(session.id)


def _is_dense(sessions: Sequence[_Session]) -> bool:
    """Whether at least half of a batch of these would be texts, and not filling."""
    lengths = [len(session.ids) for session in sessions]
    return len(lengths) * max(lengths) <= 2 * sum(lengths)


def _alike(sessions: Sequence[_Session]) -> list[list[_Session]]:
    """Parts of sessions, as few as they are dense."""
    parts: list[list[_Session]] = []
    for session in sorted(sessions, key=lambda session: -len(session.ids)):
        if parts and _is_dense([*parts[-1], session]):
            parts[-1].append(session)
        else:
            parts.append([session])
    return parts


def _row_of(session: _Session) -> CacheRow:
    assert session.group is not None
    return session.group.row_of(session)


def _choose(sessions: Sequence[_Session], logits: torch.Tensor) -> None:
    """Chooses the next token of each. Of one that has none, the session is broken, and no other."""
    likeliest = logits.argmax(dim=-1).tolist()
    for row, session in enumerate(sessions):
        try:
            greedy = session.sampler.is_greedy
            token = likeliest[row] if greedy else session.sampler.choose(logits[row])
            session.text.push(token)
            session.ids.append(token)
        except Exception as error:
            forget_frames(error)
            session.broken = error


@dataclass(slots=True)
class _Steps:
    """Passes of the model, for the length of one run."""

    module: Any
    device: str
    takes: _Forward = field(init=False)

    def __post_init__(self) -> None:
        self.takes = _forward_of(type(self.module).forward)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Reads some more tokens of every row.

        Args:
            ids: [rows, tokens], those that the cache does not have.
            mask: [rows, all tokens], 0 for filling.
            cache: what it remembers of those before; None for none.

        Returns:
            FLOAT32 [rows, vocabulary] behind the last one, and the cache; None for none.
        """
        takes = self.takes
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if takes.positions:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, -ids.shape[1] :]
        if takes.keep:
            arguments["logits_to_keep"] = 1
        if takes.use_cache:
            arguments["use_cache"] = bool(takes.cache)
        if cache is not None:
            arguments[takes.cache] = cache
        outcome = self.module(**arguments)
        made = getattr(outcome, takes.cache, None) if takes.cache else None
        # As the library's own loop takes them.
        logits = outcome.logits[:, -1].to(dtype=torch.float32)
        return logits, made if isinstance(made, Cache) else None

    def advance(self, group: _Group) -> None:
        """One more token of every session of a group."""
        batch = group.batch
        ids = torch.tensor([[session.ids[-1]] for session in group.sessions], device=self.device)
        try:
            logits, cache = self.forward(ids, batch.mask(self.device, more=1), batch.cache)
        except BaseException:
            batch.undo_step()
            raise
        batch.cache = cache
        batch.note_step()
        _choose(group.sessions, logits)

    def advance_alone(self, session: _Session) -> None:
        """One more token of a session that has no row."""
        read = [session.ids] if session.cache is None else [session.ids[-1:]]
        ids = torch.tensor(read, device=self.device)
        mask = torch.ones((1, len(session.ids)), dtype=torch.int64, device=self.device)
        logits, session.cache = self.forward(ids, mask, session.cache)
        _choose([session], logits)


@lru_cache(maxsize=256)
def _forward_of(forward: Callable[..., Any]) -> _Forward:
    names = inspect.signature(forward).parameters
    return _Forward(
        cache=next((name for name in _CACHES if name in names), ""),
        positions="position_ids" in names,
        use_cache="use_cache" in names,
        keep="logits_to_keep" in names,
    )
