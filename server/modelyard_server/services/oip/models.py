"""ModelReady, ModelMetadata and ModelConfig."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from modelyard_server.runtimes.signature import TensorKind
from modelyard_server.services.oip.datatypes import datatype_of
from modelyard_server.services.oip.meanings import Meaning, Meanings
from modelyard_server.services.oip.messages import enum_number, message
from modelyard_server.transport.api import Call

__all__ = ["ModelService"]

_BACKEND = "modelyard"


class ModelService:
    """Tells whether models can be asked, and what they take and give.

    Args:
        meanings: what names stand for.
    """

    def __init__(self, meanings: Meanings) -> None:
        self._meanings = meanings

    async def model_ready(self, request: Any, call: Call) -> Any:
        """See GRPCInferenceService.ModelReady."""
        meaning = self._meanings.of(request.name, request.version)
        return message("ModelReadyResponse")(ready=self._meanings.is_ready(meaning))

    async def model_metadata(self, request: Any, call: Call) -> Any:
        """See GRPCInferenceService.ModelMetadata."""
        meaning = self._meanings.of(request.name, request.version)
        signature = meaning.signature
        return message("ModelMetadataResponse")(
            name=meaning.name,
            versions=meaning.versions,
            platform=_platform(meaning),
            inputs=_metadata(signature.inputs),
            outputs=_metadata(signature.outputs),
            properties={"signature": "exact" if signature.is_exact else "example"} | _told(meaning),
        )

    async def model_config(self, request: Any, call: Call) -> Any:
        """See GRPCInferenceService.ModelConfig."""
        meaning = self._meanings.of(request.name, request.version)
        signature = meaning.signature
        response = message("ModelConfigResponse")()
        config = response.config
        config.name = meaning.name
        config.platform = _platform(meaning)
        config.backend = _BACKEND
        config.max_batch_size = 0
        for field, kinds in ((config.input, signature.inputs), (config.output, signature.outputs)):
            for kind in kinds:
                field.add(
                    name=kind.name,
                    data_type=enum_number("DataType", datatype_of(kind.dtype).config_name),
                    dims=kind.shape,
                )
        if signature.shares_runs:
            config.dynamic_batching.SetInParent()
        config.model_transaction_policy.decoupled = False
        config.response_cache.enable = False
        for name, text in _told(meaning).items():
            config.parameters[name].string_value = text
        return response


def _platform(meaning: Meaning) -> str:
    runtimes = sorted({model.draft.runtime for model in meaning.models})
    return f"{_BACKEND}_{runtimes[0]}" if len(runtimes) == 1 else _BACKEND


def _told(meaning: Meaning) -> dict[str, str]:
    """What else is known of a name."""
    models = meaning.models
    told = {
        "modelyard_model": ", ".join(model.id for model in models),
        "modelyard_runtime": ", ".join(dict.fromkeys(model.draft.runtime for model in models)),
        "modelyard_task": ", ".join(dict.fromkeys(filter(None, (m.draft.task for m in models)))),
    }
    return {name: text for name, text in told.items() if text}


def _metadata(kinds: Iterable[TensorKind]) -> list[Any]:
    tensor = message("ModelMetadataResponse.TensorMetadata")
    return [
        tensor(name=kind.name, datatype=datatype_of(kind.dtype).name, shape=kind.shape)
        for kind in kinds
    ]
