"""Components that turn texts into vectors, by a model of the task feature-extraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from haystack import Document, component

from modelyard.integrations.haystack._component import AnyDevice, KeyedComponent, chunks_of
from modelyard.integrations.haystack.documents import (
    checked_count,
    checked_documents,
    text_to_embed,
)
from modelyard.integrations.haystack.outputs import embeddings_of, meta_of
from modelyard.prediction import Prediction

__all__ = ["ModelyardDocumentEmbedder", "ModelyardTextEmbedder"]


@component
class ModelyardTextEmbedder(KeyedComponent):
    """Embeds a text, such as a query.

    ::

        embedder = ModelyardTextEmbedder("minilm")
        embedder.run("who made this?")["embedding"]

    Args:
        key: what to ask the server for; None for the same text as ``model``.
        model: the model's folder below the server's root, to register it; None if the server
            knows the key.
        root: name of that root in the server's configuration.
        device: where the model shall live: a ``ComponentDevice`` of Haystack or of modelyard, or
            text such as ``"cuda:1"``. None leaves it to the server. Goes with ``model``.
        options: options of the model's runtime, for instance ``{"pooling": "cls"}``. Goes with
            ``model``.
        server: the server's address; None takes ``MODELYARD_SERVER`` of the environment, or
            127.0.0.1:8470.
        timeout_s: seconds for each call.
        load_timeout_s: seconds for the load of a warm-up.
        prefix: put before each text.
        suffix: put behind each text.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or of no use.
    """

    _task = "feature-extraction"

    def __init__(
        self,
        key: str | None = None,
        *,
        model: str | None = None,
        root: str = "store",
        device: AnyDevice = None,
        options: dict[str, Any] | None = None,
        server: str | None = None,
        timeout_s: float = 30.0,
        load_timeout_s: float = 300.0,
        prefix: str = "",
        suffix: str = "",
    ) -> None:
        self._set_up(
            key=key,
            model=model,
            root=root,
            device=device,
            options=options,
            server=server,
            timeout_s=timeout_s,
            load_timeout_s=load_timeout_s,
        )
        self.prefix = prefix
        self.suffix = suffix

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """Embed one text.

        Args:
            text: the text.

        Returns:
            ``embedding``: its vector; ``meta``: key, model and device, and whether it was cold.

        Raises:
            TypeError: no str.
            UnsuitableModel: the key means a model that gives no embeddings.
            ModelyardError: the server refused or failed.
        """
        return self._answer(self._predict_all([self._inputs(text)]))

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """Embed one text without blocking the event loop; as ``run``."""
        return self._answer(await self._predict_all_async([self._inputs(text)]))

    def _inputs(self, text: str) -> list[str]:
        if not isinstance(text, str):
            raise TypeError(
                f"ModelyardTextEmbedder takes a str, got {type(text).__name__}: "
                "ModelyardDocumentEmbedder takes documents"
            )
        return [f"{self.prefix}{text}{self.suffix}"]

    def _answer(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        vectors = embeddings_of(predictions[0], self._key, 1)
        return {
            "embedding": vectors[0].tolist(),
            "meta": meta_of([each.served for each in predictions], self._key),
        }


@component
class ModelyardDocumentEmbedder(KeyedComponent):
    """Embeds documents: gives copies of them that have their ``embedding``.

    Args:
        key: as of ``ModelyardTextEmbedder``, as all others down to ``suffix``.
        model: see there.
        root: see there.
        device: see there.
        options: see there.
        server: see there.
        timeout_s: see there.
        load_timeout_s: see there.
        prefix: see there.
        suffix: see there.
        batch_size: documents in one call.
        meta_fields_to_embed: fields of a document's meta to embed with its content.
        embedding_separator: put between them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or of no use.
    """

    _task = "feature-extraction"

    def __init__(
        self,
        key: str | None = None,
        *,
        model: str | None = None,
        root: str = "store",
        device: AnyDevice = None,
        options: dict[str, Any] | None = None,
        server: str | None = None,
        timeout_s: float = 30.0,
        load_timeout_s: float = 300.0,
        prefix: str = "",
        suffix: str = "",
        batch_size: int = 32,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        self._set_up(
            key=key,
            model=model,
            root=root,
            device=device,
            options=options,
            server=server,
            timeout_s=timeout_s,
            load_timeout_s=load_timeout_s,
        )
        self.prefix = prefix
        self.suffix = suffix
        self.batch_size = checked_count(batch_size, "batch_size")
        self.meta_fields_to_embed = meta_fields_to_embed
        self.embedding_separator = embedding_separator

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents.

        Args:
            documents: the documents; they are not changed. None at all is no call.

        Returns:
            ``documents``: copies with their embeddings, in the same order; ``meta``: key, model and
            device, and whether any call was cold.

        Raises:
            TypeError: no list of documents.
            UnsuitableModel: the key means a model that gives no embeddings.
            ModelyardError: the server refused or failed.
        """
        inputs = self._inputs(documents)
        return self._answer(documents, inputs, self._predict_all(inputs))

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents without blocking the event loop; as ``run``."""
        inputs = self._inputs(documents)
        return self._answer(documents, inputs, await self._predict_all_async(inputs))

    def _inputs(self, documents: list[Document]) -> list[Sequence[str]]:
        texts = [self._text_of(document) for document in checked_documents(documents)]
        return chunks_of(texts, self.batch_size)

    def _text_of(self, document: Document) -> str:
        text = text_to_embed(document, self.meta_fields_to_embed, self.embedding_separator)
        return f"{self.prefix}{text}{self.suffix}"

    def _answer(
        self,
        documents: list[Document],
        inputs: Sequence[Sequence[str]],
        predictions: Sequence[Prediction],
    ) -> dict[str, Any]:
        vectors = [
            vector.tolist()
            for texts, prediction in zip(inputs, predictions, strict=True)
            for vector in embeddings_of(prediction, self._key, len(texts))
        ]
        return {
            "documents": [
                replace(document, embedding=vector)
                for document, vector in zip(documents, vectors, strict=True)
            ],
            "meta": meta_of([each.served for each in predictions], self._key),
        }
