"""Makes modules of model files: by the library once, and from then on by a template of that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging as library_logging

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck
from modelyard_server.runtimes.filling import Filling, clone, map_filling, settle
from modelyard_server.runtimes.hf.architectures import Architecture
from modelyard_server.runtimes.hf.skeletons import Pricing
from modelyard_server.runtimes.model_weights import HeldWeights, ModelWeights
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.template_cache import TemplateCache, tensors_digest
from modelyard_server.weights.origin import NOWHERE
from modelyard_server.weights.storages import Spread
from modelyard_server.weights.stored import StoredModel
from modelyard_server.weights.templates import ModuleTemplate, Refusal, make_template

__all__ = ["Loader", "Plan", "key_of", "quiet"]

logger = logging.getLogger(__name__)

_FOR_SAVING = frozenset({"_weight_conversions"})
"""What the library hangs on a model for the time when it is saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is known of a load before the first weight is read.

    Attributes:
        stored: the model's files.
        architecture: what is built.
        dtype: the floating type that it is loaded as.
        pricing: what it takes.
        key: what decides the module; None if its weights do.
    """

    stored: StoredModel
    architecture: Architecture
    dtype: torch.dtype
    pricing: Pricing
    key: Hashable | None

    @property
    def filling(self) -> Filling:
        """What the module is filled with."""
        return Filling(
            stored=self.stored,
            structure=self.pricing.structure,
            filed=self.pricing.filed,
            shared=self.pricing.price.shared,
        )


class Loader:
    """Loads models, and remembers how the library makes the module of each architecture.

    Thread-safe.

    Args:
        construction_lock: held while the library builds a module.
        weights: where weights come from.
    """

    def __init__(self, construction_lock: threading.Lock, weights: ModelWeights) -> None:
        self._construction_lock = construction_lock
        self._weights = weights
        self._templates = TemplateCache()

    def load(self, plan: Plan, place: Place, stop: StopCheck) -> tuple[Any, Spread, HeldWeights]:
        """Brings a model onto its devices.

        Args:
            plan: what is to be loaded.
            place: where to.
            stop: asked between steps.

        Returns:
            The module, where its tensors are, and what it holds together with others, which the
            caller releases.

        Raises:
            ModelFilesError: the files are not what they were, or do not make the model.
            LoadCancelled: stop said so. Nothing is held then.
        """
        filling, origin = plan.filling, NOWHERE
        _, template = self._templates.find(plan.key)
        if template is None or not place.target.is_whole:
            mapped = map_filling(filling, place, stop)
            module = None
            if template is None:
                module, template = self._learn(plan, mapped.tensors, stop)
            _check_stop(stop)
            if template is None or not place.target.is_whole:
                if template is not None:
                    module = template.make(mapped.tensors, mapped.tensors)
                    _set_labels(module, plan.architecture)
                assert module is not None
                spread, held = settle(
                    module,
                    mapped,
                    filling,
                    self._weights,
                    place=place,
                    lists_are_chains=True,
                    stop=stop,
                )
                return module, spread, held
            origin = mapped.origin
            # What was loaded to learn from makes room for what is loaded to stay.
            del module, mapped
        module, spread, held = clone(
            template, filling, self._weights, place=place, stop=stop, origin=origin
        )
        _set_labels(module, plan.architecture)
        return module, spread, held

    def _learn(
        self, plan: Plan, tensors: dict[str, torch.Tensor], stop: StopCheck
    ) -> tuple[Any, ModuleTemplate | None]:
        """Has the library load a model, and makes a template of it if that can be done.

        Returns:
            The module, or None if another load has found a template meanwhile; and that.
        """
        with self._construction_lock:
            _check_stop(stop)
            known, template = self._templates.find(plan.key)
            if template is not None:
                return None, template
            quiet()
            module = _build(plan, dict(tensors))
            module.eval()
            module.requires_grad_(False)
            if plan.key is not None and not known:
                # Under the lock, so that who waits for it finds the template.
                template = _template_of(module, plan, tensors)
                self._templates.put(plan.key, template)
        return module, template


def key_of(
    architecture: Architecture, dtype: torch.dtype, stored: StoredModel, pricing: Pricing
) -> Hashable | None:
    """What decides the module that the library makes of a model; None if its weights do."""
    tensors = stored.checkpoint.tensors
    ties = []
    for names in pricing.doubled:
        # The same bytes have the same identity, but for what tells two tensors of a model apart.
        contents = [tensors[name].identity.partition(".")[0] for name in names]
        if not all(contents):
            return None
        ties.append((names, tuple(contents.index(content) for content in contents)))
    return (
        architecture.model_class,
        architecture.shape,
        tuple(sorted(architecture.arguments.items())),
        dtype,
        tensors_digest(stored.checkpoint),
        tuple(ties),
    )


def _template_of(
    module: Any, plan: Plan, tensors: Mapping[str, torch.Tensor]
) -> ModuleTemplate | None:
    try:
        template = make_template(
            module,
            tensors,
            sources=plan.pricing.sources,
            copyable=(PreTrainedConfig, GenerationConfig),
            left_out=_FOR_SAVING,
        )
    except Refusal as refusal:
        logger.info("a %s is always loaded by its library: %s", type(module).__name__, refusal)
        return None
    return template if plan.filling.suits(template) else None


def _set_labels(module: Any, architecture: Architecture) -> None:
    # Past the configuration's own checks: it has passed them when it was made.
    vars(module.config).update(architecture.labels)


def _check_stop(stop: StopCheck) -> None:
    if stop():
        raise LoadCancelled


def quiet() -> None:
    """Keeps the library from drawing progress bars and tables into the server's log."""
    cast("Callable[[], None]", library_logging.disable_progress_bar)()
    library_logging.set_verbosity(logging.CRITICAL)


def _build(plan: Plan, weights: dict[str, torch.Tensor]) -> Any:
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
