"""Which class of the library serves a task, and the configuration object it is built from."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modelyard_server.runtimes.api import ModelFilesError
from modelyard_server.weights.model_config import CONFIG_FILE, ModelConfig
from modelyard_server.weights.model_files import shown

__all__ = ["Architecture", "find_architecture"]

_TABLES: dict[str, Any] = {
    "feature-extraction": modeling_auto.MODEL_MAPPING_NAMES,
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "fill-mask": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "text-generation": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}

_EARLIER_KEYS = frozenset(
    {
        # Of DeBERTa, which reads them without ever having declared them.
        "attention_head_size",
        "conv_act",
        "conv_groups",
        "conv_kernel_size",
        "norm_rel_ebd",
        "position_buckets",
        "share_att_key",
        "num_labels",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "rope_scaling",
        "rope_theta",
    }
)
"""Keys that configuration classes still read although they no longer declare them."""


LABELS = ("id2label", "label2id")
"""Settings that shape no module but by their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model class, what it is built from, and the configuration object.

    Attributes:
        model_class: class of the transformers library.
        config: its configuration; not to be changed.
        arguments: further arguments of the model class.
        shape: the same for exactly the configurations that make the same modules: all that the
            class is told but the names of labels.
    """

    model_class: Any
    config: Any
    arguments: dict[str, Any]
    shape: bytes

    @property
    def labels(self) -> dict[str, Any]:
        """Attributes of the configuration in which models of one shape differ; copies."""
        values = {name: getattr(self.config, name, None) for name in LABELS}
        return {n: dict(value) if isinstance(value, dict) else value for n, value in values.items()}


def find_architecture(config: ModelConfig, task: str) -> Architecture:
    """Finds the class for a task and makes its configuration object.

    Args:
        config: the vetted file.
        task: one of the runtime's tasks.

    Raises:
        ModelFilesError: the library has no such class, the weights were saved from another one, or
            the values make no configuration of it.
    """
    if config.model_type not in CONFIG_MAPPING:
        raise ModelFilesError(
            f"{CONFIG_FILE}: model_type {shown(config.model_type)} is not known to transformers"
        )
    names = _names(_TABLES[task].get(config.model_type))
    if not names:
        raise ModelFilesError(
            f"{CONFIG_FILE}: a model of type {shown(config.model_type)} cannot do {task}"
        )
    name = next((name for name in names if name in config.architectures), names[0])
    # Vectors can be had from every class that has this body inside.
    extracts = task == "feature-extraction"
    accepted = _all_names(config.model_type) if extracts else frozenset({name})
    if config.architectures and not accepted & set(config.architectures):
        raise ModelFilesError(
            f"{CONFIG_FILE}: the weights are those of {shown(config.architectures[0])}; "
            f"{task} needs {name}"
        )
    model_class = getattr(transformers, name)
    values = _values(config)
    config_object = _config_object(config, values)
    if getattr(config_object, "is_encoder_decoder", False):
        raise ModelFilesError(f"{CONFIG_FILE}: encoder-decoder models are not served")
    arguments = {}
    if extracts and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        # It would be computed and thrown away, and checkpoints of other heads do not have it.
        arguments["add_pooling_layer"] = False
    return Architecture(
        model_class=model_class,
        config=config_object,
        arguments=arguments,
        shape=_shape(values, config_object),
    )


def _shape(values: dict[str, Any], config: Any) -> bytes:
    shaping = {name: value for name, value in values.items() if name not in LABELS}
    shaping["num_labels"] = getattr(config, "num_labels", None)
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).digest()


def _values(config: ModelConfig) -> dict[str, Any]:
    """What the configuration class is told."""
    config_class = CONFIG_MAPPING[config.model_type]
    # Only keys that the class declares: it would set any other as an attribute of itself.
    known = {field.name for field in dataclasses.fields(config_class)}
    known |= set(config_class.attribute_map)
    known |= {
        parameter.name
        for parameter in inspect.signature(config_class.__init__).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    known |= _EARLIER_KEYS
    known -= {"self", "architectures", "dtype", "transformers_version"}
    # What comes back in tuples or attribute dictionaries is not the runtime's to rely on: text
    # tasks always ask for the latter.
    return config.selected(known) | {"return_dict": True}


def _config_object(config: ModelConfig, values: dict[str, Any]) -> Any:
    try:
        return CONFIG_MAPPING[config.model_type](**values)
    except Exception as error:
        # The library checks with assertions, lookups and arithmetic alike.
        raise ModelFilesError(
            f"{CONFIG_FILE}: its values make no {config.model_type} model ({type(error).__name__})"
        ) from error


def _all_names(model_type: str) -> frozenset[str]:
    tables = [
        table
        for name, table in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")
    ]
    return frozenset(name for table in tables for name in _names(table.get(model_type)))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
