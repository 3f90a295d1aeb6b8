"""Registers models: checks them, prices them, places them, and makes them known."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, ModelDraft, Registration, is_key, is_model_id
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placement import resolve_placement
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.execution.engine import Engine
from modelyard_server.residency.shell import Residency
from modelyard_server.runtimes.api import ModelFilesError, ModelSpec, OptionError
from modelyard_server.weights.model_files import check_folder, folder_of

__all__ = ["Registry"]

logger = logging.getLogger(__name__)

_MOST_BYTES = 2**46 - 1
"""The largest price the yard can hold, which is also the largest budget: 64 TiB."""

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

    async def create(self, draft: ModelDraft, *, validate_only: bool = False) -> Registration:
        """Registers a model, and answers with it: a Model, if it was not only to be validated.

        Raises:
            Refusal: INVALID_FIELD (every violation at once), ALREADY_EXISTS, PLACEMENT_INVALID,
                LOAD_FAILED (its files are no model), MODEL_NEVER_FITS.
        """
        spec, placements = self._checked(draft, folder_needed=True)
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
        registration = _registration(draft, needed)
        return registration if validate_only else self._add(registration, spec, placements)

    async def adopt(self, draft: ModelDraft) -> Model:
        """Registers a model of the configuration file, even if its files are broken now.

        A broken model breaks only itself: the server starts, and this model's requests are refused
        with LOAD_FAILED until its files are whole.

        Raises:
            Refusal: INVALID_FIELD, ALREADY_EXISTS or PLACEMENT_INVALID: the file itself is wrong;
                MODEL_NEVER_FITS: the model is larger than any budget can be.
        """
        spec, placements = self._checked(draft, folder_needed=False)
        try:
            needed = (await self._engine.price(spec)).peak_bytes
        except ModelFilesError as error:
            logger.warning("model %s cannot be loaded as it is: %s", draft.id, error.text)
            needed = 0  # Priced again before every load.
        if needed > _MOST_BYTES:
            self._check_fits(needed, placements)
        return self._add(_registration(draft, needed), spec, placements)

    def delete(self, model: Model) -> None:
        """Takes a model out; its memory comes back when its requests have ended."""
        self._catalog.remove(model)
        self._residency.remove(model.handle)

    def _checked(
        self, draft: ModelDraft, *, folder_needed: bool
    ) -> tuple[ModelSpec, tuple[int, ...]]:
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
        root = folder = None
        try:
            root, folder = self._source(draft)
        except ValueError as error:
            violations.append(Violation("model.source", str(error)))
        spec = ModelSpec(
            name=draft.id,
            runtime=draft.runtime,
            task=draft.task,
            folder=folder,
            root=root,
            options=draft.options,
        )
        if folder is not None and folder_needed:
            try:
                check_folder(folder_of(spec))
            except ModelFilesError as error:
                violations.append(Violation("model.source", error.text))
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

    def _source(self, draft: ModelDraft) -> tuple[Path, Path] | tuple[None, None]:
        """The model's root and its folder, by name; whether it is there is another question."""
        if not draft.root and not draft.folder:
            return None, None
        if draft.root not in self._roots:
            names = ", ".join(sorted(self._roots)) or "none"
            raise ValueError(f"there is no root {draft.root[:64]!r}; there are: {names}")
        parts = draft.folder.split("/")
        if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
            raise ValueError("the folder must be a relative path below its root")
        root = self._roots[draft.root]
        return root, root.joinpath(*parts)

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
        self, registration: Registration, spec: ModelSpec, placements: tuple[int, ...]
    ) -> Model:
        needed = registration.estimated_bytes
        model = Model(
            draft=registration.draft,
            estimated_bytes=needed,
            created=registration.created,
            etag=registration.etag,
            handle=self._residency.add(
                spec,
                placements=placements,
                needed_bytes=needed,
                reload_s=0.05 + needed / _FIRST_GUESS_BYTES_PER_S,
            ),
        )
        self._catalog.add(model)
        return model


def _registration(draft: ModelDraft, needed: int) -> Registration:
    return Registration(
        draft=draft,
        estimated_bytes=needed,
        created=datetime.now(UTC),
        etag=f'"{secrets.token_hex(8)}"',
    )
