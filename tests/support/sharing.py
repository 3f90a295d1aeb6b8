"""Models that have tensors in common, and books about them that are kept without the server.

make_family       fine-tunes of one encoder: equal but for their heads
make_blend        a classifier whose parts are taken from several others
make_mixture      a TinyMlp whose four tensors are taken from a shelf of a few
classes, mixed    what the library itself answers
Books             which tensors which model has, counted anew from the files; checks a server's
telling           replays a server's events against the books
told              all events of a server
auditing          looks at the core after every event, for a with statement
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bench.audited_server import Steps, audited
from safetensors.torch import load_file, save_file

from modelyard import Admin, DeviceCharge, Event, EventType, ManagedDevice, Residency
from modelyard import ResidencyState as State
from modelyard_server import _core
from tests.support.config_text import model_table, toml
from tests.support.server import RunningApp
from tests.support.tiny_models import MLP_FACTORY, TinyMlp, make_tiny_bert

__all__ = [
    "ROWS",
    "SHARED_STORE",
    "TEXTS",
    "Books",
    "Sizes",
    "auditing",
    "classes",
    "classifier",
    "create",
    "create_big",
    "create_mixture",
    "make_blend",
    "make_family",
    "make_mixture",
    "mixed",
    "sizes_of",
    "telling",
    "told",
]

TEXTS = ["the big dog ran", "a bird flew over the river house"]
"""What classifiers are asked."""

ROWS = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(3, 8)
"""What mixtures are asked."""

SHARED_STORE = (
    '\n[roots]\nmodels = "models"\n\n[weights]\nstore = "store"\n'
    f"\n[runtimes.torch]\nallowed_factories = {toml([MLP_FACTORY])}\n"
)
"""Piece of a configuration: models in "models", their weights held together."""

_MIX_WIDTH = 8

_TOLD_OF_MODELS = frozenset(
    {
        EventType.MODEL_CREATED,
        EventType.MODEL_UPDATED,
        EventType.MODEL_DELETED,
        EventType.PLACEMENT_CHANGED,
        EventType.REFUSED,
    }
)


@contextmanager
def auditing() -> Iterator[Steps]:
    """Servers that are built inside look at their core's books after every event.

    At the end no event may have been wrong.
    """
    steps = Steps()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_core, "Yard", audited(steps))
        yield steps
    assert steps.count
    assert not steps.wrong, steps.texts


def classifier(folder: Path, **settings: object) -> str:
    """Piece of a configuration: a classifier called like its folder in "models"."""
    place = {"root": "models", "folder": folder.name, "task": "text-classification"}
    return model_table(folder.name, "transformers", **(place | settings))


async def create(yard: RunningApp, folder: Path, **settings: Any) -> None:
    """Registers a classifier, called like its folder in "models"."""
    await yard.admin(
        Admin.create_model,
        settings.pop("model", folder.name),
        runtime="transformers",
        root="models",
        folder=folder.name,
        task="text-classification",
        **settings,
    )


def make_family(
    root: Path, names: Sequence[str], *, seed: int, heads: int = 0, labels: int = 3, width: int = 32
) -> list[Path]:
    """Makes classifiers with the same encoder, byte for byte, and heads of their own.

    Args:
        root: folder that their folders, of their names, are made in.
        names: of the models.
        seed: of the encoder.
        heads: of the first head; the next ones count on from it.
        labels: number of classes.
        width: of the encoder.
    """
    folders = [root / name for name in names]
    first = make_tiny_bert(folders[0], seed=seed, num_labels=labels, hidden_size=width)
    weights = load_file(first / "model.safetensors")
    for number, folder in enumerate(folders):
        if folder != first:
            shutil.copytree(first, folder)
        generator = torch.Generator().manual_seed(10_000 * seed + heads + number)
        head = {
            name: torch.randn(tensor.shape, generator=generator)
            for name, tensor in weights.items()
            if name.startswith("classifier.")
        }
        # Not over the file that is there: another one takes its place, as with every tool.
        (folder / "model.safetensors").unlink()
        save_file(weights | head, folder / "model.safetensors", metadata={"format": "pt"})
    return folders


def classes(folder: Path, texts: Sequence[str] = TEXTS) -> np.ndarray[Any, Any]:
    """Probabilities as the library works them out, on one thread as a lane does."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    model: Any = transformers.BertForSequenceClassification.from_pretrained(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return np.asarray(model(**batch).logits.softmax(-1))
    finally:
        torch.set_num_threads(threads)


def make_blend(
    root: Path, name: str, choice: Sequence[int], *, labels: int = 3, width: int = 32
) -> Path:
    """Makes a classifier whose parts are taken from several others.

    Args:
        root: folder that its folder is made in.
        name: of the model.
        choice: seeds of its embeddings, its two layers, and the rest.
        labels: number of classes.
        width: of the encoder.
    """
    sources = root.parent / "sources"
    weights = {}
    for seed in set(choice):
        source = sources / str(seed)
        if not source.exists():
            make_tiny_bert(source, seed=seed, num_labels=labels, hidden_size=width)
        weights[seed] = load_file(source / "model.safetensors")
    folder = root / name
    shutil.copytree(sources / str(choice[0]), folder)
    (folder / "model.safetensors").unlink()
    prefixes = ("bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.1.")
    seed_of = dict(zip(prefixes, choice, strict=False))
    blend = {}
    for key in weights[choice[0]]:
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        blend[key] = weights[seed_of.get(prefix, choice[-1])][key]
    save_file(blend, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_mixture(folder: Path, choice: Sequence[int]) -> Path:
    """Makes the weights of a TinyMlp(8, 8, 8) out of two shelves of tensors.

    Args:
        folder: made anew if it is there.
        choice: numbers of its weights on the shelf of matrices, then of its biases on that of rows;
            equal numbers are equal tensors, in one model too.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    shapes = [(_MIX_WIDTH, _MIX_WIDTH)] * 2 + [(_MIX_WIDTH,)] * 2
    names = ["first.weight", "second.weight", "first.bias", "second.bias"]
    tensors = {}
    for name, shape, number in zip(names, shapes, choice, strict=True):
        generator = torch.Generator().manual_seed(100 * len(shape) + number)
        tensors[name] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    return folder


def mixed(folder: Path) -> np.ndarray[Any, Any]:
    """What a mixture answers to ROWS."""
    module = TinyMlp(_MIX_WIDTH, _MIX_WIDTH, _MIX_WIDTH)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(ROWS)))


async def create_big(yard: RunningApp, books: Books, model: str, size_bytes: int) -> None:
    """Registers a model of so many bytes that has nothing in common with any other."""
    books.sizes[model] = Sizes({}, size_bytes)
    options = {"size_bytes": size_bytes}
    await yard.admin(Admin.create_model, model, runtime="identity", options=options)


async def create_mixture(
    yard: RunningApp, model: str, *, folder: str | None = None, **settings: Any
) -> None:
    """Registers a mixture, in the folder of its name unless another is given."""
    sizes = dict.fromkeys(("inputs", "hidden", "outputs"), _MIX_WIDTH)
    await yard.admin(
        Admin.create_model,
        model,
        runtime="torch",
        root="models",
        folder=folder or model,
        options={"factory": MLP_FACTORY, "factory_options": sizes},
        **settings,
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model is made of.

    Attributes:
        tensors: bytes by what they are; of a tensor that a model has twice, the second is another.
        own_bytes: of what is in no file.
    """

    tensors: Mapping[str, int]
    own_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of it alone."""
        return self.own_bytes + sum(self.tensors.values())


def sizes_of(folder: Path, own_bytes: int) -> Sizes:
    """Reads a model's only weights file with nothing but the description of the format."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    seen: Counter[str] = Counter()
    tensors = {}
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        kind = f"{entry['dtype']} {entry['shape']} ".encode()
        data = content[8 + length + begin : 8 + length + end]
        digest = hashlib.blake2b(kind + data).hexdigest()
        seen[digest] += 1
        tensors[f"{digest} {seen[digest]}"] = end - begin
    return Sizes(tensors, own_bytes)


class Books:
    """Which model has which tensors; what a server says is checked against them.

    Attributes:
        sizes: by the model's id. Changed by tests as they change models.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, Sizes] = {}

    def add_family(self, folders: Iterable[Path]) -> None:
        """Adds classifiers. What they compute for themselves are two rows of 64 positions."""
        for folder in folders:
            self.sizes[folder.name] = sizes_of(folder, own_bytes=2 * 64 * 8)

    def add_mixture(self, name: str, folder: Path) -> None:
        """Adds a mixture, which has a row to scale its result with."""
        self.sizes[name] = sizes_of(folder, own_bytes=4 * _MIX_WIDTH)

    def held(self, models: Iterable[str]) -> int:
        """Bytes of some models in one memory: each tensor once."""
        distinct: dict[str, int] = {}
        own_bytes = 0
        for model in models:
            distinct.update(self.sizes[model].tensors)
            own_bytes += self.sizes[model].own_bytes
        return own_bytes + sum(distinct.values())

    def alone(self, models: Iterable[str]) -> int:
        """Bytes of some models if nothing were shared."""
        return sum(self.sizes[model].total_bytes for model in models)

    def shared(self, model: str, others: Iterable[str]) -> int:
        """What of a model's bytes others hold as well."""
        theirs = {tensor for other in others for tensor in self.sizes[other].tensors}
        tensors = self.sizes[model].tensors
        return sum(size for tensor, size in tensors.items() if tensor in theirs)

    async def check(self, yard: RunningApp) -> dict[str, set[str]]:
        """Checks all that a server says of its devices, at rest; each model is whole on one.

        Returns:
            Ids of the resident models, by resource name of the device.
        """
        await yard.at_rest()
        yard.app.residency.audit()
        found: Sequence[Residency] = await yard.admin(Admin.list_residencies)
        devices: Sequence[ManagedDevice] = await yard.admin(Admin.list_devices)
        where: dict[str, set[str]] = {device.name: set() for device in devices}
        charges: dict[str, DeviceCharge] = {}
        for residency in found:
            model = residency.model.removeprefix("models/")
            assert residency.quarantined == (), residency
            if residency.state is State.RESIDENT:
                (charges[model],) = residency.charges
                where[charges[model].device].add(model)
            else:
                assert residency.charges == (), residency
        for device in devices:
            models = where[device.name]
            held = self.held(models)
            told = (device.accounted_bytes, device.resident_bytes, device.measured_bytes)
            assert told == (held, held, held), (device, sorted(models))
            assert held <= device.budget_bytes, device
            assert device.saved_bytes == self.alone(models) - held, device
            for model in models:
                shared = self.shared(model, models - {model})
                assert charges[model] == DeviceCharge(
                    device=device.name,
                    size_bytes=self.sizes[model].total_bytes,
                    shared_bytes=shared,
                ), model
        return where


def telling(books: Books, events: Iterable[Event]) -> set[str]:
    """Checks the bytes that events tell, from the books. All of them happened on one device.

    Args:
        books: about all models of the events.
        events: all there were, in order, from an empty device on.

    Returns:
        Models that are in memory after the last of them.
    """
    loading: set[str] = set()
    inside: set[str] = set()
    # Asked to leave; what they share does not stay for their sake.
    leaving: set[str] = set()
    for event in events:
        model = event.subject.removeprefix("models/")
        if model == event.subject or model not in books.sizes:
            continue
        match event.type:
            case EventType.LOAD_STARTED | EventType.LOAD_DONE | EventType.EVICTED:
                others = (inside | loading) - leaving - {model}
            case EventType.UNLOADED:
                others = (inside | loading) - {model}
            case EventType.QUEUED | EventType.PINNED | EventType.UNPINNED:
                continue
            case _:
                assert event.type in _TOLD_OF_MODELS, event
                continue
        shared = books.shared(model, others)
        assert event.size_bytes == books.sizes[model].total_bytes - shared, event
        match event.type:
            case EventType.LOAD_STARTED:
                loading.add(model)
            case EventType.LOAD_DONE:
                loading.remove(model)
                inside.add(model)
            case EventType.EVICTED:
                assert model in inside, event
                leaving.add(model)
            case _:
                inside.remove(model)
                leaving.discard(model)
                continue  # It holds nothing any more, together with others neither.
        assert event.shared_bytes == shared, event
    assert not loading, loading
    return inside


async def told(yard: RunningApp) -> list[Event]:
    """All that a server has told so far, as a watch gets it."""
    last = yard.app.journal.events_after(0)[0][-1].revision

    def read(admin: Admin) -> list[Event]:
        found: list[Event] = []
        with admin.watch_events(include_past=True, timeout_s=30) as watch:
            for event in watch:
                found.append(event)
                if event.revision >= last:
                    break
        return found

    return await yard.admin(read)
