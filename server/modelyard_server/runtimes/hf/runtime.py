"""Runtime "transformers": options, price and load. Imports neither torch nor transformers itself.

What the library is trusted with: building a class that we chose from a configuration object that we
made, and filling it with tensors that we mapped (`from_pretrained` without a folder, so that it
finds no file that we did not read: adapters, distributed checkpoints and custom generation code are
all looked for there). It takes care of renamed and fused weights and of ties.

Loads take turns: the library sets the process's default type and patches constructors while it
builds. What remains outside the lock is reading the files and moving to the devices.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from modelyard_server.runtimes.api import (
    LoadCancelled,
    LoadedModel,
    ModelFilesError,
    ModelSpec,
    OptionError,
    Price,
    Runtime,
    StopCheck,
)
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.hf.requests import check_request
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.weights.model_config import read_json_object, read_model_config
from modelyard_server.weights.model_files import folder_of
from modelyard_server.weights.safetensors_files import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from modelyard_server.runtimes.api import JsonValue
    from modelyard_server.runtimes.hf.architectures import Architecture
    from modelyard_server.runtimes.hf.skeletons import Pricing, SkeletonCache
    from modelyard_server.runtimes.targets import Place
    from modelyard_server.runtimes.tensors import TensorValue
    from modelyard_server.weights.model_config import ModelConfig
    from modelyard_server.weights.model_files import FolderLike
    from modelyard_server.weights.safetensors_files import Checkpoint
    from modelyard_server.weights.storages import Spread

__all__ = ["TASKS", "TransformersRuntime"]

TASKS = (
    "feature-extraction",
    "text-classification",
    "fill-mask",
    "text-generation",
    "image-classification",
)
_POOLINGS = ("mean", "cls", "none")
_DEFAULT_BATCH_SIZE = 32
_MAX_BATCH_SIZE = 4_096
_MAX_LENGTH = 1_048_576
_SHARED_LAYERS = 48
_LENGTH_WITHOUT_LIMIT = 4_096
"""Most tokens of a text for a model that has no limit of its own: relative positions, no tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    batch_size: int
    max_length: int | None
    pooling: str
    normalize: bool
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is known of a load before the first weight is read."""

    architecture: Architecture
    checkpoint: Checkpoint
    dtype: torch.dtype
    pricing: Pricing


class TransformersRuntime(Runtime):
    """Loads and runs model folders of the transformers library, safetensors only.

    Options:
        batch_size: most rows of one forward pass, default 32; longer inputs are split.
        max_length: most tokens of a text, default and limit the model's own (text tasks).
        pooling: "mean", "cls" or "none" (feature-extraction).
        normalize: make vectors of length one, default false (feature-extraction).
        top_k: fillings a text, default 5 (fill-mask).
    """

    def __init__(self, *, construction_lock: threading.Lock | None = None) -> None:
        self._construction_lock = construction_lock or threading.Lock()

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        return "transformers"

    @cached_property
    def _skeletons(self) -> SkeletonCache:
        from modelyard_server.runtimes.hf.skeletons import SkeletonCache

        return SkeletonCache(self._construction_lock)

    def warm_up(self) -> None:
        """Imports the libraries, which takes seconds, and forbids them the network for good."""
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        # The modules of the tasks import what the tasks need, a model's class what it needs.
        from modelyard_server.runtimes.hf import architectures, generation, image  # noqa: F401
        from modelyard_server.weights import dispatch  # noqa: F401

        with self._construction_lock:
            _quiet()

    def check(self, spec: ModelSpec) -> None:
        """Checks task and options; touches no files."""
        if spec.task not in TASKS:
            raise OptionError("task", f"must be one of {', '.join(TASKS)}")
        if spec.folder is None:
            raise OptionError("folder", "is required: it holds the model's files")
        _read_options(spec)

    def price(self, spec: ModelSpec) -> Price:
        """Says what a load takes, from config.json and the headers of the weights."""
        try:
            return self._plan(spec).pricing.price
        except BaseException as error:
            forget_frames(error)
            raise

    def check_request(
        self,
        spec: ModelSpec,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        """Checks parameters, and number, type and rank of the inputs, by the task alone."""
        check_request(spec.task, inputs, OptionReader(parameters))

    def load(self, spec: ModelSpec, *, place: Place, stop: StopCheck) -> LoadedModel:
        """Maps the weights, builds the model over them and moves its parts to their devices."""
        try:
            return self._load(spec, place, stop)
        except BaseException as error:
            # A load that failed half way holds a model half way; its error must not.
            forget_frames(error)
            raise

    def _plan(self, spec: ModelSpec) -> _Plan:
        from modelyard_server.runtimes.hf.architectures import find_architecture
        from modelyard_server.runtimes.hf.skeletons import checkpoint_dtype, price_of

        config = read_model_config(folder_of(spec))
        checkpoint = read_checkpoint(folder_of(spec))
        _check_layers(config, checkpoint)
        architecture = find_architecture(config, spec.task)
        dtype = checkpoint_dtype(config.dtype, checkpoint)
        skeleton = self._skeletons.get(architecture, dtype, config.digest)
        return _Plan(
            architecture=architecture,
            checkpoint=checkpoint,
            dtype=dtype,
            pricing=price_of(skeleton, checkpoint),
        )

    def _load(self, spec: ModelSpec, place: Place, stop: StopCheck) -> LoadedModel:
        from modelyard_server.weights.dispatch import check_disk, dispatch
        from modelyard_server.weights.mapping import map_checkpoint

        options = _read_options(spec)
        _check_stop(stop)
        plan = self._plan(spec)
        structure, filed = plan.pricing.structure, plan.pricing.filed
        on_disk = frozenset(
            name for index in check_disk(structure, place) if (name := filed[index]) is not None
        )
        _check_stop(stop)
        mapped = map_checkpoint(folder_of(spec), plan.checkpoint, stop=stop, on_disk=on_disk)
        with self._construction_lock:
            _check_stop(stop)
            _quiet()
            module = _build(plan, mapped.tensors)
        mapped.tensors.clear()
        module.eval()
        module.requires_grad_(False)
        _check_stop(stop)
        spread = dispatch(
            module,
            structure,
            place,
            extents={
                index: mapped.extents[name]
                for index, name in enumerate(filed)
                if name in mapped.extents
            },
            lists_are_chains=True,
            stop=stop,
        )
        return _with_task(module, spread, spec, options)


def _check_layers(config: ModelConfig, checkpoint: Checkpoint) -> None:
    # Building a layer takes milliseconds even without memory. A layer has tensors of its own, but
    # for models that use one layer several times, and those are shallow.
    if config.layers > max(_SHARED_LAYERS, len(checkpoint.tensors)):
        raise ModelFilesError(
            f"config.json describes {config.layers} layers, but the weights hold only "
            f"{len(checkpoint.tensors)} tensors"
        )


def _read_options(spec: ModelSpec) -> _Options:
    reader = OptionReader(spec.options)
    is_text = spec.task != "image-classification"
    batch_size = reader.integer("batch_size", None, low=1, high=_MAX_BATCH_SIZE)
    max_length = reader.integer("max_length", None, low=1, high=_MAX_LENGTH) if is_text else None
    pooling, normalize, top_k = "mean", False, None
    if spec.task == "feature-extraction":
        pooling = reader.choice("pooling", _POOLINGS, "mean")
        normalize = reader.flag("normalize", False)
    if spec.task == "fill-mask":
        top_k = reader.integer("top_k", None, low=1, high=1_000)
    reader.finish()
    return _Options(
        batch_size=batch_size or _DEFAULT_BATCH_SIZE,
        max_length=max_length,
        pooling=pooling,
        normalize=normalize,
        top_k=top_k or 5,
    )


def _check_stop(stop: StopCheck) -> None:
    if stop():
        raise LoadCancelled


def _quiet() -> None:
    """Keeps the library from drawing progress bars and tables into the server's log."""
    from transformers.utils import logging as library

    cast("Callable[[], None]", library.disable_progress_bar)()
    library.set_verbosity(logging.CRITICAL)


def _build(plan: _Plan, weights: dict[str, torch.Tensor]) -> Any:
    import torch

    model_class = plan.architecture.model_class
    try:
        module, report = model_class.from_pretrained(
            None,
            config=plan.architecture.config,
            state_dict=weights,
            dtype=plan.dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **plan.architecture.arguments,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Its texts name files and classes of the library: kept for the log, not for clients.
        raise ModelFilesError(
            f"the weights do not make a {model_class.__name__} ({type(error).__name__})"
        ) from error
    for problem, keys in (
        ("lack", report["missing_keys"]),
        ("have the wrong shape for", report["mismatched_keys"]),
    ):
        if keys:
            # The library has filled them with random numbers.
            first = min(key if isinstance(key, str) else str(key[0]) for key in keys)
            raise ModelFilesError(
                f"the weights {problem} {len(keys)} parameters of a {model_class.__name__}, for "
                f"instance {first[:100]}"
            )
    if report["error_msgs"] or any(parameter.is_meta for parameter in module.parameters()):
        raise ModelFilesError(f"the weights do not fill a {model_class.__name__}")
    return module


def _with_task(module: Any, spread: Spread, spec: ModelSpec, options: _Options) -> LoadedModel:
    from modelyard_server.runtimes.hf.generation import TextGenerator
    from modelyard_server.runtimes.hf.image import ImageClassifier, read_preparation
    from modelyard_server.runtimes.hf.text import FeatureExtractor, MaskFiller, TextClassifier
    from modelyard_server.runtimes.hf.tokenizing import read_tokenizer

    folder = folder_of(spec)
    config = module.config
    batch_size = options.batch_size
    if spec.task == "image-classification":
        channels = getattr(config, "num_channels", 3)
        preparation = read_preparation(folder, channels=channels)
        return ImageClassifier(module, spread, preparation, batch_size=batch_size)
    embeddings = module.get_input_embeddings()
    if module.main_input_name != "input_ids" or embeddings is None:
        raise ModelFilesError(f"a {type(module).__name__} does not take texts")
    pad_id = getattr(config, "pad_token_id", None)
    tokenizer = read_tokenizer(folder, pad_id=pad_id, id_limit=embeddings.weight.shape[0])
    own = _own_length(module, tokenizer.max_length)
    if options.max_length is not None and options.max_length > own:
        raise ModelFilesError(
            f"option max_length is {options.max_length}, but the model takes {own} tokens"
        )
    max_length = options.max_length or own
    tokenizer.limit(max_length)
    match spec.task:
        case "feature-extraction":
            return FeatureExtractor(
                module,
                spread,
                tokenizer,
                batch_size=batch_size,
                pooling=options.pooling,
                normalize=options.normalize,
            )
        case "text-classification":
            if pad_id is None and hasattr(module, "score"):
                # Decoders classify by the last token, and find it by the padding behind it.
                batch_size = 1
            return TextClassifier(module, spread, tokenizer, batch_size=batch_size)
        case "fill-mask":
            if tokenizer.mask_id is None:
                raise ModelFilesError("the tokenizer has no mask token; fill-mask needs one")
            return MaskFiller(module, spread, tokenizer, batch_size=batch_size, top_k=options.top_k)
        case _:
            return TextGenerator(
                module,
                spread,
                tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                end_ids=_end_ids(folder, config),
            )


def _own_length(module: Any, of_tokenizer: int | None) -> int:
    """Most tokens that the model's positions and its tokenizer's file allow."""
    limits = [] if of_tokenizer is None else [of_tokenizer]
    positions = getattr(module.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its kin count positions from behind the padding id.
        offsets = [
            embedding.padding_idx + 1
            for name, embedding in module.named_modules()
            if name.endswith("position_embeddings")
            and getattr(embedding, "padding_idx", None) is not None
        ]
        limits.append(positions - max(offsets, default=0))
    own = min(limits, default=_LENGTH_WITHOUT_LIMIT)
    if own < 1:
        raise ModelFilesError("the model takes no tokens: max_position_embeddings is too small")
    return own


def _end_ids(folder: FolderLike, config: Any) -> list[int]:
    """Ids of the tokens that end a text, by generation_config.json or else config.json."""
    settings = read_json_object(folder, "generation_config.json", max_bytes=1 << 20)
    value = settings.get("eos_token_id", getattr(config, "eos_token_id", None))
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and item >= 0]
