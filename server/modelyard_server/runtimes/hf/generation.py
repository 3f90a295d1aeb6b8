"""Task text-generation: what a causal language model writes behind a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modelyard_server.runtimes.api import JsonValue, OptionError, Prepared
from modelyard_server.runtimes.conversion import to_value
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.hf.generations import Generations
from modelyard_server.runtimes.hf.model import HfModel, chunks
from modelyard_server.runtimes.hf.requests import Sampling, read_writing, texts_of
from modelyard_server.runtimes.hf.tokenizing import TextTokenizer
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.sessions import read_command
from modelyard_server.runtimes.tensors import DType, TensorValue
from modelyard_server.weights.storages import Spread

__all__ = ["TextGenerator"]


class TextGenerator(HfModel):
    """Continuations of texts.

    Parameters:
        max_new_tokens: most tokens to write a text, default 20. Together with the text's own they
            must fit the model; of a longer text the end is kept.
        temperature, top_k, top_p: sample instead of taking the likeliest token. Applied in this
            order. Temperature 0 means not to sample.
        seed: makes sampling repeatable; texts of one request draw independently of each other.
        stop: a text or list of texts that end the writing; they are not part of the answer.

    Outputs:
        "text" TEXT [n], the continuation only; "token_count" INT64 [n], tokens written for it, the
        end token or those of the stop text included.

    Runs of sessions (runtimes/sessions.py) share passes; all others run alone.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        spread: Spread,
        tokenizer: TextTokenizer,
        *,
        batch_size: int,
        max_length: int,
        end_ids: Sequence[int],
    ) -> None:
        super().__init__(module, spread)
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._max_length = max_length
        self._end_ids = list(end_ids)
        self._generations = Generations(
            tokenizer, batch_size=batch_size, max_length=max_length, end_ids=end_ids
        )

    @property
    def generations(self) -> Generations:
        """Its sessions."""
        return self._generations

    def prepare(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> Prepared | None:
        """Reads what a run of a session is to do; None for all others."""
        try:
            command = read_command(parameters)
            return None if command is None else self._generations.prepare(command, inputs)
        except BaseException as error:
            forget_frames(error)
            raise

    def run_batch(self, requests: Sequence[Prepared]) -> Sequence[tuple[TensorValue, ...]]:
        """Goes on with sessions, together."""
        try:
            with torch.inference_mode(), self._meter.run():
                return self._generations.run(
                    requests,
                    self._module,
                    device=self._input_device,
                    measured=self._forward_pass,
                )
        except BaseException as error:
            forget_frames(error)
            raise

    def close(self) -> None:
        """Drops the module, and all sessions with what it remembers of them."""
        self._generations.clear()
        super().close()

    @property
    def _input_device(self) -> str:
        # The library takes the device of the first parameter for the model's, and warns of tokens
        # that are elsewhere; but not of tokens on host memory, which find their own way.
        of_model = self._module.device.type
        return self._device if torch.device(self._device).type == of_model else "cpu"

    def _answer(
        self, inputs: Sequence[TensorValue], parameters: OptionReader
    ) -> tuple[TensorValue, ...]:
        writing = read_writing(parameters)
        new_tokens, sampling, stops = writing.new_tokens, writing.sampling, writing.stops
        room = self._max_length - new_tokens
        if room < 1:
            raise OptionError(
                "max_new_tokens", f"must be below the model's length of {self._max_length} tokens"
            )
        name, texts = texts_of(inputs)
        self._tokenizer.limit(room, keep_end=True)
        encodings = self._tokenizer.encode(name, texts)
        answers: list[str] = []
        counts: list[int] = []
        device = self._input_device
        for part in chunks(len(encodings), self._batch_size):
            width = max(map(len, encodings[part]))
            rows = len(encodings[part])
            stopping = _StopTexts(self._tokenizer, stops, width, rows)
            processors = LogitsProcessorList()
            if sampling is not None:
                processors.append(_Sampler(sampling, part.start, rows))
            # Of the writing the first token: all others would each pay for being measured.
            with ExitStack() as first_token:
                first_token.enter_context(self._forward_pass(rows, width + 1))
                processors.append(_AfterFirst(first_token.close))
                batch = self._tokenizer.batch(encodings[part], device=device, pad_left=True)
                written = self._module.generate(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    generation_config=GenerationConfig.from_dict(
                        {
                            "max_new_tokens": new_tokens,
                            "do_sample": False,
                            "eos_token_id": self._end_ids or None,
                            "pad_token_id": self._tokenizer.pad_id,
                        }
                    ),
                    logits_processor=processors,
                    stopping_criteria=StoppingCriteriaList([stopping] if stops else []),
                )
            for row, ids in enumerate(written[:, width:].tolist()):
                text, count = self._cut(ids, stopping.lengths[row], stops)
                answers.append(text)
                counts.append(count)
        return (
            TensorValue(name="text", dtype=DType.TEXT, shape=(len(texts),), data=tuple(answers)),
            to_value("token_count", torch.tensor(counts, dtype=torch.int64)),
        )

    def _cut(self, ids: list[int], stopped_at: int | None, stops: Sequence[str]) -> tuple[str, int]:
        # Behind its end a row is filled up until the longest of its batch is done.
        ids = ids[:stopped_at]
        end = next((at for at, token in enumerate(ids) if token in self._end_ids), None)
        count = len(ids) if end is None else end + 1
        text = self._tokenizer.decode(ids[:end])
        places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        return text[: min(places)] if places else text, count


class _Sampler(LogitsProcessor):
    """Draws the next token itself and leaves only that one.

    The library would draw from the process-wide generator, which a seed of one request must not
    set while others run. Every text has a generator of its own.
    """

    def __init__(self, sampling: Sampling, first_row: int, rows: int) -> None:
        warpers: list[Any] = []
        if sampling.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k is not None:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None and sampling.top_p < 1.0:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        self._warpers = warpers
        # A prime far above any number of rows keeps the generators of two seeds apart.
        self._generators = [
            torch.Generator().manual_seed((sampling.seed * 1_000_003 + first_row + row) % 2**63)
            for row in range(rows)
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        chances = scores.float().softmax(dim=-1).cpu()
        chosen = torch.stack(
            [
                torch.multinomial(row, 1, generator=generator)
                for row, generator in zip(chances, self._generators, strict=True)
            ]
        ).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class _AfterFirst(LogitsProcessor):
    """The last of the processors: says when the first token has been chosen. Changes nothing."""

    def __init__(self, chosen: Callable[[], None]) -> None:
        self._chosen = chosen
        self._is_first = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._is_first:
            self._is_first = False
            self._chosen()
        return scores


class _StopTexts(StoppingCriteria):
    """Ends a row when its continuation holds one of the stop texts, and notes where."""

    def __init__(
        self, tokenizer: TextTokenizer, stops: Sequence[str], width: int, rows: int
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._width = width
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self._width :].tolist()):
            if self.lengths[row] is None:
                text = self._tokenizer.decode(ids)
                if any(stop in text for stop in self._stops):
                    self.lengths[row] = len(ids)
        return torch.tensor(
            [length is not None for length in self.lengths], device=input_ids.device
        )
