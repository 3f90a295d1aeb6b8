"""What each task takes and gives; the classes of the models say it in words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from modelyard_server.runtimes.signature import ANY, Signature, TensorKind
from modelyard_server.runtimes.tensors import DType

__all__ = ["signature_of"]

_TEXTS: Final = TensorKind("text", DType.TEXT, (ANY,))

_CLASSES: Final = (
    TensorKind("label", DType.TEXT, (ANY,)),
    TensorKind("score", DType.FLOAT32, (ANY,)),
    TensorKind("probabilities", DType.FLOAT32, (ANY, ANY)),
)

_OF_TASKS: Final[Mapping[str, Signature]] = MappingProxyType(
    {
        "text-classification": Signature(
            inputs=(_TEXTS,), outputs=_CLASSES, is_exact=True, shares_runs=True
        ),
        "fill-mask": Signature(
            inputs=(_TEXTS,),
            outputs=(
                TensorKind("token", DType.TEXT, (ANY, ANY)),
                TensorKind("score", DType.FLOAT32, (ANY, ANY)),
                TensorKind("sequence", DType.TEXT, (ANY, ANY)),
            ),
            is_exact=True,
            shares_runs=True,
        ),
        "text-generation": Signature(
            inputs=(_TEXTS,),
            outputs=(
                TensorKind("text", DType.TEXT, (ANY,)),
                TensorKind("token_count", DType.INT64, (ANY,)),
            ),
            is_exact=True,
        ),
        # Raw pictures; prepared ones are FLOAT32 [n, channels, height, width].
        "image-classification": Signature(
            inputs=(TensorKind("image", DType.UINT8, (ANY, ANY, ANY, ANY)),),
            outputs=_CLASSES,
            is_exact=False,
            shares_runs=True,
        ),
    }
)


def signature_of(task: str, pooling: str) -> Signature:
    """What models of a task take and give.

    Args:
        task: one that the runtime knows.
        pooling: of feature-extraction.
    """
    if task != "feature-extraction":
        return _OF_TASKS[task]
    outputs: tuple[TensorKind, ...] = (TensorKind("embedding", DType.FLOAT32, (ANY, ANY)),)
    if pooling == "none":
        outputs = (
            TensorKind("embeddings", DType.FLOAT32, (ANY, ANY, ANY)),
            TensorKind("mask", DType.BOOL, (ANY, ANY)),
        )
    return Signature(inputs=(_TEXTS,), outputs=outputs, is_exact=True, shares_runs=True)
