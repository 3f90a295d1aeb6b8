"""Registers models: checks them, prices them, places them, and makes them known."""

from __future__ import annotations

import hashlib
import logging
import stat
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, ModelDraft, is_key, is_model_id
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placement import resolve_placement
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.execution.engine import Engine
from modelyard_server.residency.shell import Residency
from modelyard_server.runtimes.api import ModelFilesError, ModelSpec, OptionError

__all__ = ["Registry"]

logger = logging.getLogger(__name__)

_FIRST_GUESS_BYTES_PER_S = 1e9
"""Load speed assumed until a load has been measured."""


class Registry:
    """Registers and removes models.

    Args:
        catalog: where they are put.
        engine: checks options and prices files.
        residency: manages their memory.
        devices: the server's devices.
        roots: folders below which model folders may lie, by name.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        engine: Engine,
        residency: Residency,
        devices: Sequence[ManagedDevice],
        roots: Mapping[str, Path],
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._residency = residency
        self._devices = tuple(devices)
        self._roots = roots

    async def create(self, draft: ModelDraft, *, validate_only: bool = False) -> Model | None:
        """Registers a model. None if it was only to be validated.

        Raises:
            Refusal: INVALID_FIELD (every violation at once), ALREADY_EXISTS, PLACEMENT_INVALID,
                LOAD_FAILED (its files are no model), MODEL_NEVER_FITS.
        """
        spec, placements = self._checked(draft)
        try:
            needed = (await self._engine.price(spec)).peak_bytes
        except ModelFilesError as error:
            raise Refusal(
                Reason.LOAD_FAILED,
                error.text,
                metadata={"stage": "price"},
                transient=error.transient,
                retry_after_s=1.0 if error.transient else None,
            ) from None
        self._check_fits(needed, placements)
        # Pricing let others run: somebody may have taken the name meanwhile.
        self._catalog.check_free(draft.id, draft.keys)
        return None if validate_only else self._add(draft, spec, placements, needed)

    async def adopt(self, draft: ModelDraft) -> Model:
        """Registers a model of the configuration file, even if its files are broken now.

        A broken model breaks only itself: the server starts, and this model's requests are refused
        with LOAD_FAILED until its files are whole.

        Raises:
            Refusal: INVALID_FIELD, ALREADY_EXISTS or PLACEMENT_INVALID: the file itself is wrong.
        """
        spec, placements = self._checked(draft)
        try:
            needed = (await self._engine.price(spec)).peak_bytes
        except ModelFilesError as error:
            logger.warning("model %s cannot be loaded as it is: %s", draft.id, error.text)
            needed = 0  # Priced again before every load.
        return self._add(draft, spec, placements, needed)

    def delete(self, model: Model) -> None:
        """Takes a model out; its memory comes back when its requests have ended."""
        self._catalog.remove(model)
        self._residency.remove(model.handle)

    def _checked(self, draft: ModelDraft) -> tuple[ModelSpec, tuple[int, ...]]:
        violations: list[Violation] = []
        if not is_model_id(draft.id):
            violations.append(
                Violation("model_id", "must match [a-z0-9][a-z0-9._-]{0,127} and hold no '..'")
            )
        for i, key in enumerate(draft.keys):
            if not is_key(key):
                violations.append(
                    Violation(
                        f"model.keys[{i}]",
                        "must match [A-Za-z0-9][A-Za-z0-9._:/-]{0,255} and hold no '..'",
                    )
                )
        if len(set(draft.keys)) != len(draft.keys):
            violations.append(Violation("model.keys", "a key is given twice"))
        folder = None
        try:
            folder = self._folder(draft)
        except ValueError as error:
            violations.append(Violation("model.source", str(error)))
        spec = ModelSpec(
            name=draft.id,
            runtime=draft.runtime,
            task=draft.task,
            folder=folder,
            options=draft.options,
        )
        try:
            self._engine.check(spec)
        except OptionError as error:
            at = error.option if error.option in ("runtime", "task") else f"options.{error.option}"
            violations.append(Violation(f"model.{at}", error.text))
        if violations:
            text = "; ".join(f"{v.field}: {v.description}" for v in violations)
            raise Refusal(Reason.INVALID_FIELD, text, violations=tuple(violations))
        self._catalog.check_free(draft.id, draft.keys)
        return spec, resolve_placement(draft.placement, self._devices)

    def _folder(self, draft: ModelDraft) -> Path | None:
        """The model's folder, below its root and reached through no symbolic link."""
        if not draft.root and not draft.folder:
            return None
        if draft.root not in self._roots:
            names = ", ".join(sorted(self._roots)) or "none"
            raise ValueError(f"there is no root {draft.root[:64]!r}; there are: {names}")
        parts = draft.folder.split("/")
        if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
            raise ValueError("the folder must be a relative path below its root")
        path = self._roots[draft.root]
        for part in parts:
            path = path / part
            try:
                mode = path.lstat().st_mode
            except OSError:
                raise ValueError("there is no such folder below its root") from None
            if stat.S_ISLNK(mode):
                raise ValueError("the folder is reached through a symbolic link")
            if not stat.S_ISDIR(mode):
                raise ValueError("it is not a folder")
        return path

    def _check_fits(self, needed: int, placements: Sequence[int]) -> None:
        budgets = {i: self._residency.device_use(i).budget for i in placements}
        if any(needed <= budget for budget in budgets.values()):
            return
        largest = max(budgets, key=lambda i: budgets[i])
        name = self._devices[largest].name
        text = f"the model needs {needed} bytes on {name}, whose budget is {budgets[largest]} bytes"
        raise Refusal(
            Reason.MODEL_NEVER_FITS,
            text,
            metadata={
                "device": name,
                "needed_bytes": str(needed),
                "budget_bytes": str(budgets[largest]),
            },
            violations=tuple(
                Violation(self._devices[i].name, f"needs {needed} bytes, budget {budget} bytes")
                for i, budget in budgets.items()
            ),
        )

    def _add(
        self, draft: ModelDraft, spec: ModelSpec, placements: tuple[int, ...], needed: int
    ) -> Model:
        handle = self._residency.add(
            spec,
            placements=placements,
            needed_bytes=needed,
            reload_s=0.05 + needed / _FIRST_GUESS_BYTES_PER_S,
        )
        created = datetime.now(UTC)
        seed = f"{draft.id}\0{created.isoformat()}\0{handle.core_id}"
        model = Model(
            draft=draft,
            handle=handle,
            estimated_bytes=needed,
            created=created,
            etag=f'"{hashlib.sha256(seed.encode()).hexdigest()[:16]}"',
        )
        self._catalog.add(model)
        return model
