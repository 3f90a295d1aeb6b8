"""The server that `make clients` gives the clients: tiny real models, and what they must answer.

What a program is to expect is computed here, from the models by plain transformers and from the
rule of splits in proto/modelyard/v1/route.proto, and never asked of the server.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import torch
import transformers
from tests.support.server import server_process
from tests.support.tiny_models import make_tiny_bert, make_tiny_gpt2

__all__ = ["AFFINITY_COUNT", "SALT", "WEIGHTS", "ClientYard", "affinities", "branch_of", "yard"]

AFFINITY_COUNT: Final = 1000
SALT: Final = "scenario"
WEIGHTS: Final[Mapping[str, int]] = {"blue": 3, "green": 1}
TEXTS: Final = ("the big dog ran", "you hate this small cat")
PROMPT: Final = "the cat sat"
TOKEN_COUNT: Final = 5

# Of weights that give the two texts labels of their own, and no end of the text within five tokens.
_SEED: Final = 2

_CONFIG: Final = """
[roots]
store = "store"

[[devices]]
device = "cpu"
budget = "64MB"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientYard:
    """A server that runs, and what client/SCENARIO.md says a program is given.

    Attributes:
        target: address of the server.
        words: everything that is the same for all programs, by name; without prefix and steps.
    """

    target: str
    words: Mapping[str, str]


@asynccontextmanager
async def yard(base: Path) -> AsyncIterator[ClientYard]:
    """Makes the models below a folder, and runs `modelyard serve` as a process of its own.

    Args:
        base: an empty folder.
    """
    words = prepare(base)
    async with server_process(_CONFIG, base) as server:
        yield ClientYard(target=server.target, words={"target": server.target} | words)


def prepare(base: Path) -> dict[str, str]:
    """Writes the models and the list of affinities, and returns what to expect of them.

    Raises:
        ValueError: the models are no good for the scenario: both texts have one label, or the
            generated text ends too soon.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    store = base / "store"
    for name in ("text", "generation"):
        (store / name).mkdir(parents=True)
    make_tiny_bert(store / "text", num_labels=4, seed=_SEED)
    make_tiny_gpt2(store / "generation", seed=_SEED)
    branches = base / "branches.tsv"
    branches.write_text(
        "".join(f"{affinity}\t{branch_of(affinity)}\n" for affinity in affinities()),
        encoding="utf-8",
    )
    return {
        "root": "store",
        "folder": "text",
        "labels": ",".join(_labels(store / "text")),
        "generation_folder": "generation",
        "tokens": ",".join(map(str, _tokens(store / "generation"))),
        "branches": str(branches),
    }


def affinities() -> list[str]:
    """The affinities that every program asks with. Some are not ASCII."""
    plain = AFFINITY_COUNT - AFFINITY_COUNT // 10
    return [f"user-{i}" if i < plain else f"käyttäjä-{i}-用户" for i in range(AFFINITY_COUNT)]


def branch_of(affinity: str) -> str:
    """The branch of an affinity by the rule of modelyard.v1.SplitTarget."""

    def score(branch: str) -> float:
        text = f"{SALT}\0{branch}\0{affinity}".encode()
        number = int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
        return -WEIGHTS[branch] / math.log((number + 0.5) / 2**64)

    return max(WEIGHTS, key=score)


def _labels(folder: Path) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    labels = [str(model.config.id2label[int(row.argmax())]) for row in logits]
    if len(set(labels)) != len(TEXTS):
        raise ValueError(f"a program could mix the texts up: both are {labels[0]}")
    return labels


def _tokens(folder: Path) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        whole = model.generate(**prompt, max_new_tokens=TOKEN_COUNT, do_sample=False)[0]
    tokens: list[int] = whole[prompt["input_ids"].shape[1] :].tolist()
    if len(tokens) != TOKEN_COUNT or model.config.eos_token_id in tokens:
        raise ValueError(f"the text ends too soon: {tokens}")
    return tokens
