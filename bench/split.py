"""A model split over two devices and the disk, against the same model on one device.

How far their answers are apart, and whether the ledger charges each device to the byte what the
header of the model's file says, with what has to be added to it: buffers that are computed, and
room for what visits from the disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bench.machine import written
from bench.plan_models import ServedModel, filed_bytes, make_bert_base, model_table
from modelyard import Admin, Client
from modelyard_server.demo.models import minilm_folder
from modelyard_server.demo.process import modelyard_server

__all__ = ["SplitResult", "compare_split"]

_HOME: Final = "cuda:0"
_OTHER: Final = "cuda:1"
_DISK: Final = "disk"
_BUDGET: Final = "1GB"
_POSITIONS: Final = 512
"""max_position_embeddings of both models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """What came of one model.

    Attributes:
        model: its name.
        most_apart: largest absolute difference of an element of its answers.
        expected_bytes: by resource name of the device, from the file's header.
        charged_bytes: by resource name of the device, from the ledger.
    """

    model: str
    most_apart: float
    expected_bytes: Mapping[str, int]
    charged_bytes: Mapping[str, int]


def compare_split(folder: Path) -> list[SplitResult]:
    """Runs MiniLM and an encoder of BERT-base's size, whole and in parts.

    Args:
        folder: for their files; exists.
    """
    store = folder / "store"
    store.mkdir()
    shutil.copytree(minilm_folder(), store / "minilm")
    minilm = ServedModel(name="minilm", task="feature-extraction", options={"pooling": "none"})
    bert = make_bert_base(store / "bert-base")
    cuts = ((minilm, _cut(6)), (bert, _cut(12)))
    config = """
        [server]
        listen = "127.0.0.1:0"
        log_level = "warning"
        [catalog]
        durable = false
        [roots]
        store = "store"
        """
    for device in (_HOME, _OTHER, _DISK):
        logical = "" if device == _DISK else "logical = true"
        config += f'\n[[devices]]\ndevice = "{device}"\nbudget = "{_BUDGET}"\n{logical}\n'
    for model, cut in cuts:
        config += model_table(model, _HOME, name=f"{model.name}-whole")
        config += model_table(model, cut, name=f"{model.name}-split")
    with (
        modelyard_server(written(folder, config, "split")) as server,
        Client(server.address) as client,
        Admin(server.address) as admin,
    ):
        return [
            SplitResult(
                model=model.name,
                most_apart=_most_apart(client, model),
                expected_bytes=_expected_bytes(store / model.name, cut),
                charged_bytes=_charged_bytes(admin, f"{model.name}-split"),
            )
            for model, cut in cuts
        ]


def _cut(layers: int) -> dict[str, str]:
    """All at home but the middle third of the layers, on another device, and the last, on disk."""
    third = layers // 3
    cut = {"": _HOME}
    for layer in range(third, layers):
        cut[f"encoder.layer.{layer}"] = _OTHER if layer < 2 * third else _DISK
    return cut


def _most_apart(client: Client, model: ServedModel) -> float:
    apart = 0.0
    for text in model.texts:
        whole = client.predict(f"{model.name}-whole", [text])["embeddings"]
        split = client.predict(f"{model.name}-split", [text])["embeddings"]
        apart = max(apart, float(np.abs(np.asarray(whole) - np.asarray(split)).max()))
        if not apart < float("inf"):
            raise RuntimeError(f"{model.name} answers with something that is no number")
    return apart


def _expected_bytes(folder: Path, cut: Mapping[str, str]) -> dict[str, int]:
    placed = {
        name: (_device_of(name, cut), size)
        for name, size in filed_bytes(folder).items()
        # On top of the encoder, and not needed for its hidden states: not loaded.
        if not name.startswith("pooler.")
    }
    # Two numbers for each position, which the library computes where the file does not hold them.
    for buffer in ("embeddings.position_ids", "embeddings.token_type_ids"):
        placed.setdefault(buffer, (_device_of(buffer, cut), 8 * _POSITIONS))
    expected: dict[str, int] = {}
    visits: dict[str, int] = {}
    for name, (device, size_bytes) in placed.items():
        expected[device] = expected.get(device, 0) + size_bytes
        if device == _DISK:
            # What is on the disk is read when its module runs, one module after the other.
            module = name.rpartition(".")[0]
            visits[module] = visits.get(module, 0) + size_bytes
    expected[_HOME] += max(visits.values())
    return {f"devices/{device.replace(':', '-')}": size for device, size in expected.items()}


def _device_of(name: str, cut: Mapping[str, str]) -> str:
    covering = [key for key in cut if not key or f"{name}.".startswith(f"{key}.")]
    return cut[max(covering, key=len)]


def _charged_bytes(admin: Admin, model: str) -> dict[str, int]:
    (residency,) = [
        residency for residency in admin.list_residencies() if residency.model == f"models/{model}"
    ]
    return {charge.device: charge.size_bytes for charge in residency.charges}
