"""Runtime "transformers": options, price and load. Imports neither torch nor transformers itself.

What the library is trusted with: building a class that we chose from a configuration object that we
made, and filling it with tensors that we mapped (`from_pretrained` without a folder, so that it
finds no file that we did not read: adapters, distributed checkpoints and custom generation code are
all looked for there). It takes care of renamed and fused weights and of ties.

The first load of an architecture takes turns with others: the library sets the process's default
type and patches constructors while it builds. A template is made of what it has built (see
weights/templates.py), and later loads need neither the library nor the lock. Models that cannot
have a template are loaded in the first way every time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

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
from modelyard_server.runtimes.hf.signatures import signature_of
from modelyard_server.runtimes.model_weights import ModelWeights, content_key
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.template_cache import tensors_digest
from modelyard_server.weights.activation_model import ActivationModel, RunEstimate
from modelyard_server.weights.first_runs import FirstRuns
from modelyard_server.weights.model_config import read_json_object, read_model_config
from modelyard_server.weights.store.recent import Recent

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from modelyard_server.runtimes.api import JsonValue
    from modelyard_server.runtimes.hf.loading import Loader, Plan
    from modelyard_server.runtimes.hf.model import HfModel
    from modelyard_server.runtimes.hf.skeletons import SkeletonCache
    from modelyard_server.runtimes.hf.tokenizing import TokenizerCache
    from modelyard_server.runtimes.model_weights import PoolSource
    from modelyard_server.runtimes.signature import Signature
    from modelyard_server.runtimes.targets import Place
    from modelyard_server.runtimes.tensors import TensorValue
    from modelyard_server.weights.holding import WeightPool
    from modelyard_server.weights.model_config import ModelConfig
    from modelyard_server.weights.model_files import FolderLike
    from modelyard_server.weights.safetensors_files import Checkpoint
    from modelyard_server.weights.storages import Spread
    from modelyard_server.weights.store import WeightStore
    from modelyard_server.weights.stored import StoredModel

__all__ = ["TASKS", "TransformersRuntime"]


logger = logging.getLogger(__name__)

TASKS = (
    "feature-extraction",
    "text-classification",
    "fill-mask",
    "text-generation",
    "image-classification",
)
_PICTURES = "image-classification"
_POOLINGS = ("mean", "cls", "none")
_DEFAULT_BATCH_SIZE = 32
_MAX_BATCH_SIZE = 4_096
_MAX_LENGTH = 1_048_576
_SHARED_LAYERS = 48
_MAX_PLANS = 512
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
class _Positions:
    """Most tokens that a model has positions for; None if it has no table of them."""

    count: int | None


class TransformersRuntime(Runtime):
    """Loads and runs model folders of the transformers library, safetensors only.

    Options:
        batch_size: most rows of one forward pass, default 32; longer inputs are split.
        max_length: most tokens of a text, default and limit the model's own (text tasks).
        pooling: "mean", "cls" or "none" (feature-extraction).
        normalize: make vectors of length one, default false (feature-extraction).
        top_k: fillings a text, default 5 (fill-mask).

    Args:
        construction_lock: of all runtimes whose models are built from this process's classes.
        store: has the models; None: they are read where they lie.
        pool: holds what models share, or gives it; None: one of its own.
        predicts_runs: a price says what runs take as well, which takes some tenths of a second for
            each architecture and setting, and the first runs of each are measured.
    """

    def __init__(
        self,
        *,
        construction_lock: threading.Lock | None = None,
        store: WeightStore | None = None,
        pool: WeightPool | PoolSource | None = None,
        predicts_runs: bool = False,
    ) -> None:
        self._predicts_runs = predicts_runs
        self._estimates: Recent[Hashable, RunEstimate] = Recent(_MAX_PLANS)
        self._first_runs: Recent[Hashable, FirstRuns] = Recent(_MAX_PLANS)
        self._construction_lock = construction_lock or threading.Lock()
        self._weights = ModelWeights(store, pool)
        self._plans: Recent[Hashable, Plan] = Recent(_MAX_PLANS)
        self._positions: Recent[Hashable, _Positions] = Recent(_MAX_PLANS)

    @property
    def name(self) -> str:
        """What the configuration calls it."""
        return "transformers"

    @cached_property
    def _skeletons(self) -> SkeletonCache:
        from modelyard_server.runtimes.hf.skeletons import SkeletonCache

        return SkeletonCache(self._construction_lock)

    @cached_property
    def _loader(self) -> Loader:
        from modelyard_server.runtimes.hf.loading import Loader

        return Loader(self._construction_lock, self._weights)

    @cached_property
    def _tokenizers(self) -> TokenizerCache:
        from modelyard_server.runtimes.hf.tokenizing import TokenizerCache

        return TokenizerCache()

    def warm_up(self) -> None:
        """Imports the libraries, which takes seconds, and forbids them the network for good."""
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        # The modules of the tasks import what the tasks need, a model's class what it needs.
        from modelyard_server.runtimes.hf import architectures, generation, image  # noqa: F401
        from modelyard_server.runtimes.hf.loading import quiet

        with self._construction_lock:
            quiet()

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
            with self._weights.found(spec) as stored:
                plan = self._plan(spec, stored)
            price = plan.pricing.price
            if not self._predicts_runs:
                return price
            estimate = self._estimate(plan, spec)
            return replace(price, activation_bytes=estimate.size_bytes, runs=estimate)
        except BaseException as error:
            forget_frames(error)
            raise

    def signature(self, spec: ModelSpec, input_names: Sequence[str] = ()) -> Signature:
        """Says what the task takes and gives."""
        return signature_of(spec.task, _read_options(spec).pooling)

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
            options = _read_options(spec)
            _check_stop(stop)
            with self._weights.found(spec, stop=stop) as stored:
                return self._load(self._plan(spec, stored), spec, options, place, stop)
        except BaseException as error:
            # A load that failed half way holds a model half way; its error must not.
            forget_frames(error)
            raise

    def _plan(self, spec: ModelSpec, stored: StoredModel) -> Plan:
        config = None if stored.digest else read_model_config(stored.folder)
        # Of a folder that is read in place nothing stands for its configuration but the file.
        content = (content_key(stored), config.digest if config is not None else "", spec.task)
        plan = self._plans.get(content)
        if plan is None or (stored.digest and plan.stored is not stored):
            plan = self._made_plan(stored, config or read_model_config(stored.folder), spec.task)
            self._plans.put(content, plan)
        return plan

    def _made_plan(self, stored: StoredModel, config: ModelConfig, task: str) -> Plan:
        from modelyard_server.runtimes.hf.architectures import find_architecture
        from modelyard_server.runtimes.hf.loading import Plan, key_of
        from modelyard_server.runtimes.hf.skeletons import checkpoint_dtype, price_of

        _check_layers(config, stored.checkpoint)
        architecture = find_architecture(config, task)
        dtype = checkpoint_dtype(config.dtype, stored.checkpoint)
        skeleton = self._skeletons.get(architecture, dtype, config.digest)
        pricing = price_of(skeleton, stored)
        return Plan(
            stored=stored,
            architecture=architecture,
            dtype=dtype,
            pricing=pricing,
            key=key_of(architecture, dtype, stored, pricing),
        )

    def _estimate(self, plan: Plan, spec: ModelSpec) -> RunEstimate:
        """What runs take, as far as the configuration tells."""
        _, batch_size, length = limits = _limits_of(plan, spec)
        key = None if plan.key is None else (plan.key, limits)
        known = None if key is None else self._estimates.get(key)
        if known is None:
            known = RunEstimate(
                key=_key_of_runs(plan, limits),
                model=self._predicted(plan, *limits) or ActivationModel.unknown(),
                largest_batch=batch_size,
                largest_length=length,
            )
            if key is not None:
                self._estimates.put(key, known)
        return known

    def _first_runs_of(self, plan: Plan, spec: ModelSpec) -> FirstRuns:
        """Picks the runs that are measured; of all models whose runs take the same."""
        if plan.key is None:
            return FirstRuns()
        return self._first_runs.setdefault((plan.key, _limits_of(plan, spec)), FirstRuns())

    def _predicted(
        self, plan: Plan, task: str, batch_size: int, length: int
    ) -> ActivationModel | None:
        import torch

        from modelyard_server.runtimes.hf.activations import model_for_task

        architecture = plan.architecture
        try:
            with self._construction_lock, torch.device("meta"):
                module = architecture.model_class._from_config(
                    architecture.config, dtype=plan.dtype, **architecture.arguments
                )
            with self._construction_lock:
                return model_for_task(module, architecture.config, task, batch_size, length)
        except Exception as error:
            # Code of a model, of which nothing but a number was wanted.
            forget_frames(error)
            name = architecture.model_class.__name__
            logger.info("what runs of a %s take is not known (%s)", name, type(error).__name__)
            return None

    def _load(
        self, plan: Plan, spec: ModelSpec, options: _Options, place: Place, stop: StopCheck
    ) -> LoadedModel:
        _check_stop(stop)
        module, spread, held = self._loader.load(plan, place, stop)
        try:
            loaded = self._with_task(module, spread, spec, plan, options)
        except BaseException:
            if held is not None:
                held.release()
            raise
        if held is not None:
            loaded.own(held)
        if self._predicts_runs:
            loaded.measure(self._first_runs_of(plan, spec))
        return loaded

    def _with_task(
        self, module: Any, spread: Spread, spec: ModelSpec, plan: Plan, options: _Options
    ) -> HfModel:
        from modelyard_server.runtimes.hf.generation import TextGenerator
        from modelyard_server.runtimes.hf.image import ImageClassifier, read_preparation
        from modelyard_server.runtimes.hf.text import FeatureExtractor, MaskFiller, TextClassifier
        from modelyard_server.runtimes.hf.tokenizing import TextTokenizer

        folder = plan.stored.folder
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
        tokenizer = TextTokenizer(
            self._tokenizers.get(folder, digest=plan.stored.digest),
            pad_id=pad_id,
            id_limit=embeddings.weight.shape[0],
        )
        own = self._own_length(module, plan, tokenizer.max_length)
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
                return MaskFiller(
                    module, spread, tokenizer, batch_size=batch_size, top_k=options.top_k
                )
            case _:
                return TextGenerator(
                    module,
                    spread,
                    tokenizer,
                    batch_size=batch_size,
                    max_length=max_length,
                    end_ids=_end_ids(folder, config),
                )

    def _own_length(self, module: Any, plan: Plan, of_tokenizer: int | None) -> int:
        """Most tokens that the model's positions and its tokenizer's file allow."""
        positions = self._positions.get(plan.key)
        if positions is None:
            positions = _positions_of(module)
            if plan.key is not None:
                self._positions.put(plan.key, positions)
        limits = (of_tokenizer, positions.count)
        own = min((limit for limit in limits if limit is not None), default=_LENGTH_WITHOUT_LIMIT)
        if own < 1:
            raise ModelFilesError("the model takes no tokens: max_position_embeddings is too small")
        return own


def _limits_of(plan: Plan, spec: ModelSpec) -> tuple[str, int, int]:
    """Task, rows of the largest batch and its tokens a row, as far as the configuration tells."""
    options, config = _read_options(spec), plan.architecture.config
    if spec.task == _PICTURES:
        return spec.task, options.batch_size, 1
    own = getattr(config, "max_position_embeddings", None)
    longest = own if isinstance(own, int) and own > 0 else _LENGTH_WITHOUT_LIMIT
    return spec.task, options.batch_size, min(options.max_length or longest, longest)


def _key_of_runs(plan: Plan, limits: tuple[str, int, int]) -> str:
    """The same for models whose runs take the same; empty if nobody can tell."""
    if plan.key is None:
        return ""
    architecture = plan.architecture
    decisive = (
        f"{architecture.model_class.__module__}.{architecture.model_class.__qualname__}",
        architecture.shape,
        sorted(architecture.arguments.items()),
        plan.dtype,
        tensors_digest(plan.stored.checkpoint),
        limits,
    )
    return f"transformers:{hashlib.sha256(repr(decisive).encode()).hexdigest()}"


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


def _positions_of(module: Any) -> _Positions:
    positions = getattr(module.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return _Positions(count=None)
    # RoBERTa and its kin count positions from behind the padding id.
    offsets = [
        embedding.padding_idx + 1
        for name, embedding in module.named_modules()
        if name.endswith("position_embeddings")
        and getattr(embedding, "padding_idx", None) is not None
    ]
    return _Positions(count=positions - max(offsets, default=0))


def _end_ids(folder: FolderLike, config: Any) -> list[int]:
    """Ids of the tokens that end a text, by generation_config.json or else config.json."""
    settings = read_json_object(folder, "generation_config.json", max_bytes=1 << 20)
    value = settings.get("eos_token_id", getattr(config, "eos_token_id", None))
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and item >= 0]
