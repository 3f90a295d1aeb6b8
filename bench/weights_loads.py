"""Loading times: the runtime over its store, against the library's from_pretrained.

Both in one process, with torch on one thread, in turn within each round and first in turn, on the
same model of the same content in the same page cache; neither keeps a model from one round to the
next. A round's model is another fine-tune than that of the round before. The first rounds count for
neither side.

    load            Ours is all of Runtime.load: the files looked at, weights, module, tokenizer and
                    task. Theirs is AutoModel...from_pretrained(folder).eval(), without a tokenizer.
    first, steady   One text of 32 tokens. Ours is LoadedModel.run, which tokenizes the text and
                    makes an answer of what the module gives. Theirs is the module on tokens.

Where the two sides are not alike it is to our disadvantage.

Files are in the page cache as reading them from end to end leaves them there, in large pieces. What
has just been written can lie there in small ones, which take longer to map; so 438 MB is also
measured as the import has left it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.weights_cache import cold_read_s, drop, resident_share, warm
from bench.weights_figures import over_limit, paired_ratio
from bench.weights_models import (
    BASE,
    CLASSIFY,
    EMBED,
    SMALL,
    TINY,
    WeightsModel,
    filed_bytes,
    make_encoders,
    make_minilms,
    offline,
)

__all__ = [
    "TEXT",
    "TOLERANCE",
    "Tell",
    "Times",
    "load_figures",
    "packs_of",
    "prepared_runtime",
    "spec_of",
    "text_input",
]

Tell = Callable[[str], None]
"""Is told how far a part has come."""

_TOKENS: Final = 32
TEXT: Final = " ".join(["rain"] * (_TOKENS - 2))
"""With what the tokenizer puts around it, 32 tokens."""
_STEADY_RUNS: Final = 3
_WARM_ROUNDS: Final = 3
TOLERANCE: Final = 1e-5
"""How far an answer may be from the library's."""


@dataclass(slots=True)
class Times:
    """What the rounds of one side took, in seconds.

    Attributes:
        load: of each round.
        first: of each round's first inference.
        steady: median of the inferences after it, of each round.
    """

    load: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    steady: list[float] = field(default_factory=list)

    @property
    def to_first(self) -> list[float]:
        """Load and first inference, of each round."""
        return [load + first for load, first in zip(self.load, self.first, strict=True)]


def load_figures(folder: Path, quick: bool, tell: Tell) -> dict[str, Any]:
    """Runs the rounds.

    Args:
        folder: for models and the store; exists.
        quick: fewer rounds.
        tell: is told what goes on.
    """
    tell("making models")
    names = ("a", "b", "c")
    base = make_encoders(folder, BASE, [f"base-{name}" for name in names])
    small = make_encoders(folder, SMALL, [f"mini-{name}" for name in names])
    tiny = make_encoders(folder, TINY, [f"tiny-{name}" for name in names])
    minilm = make_minilms(folder, [f"minilm-{name}" for name in names])
    tell("importing them into the store")
    bench = _Bench(folder / "weights", [*base, *small, *tiny, *minilm])

    figures: dict[str, Any] = {}
    ours, theirs = bench.rounds(base, 3 if quick else 9, "438 MB, just imported", tell)
    figures |= {
        "reload_as_imported_vs_from_pretrained": round(paired_ratio(theirs.load, ours.load), 2),
        **_milliseconds("reload_as_imported", ours, theirs),
    }
    bench.read_in([*base, *small, *tiny, *minilm])
    ours, theirs = bench.rounds(base, 3 if quick else 15, "438 MB", tell)
    figures |= {
        "reload_vs_from_pretrained": round(paired_ratio(theirs.load, ours.load), 2),
        "ttfi_vs_from_pretrained": round(paired_ratio(theirs.to_first, ours.to_first), 3),
        "ttfi_vs_steady": round(paired_ratio(ours.to_first, ours.steady), 3),
        "reload_bytes": filed_bytes(base[0].folder),
        "reload_from_pretrained_includes": "the model alone, no tokenizer",
        **_milliseconds("reload", ours, theirs),
    }
    ratios = []
    for key, models in (("minilm", minilm), ("mini", small), ("tiny", tiny)):
        size = filed_bytes(models[0].folder)
        ours, theirs = bench.rounds(models, 5 if quick else 30, f"{size / 1e6:.0f} MB", tell)
        ratio = paired_ratio(theirs.load, ours.load)
        ratios.append(ratio)
        figures |= {
            f"{key}_reload_vs_from_pretrained": round(ratio, 2),
            f"{key}_ttfi_vs_from_pretrained": round(
                paired_ratio(theirs.to_first, ours.to_first), 3
            ),
            f"{key}_bytes": size,
            **_milliseconds(f"{key}_reload", ours, theirs),
        }
    figures["small_reload_vs_from_pretrained"] = round(min(ratios), 2)
    figures |= bench.cold(base, 2 if quick else 9, tell)
    return figures | {"answers_wrong": bench.wrong, "answers_compared": bench.compared}


def prepared_runtime(store: Path) -> Any:
    """A runtime over a store, in a process that has done what a server's process does first."""
    import torch

    from modelyard_server.execution.discipline import settle_process, warm_thread
    from modelyard_server.runtimes.hf.runtime import TransformersRuntime
    from modelyard_server.weights.store import WeightStore

    torch.set_num_threads(1)
    transformers = offline()
    runtime = TransformersRuntime(store=WeightStore.open(store))
    runtime.warm_up()
    # What the other side's first call would import.
    for name in ("AutoModel", "AutoModelForSequenceClassification", "BertModel"):
        getattr(transformers, name)
    warm_thread(1)
    settle_process()
    return runtime


def spec_of(model: WeightsModel) -> Any:
    """What the runtime is to load."""
    from modelyard_server.runtimes.api import ModelSpec

    return ModelSpec(
        name=model.name,
        runtime="transformers",
        task=model.task,
        folder=model.folder,
        root=model.folder.parent,
    )


def text_input(text: str = TEXT) -> Any:
    """One text as a model's input."""
    from modelyard_server.runtimes.tensors import DType, TensorValue

    return TensorValue(name="text", dtype=DType.TEXT, shape=(1,), data=(text,))


class _Bench:
    """Both sides, over the same models.

    Attributes:
        compared: answers that were compared with the other side's.
        wrong: those that were not the same.
    """

    def __init__(self, store: Path, models: Sequence[WeightsModel]) -> None:
        from modelyard_server.execution.freed_memory import give_back_freed
        from modelyard_server.weights.store import WeightStore

        self.compared = 0
        self.wrong = 0
        self._give_back = give_back_freed
        self._runtime = prepared_runtime(store)
        self._library = offline()
        for model in models:
            # As registering it does: it is in the store afterwards.
            self._runtime.price(spec_of(model))
        opened = WeightStore.open(store)
        self._packs = {model.name: packs_of(opened, model) for model in models}
        opened.close()
        self._tokens = self._library.AutoTokenizer.from_pretrained(models[0].folder)(
            [TEXT], return_tensors="pt"
        )
        if tuple(self._tokens["input_ids"].shape) != (1, _TOKENS):
            raise RuntimeError(f"the text has {self._tokens['input_ids'].shape[1]} tokens")

    def read_in(self, models: Sequence[WeightsModel]) -> None:
        """Throws the files of both sides out of the page cache, and reads them back into it."""
        for model in models:
            drop(self._files(model))
            warm(self._files(model))

    def rounds(
        self, models: Sequence[WeightsModel], count: int, name: str, tell: Tell
    ) -> tuple[Times, Times]:
        """Loads models in turn, on both sides in turn."""
        for model in models:
            warm(self._files(model))
        ours, theirs = Times(), Times()
        warming: tuple[Times, Times] = (Times(), Times())
        for number in range(-_WARM_ROUNDS, count):
            model = models[number % len(models)]
            mine, other = (ours, theirs) if number >= 0 else warming
            sides = [(self._ours, mine), (self._theirs, other)]
            if number % 2:
                sides.reverse()
            answers = [side(model, times) for side, times in sides]
            self.compared += 1
            self.wrong += not np.abs(answers[0] - answers[1]).max() <= TOLERANCE
            if number >= 0:
                tell(f"{name}: round {number + 1} of {count}")
        return ours, theirs

    def cold(self, models: Sequence[WeightsModel], count: int, tell: Tell) -> dict[str, Any]:
        """Loads models that are only on the disk, in turn with reading the same files."""
        times, reads, sizes = Times(), [], []
        for model in models:
            # Who keeps the machine's disk may have a cache too: the same for all that follow.
            cold_read_s(self._packs[model.name])
        for number in range(count):
            model = models[number % len(models)]
            packs = self._packs[model.name]
            size_bytes = sum(path.stat().st_size for path in packs)
            for loads in (True, False) if number % 2 else (False, True):
                if loads:
                    drop(packs)
                    self._ours(model, times)
                else:
                    reads.append(cold_read_s(packs))
            sizes.append(size_bytes)
            tell(f"cold: round {number + 1} of {count}")
        shares = [resident_share(path) for path in self._packs[models[0].name]]
        if not any(shares):
            raise RuntimeError("what was just read is not in the page cache: it cannot be watched")
        speed = statistics.median(size / read for size, read in zip(sizes, reads, strict=True))
        return {
            "cold_vs_limit": round(over_limit(times.to_first, reads, times.steady), 3),
            "cold_ttfi_ms": _ms(times.to_first),
            "cold_load_ms": _ms(times.load),
            "cold_read_ms": _ms(reads),
            "disk_gb_per_s": round(speed / 1e9, 2),
        }

    def _files(self, model: WeightsModel) -> list[Path]:
        return [*model.folder.glob("*.safetensors"), *self._packs[model.name]]

    def _ours(self, model: WeightsModel, times: Times) -> Any:
        from modelyard_server.runtimes.targets import Place

        spec, place, text = spec_of(model), Place.on("cpu"), [text_input()]
        began = time.perf_counter()
        loaded = self._runtime.load(spec, place=place, stop=lambda: False)
        at_load = time.perf_counter()
        answer = loaded.run(text, {})
        at_first = time.perf_counter()
        times.steady.append(_median_s(partial(loaded.run, text, {})))
        times.load.append(at_load - began)
        times.first.append(at_first - at_load)
        loaded.close()
        del loaded
        self._give_back(())
        (output,) = (out for out in answer if out.name in ("probabilities", "embedding"))
        return np.frombuffer(output.data, np.float32).copy()

    def _theirs(self, model: WeightsModel, times: Times) -> Any:
        import torch

        name = "AutoModelForSequenceClassification" if model.task == CLASSIFY else "AutoModel"
        kind = getattr(self._library, name)
        with torch.inference_mode():
            began = time.perf_counter()
            module = kind.from_pretrained(model.folder, local_files_only=True).eval()
            at_load = time.perf_counter()
            answer = module(**self._tokens)
            at_first = time.perf_counter()
            times.steady.append(_median_s(partial(module, **self._tokens)))
            times.load.append(at_load - began)
            times.first.append(at_first - at_load)
            del module
            # One text without padding: its mean is over all tokens.
            found = (
                answer.last_hidden_state.mean(1)
                if model.task == EMBED
                else answer.logits.softmax(-1)
            )
        self._give_back(())
        return found.numpy().ravel()


def packs_of(store: Any, model: WeightsModel) -> list[Path]:
    """The files of an open store that a model is loaded from."""
    stored = store.take(model.folder)
    return [Path(stored.packs) / header.name for header in stored.checkpoint.files]


def _median_s(run: Callable[[], object]) -> float:
    taken = []
    for _ in range(_STEADY_RUNS):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _milliseconds(name: str, ours: Times, theirs: Times) -> dict[str, float]:
    return {
        f"{name}_ms": _ms(ours.load),
        f"{name}_ttfi_ms": _ms(ours.to_first),
        f"{name}_steady_ms": _ms(ours.steady),
        f"{name}_from_pretrained_ms": _ms(theirs.load),
        f"{name}_from_pretrained_ttfi_ms": _ms(theirs.to_first),
        f"{name}_from_pretrained_steady_ms": _ms(theirs.steady),
    }


def _ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)
