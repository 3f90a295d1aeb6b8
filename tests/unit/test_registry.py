"""Registering models: what is refused, and that a refusal leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.catalog_bench import CatalogBench
from tests.support.fake_engine import turns

from modelyard.devices import ComponentDevice, Device
from modelyard_server.catalog.model import Model, ModelDraft, Registration
from modelyard_server.catalog.records import Change, Owner
from modelyard_server.errors import Code, Reason, Refusal
from modelyard_server.residency.journal import EventType
from modelyard_server.residency.values import NEVER_NS, State
from modelyard_server.runtimes.api import ModelFilesError, OptionError


class Bench(CatalogBench):
    """A registry over a fake engine, with one root and one model folder."""

    def draft(self, model_id: str = "m", **changes: Any) -> ModelDraft:
        return super().draft(model_id, **({"root": "store", "folder": "m"} | changes))

    async def refused_draft(self, draft: ModelDraft, **options: Any) -> Refusal:
        """The refusal of a draft, which must leave nothing behind."""
        before, written = dict(self.catalog.keys), list(self.store.written)
        revision = self.journal.revision
        refusal = await self.refused(self.creating(draft, **options))
        assert dict(self.catalog.keys) == before
        assert self.residency._yard.model_count == len(self.catalog.models())
        assert self.store.written == written
        assert self.journal.revision == revision
        return refusal

    async def creating(self, draft: ModelDraft, **options: Any) -> Registration:
        async with self.writes.alone():
            return await self.registry.create(draft, **options)

    async def deleting(self, model: Model) -> None:
        async with self.writes.alone():
            await self.registry.delete(model)

    async def updating(self, old: Model, draft: ModelDraft, **options: Any) -> Registration:
        async with self.writes.alone():
            return await self.registry.update(old, draft, **options)

    async def pinning(self, model: Model, pinned: bool) -> None:
        async with self.writes.alone():
            await self.registry.set_pinned(model, pinned)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    root = tmp_path / "store"
    (root / "m").mkdir(parents=True)
    made = Bench(root)
    yield made
    await made.end()


async def created(bench: Bench, draft: ModelDraft) -> Model:
    model = await bench.creating(draft)
    assert isinstance(model, Model)
    return model


async def test_a_model_is_registered_cold_priced_and_known_by_its_keys(bench: Bench) -> None:
    model = await created(bench, bench.draft(keys=("a/b",), options={"x": 1}, task="t"))
    assert bench.catalog.get("m") is model
    assert bench.catalog.keys["a/b"] is model
    assert model.estimated_bytes == model.handle.needed_bytes == 100
    assert [dict(way.charges) for way in model.handle.ways] == [{0: 100}, {1: 100}]
    spec = model.handle.spec
    assert (spec.name, spec.folder, spec.task) == ("m", bench.root / "m", "t")
    assert spec.options == {"x": 1}
    assert bench.residency.use(model.handle).state == State.COLD
    assert model.created.tzinfo is not None
    assert model.etag.startswith('"')


async def test_a_model_registered_again_has_another_etag(bench: Bench) -> None:
    first = await created(bench, bench.draft())
    await bench.deleting(first)
    second = await created(bench, bench.draft())
    assert first.etag != second.etag


async def test_validate_only_checks_everything_and_changes_nothing(bench: Bench) -> None:
    checked = await bench.creating(bench.draft(), validate_only=True)
    assert not isinstance(checked, Model)
    assert (checked.id, checked.estimated_bytes) == ("m", 100)
    assert bench.catalog.models() == []
    assert bench.engine.priced == ["m"]
    bench.engine.price_errors["m"] = ModelFilesError("cut short")
    refusal = await bench.refused_draft(bench.draft(), validate_only=True)
    assert refusal.reason is Reason.LOAD_FAILED
    bench.engine.price_errors.clear()
    bench.engine.prices["m"] = 401
    refusal = await bench.refused_draft(bench.draft(), validate_only=True)
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    bench.engine.prices["m"] = 1
    await created(bench, bench.draft())
    refusal = await bench.refused_draft(bench.draft(), validate_only=True)
    assert refusal.reason is Reason.ALREADY_EXISTS


@pytest.mark.parametrize(
    "folder",
    [
        "..",
        "../store/m",
        "m/..",
        "m/../m",
        "./m",
        ".",
        "/",
        "/etc",
        "m//m",
        "m/",
        "/m",
        "",
        "m\0",
        "m\\..",
        "missing",
        "m/missing",
        "file",
        "file/x",
        "x" * 5000,
    ],
)
async def test_a_folder_that_is_no_folder_below_its_root_is_refused(
    bench: Bench, folder: str
) -> None:
    (bench.root / "file").write_text("x")
    refusal = await bench.refused_draft(bench.draft(folder=folder))
    assert refusal.reason is Reason.INVALID_FIELD
    assert [v.field for v in refusal.violations] == ["model.source"]
    assert str(bench.root) not in refusal.text
    assert len(refusal.text) < 200
    assert not bench.engine.priced


async def test_symbolic_links_are_not_followed(bench: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "outside" / "m"
    outside.mkdir(parents=True)
    (bench.root / "link").symlink_to(outside)
    (bench.root / "up").symlink_to(tmp_path / "outside")
    (bench.root / "inside").symlink_to(bench.root / "m")
    (bench.root / "dangling").symlink_to(tmp_path / "nowhere")
    for folder in ("link", "up/m", "inside", "dangling"):
        refusal = await bench.refused_draft(bench.draft(folder=folder))
        assert refusal.reason is Reason.INVALID_FIELD
        assert str(tmp_path) not in refusal.text


async def test_a_root_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real" / "m").mkdir(parents=True)
    (tmp_path / "store").symlink_to(tmp_path / "real")
    bench = Bench(tmp_path / "store")
    await created(bench, bench.draft())


async def test_folders_may_be_nested(bench: Bench) -> None:
    (bench.root / "a" / "b").mkdir(parents=True)
    model = await created(bench, bench.draft(folder="a/b"))
    assert model.handle.spec.folder == bench.root / "a" / "b"


@pytest.mark.parametrize("root", ["", "nowhere", "x" * 1000, "../store"])
async def test_an_unknown_root_is_refused_with_those_there_are(bench: Bench, root: str) -> None:
    refusal = await bench.refused_draft(bench.draft(root=root))
    assert refusal.reason is Reason.INVALID_FIELD
    assert "there are: store" in refusal.text
    assert len(refusal.text) < 200


async def test_a_model_without_files_has_no_folder(bench: Bench) -> None:
    model = await created(bench, bench.draft(root="", folder=""))
    assert model.handle.spec.folder is None


async def test_every_violation_is_told_at_once(bench: Bench) -> None:
    bench.engine.check_error = OptionError("top_k", "must be a number")
    refusal = await bench.refused_draft(
        bench.draft("Bad Id", keys=("ok", "a..b", "ok", ""), folder="..", root="store")
    )
    assert refusal.reason is Reason.INVALID_FIELD
    assert [v.field for v in refusal.violations] == [
        "model_id",
        "model.keys[1]",
        "model.keys[3]",
        "model.keys",
        "model.source",
        "model.options.top_k",
    ]


@pytest.mark.parametrize("option", ["runtime", "task"])
async def test_runtime_and_task_are_fields_of_their_own(bench: Bench, option: str) -> None:
    bench.engine.check_error = OptionError(option, "is unknown")
    refusal = await bench.refused_draft(bench.draft())
    assert [v.field for v in refusal.violations] == [f"model.{option}"]


async def test_a_model_that_fits_no_device_is_refused_with_every_budget(bench: Bench) -> None:
    bench.engine.prices["m"] = 401
    refusal = await bench.refused_draft(bench.draft())
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    assert refusal.metadata == {
        "device": "devices/cuda-1",
        "needed_bytes": "401",
        "budget_bytes": "400",
    }
    assert [v.field for v in refusal.violations] == ["devices/cuda-0", "devices/cuda-1"]


async def test_a_model_must_fit_where_it_is_placed(bench: Bench) -> None:
    bench.engine.prices["m"] = 300
    placement = ComponentDevice.from_single(Device.from_str("cuda:0"))
    refusal = await bench.refused_draft(bench.draft(placement=placement))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    model = await created(bench, bench.draft())
    assert [dict(way.charges) for way in model.handle.ways] == [{0: 300}, {1: 300}]


async def test_a_placement_the_server_has_not_is_refused(bench: Bench) -> None:
    placement = ComponentDevice.from_single(Device.from_str("xpu:0"))
    assert (await bench.refused_draft(bench.draft(placement=placement))).reason is (
        Reason.PLACEMENT_INVALID
    )


@pytest.mark.parametrize(
    ("transient", "code"), [(False, Code.FAILED_PRECONDITION), (True, Code.UNAVAILABLE)]
)
async def test_files_that_are_no_model_are_refused(
    bench: Bench, transient: bool, code: Code
) -> None:
    bench.engine.price_errors["m"] = ModelFilesError("config.json is gone", transient=transient)
    refusal = await bench.refused_draft(bench.draft())
    assert refusal.reason is Reason.LOAD_FAILED
    assert refusal.code is code
    assert refusal.text == "config.json is gone"
    assert (refusal.retry_after_s is not None) == transient


async def test_of_two_that_register_the_same_name_at_once_one_is_refused(bench: Bench) -> None:
    bench.engine.price_gate = asyncio.Event()
    tasks = [asyncio.create_task(bench.creating(bench.draft())) for _ in range(2)]
    await turns()
    bench.engine.price_gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Model, Refusal]
    assert len(bench.catalog.models()) == 1
    assert bench.residency._yard.model_count == 1


async def test_a_registration_that_is_cancelled_leaves_nothing(bench: Bench) -> None:
    bench.engine.price_gate = asyncio.Event()
    task = asyncio.create_task(bench.creating(bench.draft()))
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.catalog.models() == []
    bench.engine.price_gate.set()
    await created(bench, bench.draft())


async def test_a_deleted_model_is_gone_from_catalog_and_yard(bench: Bench) -> None:
    model = await created(bench, bench.draft(keys=("k",)))
    await bench.deleting(model)
    assert not bench.catalog.keys
    assert bench.residency._yard.model_count == 0
    await created(bench, bench.draft(keys=("k",)))


# --- Durable, and only then so --------------------------------------------------------------------


async def test_a_created_model_is_stored_before_it_is_known(bench: Bench) -> None:
    bench.store.gate = asyncio.Event()
    task = asyncio.create_task(bench.creating(bench.draft(keys=("k",))))
    await bench.until(bench.writes._lock.locked)
    await turns()
    assert not bench.catalog.keys
    bench.store.gate.set()
    model = await task
    assert isinstance(model, Model)
    (record,) = bench.store.read().models
    assert record == model.record(pinned=False)
    assert record.owner is Owner.API
    assert [event.type for event in bench.events()] == [EventType.MODEL_CREATED]


async def test_a_full_disk_refuses_every_change_and_nothing_is_changed(bench: Bench) -> None:
    model = await created(bench, bench.draft(keys=("k",)))
    before, stored = bench.journal.revision, bench.store.read()
    bench.store.full = True
    for work in (
        bench.creating(bench.draft("other")),
        bench.updating(model, bench.draft(keys=("l",))),
        bench.deleting(model),
    ):
        refusal = await bench.refused(work)
        assert refusal.reason is Reason.CATALOG_UNAVAILABLE
        assert refusal.retry_after_s is not None
    assert dict(bench.catalog.keys) == {"m": model, "k": model}
    assert bench.residency._yard.model_count == 1
    assert bench.journal.revision == before
    assert bench.store.read() == stored
    # Serving goes on, and so do changes once there is room.
    await bench.load_and_release(model)
    bench.store.full = False
    await bench.run_all(bench.deleting(model))
    assert bench.store.read().models == ()


async def test_a_change_that_has_begun_to_be_written_is_shown_though_its_caller_has_gone(
    bench: Bench,
) -> None:
    bench.store.gate = asyncio.Event()
    task = asyncio.create_task(bench.creating(bench.draft()))
    await bench.until(bench.writes._lock.locked)
    await turns()
    task.cancel()
    await turns()
    bench.store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    # What is stored and what is known are the same.
    assert [record.id for record in bench.store.read().models] == ["m"]
    assert list(bench.catalog.keys) == ["m"]


# --- Changing -------------------------------------------------------------------------------------


async def test_an_updated_cold_model_stays_cold_and_keeps_its_birthday(bench: Bench) -> None:
    old = await created(bench, bench.draft(keys=("a", "b")))
    new = await bench.updating(old, bench.draft(keys=("b", "c"), options={"x": 1}))
    assert isinstance(new, Model)
    assert dict(bench.catalog.keys) == {"m": new, "b": new, "c": new}
    assert new.created == old.created
    assert new.etag != old.etag
    assert bench.state(new) == State.COLD
    assert new.handle.spec.options == {"x": 1}
    assert bench.store.read().models == (new.record(pinned=False),)
    assert bench.events()[-1].type is EventType.MODEL_UPDATED


async def test_an_update_that_is_refused_or_only_validated_changes_nothing(bench: Bench) -> None:
    old = await created(bench, bench.draft())
    other = await created(bench, bench.draft("other", keys=("taken",)))
    stored, revision = bench.store.read(), bench.journal.revision
    checked = await bench.updating(old, bench.draft(keys=("new",)), validate_only=True)
    assert checked.draft.keys == ("new",)
    refusal = await bench.refused(bench.updating(old, bench.draft(keys=("taken",))))
    assert refusal.reason is Reason.ALREADY_EXISTS
    bench.engine.prices["m"] = 401
    refusal = await bench.refused(bench.updating(old, bench.draft()))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    bench.engine.price_errors["m"] = ModelFilesError("cut short")
    refusal = await bench.refused(bench.updating(old, bench.draft()))
    assert refusal.reason is Reason.LOAD_FAILED
    assert dict(bench.catalog.keys) == {"m": old, "other": other, "taken": other}
    assert bench.store.read() == stored
    assert bench.journal.revision == revision


async def test_an_updated_model_that_had_failed_is_loaded_without_a_pause(bench: Bench) -> None:
    old = await created(bench, bench.draft())
    waiter = asyncio.create_task(bench.residency.lease(old.handle, NEVER_NS))
    await turns()
    bench.engine.loads[old.handle.core_id].fail(ModelFilesError("cut short"))
    with pytest.raises(Refusal):
        await waiter
    assert bench.state(old) == State.FAILED
    new = await bench.updating(old, bench.draft(options={"x": 1}))
    assert isinstance(new, Model)
    await bench.load_and_release(new)


async def test_models_of_the_configuration_are_neither_updated_nor_deleted(bench: Bench) -> None:
    checked = bench.registry.check(bench.draft(), folder_needed=True)
    price = await bench.registry.price(checked.spec)
    registration = bench.registry.register(checked, price, owner=Owner.CONFIG, origin="x")
    await bench.store.write(Change(put_models=(registration.record(pinned=False),)))
    model = bench.registry.add(registration, checked.spec, price)
    for work in (bench.updating(model, bench.draft()), bench.deleting(model)):
        refusal = await bench.refused(work)
        assert refusal.reason is Reason.CONFIG_OWNED
        assert refusal.resource is not None
        assert refusal.resource.name == "models/m"
    # A pin is not the file's.
    await bench.pinning(model, True)
    assert bench.store.read().models == (model.record(pinned=True),)


# --- Pins -----------------------------------------------------------------------------------------


async def test_a_pin_loads_and_is_stored_and_taken_back(bench: Bench) -> None:
    model = await created(bench, bench.draft())
    await bench.pinning(model, True)
    assert bench.store.read().models[0].pinned
    assert bench.residency.use(model.handle).pinned
    await bench.settle()
    assert bench.state(model) == State.RESIDENT
    writes = len(bench.store.written)
    await bench.pinning(model, True)
    assert len(bench.store.written) == writes
    await bench.pinning(model, False)
    assert not bench.store.read().models[0].pinned
    assert bench.state(model) == State.RESIDENT


async def test_a_pin_that_cannot_be_stored_or_loaded_is_none(bench: Bench) -> None:
    model = await created(bench, bench.draft())
    bench.store.full = True
    refusal = await bench.refused(bench.pinning(model, True))
    assert refusal.reason is Reason.CATALOG_UNAVAILABLE
    assert not bench.residency.use(model.handle).pinned
    bench.store.full = False
    for device in (0, 1):
        bench.residency.set_budget(device, 10)
    await bench.settle()
    refusal = await bench.refused(bench.pinning(model, True))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    assert not bench.residency.use(model.handle).pinned
    assert not bench.store.read().models[0].pinned


async def test_a_model_that_leaves_while_its_pin_is_written_is_loaded_again(bench: Bench) -> None:
    model = await created(bench, bench.draft())
    await bench.load_and_release(model)
    bench.store.gate = asyncio.Event()
    task = asyncio.create_task(bench.pinning(model, True))
    await bench.until(bench.writes._lock.locked)
    await turns()
    await bench.run_all(bench.residency.unload(model.handle))
    assert bench.state(model) == State.COLD
    bench.store.gate.set()
    await task
    await bench.settle()
    assert bench.state(model) == State.RESIDENT
    assert bench.residency.use(model.handle).pinned
