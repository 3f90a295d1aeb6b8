"""The sequence pattern of Beam's multi-model pipelines, its two models within one budget of bytes.

    python examples/beam_sequence.py MODELS [Beam's own options]

MODELS is a folder with the model folders `storyteller` and `sentiment`; `make demo` leaves one in
build/demo/models. One model goes on with each of some beginnings, and another one says what it
thinks of that.

The pipeline is that of Beam's page; exchanged are its handlers. See examples/beam_ab_branch.py.
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
BEGINNINGS = ("The waiter", "The hotel", "the dog")


def some_post_processing(result: Any) -> str:
    """What the second model is asked of the first one's result: its text."""
    text: str = result.inference["text"]
    return text


def shown(result: Any) -> str:
    """One line for a result."""
    return f"{result.model_id}: {result.example!r} is {result.inference['label']}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    given, beam_arguments = parser.parse_known_args(arguments)

    yard = EmbeddedYard(budgets={"cpu": BUDGET})
    MODEL_HANDLER_A = YardModelHandler(
        YardModel(folder=given.models / "storyteller", task="text-generation", name="storyteller"),
        yard,
    )
    MODEL_HANDLER_B = YardModelHandler(
        YardModel(folder=given.models / "sentiment", task="text-classification", name="sentiment"),
        yard,
    )

    pipeline = beam.Pipeline(options=PipelineOptions(beam_arguments))
    with pipeline as p:
        data = p | "Read" >> beam.Create(BEGINNINGS)
        model_a_predictions = data | "A" >> RunInference(
            MODEL_HANDLER_A, inference_args={"max_new_tokens": 12}
        )
        model_b_predictions = (
            model_a_predictions
            | beam.Map(some_post_processing)
            | "B" >> RunInference(MODEL_HANDLER_B)
        )
        _ = model_b_predictions | "Show" >> beam.Map(lambda result: print(shown(result)))


if __name__ == "__main__":
    main()
