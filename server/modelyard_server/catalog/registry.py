"""Registers models: checks them, prices them, places them, and makes them known."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from modelyard.placements import Placement
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import (
    GivenPlacement,
    Model,
    ModelDraft,
    Registration,
    is_key,
    is_model_id,
)
from modelyard_server.catalog.records import Change, Owner, RequestRecord
from modelyard_server.catalog.run_figures import RunFigures
from modelyard_server.catalog.succession import Heir, Succession
from modelyard_server.catalog.writes import Writes, to_the_end
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placed import PlacedAs
from modelyard_server.devices.placement import effective_placement, expand
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.execution.engine import Engine
from modelyard_server.residency.journal import EventType, Journal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import MAX_BYTES, NEVER_NS, State
from modelyard_server.runtimes.api import ModelFilesError, ModelSpec, OptionError, Price
from modelyard_server.weights.activation_model import ActivationPoint
from modelyard_server.weights.model_files import FolderLike, ModelFolder, check_folder, folder_of

__all__ = ["Checked", "Registry", "Remember"]

logger = logging.getLogger(__name__)

_FIELDS_OF_OPTIONS = {"runtime": "runtime", "task": "task", "folder": "source"}
"""What a runtime calls an option and is a field of the model."""

_FIRST_GUESS_BYTES_PER_S = 1e9
"""Load speed assumed until a load has been measured."""

_MOST_NAMED = 8
"""Routes that a refusal names."""

_IN_MEMORY = frozenset({State.LOADING, State.RESIDENT})

Remember = Callable[[Registration], RequestRecord | None]
"""What is to be remembered of a call, given its answer."""


def _nothing(registration: Registration) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A draft whose own words are right; its files are another question.

    Attributes:
        draft: as it was given.
        given: what a device plan says of its placement.
        spec: what the engine would load, without the options that are about placement.
        placement: in force, after options and plan have been heard.
        warnings: what an operator should know.
    """

    draft: ModelDraft
    given: GivenPlacement | None
    spec: ModelSpec
    placement: Placement | None
    warnings: tuple[str, ...]


class Registry:
    """Registers, changes and removes models.

    What changes the catalog is called inside `Writes.alone`. What it makes durable it shows in the
    same step, whatever becomes of its caller.

    Args:
        catalog: where models are put.
        engine: checks options and prices files.
        residency: manages their memory.
        devices: the server's devices.
        roots: folders below which model folders may lie, by name.
        writes: makes changes durable.
        journal: is told of them.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        engine: Engine,
        residency: Residency,
        devices: Sequence[ManagedDevice],
        roots: Mapping[str, Path],
        writes: Writes,
        journal: Journal,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._residency = residency
        self._devices = tuple(devices)
        self._roots = roots
        self._writes = writes
        self._journal = journal
        self._run_figures = RunFigures()
        self._arriving: Counter[FolderLike] = Counter()

    # --- By the API ---------------------------------------------------------------------------

    async def create(
        self, draft: ModelDraft, *, validate_only: bool = False, remember: Remember = _nothing
    ) -> Registration:
        """Registers a model, and answers with it: a Model, if it was not only to be validated.

        Raises:
            Refusal: INVALID_FIELD (every violation at once), ALREADY_EXISTS, PLACEMENT_INVALID,
                LOAD_FAILED (its files are no model), MODEL_NEVER_FITS, CATALOG_UNAVAILABLE.
        """
        checked = self.check(draft, folder_needed=True)
        self._catalog.check_free(draft.id, draft.keys)
        with self._coming(checked.spec):
            return await self._create(checked, validate_only, remember)

    async def _create(
        self, checked: Checked, validate_only: bool, remember: Remember
    ) -> Registration:
        price = await self.price(checked.spec)
        registration = self.register(checked, price, owner=Owner.API)
        self._check_fits(registration.ways)
        if validate_only:
            return registration

        async def finish() -> Model:
            await self._writes.write(
                Change(
                    put_models=(registration.record(pinned=False),), request=remember(registration)
                )
            )
            model = self.add(registration, checked.spec, price)
            self._journal.publish(EventType.MODEL_CREATED, f"models/{model.id}", cause="operator")
            self._journal.changed(model.id)
            return model

        return await to_the_end(f"create {registration.id}", finish)

    async def update(
        self,
        old: Model,
        draft: ModelDraft,
        *,
        keep_given: bool = True,
        reload: bool = True,
        deadline_ns: int = NEVER_NS,
        validate_only: bool = False,
        remember: Remember = _nothing,
    ) -> Registration:
        """Changes a model to what the draft says, and answers with it.

        If it is in memory, the changed model is loaded beside it, where both fit, before it takes
        over.

        Args:
            old: as it is.
            draft: as it is to be.
            keep_given: a placement that a plan gave it still counts.
            reload: more than its keys is changed, so what is loaded is not it any more.
            deadline_ns: of the residency's clock, for the load.
            validate_only: check everything, change nothing.
            remember: what is to be remembered of the call, given its answer.

        Raises:
            Refusal: CONFIG_OWNED, or as `create`. LOAD_FAILED, DEADLINE_IN_LOAD and others of a
                request: the changed model cannot be loaded; everything is as before.
        """
        self._check_owner(old)
        given = old.given if keep_given else None
        checked = self.check(draft, folder_needed=True, given=given)
        self._catalog.check_free(draft.id, draft.keys, but_for=old)
        with self._coming(checked.spec):
            return await self._update(old, checked, reload, deadline_ns, validate_only, remember)

    async def _update(
        self,
        old: Model,
        checked: Checked,
        reload: bool,
        deadline_ns: int,
        validate_only: bool,
        remember: Remember,
    ) -> Registration:
        given = checked.given
        price = await self.price(checked.spec)
        registration = self.register(
            checked, price, owner=old.owner, created=old.created, origin=old.origin
        )
        self._check_fits(registration.ways)
        if validate_only:
            return registration
        if not reload:
            return await self._rename(old, registration, remember)
        heir = Heir(
            old=old,
            registration=registration,
            spec=checked.spec,
            priced_bytes=price.peak_bytes,
            staged=self._can_be_staged(old, registration),
        )
        with self.succession([heir]) as succession:
            await succession.stage(deadline_ns)
            pinned = self._residency.use(old.handle).pinned

            async def finish() -> Model:
                await self._writes.write(
                    Change(
                        put_models=(registration.record(pinned=pinned),),
                        delete_placements=(old.id,) if given is None else (),
                        request=remember(registration),
                    )
                )
                (model,) = succession.commit()
                self._journal.publish(
                    EventType.MODEL_UPDATED, f"models/{model.id}", cause="operator"
                )
                self._journal.changed(model.id)
                if pinned:
                    self._want(model)
                return model

            return await to_the_end(f"update {old.id}", finish)

    async def _rename(self, old: Model, registration: Registration, remember: Remember) -> Model:
        """Gives a model other keys; what is loaded stays as it is."""
        renamed = replace(registration, ways=old.ways, replan=old.replan)

        async def finish() -> Model:
            pinned = self._residency.use(old.handle).pinned
            await self._writes.write(
                Change(put_models=(renamed.record(pinned=pinned),), request=remember(renamed))
            )
            model = Model.of(renamed, old.handle)
            self._catalog.replace(old, model)
            self._journal.publish(EventType.MODEL_UPDATED, f"models/{model.id}", cause="operator")
            self._journal.changed(model.id)
            return model

        return await to_the_end(f"update {old.id}", finish)

    async def delete(self, model: Model, *, request: RequestRecord | None = None) -> None:
        """Takes a model out; its memory comes back when its requests have ended.

        Raises:
            Refusal: CONFIG_OWNED, MODEL_IN_USE (routes give it keys), CATALOG_UNAVAILABLE.
        """
        self._check_owner(model)
        self._check_not_routed_to(model)

        async def finish() -> None:
            await self._writes.write(Change(delete_models=(model.id,), request=request))
            self._catalog.remove(model)
            self._residency.remove(model.handle)
            self._journal.publish(EventType.MODEL_DELETED, f"models/{model.id}", cause="operator")
            self._journal.removed(model.id)

        await to_the_end(f"delete {model.id}", finish)

    async def set_pinned(self, model: Model, pinned: bool) -> None:
        """Pins a model, which loads it, or lets it go. Durable.

        Raises:
            Refusal: it is to be pinned and cannot be loaded; CATALOG_UNAVAILABLE.
        """
        if pinned:
            # The wish first: if it is refused, the model is not pinned either.
            self._residency.want(model.handle)
        if self._residency.use(model.handle).pinned == pinned:
            return

        async def finish() -> None:
            await self._writes.write(Change(put_models=(model.record(pinned=pinned),)))
            self._residency.set_pinned(model.handle, pinned)
            if pinned:
                # It may have been evicted while the pin was written.
                self._want(model)

        await to_the_end(f"pin {model.id}", finish)

    # --- Steps that device plans and the start share ----------------------------------------------

    def check(
        self, draft: ModelDraft, *, folder_needed: bool, given: GivenPlacement | None = None
    ) -> Checked:
        """Checks what can be checked of a draft without its files.

        Args:
            draft: what to check.
            folder_needed: its folder must be there.
            given: what a device plan says of its placement.

        Raises:
            Refusal: INVALID_FIELD, with every violation at once.
        """
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
        placement, options = draft.placement, dict(draft.options)
        warnings: tuple[str, ...] = ()
        try:
            placement, options, warnings = effective_placement(
                draft.placement if given is None else given.placement, draft.options
            )
        except Refusal as refusal:
            if refusal.reason is not Reason.INVALID_FIELD:
                raise
            violations += refusal.violations
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
            options=options,
        )
        if folder is not None and folder_needed:
            try:
                check_folder(folder_of(spec))
            except ModelFilesError as error:
                violations.append(Violation("model.source", error.text))
        try:
            self._engine.check(spec)
        except OptionError as error:
            field = f"model.{_FIELDS_OF_OPTIONS.get(error.option, f'options.{error.option}')}"
            # A source that is wrong is not missing.
            if field != "model.source" or all(v.field != field for v in violations):
                violations.append(Violation(field, error.text))
        if violations:
            text = "; ".join(f"{v.field}: {v.description}" for v in violations)
            raise Refusal(Reason.INVALID_FIELD, text, violations=tuple(violations))
        return Checked(
            draft=draft, given=given, spec=spec, placement=placement, warnings=tuple(warnings)
        )

    async def price(self, spec: ModelSpec) -> Price:
        """Prices a model's files.

        Raises:
            Refusal: LOAD_FAILED. They are no model of its runtime, or larger than the core can
                count.
        """
        try:
            price = await self._engine.price(spec)
        except ModelFilesError as error:
            raise Refusal(
                Reason.LOAD_FAILED,
                error.text,
                metadata={"stage": "price"},
                transient=error.transient,
                retry_after_s=1.0 if error.transient else None,
            ) from None
        return price

    def register(
        self,
        checked: Checked,
        price: Price | None,
        *,
        owner: Owner,
        created: datetime | None = None,
        etag: str | None = None,
        origin: str = "",
        budgets: Sequence[int] | None = None,
    ) -> Registration:
        """Works out how a model may be loaded.

        Args:
            checked: the model.
            price: of its files; None if they are broken now.
            owner: of its record.
            created: when it was registered; None for now.
            etag: None for a new one.
            origin: for models of the configuration file, a digest of what the file said.
            budgets: by position; None for those in force.

        Raises:
            Refusal: PLACEMENT_INVALID, or MODEL_NEVER_FITS for an automatic cut.
        """

        def replan(new: Price) -> tuple[PlacedAs, ...]:
            return expand(
                checked.placement, price=new, devices=self._devices, budgets=self.budgets()
            )

        ways = expand(
            checked.placement,
            price=price,
            devices=self._devices,
            budgets=self.budgets() if budgets is None else budgets,
        )
        self._check_countable(ways)
        return Registration(
            draft=checked.draft,
            owner=owner,
            given=checked.given,
            ways=ways,
            replan=replan,
            warnings=checked.warnings,
            runs=self._run_figures.of(price),
            input_names=() if price is None else price.input_names,
            created=created or datetime.now(UTC),
            etag=etag or f'"{secrets.token_hex(8)}"',
            origin=origin,
        )

    def check_free(self, registration: Registration) -> None:
        """Raises Refusal ALREADY_EXISTS if its id or a key is taken."""
        self._catalog.check_free(registration.id, registration.draft.keys)

    def add(self, registration: Registration, spec: ModelSpec, price: Price | None) -> Model:
        """Makes a registered model known."""
        needed = registration.estimated_bytes
        model = Model.of(
            registration,
            self._residency.add(
                spec,
                ways=registration.ways,
                replan=registration.replan,
                priced_bytes=0 if price is None else price.peak_bytes,
                reload_s=0.05 + needed / _FIRST_GUESS_BYTES_PER_S,
            ),
        )
        self._catalog.add(model)
        return model

    def succession(self, heirs: Sequence[Heir]) -> Succession:
        """Heirs that are to take over from registered models."""
        return Succession(heirs, catalog=self._catalog, residency=self._residency)

    def note_runs(self, core_id: int, points: Sequence[ActivationPoint]) -> None:
        """Corrects what is said of a model's runs, and of all whose runs take the same.

        Args:
            core_id: the yard's id for the model; nothing happens if it is not known any more.
            points: what runs of it took.
        """
        for model in self._catalog.models():
            if model.handle.core_id == core_id:
                model.runs.observe(points)

    def folders(self) -> list[FolderLike]:
        """The folders of all models, those included that are just being registered."""
        folders: list[FolderLike] = list(self._arriving)
        for model in self._catalog.models():
            draft = model.draft
            if draft.root in self._roots and draft.folder:
                parts = tuple(draft.folder.split("/"))
                folders.append(ModelFolder(root=self._roots[draft.root], parts=parts))
        return folders

    @contextmanager
    def _coming(self, spec: ModelSpec) -> Iterator[None]:
        """Counts a model's folder among those in use, from before its files are read."""
        folders = [] if spec.folder is None else [folder_of(spec)]
        self._arriving.update(folders)
        self._catalog.note_models()
        try:
            yield
        finally:
            self._arriving -= Counter(folders)
            self._catalog.note_models()

    def budgets(self) -> tuple[int, ...]:
        """The budgets in force, by position."""
        return tuple(self._residency.device_use(i).budget for i in range(len(self._devices)))

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

    def _check_owner(self, model: Model) -> None:
        if model.owner is Owner.CONFIG:
            raise Refusal(
                Reason.CONFIG_OWNED,
                f"model {model.id!r} belongs to the configuration file: change it there; pins and "
                "device plans apply to it as well",
                resource=Resource("model", f"models/{model.id}"),
            )

    def _check_not_routed_to(self, model: Model) -> None:
        if routes := self._catalog.routes_to(model.id):
            names = [f"routes/{route.id}" for route in routes]
            shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if names[_MOST_NAMED:] else "")
            raise Refusal(
                Reason.MODEL_IN_USE,
                f"{shown} lead to model {model.id!r}: delete those or point them elsewhere first",
                metadata={"routes": shown},
                resource=Resource("model", f"models/{model.id}"),
            )

    def _can_be_staged(self, old: Model, registration: Registration) -> bool:
        """True if the changed model can be loaded while the old one stays, and should be."""
        use = self._residency.use(old.handle)
        if use.state not in _IN_MEMORY:
            return False
        rehearsal = self._residency.rehearse()
        rehearsal.settle()
        rehearsal.set_pinned(old.handle.core_id, True)
        heir = rehearsal.add(registration.ways)
        return rehearsal.want(heir)

    def _want(self, model: Model) -> None:
        try:
            self._residency.want(model.handle)
        except Refusal as refusal:
            logger.error("%s is pinned and cannot be loaded: %s", model.id, refusal)

    def _check_countable(self, ways: Sequence[PlacedAs]) -> None:
        for way in ways:
            for device, needed in way.charges.items():
                if needed > MAX_BYTES:
                    raise self._never_fits(device, needed, self.budgets()[device], ())

    def _check_fits(self, ways: Sequence[PlacedAs]) -> None:
        """Raises Refusal MODEL_NEVER_FITS if a model is too large in each of its ways."""
        budgets = self.budgets()
        if any(
            all(needed <= budgets[device] for device, needed in way.charges.items()) for way in ways
        ):
            return
        short = [
            (needed - budgets[device], device, needed)
            for way in ways
            for device, needed in way.charges.items()
            if needed > budgets[device]
        ]
        _, device, needed = min(short)
        raise self._never_fits(
            device,
            needed,
            budgets[device],
            tuple(
                Violation(self._devices[i].name, f"needs {n} bytes, budget {budgets[i]} bytes")
                for _, i, n in short
            ),
        )

    def _never_fits(
        self, device: int, needed: int, budget: int, violations: tuple[Violation, ...]
    ) -> Refusal:
        name = self._devices[device].name
        text = f"the model needs {needed} bytes on {name}, whose budget is {budget} bytes"
        return Refusal(
            Reason.MODEL_NEVER_FITS,
            text,
            metadata={"device": name, "needed_bytes": str(needed), "budget_bytes": str(budget)},
            violations=violations or (Violation(name, text),),
        )
