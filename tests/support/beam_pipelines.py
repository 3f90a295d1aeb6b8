"""Beam in tests: pipelines of its own runner in this process, with a temporary folder each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.ml.inference.base import RunInference

__all__ = ["COLLECTED", "collect", "metrics_of", "own_temporary_folder", "run_pipeline"]


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """What Beam leaves in the folder for temporary files is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


COLLECTED: list[Any] = []
"""What `collect` was given since the last pipeline began."""


def collect(element: Any) -> Any:
    """A step that notes what it gets. By its name, since Beam copies what has none."""
    COLLECTED.append(element)
    return element


def run_pipeline(
    elements: list[Any], handler: Any, *, then: Callable[[Any], Any] | None = None, **settings: Any
) -> tuple[list[Any], Any]:
    """Runs `Create | RunInference` to its end.

    Args:
        elements: of the pipeline.
        handler: of RunInference.
        then: what goes behind it, from and to a collection.
        settings: of RunInference.

    Returns:
        What came out, in the order in which it did, and the result of the run.
    """
    COLLECTED.clear()
    with own_temporary_folder():
        pipeline = beam.Pipeline(runner="FnApiRunner")
        out = pipeline | beam.Create(elements, reshuffle=False) | RunInference(handler, **settings)
        _ = (out if then is None else then(out)) | "collect" >> beam.Map(collect)
        result = pipeline.run()
        result.wait_until_finish()
    return list(COLLECTED), result


def metrics_of(result: Any) -> dict[str, int]:
    """The counters of a run: namespace/name and value."""
    return {
        f"{found.key.metric.namespace}/{found.key.metric.name}": found.result
        for found in result.metrics().query()["counters"]
    }
