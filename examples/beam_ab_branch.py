"""The A/B pattern of Beam's multi-model pipelines, its two models within one budget of bytes.

    python examples/beam_ab_branch.py MODELS [--texts FILE] [Beam's own options]

MODELS is a folder with the model folders `sentiment` and `language`; `make demo` leaves one in
build/demo/models. Every line of FILE is put to both models.

The pipeline is that of Beam's page; exchanged are its handlers. What each of them names is a model
in the yard of the worker: together they hold no more than BUDGET, whatever the number of threads.
With Beam's own handlers each step would hold its model for itself, and nothing would add them up.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions

from modelyard.integrations.beam import EmbeddedYard, YardModel, YardModelHandler

BUDGET = "200MB"
TEXTS = ("I like it, it is very good.", "Das gefällt mir gar nicht.")


def shown(branch: str, result: Any) -> str:
    """One line for a result."""
    return f"{branch} {result.model_id}: {result.example!r} is {result.inference['label']}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--texts", type=Path)
    given, beam_arguments = parser.parse_known_args(arguments)

    yard = EmbeddedYard(budgets={"cpu": BUDGET})
    MODEL_HANDLER_A = YardModelHandler(
        YardModel(folder=given.models / "sentiment", task="text-classification", name="sentiment"),
        yard,
    )
    MODEL_HANDLER_B = YardModelHandler(
        YardModel(folder=given.models / "language", task="text-classification", name="language"),
        yard,
    )

    pipeline = beam.Pipeline(options=PipelineOptions(beam_arguments))
    with pipeline as p:
        source = beam.io.ReadFromText(str(given.texts)) if given.texts else beam.Create(TEXTS)
        data = p | "Read" >> source
        # Beam wants a label of its own for each of two steps of one kind; the page leaves it out.
        model_a_predictions = data | "A" >> RunInference(MODEL_HANDLER_A)
        model_b_predictions = data | "B" >> RunInference(MODEL_HANDLER_B)

        _ = model_a_predictions | "Show A" >> beam.Map(lambda result: print(shown("A", result)))
        _ = model_b_predictions | "Show B" >> beam.Map(lambda result: print(shown("B", result)))


if __name__ == "__main__":
    main()
