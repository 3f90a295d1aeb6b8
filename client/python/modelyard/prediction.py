"""What a prediction is: the model's outputs, and how they came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from modelyard.tensors import InputValue, TensorValue

__all__ = ["BatchItem", "Inputs", "Prediction", "Served"]

Inputs: TypeAlias = InputValue | Mapping[str, InputValue]
"""One unnamed input, or inputs by name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchItem:
    """One of the predictions that ``predict_batch`` asks for; arguments as those of ``predict``.

    Args:
        key: what to ask for.
        inputs: one value, or values by input name.
        parameters: parameters of this run.
        affinity: what a route that has a choice goes by.
        version: which version of what the key means.
    """

    key: str
    inputs: Inputs
    parameters: Mapping[str, object] | None = None
    affinity: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What served a request, and what the request waited for.

    Of a request that ran several models this is of all together, and ``steps`` has each.

    Args:
        model: resource name of the model, ``models/{model}``.
        device: resource name of the device that ran it, ``devices/{device}``; for a model on
            several devices, the one its inputs went to.
        cold: True if the model was not resident and the request waited for its load.
        wait_s: seconds from arrival until the model was there.
        load_s: the part of ``wait_s`` during which it was being loaded; None for a hit.
        run_s: seconds from then to the answer.
        route: resource name of the route that led there; empty if the key is a model's own.
        branch: the parts of routes that led there, for instance ``treatment``; empty if there was
            no choice.
        version: the version that was chosen; empty if there was none to choose.
        steps: every model that ran for this answer, in the order they ended; empty if it was one.
    """

    model: str
    device: str
    cold: bool
    wait_s: float
    load_s: float | None
    run_s: float
    route: str = ""
    branch: str = ""
    version: str = ""
    steps: tuple[Served, ...] = ()


class Prediction(Mapping[str, TensorValue]):
    """The outputs of a model by name, in the model's own order. Read-only.

    Two predictions are equal only if they are the same one: arrays have no single answer to "are
    they equal".

    Args:
        outputs: the outputs; copied.
        served: how they came about.
    """

    __slots__ = ("_outputs", "_served")

    def __init__(self, outputs: Mapping[str, TensorValue], served: Served) -> None:
        self._outputs = dict(outputs)
        self._served = served

    @property
    def served(self) -> Served:
        """What served the request, and what it waited for."""
        return self._served

    @property
    def only(self) -> TensorValue:
        """The output of a model that has exactly one.

        Raises:
            ValueError: it has none or several; the text names them.
        """
        if len(self._outputs) != 1:
            raise ValueError(f"the model has {len(self._outputs)} outputs: {self._names()}")
        return next(iter(self._outputs.values()))

    def __getitem__(self, name: str) -> TensorValue:
        """Return one output. Raises ``KeyError``, which names those there are."""
        try:
            return self._outputs[name]
        except KeyError:
            raise KeyError(f"no output {name!r}; there are: {self._names()}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def __contains__(self, name: object) -> bool:
        return name in self._outputs

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<Prediction of {self._served.model!r}: {self._names()}>"

    def _names(self) -> str:
        return ", ".join(map(repr, self._outputs)) or "none"
