"""Starting again: the configuration file and what was stored, and which of them spoke last."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.support.catalog_bench import CatalogBench, GatedStore
from tests.support.fake_engine import turns

from modelyard import AutomaticPlacement, ComponentDevice, Device, PlacementStrategy
from modelyard_server.catalog.model import Model, ModelDraft
from modelyard_server.catalog.plans import PlanChange
from modelyard_server.catalog.records import Change, Owner, RouteRecord
from modelyard_server.catalog.restoring import ConfiguredModel
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.values import NEVER_NS, State
from modelyard_server.runtimes.api import ModelFilesError, OptionError

FIRST, SECOND = (ComponentDevice.from_single(Device.from_str(f"cuda:{i}")) for i in (0, 1))
BALANCED = AutomaticPlacement(strategy=PlacementStrategy.BALANCED)

Starts = Callable[..., Any]


def configured(model_id: str = "m", *, pinned: bool = False, **changes: Any) -> ConfiguredModel:
    values: dict[str, Any] = {"id": model_id, "runtime": "fake", "options": {}} | changes
    return ConfiguredModel(draft=ModelDraft(**values), pinned=pinned)


class Server(CatalogBench):
    """One run of a server on a catalog file."""

    async def restore(self, *models: ConfiguredModel) -> None:
        await self.restorer.restore(models, self.store.read())

    def model(self, model_id: str = "m") -> Model:
        return self.catalog.get(model_id)

    async def pin(self, model_id: str = "m", pinned: bool = True) -> None:
        async with self.writes.alone():
            await self.registry.set_pinned(self.model(model_id), pinned)

    async def update(self, model_id: str, **changes: Any) -> None:
        async with self.writes.alone():
            await self.registry.update(self.model(model_id), self.draft(model_id, **changes))

    async def delete(self, model_id: str) -> None:
        async with self.writes.alone():
            await self.registry.delete(self.model(model_id))

    async def change_device(self, position: int, **changes: Any) -> None:
        async with self.writes.alone():
            await self.plans.change_device(position, answer=lambda use: None, **changes)

    async def place(self, model_id: str, placement: Any) -> None:
        async with self.writes.alone():
            await self.plans.apply(
                PlanChange(placements={model_id: placement}), deadline_ns=NEVER_NS
            )

    def budgets(self) -> tuple[int, ...]:
        return self.registry.budgets()


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Starts]:
    """Starts a server on the same catalog file, after stopping the one before."""
    runs: list[Server] = []
    root = tmp_path / "store"
    root.mkdir()

    async def stop() -> None:
        if runs:
            await runs.pop().end()

    async def starts(
        *models: ConfiguredModel,
        budgets: Sequence[int] = (250, 400),
        prepare: Callable[[Server], None] | None = None,
        roots: dict[str, Path] | None = None,
    ) -> Server:
        await stop()
        store = GatedStore.opened(tmp_path / "catalog.db")
        runs.append(Server(root, budgets=budgets, store=store, roots=roots))
        if prepare is not None:
            prepare(runs[-1])
        await runs[-1].restore(*models)
        return runs[-1]

    yield starts
    await stop()


# --- Models ---------------------------------------------------------------------------------------


async def test_models_of_the_api_come_back_as_they_were(start: Starts, tmp_path: Path) -> None:
    (tmp_path / "store" / "a").mkdir()
    server = await start()
    before = await server.create(
        "m",
        keys=("k", "l"),
        root="store",
        folder="a",
        task="t",
        options={"x": [1, 2.5, None]},
        placement=SECOND,
    )
    await server.pin()
    await server.settle()
    server = await start()
    after = server.model()
    assert after is not before
    assert after.draft == before.draft
    assert (after.created, after.etag, after.owner) == (before.created, before.etag, Owner.API)
    assert set(server.catalog.keys) == {"m", "k", "l"}
    # A pinned model is loaded again.
    await server.settle()
    assert server.state(after) == State.RESIDENT
    assert server.residency.use(after.handle).pinned
    assert server.residency.use(after.handle).charges == {1: 100}
    # Nothing had to be written for that.
    assert server.store.written == []


async def test_what_was_updated_deleted_or_unpinned_is_so_after_a_start(start: Starts) -> None:
    server = await start()
    for model_id in ("changed", "deleted", "unpinned"):
        await server.create(model_id, keys=(f"key/{model_id}",))
    await server.pin("unpinned")
    await server.settle()
    await server.pin("unpinned", False)
    await server.update("changed", keys=("key/new",), options={"x": 1})
    await server.delete("deleted")
    etag = server.model("changed").etag
    server = await start()
    assert set(server.catalog.keys) == {"changed", "key/new", "unpinned", "key/unpinned"}
    assert server.model("changed").etag == etag
    assert server.model("changed").draft.options == {"x": 1}
    assert not server.residency.use(server.model("unpinned").handle).pinned
    assert not server.engine.load_log


async def test_models_of_the_file_follow_the_file(start: Starts) -> None:
    server = await start(configured("m", keys=("a",)), configured("gone", keys=("g",)))
    before = server.model()
    assert before.owner is Owner.CONFIG
    same = (await start(configured("m", keys=("a",)), configured("gone", keys=("g",)))).model()
    assert (same.etag, same.created) == (before.etag, before.created)
    server = await start(configured("m", keys=("b", "g")))
    after = server.model()
    assert set(server.catalog.keys) == {"m", "b", "g"}
    assert after.etag != before.etag
    assert after.created == before.created
    assert server.store.read().models == (after.record(pinned=False),)
    # A name that the file has given up is free for the API.
    server = await start(configured("m", keys=("b",)))
    await server.create("gone", keys=("g",))


async def test_a_model_the_file_names_like_one_of_the_api_keeps_the_server_from_starting(
    start: Starts,
) -> None:
    server = await start()
    await server.create("m")
    stored = server.store.read()
    with pytest.raises(Refusal) as caught:
        await start(configured("m"))
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert caught.value.text.startswith("models.m: ")
    server = await start()
    assert server.store.read() == stored
    assert server.model().owner is Owner.API


@pytest.mark.parametrize(("mine", "theirs"), [(("k",), ("k",)), (("api",), ()), ((), ("file",))])
async def test_a_key_that_the_file_and_the_api_give_to_different_models_is_named(
    start: Starts, mine: tuple[str, ...], theirs: tuple[str, ...]
) -> None:
    server = await start()
    await server.create("api", keys=theirs)
    with pytest.raises(Refusal) as caught:
        await start(configured("file", keys=mine))
    assert caught.value.reason is Reason.ALREADY_EXISTS
    (key,) = {"k", "api", "file"} & ({*mine, "file"} & {*theirs, "api"})
    assert repr(key) in caught.value.text
    assert caught.value.text.startswith("models.")


@pytest.mark.parametrize("changes", [{"folder": ".."}, {"keys": ("..",)}, {"root": "nowhere"}])
async def test_a_file_that_is_itself_wrong_is_refused_with_the_models_name(
    start: Starts, changes: dict[str, Any]
) -> None:
    with pytest.raises(Refusal) as caught:
        await start(configured("fine"), configured("bad", **changes))
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.text.startswith("models.bad: ")


# --- Pins -----------------------------------------------------------------------------------------


async def test_the_latest_word_on_a_pin_counts(start: Starts) -> None:
    def is_pinned(server: Server) -> bool:
        return server.residency.use(server.model().handle).pinned

    # The file's at first, then that of a call, until the file says something else.
    server = await start(configured(pinned=True))
    assert is_pinned(server)
    await server.pin(pinned=False)
    server = await start(configured(pinned=True))
    assert not is_pinned(server)
    server = await start(configured(pinned=False))
    assert not is_pinned(server)
    await server.pin()
    server = await start(configured(pinned=False))
    assert is_pinned(server)
    server = await start(configured(pinned=False, keys=("k",)))
    assert not is_pinned(server)
    server = await start(configured(pinned=True, keys=("k",)))
    assert is_pinned(server)
    await server.settle()


async def test_a_pin_whose_model_no_longer_fits_is_kept_and_the_server_starts(
    start: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start()
    await server.create("m", size=300)
    await server.pin()
    await server.settle()

    def grown(server: Server) -> None:
        server.engine.prices["m"] = 500

    server = await start(prepare=grown)
    assert server.residency.use(server.model().handle).pinned
    assert "m is to be pinned and cannot be" in caplog.text


# --- Devices --------------------------------------------------------------------------------------


async def test_budgets_and_drains_come_back_before_anything_is_loaded(start: Starts) -> None:
    server = await start(configured(pinned=True, placement=FIRST))
    await server.settle()
    await server.change_device(0, budget_bytes=150)
    await server.change_device(1, drained=True)
    plan = server.plans.plan()
    assert plan.revision == 2
    server = await start(configured(pinned=True, placement=FIRST))
    await server.settle()
    after = server.plans.plan()
    assert server.budgets() == (150, 400)
    assert [device.drained for device in after.devices] == [False, True]
    assert (after.revision, after.etag) == (plan.revision, plan.etag)
    assert after.changed is not None
    assert server.residency.device_use(0).peak <= 150
    await server.change_device(1, drained=False)
    assert not (await start()).residency.is_closed(1)


async def test_a_budget_the_file_says_anew_is_the_files(
    start: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start()
    await server.change_device(0, budget_bytes=150)
    await server.change_device(1, budget_bytes=160)
    server = await start(budgets=(300, 400))
    assert server.budgets() == (300, 160)
    assert "devices/cuda-0" in caplog.text
    # It was forgotten: the old word of the file does not bring it back.
    assert (await start(budgets=(250, 400))).budgets() == (250, 160)


async def test_what_was_said_of_a_device_that_is_gone_is_forgotten(
    start: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start()
    await server.change_device(1, budget_bytes=160, drained=True)
    server = await start(budgets=(250,))
    assert server.budgets() == (250,)
    assert "devices/cuda-1" in caplog.text
    server = await start()
    assert server.budgets() == (250, 400)
    assert not server.residency.is_closed(1)


async def test_stored_budgets_that_are_not_possible_any_more_give_way_to_the_files(
    start: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start()
    await server.change_device(0, budget_bytes=500_000)
    # The host's memory is one: with this file they would be more than there is together.
    server = await start(budgets=(250, 900_000))
    assert server.budgets() == (250, 900_000)
    assert "not possible any more" in caplog.text


# --- Placements -----------------------------------------------------------------------------------


async def test_the_latest_word_on_a_placement_counts(
    start: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(configured(placement=FIRST))
    await server.create("api")
    await server.place("m", SECOND)
    await server.place("api", FIRST)
    server = await start(configured(placement=FIRST))
    assert server.model().placement == SECOND
    assert server.model().draft.placement == FIRST
    assert server.model("api").placement == FIRST
    assert [dict(way.charges) for way in server.model().handle.ways] == [{1: 100}]
    # Other words of the file leave it; one about the placement does not.
    server = await start(configured(placement=FIRST, keys=("k",)))
    assert server.model().placement == SECOND
    server = await start(configured(placement=None, keys=("k",)))
    assert server.model().placement is None
    assert server.model().given is None
    assert "another placement" in caplog.text
    server = await start(configured(placement=FIRST, keys=("k",)))
    assert server.model().placement == FIRST
    assert server.model("api").placement == FIRST


async def test_a_plans_placement_on_a_device_that_is_gone_is_dropped_with_a_line(
    start: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(configured(placement=FIRST))
    await server.create("api", placement=FIRST)
    await server.place("m", SECOND)
    await server.place("api", SECOND)
    server = await start(configured(placement=FIRST), budgets=(250,))
    for model_id in ("m", "api"):
        assert server.model(model_id).placement == FIRST
        assert f"a plan gave {model_id} is void" in caplog.text
    assert server.store.read().placements == ()
    # For good.
    server = await start(configured(placement=FIRST))
    assert server.model().placement == FIRST


async def test_a_model_of_the_api_whose_own_device_is_gone_is_there_and_says_so(
    start: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start()
    await server.create("m", placement=SECOND, keys=("k",))
    stored = server.store.read()
    server = await start(budgets=(250,))
    assert "cuda:1" in "".join(server.model().warnings)
    assert server.catalog.keys["k"] is server.model()
    assert server.store.read() == stored
    assert "model m cannot be placed" in caplog.text
    # When the device is back, it lives there again.
    server = await start()
    assert server.model().warnings == ()
    assert [dict(way.charges) for way in server.model().handle.ways] == [{1: 100}]


async def test_a_file_that_places_a_model_on_no_device_of_it_is_refused(start: Starts) -> None:
    with pytest.raises(Refusal) as caught:
        await start(configured(placement=SECOND), budgets=(250,))
    assert caught.value.reason is Reason.PLACEMENT_INVALID
    assert caught.value.text.startswith("models.m: ")


@pytest.mark.parametrize("owner", list(Owner))
async def test_a_cut_that_a_lower_budget_made_impossible_keeps_no_server_from_starting(
    start: Starts, owner: Owner
) -> None:
    models = [configured(placement=BALANCED)] if owner is Owner.CONFIG else []
    server = await start(*models)
    if owner is Owner.API:
        await server.create(placement=BALANCED)
    for position in (0, 1):
        await server.change_device(position, budget_bytes=50)
    server = await start(*models)
    assert server.budgets() == (50, 50)
    with pytest.raises(Refusal) as caught:
        await server.residency.lease(server.model().handle, NEVER_NS)
    assert caught.value.reason is Reason.LOAD_FAILED
    assert "budget" in server.model().handle.failure_text
    # With room it is loaded where its placement says.
    for position in (0, 1):
        await server.change_device(position, budget_bytes=300)
    server = await start(*models)
    await server.load_and_release(server.model())
    assert server.model().placement == BALANCED


# --- Broken models --------------------------------------------------------------------------------


def broken(server: Server) -> None:
    server.engine.price_errors["m"] = ModelFilesError("config.json is gone")


@pytest.mark.parametrize("owner", list(Owner))
async def test_a_model_with_broken_files_is_there_and_breaks_only_itself(
    start: Starts, owner: Owner
) -> None:
    models = [configured(keys=("k",))] if owner is Owner.CONFIG else []
    server = await start(*models)
    if owner is Owner.API:
        await server.create(keys=("k",))
    await server.create("other")
    server = await start(*models, prepare=broken)
    model = server.model()
    assert server.catalog.keys["k"] is model
    with pytest.raises(Refusal) as caught:
        await server.residency.lease(model.handle, NEVER_NS)
    assert caught.value.reason is Reason.LOAD_FAILED
    assert model.handle.failure_text == "config.json is gone"
    await server.load_and_release(server.model("other"))


async def test_a_broken_model_whose_files_are_whole_again_is_loaded_at_its_true_price(
    start: Starts,
) -> None:
    server = await start(configured(), prepare=broken)
    server.engine.price_errors.clear()
    handle = server.model().handle
    waiter = asyncio.create_task(server.residency.lease(handle, NEVER_NS))
    await turns()
    assert handle.needed_bytes == 100
    device = server.engine.loads[handle.core_id].device
    assert server.residency.device_use(device).reserved == 100
    server.engine.loads[handle.core_id].finish(100)
    (await waiter).release()


async def test_a_broken_model_with_a_plans_placement_keeps_it(start: Starts) -> None:
    server = await start(configured(placement=FIRST))
    await server.place("m", SECOND)
    server = await start(configured(placement=FIRST), prepare=broken)
    assert server.model().placement == SECOND
    server.engine.price_errors.clear()
    await server.load_and_release(server.model())
    assert server.residency.use(server.model().handle).charges == {1: 100}


async def test_a_model_too_large_for_anything_keeps_no_server_from_starting(start: Starts) -> None:
    def huge(server: Server) -> None:
        # 2^50 bytes is what the identity runtime lets a configuration ask for.
        server.engine.prices["m"] = 2**50

    server = await start(configured(), prepare=huge)
    with pytest.raises(Refusal) as caught:
        await server.residency.lease(server.model().handle, NEVER_NS)
    assert caught.value.reason in (Reason.MODEL_NEVER_FITS, Reason.LOAD_FAILED)


async def test_a_model_of_the_api_whose_root_is_gone_can_be_deleted(
    start: Starts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store" / "a").mkdir()
    server = await start()
    await server.create("m", root="store", folder="a")
    await server.create("other")
    stored = server.store.read()

    def needs_a_folder(server: Server) -> None:
        server.engine.price_errors["m"] = ModelFilesError("the model has no folder")

    server = await start(roots={}, prepare=needs_a_folder)
    model = server.model()
    assert "there is no root 'store'" in "".join(model.warnings)
    assert "there is no root 'store'" in caplog.text
    assert model.handle.spec.folder is None
    with pytest.raises(Refusal) as caught:
        await server.residency.lease(model.handle, NEVER_NS)
    assert caught.value.reason is Reason.LOAD_FAILED
    await server.load_and_release(server.model("other"))
    assert server.store.read() == stored
    # With its root back it is whole; without it can be deleted.
    server = await start()
    assert server.model().warnings == ()
    server = await start(roots={}, prepare=needs_a_folder)
    await server.delete("m")
    assert [record.id for record in server.store.read().models] == ["other"]


async def test_a_model_of_the_api_with_options_of_another_version_is_there_and_fails(
    start: Starts,
) -> None:
    server = await start()
    await server.create("m", options={"old": 1})

    def strict(server: Server) -> None:
        server.engine.check_error = OptionError("old", "is not known")
        server.engine.price_errors["m"] = OptionError("old", "is not known")

    server = await start(prepare=strict)
    with pytest.raises(Refusal) as caught:
        await server.residency.lease(server.model().handle, NEVER_NS)
    assert caught.value.reason is Reason.LOAD_FAILED
    assert server.model().handle.failure_text == "old: is not known"


# --- A disk that is full --------------------------------------------------------------------------


async def test_a_full_disk_keeps_nobody_from_starting_and_what_is_owed_is_written_later(
    start: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    await start(configured("old", keys=("k",)))

    def full(server: Server) -> None:
        server.store.full = True

    caplog.set_level(logging.ERROR)
    server = await start(configured("new", placement=FIRST), prepare=full)
    assert list(server.catalog.keys) == ["new"]
    assert "could not be stored" in caplog.text
    server.store.full = False
    # Both rest on what could not be written: a model that is not stored, a key that is taken.
    await server.place("new", SECOND)
    await server.create("api", keys=("k",))
    server = await start(configured("new", placement=FIRST))
    assert set(server.catalog.keys) == {"new", "api", "k"}
    assert server.model("new").placement == SECOND
    assert server.store.written == []


async def test_nothing_is_written_when_nothing_has_changed(start: Starts) -> None:
    models = (configured("a", pinned=True, keys=("k",), options={"x": 1.5}), configured("b"))
    assert len((await start(*models)).store.written) == 1
    server = await start(*models)
    assert server.store.written == []
    assert server.store.read().plan_revision == 0
    await server.settle()


async def test_a_record_that_makes_no_sense_is_void_with_a_line(
    start: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(configured(placement=FIRST))
    await server.place("m", SECOND)
    (record,) = server.store.read().placements
    odd = type(record)(model="m", placement={"type": "odd"}, origin=record.origin)
    await server.store.write(Change(put_placements=(odd,)))
    server = await start(configured(placement=FIRST))
    assert server.model().placement == FIRST
    assert "the stored placement of m is void" in caplog.text
    assert server.store.read().placements == ()


# --- Routes ---------------------------------------------------------------------------------------


async def test_a_stored_route_of_a_kind_that_nobody_knows_stops_the_start(start: Starts) -> None:
    """Left out, its keys would mean nothing, or something else by a prefix."""
    record = RouteRecord(
        id="r",
        owner=Owner.API,
        keys=("k",),
        target={"quantum": {}},
        created=datetime(2026, 1, 1, tzinfo=UTC),
        updated=datetime(2026, 1, 1, tzinfo=UTC),
        etag="e",
        origin="",
    )
    server = await start()
    await server.store.write(Change(put_routes=(record,)))
    with pytest.raises(Refusal, match=r"routes\.r: what the catalog holds is no route") as caught:
        await start()
    assert caught.value.reason is Reason.INTERNAL
