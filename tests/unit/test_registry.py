"""Registering models: what is refused, and that a refusal leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_engine import FakeEngine, turns

from modelyard.devices import ComponentDevice, Device
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, ModelDraft
from modelyard_server.catalog.registry import Registry
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Code, Reason, Refusal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import NEVER_NS, State, YardSettings
from modelyard_server.runtimes.api import ModelFilesError, OptionError

BUDGETS = (250, 400)


class Bench:
    """A registry over a fake engine, with one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.engine = FakeEngine()
        self.catalog = Catalog()
        devices = [
            ManagedDevice(
                name=f"devices/cuda-{i}",
                device=Device.from_str(f"cuda:{i}"),
                logical=True,
                torch_device="cpu",
                threads=1,
                total_bytes=1000,
                budget_bytes=budget,
            )
            for i, budget in enumerate(BUDGETS)
        ]
        self.residency = Residency(
            settings=YardSettings(budgets=BUDGETS),
            device_names=[device.name for device in devices],
            engine=self.engine,
        )
        self.registry = Registry(
            catalog=self.catalog,
            engine=self.engine,
            residency=self.residency,
            devices=devices,
            roots={"store": root},
        )

    def draft(self, model_id: str = "m", **changes: Any) -> ModelDraft:
        values: dict[str, Any] = {
            "id": model_id,
            "root": "store",
            "folder": "m",
            "runtime": "fake",
            "options": {},
        }
        return ModelDraft(**(values | changes))

    async def refused(self, draft: ModelDraft, **options: Any) -> Refusal:
        """The refusal of a draft, which must leave nothing behind."""
        before = dict(self.catalog.keys)
        with pytest.raises(Refusal) as caught:
            await self.registry.create(draft, **options)
        assert dict(self.catalog.keys) == before
        assert self.residency._yard.model_count == len(self.catalog.models())
        return caught.value


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    root = tmp_path / "store"
    (root / "m").mkdir(parents=True)
    made = Bench(root)
    yield made
    await made.residency.close(10)
    made.residency.audit()
    assert not made.residency._tasks


async def created(bench: Bench, draft: ModelDraft) -> Model:
    model = await bench.registry.create(draft)
    assert isinstance(model, Model)
    return model


async def test_a_model_is_registered_cold_priced_and_known_by_its_keys(bench: Bench) -> None:
    model = await created(bench, bench.draft(keys=("a/b",), options={"x": 1}, task="t"))
    assert bench.catalog.get("m") is model
    assert bench.catalog.keys["a/b"] is model
    assert model.estimated_bytes == model.handle.needed_bytes == 100
    assert model.handle.placements == (0, 1)
    spec = model.handle.spec
    assert (spec.name, spec.folder, spec.task) == ("m", bench.root / "m", "t")
    assert spec.options == {"x": 1}
    assert bench.residency.use(model.handle).state == State.COLD
    assert model.created.tzinfo is not None
    assert model.etag.startswith('"')


async def test_a_model_registered_again_has_another_etag(bench: Bench) -> None:
    first = await created(bench, bench.draft())
    bench.registry.delete(first)
    second = await created(bench, bench.draft())
    assert first.etag != second.etag


async def test_validate_only_checks_everything_and_changes_nothing(bench: Bench) -> None:
    checked = await bench.registry.create(bench.draft(), validate_only=True)
    assert not isinstance(checked, Model)
    assert (checked.id, checked.estimated_bytes) == ("m", 100)
    assert bench.catalog.models() == []
    assert bench.engine.priced == ["m"]
    bench.engine.price_errors["m"] = ModelFilesError("cut short")
    refusal = await bench.refused(bench.draft(), validate_only=True)
    assert refusal.reason is Reason.LOAD_FAILED
    bench.engine.price_errors.clear()
    bench.engine.prices["m"] = 401
    refusal = await bench.refused(bench.draft(), validate_only=True)
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    bench.engine.prices["m"] = 1
    await created(bench, bench.draft())
    refusal = await bench.refused(bench.draft(), validate_only=True)
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
    refusal = await bench.refused(bench.draft(folder=folder))
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
        refusal = await bench.refused(bench.draft(folder=folder))
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
    refusal = await bench.refused(bench.draft(root=root))
    assert refusal.reason is Reason.INVALID_FIELD
    assert "there are: store" in refusal.text
    assert len(refusal.text) < 200


async def test_a_model_without_files_has_no_folder(bench: Bench) -> None:
    model = await created(bench, bench.draft(root="", folder=""))
    assert model.handle.spec.folder is None


async def test_every_violation_is_told_at_once(bench: Bench) -> None:
    bench.engine.check_error = OptionError("top_k", "must be a number")
    refusal = await bench.refused(
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
    refusal = await bench.refused(bench.draft())
    assert [v.field for v in refusal.violations] == [f"model.{option}"]


async def test_a_model_that_fits_no_device_is_refused_with_every_budget(bench: Bench) -> None:
    bench.engine.prices["m"] = 401
    refusal = await bench.refused(bench.draft())
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
    refusal = await bench.refused(bench.draft(placement=placement))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    model = await created(bench, bench.draft())
    assert model.handle.placements == (0, 1)


async def test_a_placement_the_server_has_not_is_refused(bench: Bench) -> None:
    placement = ComponentDevice.from_single(Device.from_str("xpu:0"))
    assert (await bench.refused(bench.draft(placement=placement))).reason is (
        Reason.PLACEMENT_INVALID
    )


@pytest.mark.parametrize(
    ("transient", "code"), [(False, Code.FAILED_PRECONDITION), (True, Code.UNAVAILABLE)]
)
async def test_files_that_are_no_model_are_refused(
    bench: Bench, transient: bool, code: Code
) -> None:
    bench.engine.price_errors["m"] = ModelFilesError("config.json is gone", transient=transient)
    refusal = await bench.refused(bench.draft())
    assert refusal.reason is Reason.LOAD_FAILED
    assert refusal.code is code
    assert refusal.text == "config.json is gone"
    assert (refusal.retry_after_s is not None) == transient


async def test_of_two_that_register_the_same_name_at_once_one_is_refused(bench: Bench) -> None:
    bench.engine.price_gate = asyncio.Event()
    tasks = [asyncio.create_task(bench.registry.create(bench.draft())) for _ in range(2)]
    await turns()
    bench.engine.price_gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Model, Refusal]
    assert len(bench.catalog.models()) == 1
    assert bench.residency._yard.model_count == 1


async def test_a_registration_that_is_cancelled_leaves_nothing(bench: Bench) -> None:
    bench.engine.price_gate = asyncio.Event()
    task = asyncio.create_task(bench.registry.create(bench.draft()))
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.catalog.models() == []
    bench.engine.price_gate.set()
    await created(bench, bench.draft())


async def test_a_broken_model_of_the_configuration_is_adopted_and_breaks_only_itself(
    bench: Bench,
) -> None:
    bench.engine.price_errors["m"] = ModelFilesError("config.json is gone")
    model = await bench.registry.adopt(bench.draft(keys=("k",)))
    assert bench.catalog.keys["k"] is model
    with pytest.raises(Refusal) as caught:
        await bench.residency.lease(model.handle, NEVER_NS)
    assert caught.value.reason is Reason.LOAD_FAILED
    assert model.handle.failure_text == "config.json is gone"


async def test_an_adopted_model_whose_files_are_whole_again_is_loaded(bench: Bench) -> None:
    bench.engine.price_errors["m"] = ModelFilesError("config.json is gone")
    model = await bench.registry.adopt(bench.draft())
    bench.engine.price_errors.clear()
    waiter = asyncio.create_task(bench.residency.lease(model.handle, NEVER_NS))
    await turns()
    assert model.handle.needed_bytes == 100
    device = bench.engine.loads[model.handle.core_id].device
    assert bench.residency.device_use(device).reserved == 100
    bench.engine.loads[model.handle.core_id].finish(100)
    (await waiter).release()


@pytest.mark.parametrize("changes", [{"folder": ".."}, {"keys": ("..",)}])
async def test_a_configuration_that_is_itself_wrong_is_not_adopted(
    bench: Bench, changes: dict[str, Any]
) -> None:
    with pytest.raises(Refusal) as caught:
        await bench.registry.adopt(bench.draft(**changes))
    assert caught.value.reason is Reason.INVALID_FIELD
    assert bench.catalog.models() == []


async def test_a_model_too_large_for_every_budget_is_adopted_or_refused_but_no_crash(
    bench: Bench,
) -> None:
    # 2^50 bytes is what the identity runtime lets a configuration ask for.
    bench.engine.prices["m"] = 2**50
    try:
        model = await bench.registry.adopt(bench.draft())
    except Refusal as refusal:
        assert refusal.reason is Reason.MODEL_NEVER_FITS
        return
    with pytest.raises(Refusal) as caught:
        await bench.residency.lease(model.handle, NEVER_NS)
    assert caught.value.reason is Reason.MODEL_NEVER_FITS


async def test_a_deleted_model_is_gone_from_catalog_and_yard(bench: Bench) -> None:
    model = await created(bench, bench.draft(keys=("k",)))
    bench.registry.delete(model)
    assert not bench.catalog.keys
    assert bench.residency._yard.model_count == 0
    await created(bench, bench.draft(keys=("k",)))
