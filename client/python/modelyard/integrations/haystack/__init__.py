"""Haystack (the package haystack-ai, 3.x): components that ask a modelyard server, and its devices.

::

    from haystack import Pipeline
    from modelyard.integrations.haystack import ModelyardRanker, ModelyardTextEmbedder

    pipeline = Pipeline()
    pipeline.add_component("embedder", ModelyardTextEmbedder("minilm"))

A component asks for a key that the server knows, or brings its model: ``model`` is a folder on the
server and ``device`` where it shall live, and warming the component up registers it. Components
that name the same model share it, in one process or in many. ``_component`` has the rules, and
docs/haystack.md the whole story.

``to_haystack`` and ``from_haystack`` turn device values into each other.

Importing this package imports Haystack, which imports torch where it is installed. Haystack's
telemetry is Haystack's: ``HAYSTACK_TELEMETRY_ENABLED=False`` in the environment turns it off.
"""

from __future__ import annotations

from importlib import import_module

try:
    import_module("haystack.utils")
except ImportError as error:
    raise ImportError(
        "modelyard.integrations.haystack needs the package haystack-ai: "
        "pip install 'modelyard[haystack]'"
    ) from error

from modelyard.integrations.haystack.classifiers import ModelyardDocumentClassifier
from modelyard.integrations.haystack.devices import from_haystack, to_haystack
from modelyard.integrations.haystack.embedders import (
    ModelyardDocumentEmbedder,
    ModelyardTextEmbedder,
)
from modelyard.integrations.haystack.generators import ModelyardGenerator
from modelyard.integrations.haystack.outputs import UnsuitableModel
from modelyard.integrations.haystack.rankers import ModelyardRanker

__all__ = [
    "ModelyardDocumentClassifier",
    "ModelyardDocumentEmbedder",
    "ModelyardGenerator",
    "ModelyardRanker",
    "ModelyardTextEmbedder",
    "UnsuitableModel",
    "from_haystack",
    "to_haystack",
]
