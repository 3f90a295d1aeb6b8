"""What is said of a model's bytes before they are there, against what is there.

price           Runtime.price, from headers, against the unique storages of the loaded model: as
                the runtime counts them, and as they are found in the model that the library
                makes of the same folder.
activations     The prediction over the model's skeleton, against the allocator's true peak: the
                most that all blocks it gave out held at once, by torch's profiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

from bench.weights_figures import error_pct, worst_error_pct
from bench.weights_loads import Tell, prepared_runtime, spec_of
from bench.weights_models import (
    BASE,
    CLASSIFY,
    SMALL,
    TINY,
    WeightsModel,
    make_encoders,
    make_fine_tunes,
    make_minilms,
    offline,
)

__all__ = ["size_figures"]

_ENCODER_BATCHES: Final = ((1, 32), (8, 32), (8, 128), (2, 512))
_DECODER_BATCHES: Final = ((1, 32), (4, 128))
_QUICK_BATCHES: Final = ((1, 32), (8, 128))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A network whose runs are predicted.

    Attributes:
        name: for people.
        build: makes it, on whatever device is torch's default.
        batches: rows and tokens.
    """

    name: str
    build: Callable[[], Any]
    batches: Sequence[tuple[int, int]]


def size_figures(folder: Path, quick: bool, tell: Tell) -> dict[str, Any]:
    """Compares prices and predictions with what is there.

    Args:
        folder: for models and the store; exists.
        quick: smaller models.
        tell: is told what goes on.
    """
    tell("making models")
    models = [
        *make_encoders(folder, TINY, ["tiny-a"]),
        *make_encoders(folder, SMALL, ["mini-a"]),
        *make_minilms(folder, ["minilm-a", "minilm-b"]),
        *make_fine_tunes(folder / "tunes", SMALL, 2),
    ]
    if not quick:
        models += make_encoders(folder, BASE, ["base-a"])
    return _prices(folder / "weights", models, tell) | _activations(quick, tell)


# --- Prices -------------------------------------------------------------------------------------


def _prices(store: Path, models: Sequence[WeightsModel], tell: Tell) -> dict[str, Any]:
    from modelyard_server.runtimes.targets import Place

    runtime = prepared_runtime(store)
    errors, most_bytes = {}, 0
    for model in models:
        spec = spec_of(model)
        price = runtime.price(spec).resting_bytes
        loaded = runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)
        measured = sum(loaded.measured_bytes().values())
        loaded.close()
        del loaded
        found = _bytes_by_library(model)
        errors[model.name] = worst_error_pct([error_pct(price, measured), error_pct(price, found)])
        most_bytes = max(most_bytes, abs(price - measured), abs(price - found))
        tell(f"{model.name}: price {price:,}, measured {measured:,}, by the library {found:,}")
    worst = worst_error_pct(errors.values())
    return {
        "price_error_pct": round(abs(worst), 6),
        "price_error_signed_pct": round(worst, 6),
        "price_error_most_bytes": most_bytes,
        "priced_models": len(errors),
    }


def _bytes_by_library(model: WeightsModel) -> int:
    """Bytes of the distinct parameters and buffers of the model that the library makes.

    By address: a mapped file is one storage to torch, and none of it is counted twice.
    """
    library = offline()
    kind = (
        library.AutoModelForSequenceClassification if model.task == CLASSIFY else library.AutoModel
    )
    # As the runtime has it: what is on top of the encoder is not needed for its hidden states.
    settings = {} if model.task == CLASSIFY else {"add_pooling_layer": False}
    module = kind.from_pretrained(model.folder, local_files_only=True, **settings)
    sizes = {}
    for tensor in chain(module.parameters(), module.buffers()):
        sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


# --- Activations --------------------------------------------------------------------------------


def _activations(quick: bool, tell: Tell) -> dict[str, Any]:
    import torch

    from modelyard_server.weights.activations import predict_peak_bytes

    errors = {}
    for case in _cases(quick):
        module = case.build().eval()
        with torch.device("meta"):
            skeleton = case.build().eval()
        for rows, tokens in case.batches:
            name = f"{case.name} {rows}x{tokens}"
            shapes = _shapes(rows, tokens)
            predicted = predict_peak_bytes(skeleton, shapes)
            if predicted.peak_bytes is None:
                raise RuntimeError(f"{name} cannot be predicted: {predicted.reason}")
            peak = _allocator_peak(module, _inputs(shapes))
            errors[name] = error_pct(predicted.peak_bytes, peak)
            tell(f"{name}: predicted {predicted.peak_bytes:,}, allocated {peak:,}")
    worst = worst_error_pct(errors.values())
    return {
        "activation_error_pct": round(abs(worst), 3),
        "activation_error_signed_pct": round(worst, 3),
        "activation_shapes": len(errors),
    }


def _cases(quick: bool) -> list[_Case]:
    library = offline()
    encoder = _QUICK_BATCHES if quick else _ENCODER_BATCHES
    base = {"num_hidden_layers": 2, "vocab_size": 1000} if quick else {}
    minilm = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    gpt2 = {"n_layer": 2, "vocab_size": 1000} if quick else {}
    return [
        _Case(
            name="BERT-base",
            build=lambda: library.BertForSequenceClassification(library.BertConfig(**base)),
            batches=encoder,
        ),
        _Case(
            name="MiniLM",
            build=lambda: library.BertModel(library.BertConfig(**minilm)),
            batches=encoder,
        ),
        _Case(
            name="GPT-2",
            build=lambda: library.GPT2LMHeadModel(library.GPT2Config(**gpt2)),
            batches=_QUICK_BATCHES if quick else _DECODER_BATCHES,
        ),
    ]


def _shapes(rows: int, tokens: int) -> dict[str, Any]:
    import torch

    shape = ((rows, tokens), torch.int64)
    return {"input_ids": shape, "attention_mask": shape}


def _inputs(shapes: dict[str, Any]) -> dict[str, Any]:
    """Texts of different lengths: of masks without a zero the library makes nothing."""
    import torch

    made = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    mask = made["attention_mask"]
    mask[0, mask.shape[1] // 2 :] = 0
    return made


def _allocator_peak(module: Any, inputs: dict[str, Any]) -> int:
    import torch

    with torch.inference_mode():
        # What libraries keep from their first run on is nobody's activation.
        module(**inputs)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiled:
            outcome = module(**inputs)
    del outcome
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
