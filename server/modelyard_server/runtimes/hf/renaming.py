"""Which tensor of a file becomes which parameter, where the library renames or computes them.

Weights saved by an earlier version of the library go by other names; some models compute parameters
from several tensors of the file. The library says so in a list of steps for each model. We follow
them by name alone, so that a tensor that is only renamed can stay on the disk where it lies. That
it is really used from there is checked when the model is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

__all__ = ["Renaming"]


class Renaming:
    """The steps of one architecture.

    Thread-safe. It remembers the last answer: models of one architecture have the same names.

    Attributes:
        computes: some parameters may be computed from several tensors or changed ones.
    """

    def __init__(self, model: Any) -> None:
        steps = get_model_conversion_mapping(model)
        self._renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self._converters = [step for step in steps if isinstance(step, WeightConverter)]
        self._prefix: str = model.base_model_prefix
        # The library asks for names and whether there is a value, never for the value.
        self._names = dict.fromkeys(model.state_dict(), True)
        self._last: tuple[frozenset[str], Mapping[str, str]] | None = None
        self.computes = bool(self._converters)

    def sources(self, filed: frozenset[str]) -> Mapping[str, str]:
        """Returns, by name in the model, the name in the file of each tensor that is only renamed.

        Args:
            filed: names of the file's tensors.
        """
        last = self._last
        if last is None or last[0] != filed:
            last = filed, self._find(filed)
            self._last = last
        return last[1]

    def _find(self, filed: frozenset[str]) -> Mapping[str, str]:
        # A step remembers what it has met: each run takes fresh ones.
        renamings, converters = copy.deepcopy((self._renamings, self._converters))
        found: dict[str, list[str | None]] = {}
        for name in sorted(filed, key=dot_natural_key):
            own, pattern = rename_source_key(name, renamings, converters, self._prefix, self._names)
            if own not in self._names and name in self._names:
                own, pattern = rename_source_key(name, [], [], self._prefix, self._names)
            if own in self._names:
                found.setdefault(own, []).append(name if pattern is None else None)
        return {
            own: name
            for own, names in found.items()
            for name in names
            if len(names) == 1 and name is not None
        }
