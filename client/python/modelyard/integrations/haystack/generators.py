"""A component that writes text, by a model of the task text-generation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Self

from haystack import component, default_from_dict
from haystack.dataclasses import (
    ComponentInfo,
    StreamingCallbackT,
    StreamingChunk,
    select_streaming_callback,
)
from haystack.dataclasses.streaming_chunk import FinishReason as TheirReason
from haystack.utils import deserialize_callable, serialize_callable

from modelyard.aio import AsyncClient
from modelyard.client import Client
from modelyard.generation import FinishReason, GenerationPiece
from modelyard.integrations.haystack._component import AnyDevice, KeyedComponent
from modelyard.integrations.haystack.outputs import meta_of

__all__ = ["ModelyardGenerator"]

_SETTINGS: Final = frozenset(
    name
    for name in inspect.signature(Client.generate).parameters
    if name not in {"self", "key", "prompt", "timeout_s"}
)
"""What ``generation_kwargs`` may hold."""

_REASONS: Final[Mapping[FinishReason, TheirReason]] = MappingProxyType(
    {FinishReason.END: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
)


@component
class ModelyardGenerator(KeyedComponent):
    """Writes what a language model has to say behind a prompt.

    ::

        generator = ModelyardGenerator(model="llama2", device=ComponentDevice.from_str("cuda:1"))
        generator.run("Once upon a time", generation_kwargs={"max_new_tokens": 40})["replies"]

    Args:
        key: what to ask the server for; None for the same text as ``model``.
        model: the model's folder below the server's root, to register it; None if the server
            knows the key.
        root: name of that root in the server's configuration.
        device: where the model shall live: a ``ComponentDevice`` of Haystack or of modelyard, or
            text such as ``"cuda:1"``. None leaves it to the server. Goes with ``model``.
        options: options of the model's runtime, for instance ``{"max_length": 512}``. Goes with
            ``model``.
        huggingface_pipeline_kwargs: another name of ``options``, for code that was written for
            Haystack's local generator. A ``device_map`` or ``device`` in it, or in ``options``,
            beats ``device``, by presence, even if it is None.
        server: the server's address; None takes ``MODELYARD_SERVER`` of the environment, or
            127.0.0.1:8470.
        timeout_s: seconds for each call.
        load_timeout_s: seconds for the load of a warm-up.
        generation_kwargs: settings of every run: ``max_new_tokens``, ``temperature``, ``top_k``,
            ``top_p``, ``seed``, ``stop``, ``affinity``, ``version``, as ``Client.generate`` has
            them.
        stop_words: texts that end the writing; they are not part of the reply. The same as
            ``stop`` among ``generation_kwargs``.
        streaming_callback: called with each piece of the text as it comes; for ``run_async`` it may
            be a coroutine function.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or of no use, or two for one thing.
    """

    _task = "text-generation"

    def __init__(
        self,
        key: str | None = None,
        *,
        model: str | None = None,
        root: str = "store",
        device: AnyDevice = None,
        options: dict[str, Any] | None = None,
        huggingface_pipeline_kwargs: dict[str, Any] | None = None,
        server: str | None = None,
        timeout_s: float = 30.0,
        load_timeout_s: float = 300.0,
        generation_kwargs: dict[str, Any] | None = None,
        stop_words: list[str] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> None:
        _check_settings(generation_kwargs)
        if options is not None and huggingface_pipeline_kwargs is not None:
            raise ValueError("options and huggingface_pipeline_kwargs are the same: give one")
        if stop_words is not None and "stop" in (generation_kwargs or {}):
            raise ValueError("stop_words and generation_kwargs['stop'] are the same: give one")
        self._set_up(
            key=key,
            model=model,
            root=root,
            device=device,
            options=options,
            server=server,
            timeout_s=timeout_s,
            load_timeout_s=load_timeout_s,
            registered_options=huggingface_pipeline_kwargs,
        )
        self.huggingface_pipeline_kwargs = huggingface_pipeline_kwargs
        self.generation_kwargs = generation_kwargs
        self.stop_words = stop_words
        self.streaming_callback = streaming_callback

    def to_dict(self) -> dict[str, Any]:
        """Return the component as data; the callback by the name it can be imported by."""
        data = KeyedComponent.to_dict(self)
        if self.streaming_callback is not None:
            name = serialize_callable(self.streaming_callback)
            data["init_parameters"]["streaming_callback"] = name
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the component that ``to_dict`` wrote. Raises as the class, and as Haystack does."""
        given = dict(data.get("init_parameters", {}))
        if isinstance(name := given.get("streaming_callback"), str):
            given["streaming_callback"] = deserialize_callable(name)
        return default_from_dict(cls, {**data, "init_parameters": given})

    @component.output_types(replies=list[str], meta=list[dict[str, Any]])
    def run(
        self,
        prompt: str,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write behind a prompt.

        Args:
            prompt: the text to go on from.
            streaming_callback: instead of the component's.
            generation_kwargs: settings of this run; each beats the component's own.

        Returns:
            ``replies``: one text, without the prompt; ``meta``: for it the key, model and device,
            whether it was cold, ``finish_reason`` (``stop`` or ``length``), and ``usage`` in
            tokens.

        Raises:
            TypeError, ValueError: an argument of the wrong type, or of no use.
            ModelyardError: the server refused or failed.
        """
        settings = self._settings(prompt, generation_kwargs)
        callback = select_streaming_callback(
            self.streaming_callback, streaming_callback, requires_async=False
        )

        def ask(client: Client) -> dict[str, Any]:
            reply: list[str] = []
            with client.generate(self._key, prompt, **settings) as generation:
                for piece in generation:
                    if callback is not None:
                        callback(self._chunk(piece, is_first=not reply))
                    reply.append(piece.text)
                return self._answer(reply, generation.last)

        return self._ask(ask)

    @component.output_types(replies=list[str], meta=list[dict[str, Any]])
    async def run_async(
        self,
        prompt: str,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write behind a prompt without blocking the event loop; as ``run``."""
        settings = self._settings(prompt, generation_kwargs)
        callback = select_streaming_callback(
            self.streaming_callback, streaming_callback, requires_async=True
        )

        async def ask(client: AsyncClient) -> dict[str, Any]:
            reply: list[str] = []
            async with client.generate(self._key, prompt, **settings) as generation:
                async for piece in generation:
                    if callback is not None:
                        told = callback(self._chunk(piece, is_first=not reply))
                        if inspect.isawaitable(told):
                            await told
                    reply.append(piece.text)
                return self._answer(reply, generation.last)

        return await self._ask_async(ask)

    def _settings(self, prompt: str, generation_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a str, got {type(prompt).__name__}")
        _check_settings(generation_kwargs)
        stop = {} if self.stop_words is None else {"stop": self.stop_words}
        return {**stop, **(self.generation_kwargs or {}), **(generation_kwargs or {})}

    def _chunk(self, piece: GenerationPiece, *, is_first: bool) -> StreamingChunk:
        return StreamingChunk(
            content=piece.text,
            meta={"key": self._key, "token_ids": list(piece.token_ids)},
            component_info=ComponentInfo.from_component(self),
            index=0,
            start=is_first,
            finish_reason=None if piece.finish is None else _REASONS.get(piece.finish),
        )

    def _answer(self, reply: list[str], last: GenerationPiece) -> dict[str, Any]:
        prompt_tokens, tokens = last.prompt_token_count or 0, last.token_count or 0
        meta = meta_of([] if last.served is None else [last.served], self._key)
        meta |= {
            "finish_reason": None if last.finish is None else _REASONS.get(last.finish),
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": tokens,
                "total_tokens": prompt_tokens + tokens,
            },
        }
        return {"replies": ["".join(reply)], "meta": [meta]}


def _check_settings(generation_kwargs: Any) -> None:
    if not isinstance(generation_kwargs, dict | None):
        kind = type(generation_kwargs).__name__
        raise TypeError(f"generation_kwargs must be a dict or None, got {kind}")
    if unknown := sorted(set(generation_kwargs or ()) - _SETTINGS):
        raise ValueError(
            f"unknown among generation_kwargs: {', '.join(map(str, unknown))}; known are "
            f"{', '.join(sorted(_SETTINGS))}"
        )
