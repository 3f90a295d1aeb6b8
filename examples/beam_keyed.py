"""Models mapped to keys, as on Beam's page of multi-model pipelines, within a budget of bytes.

    python examples/beam_keyed.py [FOLDER] [Beam's own options]

Makes four small models in FOLDER (a temporary one by default) and runs the two keyed pipelines of
the page: one of two models, and one of four of which two fit into memory at a time. Exchanged are
the handlers, and with them what bounds memory: the page's `max_models_per_worker_hint=2` is room
for the two largest models, in bytes and for all threads of the worker together.

No GroupByKey is needed before inference: the yard groups what a batch asks for by model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import torch
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from safetensors.torch import save_file

from modelyard.integrations.beam import (
    KeyedModelHandler,
    KeyModelMapping,
    YardModel,
    YardModelHandler,
)


def make_config(folder: Path, number: int) -> YardModel:
    """Make a model that adds three numbers up, and multiplies the sum by its own number."""
    path = folder / f"model-{number}"
    path.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((1, 3), float(number))}, path / "model.safetensors")
    sizes = {"in_features": 3, "out_features": 1, "bias": False}
    return YardModel.torch(path, torch.nn.Linear, sizes, name=f"config-{number}")


def shown(pair: tuple[str, Any]) -> str:
    """One line for a key's result."""
    key, result = pair
    return f"{key} by {result.model_id}: {result.inference.flatten().tolist()}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both pipelines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    given, beam_arguments = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        run(given.folder or Path(temporary), PipelineOptions(beam_arguments))


def run(folder: Path, options: PipelineOptions) -> None:
    """Run both pipelines with models in a folder."""
    CONFIG_1, CONFIG_2, CONFIG_3, CONFIG_4 = (make_config(folder, n) for n in (1, 2, 3, 4))

    keyed_model_handler = KeyedModelHandler(
        [
            KeyModelMapping(["KEY_1"], YardModelHandler(CONFIG_1)),
            KeyModelMapping(["KEY_2", "KEY_3"], YardModelHandler(CONFIG_2)),
        ]
    )
    with beam.Pipeline(options=options) as p:
        data = p | beam.Create(
            [
                ("KEY_1", torch.tensor([[1.0, 2, 3], [4, 5, 6]])),
                ("KEY_2", torch.tensor([[1.0, 2, 3], [4, 5, 6]])),
                ("KEY_3", torch.tensor([[1.0, 2, 3], [4, 5, 6]])),
            ]
        )
        predictions = data | RunInference(keyed_model_handler)
        _ = predictions | "Show" >> beam.Map(lambda pair: print(shown(pair)))

    mhs = [
        KeyModelMapping(["KEY_1"], YardModelHandler(CONFIG_1)),
        KeyModelMapping(["KEY_2", "KEY_3"], YardModelHandler(CONFIG_2)),
        KeyModelMapping(["KEY_4"], YardModelHandler(CONFIG_3)),
        # As the page has it. Beam refuses the repeat; here it counts once, and a warning says so.
        KeyModelMapping(["KEY_5", "KEY_5", "KEY_6"], YardModelHandler(CONFIG_4)),
    ]
    keyed_model_handler = KeyedModelHandler(mhs, max_models_per_worker_hint=2)
    with beam.Pipeline(options=options) as p:
        _ = (
            p
            | beam.Create([(f"KEY_{n % 6 + 1}", torch.ones(3)) for n in range(12)])
            | RunInference(keyed_model_handler)
            | "Show" >> beam.Map(lambda pair: print(shown(pair)))
        )


if __name__ == "__main__":
    main()
