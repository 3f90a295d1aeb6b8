"""What a request asks for, read and checked in itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelyard_server.catalog.model import Model
from modelyard_server.catalog.route import Route
from modelyard_server.runtimes.api import JsonValue
from modelyard_server.runtimes.tensors import TensorValue

__all__ = ["Asked", "AskedRoute"]


@dataclass(slots=True)
class Asked:
    """A request for a model.

    Attributes:
        key: as it came.
        model: what its key means.
        inputs: its tensors.
        parameters: of this run.
    """

    key: str
    model: Model
    inputs: tuple[TensorValue, ...]
    parameters: Mapping[str, JsonValue]


@dataclass(slots=True)
class AskedRoute:
    """A request for what a route leads to.

    Attributes:
        key: as it came.
        route: what its key means.
        inputs: its tensors.
        parameters: of the first model that runs.
        affinity: what choices go by; empty for none.
        version: the version that is meant; empty for the current one.
    """

    key: str
    route: Route
    inputs: tuple[TensorValue, ...]
    parameters: Mapping[str, JsonValue]
    affinity: str
    version: str
