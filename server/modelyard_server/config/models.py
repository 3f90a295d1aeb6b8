"""Models and the keys that mean them: ``[models.ID]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, cast

from modelyard.placements import Placement
from modelyard_server.config import placement, rules
from modelyard_server.config.problems import quoted
from modelyard_server.config.rules import Finding
from modelyard_server.config.sections import check, ruled

__all__ = ["TASKS", "ModelConfig"]

TASKS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "transformers": (
            "feature-extraction",
            "text-classification",
            "fill-mask",
            "text-generation",
            "image-classification",
        ),
        "torch": (),
        "identity": (),
    }
)
"""The runtimes and the tasks of each. A runtime without tasks does one thing."""

_WEIGHTLESS: Final = frozenset({"identity"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model and the keys that mean it: ``[models.ID]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    id: str = field(metadata=ruled(rules.identifier))
    """Its id, which is the name of its table."""
    runtime: str = field(metadata=ruled(rules.one_of(*TASKS)))
    """What executes it."""
    keys: tuple[str, ...] = field(default=(), metadata=ruled(rules.keys))
    """Keys that mean it, besides its id, which always does."""
    task: str = field(default="", metadata=ruled(rules.word))
    """What the runtime does with it; empty for runtimes that do one thing."""
    root: str | None = field(default=None, metadata=ruled(rules.identifier))
    """Name of the root below which its weights are; None for runtimes without weights."""
    folder: str | None = field(default=None, metadata=ruled(rules.folder))
    """Folder below the root, ``/``-separated; None for runtimes without weights."""
    device: Placement | None = field(default=None, metadata=ruled(placement.placement))
    """Where it lives; None lets the server choose at each load."""
    pinned: bool = field(default=False, metadata=ruled(rules.boolean))
    """Whether it is loaded at the start and never evicted."""
    options: Mapping[str, object] = field(
        default_factory=lambda: MappingProxyType({}), hash=False, metadata=ruled(rules.options)
    )
    """What the runtime is told; it judges them. Read-only throughout: arrays are tuples."""

    def __post_init__(self) -> None:
        check(self)

    def plain_options(self) -> dict[str, Any]:
        """Return a copy of the options in dicts and lists, as a runtime's own checks want it."""
        return cast("dict[str, Any]", _plain(self.options))

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        runtime = given.get("runtime")
        if runtime is None:
            return
        if "task" in given:
            yield from _task_conflicts(runtime, given["task"])
        for name, what in (("root", "one of [roots]"), ("folder", "a folder below the root")):
            if name not in given:
                continue
            if runtime in _WEIGHTLESS and given[name] is not None:
                yield (name,), f"must be left out: the {runtime} runtime has no weights"
            elif runtime not in _WEIGHTLESS and given[name] is None:
                yield (name,), f"is missing: the {runtime} runtime reads weights, name {what}"


def _task_conflicts(runtime: str, task: str) -> Iterator[Finding]:
    tasks = TASKS[runtime]
    if task and not tasks:
        yield ("task",), f"must be left out: the {runtime} runtime does one thing"
    elif tasks and not task:
        yield ("task",), f"is missing: the {runtime} runtime does {', '.join(tasks)}"
    elif task and task not in tasks:
        yield (
            ("task",),
            f"the {runtime} runtime does not do {quoted(task)}: use one of {', '.join(tasks)}",
        )


def _plain(value: object) -> object:
    match value:
        case Mapping():
            return {key: _plain(element) for key, element in value.items()}
        case tuple():
            return [_plain(element) for element in value]
        case _:
            return value
