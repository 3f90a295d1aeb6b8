"""A component that orders documents by what they have to do with a query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from haystack import Document, component

from modelyard.integrations.haystack._component import AnyDevice, KeyedComponent, chunks_of
from modelyard.integrations.haystack.documents import (
    checked_count,
    checked_documents,
    text_to_embed,
)
from modelyard.integrations.haystack.outputs import embeddings_of
from modelyard.prediction import Prediction

__all__ = ["ModelyardRanker"]


@component
class ModelyardRanker(KeyedComponent):
    """Orders documents by the cosine of their vectors and the query's.

    The model is one that embeds texts (task feature-extraction). Vectors that documents bring are
    not used: they may be another model's. With the model of an embedder of the same pipeline there
    is one model on the server, and no more memory.

    Args:
        key: what to ask the server for; None for the same text as ``model``.
        model: the model's folder below the server's root, to register it; None if the server
            knows the key.
        root: name of that root in the server's configuration.
        device: where the model shall live: a ``ComponentDevice`` of Haystack or of modelyard, or
            text such as ``"cuda:1"``. None leaves it to the server. Goes with ``model``.
        options: options of the model's runtime. Goes with ``model``.
        server: the server's address; None takes ``MODELYARD_SERVER`` of the environment, or
            127.0.0.1:8470.
        timeout_s: seconds for each call.
        load_timeout_s: seconds for the load of a warm-up.
        top_k: most documents to answer with; None for all.
        score_threshold: leaves out documents with a lower score; None keeps all.
        query_prefix: put before the query.
        document_prefix: put before each document.
        meta_fields_to_embed: fields of a document's meta to embed with its content.
        embedding_separator: put between them.
        batch_size: texts in one call.

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
        top_k: int | None = 10,
        score_threshold: float | None = None,
        query_prefix: str = "",
        document_prefix: str = "",
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        batch_size: int = 32,
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
        self.top_k = None if top_k is None else checked_count(top_k, "top_k")
        self.score_threshold = score_threshold
        self.query_prefix = query_prefix
        self.document_prefix = document_prefix
        self.meta_fields_to_embed = meta_fields_to_embed
        self.embedding_separator = embedding_separator
        self.batch_size = checked_count(batch_size, "batch_size")

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, Any]:
        """Order documents.

        Args:
            query: what to compare them with.
            documents: in any order; they are not changed. Of those with one id, the best scored
                counts. None at all is no call.
            top_k: most documents to answer with; None takes the component's.
            score_threshold: the lowest score to answer with; None takes the component's.

        Returns:
            ``documents``: copies with their ``score``, a cosine of -1 to 1, highest first; of
            equal ones the order is kept.

        Raises:
            TypeError: no str, or no list of documents.
            ValueError: ``top_k`` is below 1.
            UnsuitableModel: the key means a model that gives no embeddings.
            ModelyardError: the server refused or failed.
        """
        kept, inputs = self._inputs(query, documents, top_k)
        predictions = self._predict_all(inputs)
        return self._answer(kept, inputs, predictions, top_k, score_threshold)

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, Any]:
        """Order documents without blocking the event loop; as ``run``."""
        kept, inputs = self._inputs(query, documents, top_k)
        predictions = await self._predict_all_async(inputs)
        return self._answer(kept, inputs, predictions, top_k, score_threshold)

    def _inputs(
        self, query: str, documents: list[Document], top_k: int | None
    ) -> tuple[list[Document], list[Sequence[str]]]:
        if not isinstance(query, str):
            raise TypeError(f"query must be a str, got {type(query).__name__}")
        if top_k is not None:
            checked_count(top_k, "top_k")
        kept: dict[str, Document] = {}
        for document in checked_documents(documents):
            first = kept.setdefault(document.id, document)
            if _score_of(document) > _score_of(first):
                kept[document.id] = document
        if not kept:
            return [], []
        texts = [f"{self.query_prefix}{query}", *map(self._text_of, kept.values())]
        return list(kept.values()), chunks_of(texts, self.batch_size)

    def _text_of(self, document: Document) -> str:
        text = text_to_embed(document, self.meta_fields_to_embed, self.embedding_separator)
        return f"{self.document_prefix}{text}"

    def _answer(
        self,
        documents: list[Document],
        inputs: Sequence[Sequence[str]],
        predictions: Sequence[Prediction],
        top_k: int | None,
        score_threshold: float | None,
    ) -> dict[str, Any]:
        if not documents:
            return {"documents": []}
        vectors = np.concatenate(
            [
                embeddings_of(prediction, self._key, len(texts)).astype(np.float64)
                for texts, prediction in zip(inputs, predictions, strict=True)
            ]
        )
        # A vector of zeros has no direction; its cosine with anything counts as 0.
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
        scores = vectors[1:] @ vectors[0]
        lowest = self.score_threshold if score_threshold is None else score_threshold
        ranked = [
            replace(documents[index], score=float(scores[index]))
            for index in np.argsort(-scores, kind="stable")
            if lowest is None or scores[index] >= lowest
        ]
        return {"documents": ranked[: self.top_k if top_k is None else top_k]}


def _score_of(document: Document) -> float:
    return -math.inf if document.score is None else document.score
