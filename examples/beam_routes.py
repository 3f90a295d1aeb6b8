"""A/B branches and sequences as keys of a server's routes: one step of a pipeline for each.

    python examples/beam_routes.py TARGET [Beam's own options]

TARGET is a modelyard server with the models `sentiment`, `language` and `storyteller`, as `make
demo` runs one. Two routes are made on it: `opinion` sends each user's texts to one of two models,
always to the same one, and `judged-story` lets one model go on with a text and another one judge
what came of it. A pipeline asks for the keys, and `model_id` says which branch it was. What keys
mean is changed on the server, while pipelines run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions

from modelyard import Admin, AlreadyExists
from modelyard.integrations.beam import KeyedServerModelHandler
from modelyard.route_targets import Branch, RouteTarget, SequenceStep, SequenceTarget, SplitTarget

OPINION = SplitTarget(
    branches=[
        Branch(name="control", target="sentiment", weight=50),
        Branch(name="treatment", target="language", weight=50),
    ]
)
JUDGED_STORY = SequenceTarget(
    steps=[
        SequenceStep(target="storyteller"),
        SequenceStep(target="sentiment", rename={"text": "text"}),
    ]
)


def make_route(admin: Admin, key: str, target: RouteTarget) -> None:
    """Give a key a meaning, unless it has one."""
    try:
        admin.create_route(f"{key}-route", [key], target=target)
    except AlreadyExists:
        print(f"{key} is there already")


def user_of(element: tuple[str, dict[str, str]]) -> str:
    """What a choice goes by: who has said it."""
    _, said = element
    return said["user"]


def text_of(said: dict[str, str]) -> str:
    """What the models are asked."""
    return said["text"]


def shown(pair: tuple[str, Any]) -> str:
    """One line for a key's result."""
    key, result = pair
    return f"{key} of {result.example['user']} by {result.model_id}: {result.inference['label']}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the routes and run the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    given, beam_arguments = parser.parse_known_args(arguments)
    with Admin(given.target) as admin:
        make_route(admin, "opinion", OPINION)
        make_route(admin, "judged-story", JUDGED_STORY)

    handler = KeyedServerModelHandler(given.target, encoder=text_of, affinity=user_of)
    texts = ("I like it, it is very good.", "Das gefällt mir gar nicht.")
    said = [{"user": f"user-{n}", "text": text} for n in range(4) for text in texts]
    with beam.Pipeline(options=PipelineOptions(beam_arguments)) as p:
        _ = (
            p
            | beam.Create([(key, one) for key in ("opinion", "judged-story") for one in said])
            | RunInference(handler)
            | beam.Map(lambda pair: print(shown(pair)))
        )


if __name__ == "__main__":
    main()
