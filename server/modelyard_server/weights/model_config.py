"""Reads config.json ourselves and passes on only what describes a model.

To the library that builds the model, its configuration is more than numbers: keys of it have named
code to run, kernels to fetch and files to open, and several did so although remote code was
forbidden. So the file is read here, what could reach beyond the model is refused by name, and sizes
that no model has are refused before anything is built from them. The library never sees the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from modelyard_server.runtimes.api import JsonValue, ModelFilesError
from modelyard_server.weights.model_files import FolderLike, parse_json, read_model_file, shown

__all__ = ["ModelConfig", "read_json_object", "read_model_config"]

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 8 << 20
"""ImageNet-22k's labels, twice, are 2 MB."""

MAX_LAYERS = 256
"""Most layers, blocks or stages. Each becomes some dozen Python objects when the model is built,
which takes milliseconds; the deepest models that are published have 126."""

MAX_EXPERTS = 1_024
"""Most experts, groups or levels of a layer."""

MAX_LABELS = 100_000
_MAX_INTEGER = 2**31 - 1
_MAX_LIST = 20_000

_BENIGN_PRIVATE_KEYS = frozenset({"_name_or_path", "_commit_hash", "_num_labels"})
"""Left behind by earlier versions of the library. Dropped."""

_FORBIDDEN_KEYS = frozenset(
    {
        "auto_map",
        "attn_implementation",
        "adapters",
        "backbone",
        "compression_config",
        "distributed_config",
        "experts_implementation",
        "extra_files",
        "fusion_config",
        "kernel_config",
        "per_layer_config",
        "quantization_config",
        "transformers_weights",
        "trust_remote_code",
    }
)
"""Keys that name code, kernels, other files or other libraries. `backbone` is the name of a model
to download; a backbone's own configuration is `backbone_config`."""

_FORBIDDEN_PATTERN = re.compile(
    r"^(custom_|_attn_implementation|_experts_implementation|use_pretrained|use_timm)|kernels?$|_kernels?_(config|map)"
)
_ARCHITECTURE_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,127}")
_LAYERS_PATTERN = re.compile(r"^(n|num)_.*(layer|block|stage)s?$|^n_?layers?$|layers$|^depths?$")
_EXPERTS_PATTERN = re.compile(r"^(n|num)_.*(expert|group|level)s?$|experts$")
_OFF: tuple[JsonValue, ...] = (None, False, [], {}, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What config.json says, without what must not be believed.

    Attributes:
        values: keys and values; no private keys at any depth. Plain JSON values, not shared.
        model_type: the library's name of the model's kind.
        architectures: names of the classes it was saved from; may be empty.
        dtype: name of the floating type it asks to be loaded in, or None.
        layers: the largest number of layers, blocks or stages that it names at any depth.
        digest: SHA-256 of the file.
    """

    values: Mapping[str, JsonValue]
    model_type: str
    architectures: tuple[str, ...]
    dtype: str | None
    layers: int
    digest: str

    def selected(self, names: Collection[str]) -> dict[str, JsonValue]:
        """Returns the values of those keys that are among `names`."""
        return {key: value for key, value in self.values.items() if key in names}


def read_model_config(folder: FolderLike) -> ModelConfig:
    """Reads and vets a model folder's config.json.

    Raises:
        ModelFilesError: it is missing, no JSON object, asks for code, kernels or other files, or
            has sizes that no model has.
    """
    content = read_model_file(folder, CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)
    if content is None:
        raise ModelFilesError(f"{CONFIG_FILE} is missing")
    raw = parse_json(CONFIG_FILE, content)
    if not isinstance(raw, dict):
        raise ModelFilesError(f"{CONFIG_FILE} is not a JSON object")
    values = _vetted_object(raw, CONFIG_FILE)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or len(model_type) > 64:
        raise ModelFilesError(f"{CONFIG_FILE} does not say its model_type")
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(
        isinstance(name, str) and _ARCHITECTURE_PATTERN.fullmatch(name) for name in architectures
    ):
        raise ModelFilesError(f"{CONFIG_FILE}: architectures is not a list of class names")
    dtype = values.get("dtype", values.get("torch_dtype"))
    if isinstance(dtype, str):
        dtype = dtype.removeprefix("torch.")
    if dtype not in (None, "float16", "bfloat16", "float32", "float64"):
        raise ModelFilesError(f"{CONFIG_FILE}: its dtype is not one that is served")
    return ModelConfig(
        values=values,
        model_type=model_type,
        architectures=tuple(architectures),
        dtype=dtype,
        layers=_most_layers(values),
        digest=hashlib.sha256(content).hexdigest(),
    )


def read_json_object(folder: FolderLike, name: str, *, max_bytes: int) -> dict[str, JsonValue]:
    """Reads another configuration file of the folder, of which single values are picked.

    Returns:
        Its content; empty if there is no such file.

    Raises:
        ModelFilesError: it is too large or not a JSON object.
    """
    content = read_model_file(folder, name, max_bytes=max_bytes)
    if content is None:
        return {}
    value = parse_json(name, content)
    if not isinstance(value, dict):
        raise ModelFilesError(f"{name} is not a JSON object")
    return value


# parse_json has bounded the depth of what these walk.


def _most_layers(value: JsonValue, key: str = "") -> int:
    if isinstance(value, dict):
        return max((_most_layers(item, key) for key, item in value.items()), default=0)
    if isinstance(value, list):
        return max((_most_layers(item, key) for item in value), default=0)
    return value if type(value) is int and _LAYERS_PATTERN.search(key) else 0


def _vetted_object(value: dict[str, JsonValue], where: str) -> dict[str, JsonValue]:
    kept = {}
    for key, item in value.items():
        if key in _BENIGN_PRIVATE_KEYS:
            continue
        if key in _FORBIDDEN_KEYS or _FORBIDDEN_PATTERN.search(key):
            # A switch that is off, as in "use_pretrained_backbone": false, asks for nothing.
            if any(item is off or item == off for off in _OFF) and not key.startswith("_"):
                continue
            raise ModelFilesError(
                f"{where} sets {shown(key)}, which reaches beyond the model's own weights; "
                "models with it are not served"
            )
        if key.startswith("_"):
            continue
        kept[key] = _vetted_value(key, item, where)
    return kept


def _vetted_value(key: str, value: JsonValue, where: str) -> JsonValue:
    if isinstance(value, dict):
        if len(value) > MAX_LABELS:
            raise ModelFilesError(f"{where}: {shown(key)} has more than {MAX_LABELS} entries")
        return _vetted_object(value, where)
    if isinstance(value, list):
        if len(value) > _MAX_LIST:
            raise ModelFilesError(f"{where}: {shown(key)} has more than {_MAX_LIST} entries")
        return [_vetted_value(key, item, where) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        limit = _MAX_INTEGER
        if _LAYERS_PATTERN.search(key):
            limit = MAX_LAYERS
        elif _EXPERTS_PATTERN.search(key):
            limit = MAX_EXPERTS
        elif key == "num_labels":
            limit = MAX_LABELS
        if not -limit <= value <= limit:
            raise ModelFilesError(f"{where}: {shown(key)} is beyond {limit}, more than any model's")
        if value < 0 and _is_size(key):
            raise ModelFilesError(f"{where}: {shown(key)} is negative")
    return value


def _is_size(key: str) -> bool:
    return key.endswith(("_size", "_dim", "_labels")) or key.startswith(("num_", "n_"))
