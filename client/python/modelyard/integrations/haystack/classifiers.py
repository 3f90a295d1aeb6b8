"""A component that sorts documents into classes, by a model of the task text-classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from haystack import Document, component

from modelyard.integrations.haystack._component import AnyDevice, KeyedComponent, chunks_of
from modelyard.integrations.haystack.documents import checked_count, checked_documents
from modelyard.integrations.haystack.outputs import figures_of, meta_of, texts_of
from modelyard.prediction import Prediction

__all__ = ["ModelyardDocumentClassifier"]


@component
class ModelyardDocumentClassifier(KeyedComponent):
    """Says of each document which class it is of, in ``meta["classification"]``.

    That is ``{"label": str, "score": float}``, where Haystack's other classifiers have it, so that
    routers and filters find it.

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
        classification_field: field of the meta to classify; None for the content.
        batch_size: documents in one call.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or of no use.
    """

    _task = "text-classification"

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
        classification_field: str | None = None,
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
        self.classification_field = classification_field
        self.batch_size = checked_count(batch_size, "batch_size")

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Classify documents.

        Args:
            documents: the documents; they are not changed. None at all is no call.

        Returns:
            ``documents``: copies, in the same order, with their class; ``meta``: key, model and
            device, and whether any call was cold.

        Raises:
            TypeError: no list of documents, or a field that holds no text.
            UnsuitableModel: the key means a model that gives no classes.
            ModelyardError: the server refused or failed.
        """
        inputs = self._inputs(documents)
        return self._answer(documents, inputs, self._predict_all(inputs))

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """Classify documents without blocking the event loop; as ``run``."""
        inputs = self._inputs(documents)
        return self._answer(documents, inputs, await self._predict_all_async(inputs))

    def _inputs(self, documents: list[Document]) -> list[Sequence[str]]:
        texts = [self._text_of(document) for document in checked_documents(documents)]
        return chunks_of(texts, self.batch_size)

    def _text_of(self, document: Document) -> str:
        if self.classification_field is None:
            return document.content or ""
        text = document.meta.get(self.classification_field)
        if not isinstance(text, str):
            raise TypeError(
                f"meta field {self.classification_field!r} of document {document.id} is to be "
                f"classified and holds no text but {type(text).__name__}"
            )
        return text

    def _answer(
        self,
        documents: list[Document],
        inputs: Sequence[Sequence[str]],
        predictions: Sequence[Prediction],
    ) -> dict[str, Any]:
        classes = [
            {"label": label, "score": score}
            for texts, prediction in zip(inputs, predictions, strict=True)
            for label, score in zip(
                texts_of(prediction, "label", self._key, len(texts), self._task),
                figures_of(prediction, "score", self._key, len(texts), self._task),
                strict=True,
            )
        ]
        return {
            "documents": [
                replace(document, meta={**document.meta, "classification": found})
                for document, found in zip(documents, classes, strict=True)
            ],
            "meta": meta_of([each.served for each in predictions], self._key),
        }
