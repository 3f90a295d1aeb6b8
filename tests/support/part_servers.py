"""Tests of a whole server with models in parts, over a real channel, on any two accelerators.

A subclass whose name begins with Test has them run; it needs a fixture `accelerators`. The server
has cpu, cuda:0, cuda:1 and the disk, in this order, and the folder "store" of models.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelyard import (
    Admin,
    DevicePlan,
    LoadFailed,
    ModelFailed,
    ModelPlacement,
    PlacementInvalid,
    Prediction,
    ResidencyState,
    read_placement,
)
from modelyard_server.runtimes.api import JsonValue, ModelSpec
from modelyard_server.runtimes.conversion import to_torch
from modelyard_server.runtimes.targets import Place, Target, staging_bytes
from modelyard_server.runtimes.tensors import DType
from tests.support.config_text import DISK, ROOTS, device_table, toml
from tests.support.part_cases import MODULES, TORCH, Case, case_of, rows
from tests.support.part_devices import (
    FIRST,
    HOST,
    ON_DISK,
    SECOND,
    Accelerators,
    nothing_is_left,
)
from tests.support.part_models import FACTORIES, MIXES, WIDE, charges, make_factory_model
from tests.support.server import RunningApp, eventually, refusal_of, running_app

__all__ = [
    "ServersOnAccelerators",
    "ask",
    "asking",
    "assert_equal",
    "charged",
    "create",
    "placed",
    "serving",
]

ENCODER = "feature-extraction"
POSITIONS = {"cpu": HOST, "cuda:0": FIRST, "cuda:1": SECOND, "disk": ON_DISK}

MAPS: Mapping[str, Mapping[str, str]] = {
    ENCODER: {"": "cuda:0", "encoder.layer.0": "cuda:1", "encoder.layer.1": "disk"},
    "text-generation": {"": "cuda:1", "transformer.h.0": "cuda:0", "transformer.h.1": "disk"},
    "image-classification": {
        "": "cpu",
        "vit.embeddings": "disk",
        "vit.layers.0": "cuda:0",
        "vit.layers.1": "cuda:1",
    },
    f"{MODULES}:Residual": {"first": "cuda:1", "last": "disk", "layers": "cuda:0"},
}
"""A map over both accelerators and the disk for models of each kind; the first key is home."""


@asynccontextmanager
async def serving(accelerators: Accelerators, base: Path) -> AsyncIterator[RunningApp]:
    """A server without models that tries failed loads again at once."""
    store = base / "store"
    store.mkdir(exist_ok=True)
    config = "\n[yard]\nbackoff_initial_s = 0.001\nbackoff_max_s = 0.001\n"
    config += device_table("cpu", "64MB", threads=1)
    for position in (FIRST, SECOND):
        pool = {} if position in accelerators.counted else {"logical": True}
        config += device_table(f"cuda:{position - FIRST}", "256MB", threads=1, **pool)
    config += DISK + ROOTS
    allowed = toml([*FACTORIES, MIXES, WIDE])
    config += f"\n[runtimes.torch]\nallowed_factories = {allowed}\n"
    async with running_app(config, base, probes=accelerators.probes(store)) as yard:
        yield yard


async def create(yard: RunningApp, name: str, case: Case, placement: Any) -> None:
    """Registers a case's model."""
    spec = case.spec
    assert spec.folder is not None
    await yard.admin(
        Admin.create_model,
        name,
        runtime=spec.runtime,
        root="store",
        folder=spec.folder.name,
        task=spec.task,
        options=spec.options,
        placement=placement,
    )


async def ask(yard: RunningApp, name: str, case: Case) -> Prediction:
    """Asks what the case has."""
    value = case.value
    data: Any = list(value.data) if value.dtype is DType.TEXT else to_torch(value).numpy()
    return await yard.client.predict(name, data, parameters=case.parameters, timeout_s=60)


def assert_equal(left: Prediction, right: Prediction, tolerance: float = 1e-5) -> None:
    """Checks that two answers are the same, and their numbers so to a tolerance."""
    assert left.keys() == right.keys()
    for name, one in left.items():
        other = right[name]
        if isinstance(one, np.ndarray):
            assert isinstance(other, np.ndarray)
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert np.abs(one.astype(np.float64) - other).max() <= tolerance
        else:
            assert one == other


async def charged(
    yard: RunningApp, accelerators: Accelerators, *, free: Mapping[int, int] | None = None
) -> dict[int, int]:
    """What the ledger has for the accelerators when all is at rest, which is what they hold.

    Args:
        yard: the server.
        accelerators: its devices.
        free: bytes by position that models are charged for and do not hold while they rest.
    """
    await yard.at_rest()
    ledger = {}
    for position in (FIRST, SECOND):
        device = await yard.device(f"cuda:{position - FIRST}")
        assert device.accounted_bytes == device.resident_bytes == device.measured_bytes
        ledger[position] = device.resident_bytes
    free = free or {}
    accelerators.assert_holds({i: ledger[i] - free.get(i, 0) for i in ledger})
    return ledger


@asynccontextmanager
async def asking(yard: RunningApp, name: str, case: Case) -> AsyncIterator[None]:
    """Asks a model again and again meanwhile; every answer has to be the first one's."""
    expected = await ask(yard, name, case)
    done = asyncio.Event()
    count = 0

    async def ask_on() -> None:
        nonlocal count
        while not done.is_set():
            assert_equal(await ask(yard, name, case), expected)
            count += 1

    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(ask_on()) for _ in range(2)]
        try:
            yield
            before = count
            await eventually(f"{name} still answers", lambda: count > before + 2)
        finally:
            done.set()
            if not any(client.done() for client in clients):
                await asyncio.gather(*clients)


def encoder(base: Path) -> Case:
    return case_of(base / "store", ENCODER)


def placed(
    case: Case, accelerators: Accelerators, device_map: Mapping[str, str]
) -> tuple[dict[int, int], dict[int, int]]:
    """What a case's model is charged for, and what of it is kept free for what visits home.

    Args:
        case: the model.
        accelerators: the server's devices.
        device_map: its placement; the first key is at home.
    """
    parts = tuple((key, POSITIONS[device]) for key, device in device_map.items())
    target = Target(home=parts[0][1], parts=parts)
    place = Place(target=target, torch_devices=accelerators.torch_devices)
    free = staging_bytes(case.structure, target, frozenset({ON_DISK}))
    return charges(case.structure, place), {target.home: free}


def wide(base: Path, accelerators: Accelerators) -> Case:
    """A model whose two parts, "into" and "out", are large."""
    size_bytes = accelerators.large_bytes
    folder = make_factory_model(base / "store" / "wide", WIDE, seed=2, size_bytes=size_bytes)
    options: dict[str, JsonValue] = {"factory": WIDE, "factory_options": {"size_bytes": size_bytes}}
    spec = ModelSpec(name="wide", runtime="torch", folder=folder, options=options)
    return Case(runtime=TORCH, spec=spec, value=rows())


class ServersOnAccelerators:
    """See the module."""

    @pytest.fixture(autouse=True)
    def released(self, accelerators: Accelerators) -> Iterator[None]:
        """Checks that a server that has stopped holds nothing."""
        with nothing_is_left(accelerators):
            yield

    @pytest.mark.parametrize("kind", MAPS)
    async def test_a_model_over_two_accelerators_and_the_disk_answers_as_on_one(
        self, tmp_path: Path, accelerators: Accelerators, kind: str
    ) -> None:
        case = case_of(tmp_path / "store", kind)
        wanted, free = placed(case, accelerators, MAPS[kind])
        assert all(free.values())
        async with serving(accelerators, tmp_path) as yard:
            await create(yard, "whole", case, "cuda:0")
            await create(yard, "split", case, MAPS[kind])
            expected = await ask(yard, "whole", case)
            await yard.admin(Admin.unload, "whole")
            assert await charged(yard, accelerators) == {FIRST: 0, SECOND: 0}

            for _ in range(3):
                assert_equal(await ask(yard, "split", case), expected, accelerators.tolerance)
                ledger = await charged(yard, accelerators, free=free)
                assert ledger == {i: wanted.get(i, 0) for i in ledger}
            residency = await yard.residency("split")
            assert {
                charge.device: charge.size_bytes for charge in residency.charges
            } == {
                f"devices/{name.replace(':', '-')}": wanted[i]
                for name, i in POSITIONS.items()
                if i in wanted
            }  # fmt: skip
            assert (await yard.device("disk")).resident_bytes == wanted[ON_DISK]

    async def test_the_ledger_is_what_the_devices_hold_for_every_kind_of_placement(
        self, tmp_path: Path, accelerators: Accelerators
    ) -> None:
        case = encoder(tmp_path)
        whole = case.structure.size_bytes
        both = ["cuda:0", "cuda:1"]
        async with serving(accelerators, tmp_path) as yard:
            # The first cannot have all of it, so that what fills one after the other is cut, too.
            most = case.runtime.price(case.spec).peak_bytes
            await yard.admin(Admin.update_budget, "cuda:0", whole * 3 // 4)
            await yard.admin(Admin.update_budget, "cuda:1", most)
            await create(yard, "cpu", case, "cpu")
            expected = await ask(yard, "cpu", case)
            for name, placement in {
                "whole": "cuda:1",
                "split": {"": "cuda:0", "encoder.layer.1": "cuda:1"},
                "balanced": {"strategy": "balanced", "devices": both},
                "sequential": {"strategy": "sequential", "devices": both},
                "auto": {"strategy": "auto", "devices": both},
            }.items():
                await create(yard, name, case, placement)
                assert_equal(await ask(yard, name, case), expected, accelerators.tolerance)
                ledger = await charged(yard, accelerators)
                assert sum(ledger.values()) == whole, name
                in_parts = name in ("split", "balanced", "sequential")
                assert (0 not in ledger.values()) is in_parts, name
                if name == "sequential":
                    assert ledger[FIRST] > ledger[SECOND]
                await yard.admin(Admin.unload, name)
                assert await charged(yard, accelerators) == {FIRST: 0, SECOND: 0}

    async def test_models_at_home_on_different_devices_run_across_each_other(
        self, tmp_path: Path, accelerators: Accelerators
    ) -> None:
        case = encoder(tmp_path)
        maps = {
            "a": {"": "cuda:0", "encoder.layer.0": "cuda:1", "encoder.layer.1": "disk"},
            "b": {"": "cuda:1", "encoder.layer.0": "cuda:0", "encoder.layer.1": "disk"},
            "c": {"": "cpu", "encoder.layer.0": "cuda:0", "encoder.layer.1": "cuda:1"},
        }
        async with serving(accelerators, tmp_path) as yard:
            await create(yard, "whole", case, "cuda:0")
            expected = await ask(yard, "whole", case)
            wanted = Counter({FIRST: case.structure.size_bytes})
            free = Counter[int]()
            for name, device_map in maps.items():
                await create(yard, name, case, device_map)
                more, more_free = placed(case, accelerators, device_map)
                wanted.update(more)
                free.update(more_free)
            names = [*maps, "whole"] * 8
            for answer in await asyncio.gather(*(ask(yard, name, case) for name in names)):
                assert_equal(answer, expected, accelerators.tolerance)
            ledger = await charged(yard, accelerators, free=free)
            assert ledger == {i: wanted[i] for i in ledger}
            for name in names[:4]:
                assert (await yard.residency(name)).load_count == 1

    async def test_a_map_that_does_not_fit_is_refused_when_it_is_registered(
        self, tmp_path: Path, accelerators: Accelerators
    ) -> None:
        case = encoder(tmp_path)
        right = {"embeddings": "cuda:0", "encoder.layer.0": "cuda:1", "encoder.layer.1": "disk"}
        wrong = {"embeddings": "cuda:0", "encoder.layer.0": "cuda:1", "encoder.layer.7": "disk"}
        async with serving(accelerators, tmp_path) as yard:
            error = await refusal_of(create(yard, "m", case, wrong))
            assert isinstance(error, PlacementInvalid)
            for named in ("'encoder.layer.7'", "encoder.layer.1.attention.self.query.weight"):
                assert named in str(error)
                assert any(named in violation.description for violation in error.violations)
            nowhere = await refusal_of(create(yard, "m", case, {"": "cuda:0", "encoder": "cuda:2"}))
            assert isinstance(nowhere, PlacementInvalid)
            assert "cuda:2" in str(nowhere)
            assert await yard.admin(Admin.list_models) == ()
            await create(yard, "m", case, right)
            await ask(yard, "m", case)

    @pytest.mark.parametrize("left", [0.0, 1.5], ids=["no-part-fits", "one-part-fits"])
    async def test_a_load_for_which_the_device_has_no_memory_fails_and_leaves_nothing(
        self, tmp_path: Path, accelerators: Accelerators, left: float
    ) -> None:
        """The yard believes that there is room: its budget is larger than the device."""
        case, large = encoder(tmp_path), wide(tmp_path, accelerators)
        left_bytes = int(left * accelerators.large_bytes)
        # The second has its first part on the other device when it fails.
        placements = {"whole": "cuda:0", "split": {"into": "cuda:1", "out": "cuda:0"}}
        async with serving(accelerators, tmp_path) as yard:
            for name, device in (("one", "cuda:0"), ("other", "cuda:1")):
                await create(yard, name, case, device)
                await ask(yard, name, case)
            for name, placement in placements.items():
                await create(yard, name, large, placement)
            before = await charged(yard, accelerators)
            async with asking(yard, "other", case):
                with accelerators.starved(FIRST, left_bytes=left_bytes):
                    for name in placements if left < 1 else ("whole",):
                        error = await refusal_of(ask(yard, name, large))
                        assert isinstance(error, LoadFailed)
                        assert error.transient
                        assert error.retry_after_s is not None
                        failed = await yard.becomes(name, ResidencyState.FAILED)
                        assert failed.charges == failed.quarantined == ()
                        assert failed.failure is not None
                        assert failed.failure.transient
                        assert "no memory" in failed.failure.message
            assert await charged(yard, accelerators) == before
            for name in ("one", "other"):
                assert not (await ask(yard, name, case)).served.cold
            # There is memory again, and it is tried again.
            whole, split = [await ask(yard, name, large) for name in placements]
            assert_equal(split, whole, accelerators.tolerance)
            for name in placements:
                await yard.admin(Admin.unload, name)
            assert await charged(yard, accelerators) == before

    async def test_a_plan_that_a_device_has_no_memory_for_is_rolled_back_while_requests_flow(
        self, tmp_path: Path, accelerators: Accelerators
    ) -> None:
        case, large = encoder(tmp_path), wide(tmp_path, accelerators)
        placement = read_placement({"into": "cuda:1", "out": "cuda:0"})
        change = DevicePlan(
            models=(
                # One that moves without trouble, and one that does not.
                ModelPlacement(model="easy", placement=read_placement("cuda:0")),
                ModelPlacement(model="m", placement=placement),
            )
        )
        async with serving(accelerators, tmp_path) as yard:
            await create(yard, "easy", case, "cpu")
            await create(yard, "m", large, "cuda:1")
            for name, each in (("easy", case), ("m", large)):
                await ask(yard, name, each)
            before, plan = await charged(yard, accelerators), await yard.admin(Admin.get_plan)
            assert before == {FIRST: 0, SECOND: large.structure.size_bytes}
            async with asking(yard, "m", large), asking(yard, "easy", case):
                left_bytes = accelerators.large_bytes // 2 + case.structure.size_bytes
                with accelerators.starved(FIRST, left_bytes=left_bytes):
                    error = await refusal_of(yard.admin(Admin.apply_plan, change, timeout_s=60))
                    assert isinstance(error, LoadFailed)
                    assert error.transient
                    assert "models/m" in str(error)
                assert await yard.admin(Admin.get_plan) == plan
            assert await charged(yard, accelerators) == before
            for name in ("easy", "m"):
                residency = await yard.residency(name)
                assert (residency.state, residency.load_count) == (ResidencyState.RESIDENT, 1)
            # There is memory again.
            async with asking(yard, "m", large):
                applied = await yard.admin(Admin.apply_plan, change, timeout_s=60)
                assert placement in [each.placement for each in applied.plan.models]
            assert await charged(yard, accelerators) == {
                FIRST: large.structure.size_bytes // 2 + case.structure.size_bytes,
                SECOND: large.structure.size_bytes // 2,
            }
            assert not (await ask(yard, "m", large)).served.cold

    async def test_who_is_evicted_or_unloaded_gives_every_byte_back(
        self, tmp_path: Path, accelerators: Accelerators
    ) -> None:
        case, large = encoder(tmp_path), wide(tmp_path, accelerators)
        placements = {"small": {"": "cuda:0", "encoder": "cuda:1"}, "large": "cuda:0"}
        cases = {"small": case, "large": large}
        async with serving(accelerators, tmp_path) as yard:
            for name, placement in placements.items():
                await create(yard, name, cases[name], placement)
            await yard.admin(Admin.update_budget, "cuda:0", large.structure.size_bytes)
            small, _ = placed(case, accelerators, {"": "cuda:0", "encoder": "cuda:1"})
            for _ in range(3):
                assert (await ask(yard, "small", case)).served.cold
                assert await charged(yard, accelerators) == small
                assert (await ask(yard, "large", large)).served.cold
                wanted = {FIRST: large.structure.size_bytes, SECOND: 0}
                assert await charged(yard, accelerators) == wanted
            await yard.admin(Admin.unload, "large")
            assert await charged(yard, accelerators) == {FIRST: 0, SECOND: 0}
            assert (await yard.device("cuda:0")).eviction_count == 5

    async def test_a_drained_device_is_empty_while_its_models_answer_from_the_other(
        self, tmp_path: Path, accelerators: Accelerators
    ) -> None:
        case = encoder(tmp_path)
        size_bytes = case.structure.size_bytes
        async with serving(accelerators, tmp_path) as yard:
            anywhere = {"strategy": "auto", "devices": ["cuda:0", "cuda:1"]}
            await create(yard, "m", case, anywhere)
            async with asking(yard, "m", case):
                assert [c.device for c in (await yard.residency("m")).charges] == ["devices/cuda-0"]
                await yard.admin(Admin.drain_device, "cuda:0")

                async def is_empty() -> bool:
                    device = await yard.device("cuda:0")
                    return device.drained and device.accounted_bytes == 0

                await eventually("the device is empty", is_empty)
                assert accelerators.used_bytes(FIRST) == 0
                # Somewhere in this it is loaded on the other one.
            assert await charged(yard, accelerators) == {FIRST: 0, SECOND: size_bytes}
            assert (await yard.residency("m")).load_count == 2
            await yard.admin(Admin.undrain_device, "cuda:0")
            await yard.admin(Admin.drain_device, "cuda:1")
            await ask(yard, "m", case)
            assert await charged(yard, accelerators) == {FIRST: size_bytes, SECOND: 0}

    async def test_a_model_that_mixes_devices_by_itself_fails_alone(
        self, tmp_path: Path, accelerators: Accelerators
    ) -> None:
        case, mixing = encoder(tmp_path), case_of(tmp_path / "store", MIXES, name="mixing")
        async with serving(accelerators, tmp_path) as yard:
            await create(yard, "other", case, {"": "cuda:0", "encoder": "cuda:1"})
            await create(yard, "whole", mixing, "cuda:0")
            await create(yard, "split", mixing, {"called": "cuda:0", "used": "cuda:1"})
            for name, each in (("other", case), ("whole", mixing)):
                await ask(yard, name, each)
            error = await refusal_of(ask(yard, "split", mixing))
            assert isinstance(error, ModelFailed)
            assert error.exception_type == "RuntimeError"
            before = await charged(yard, accelerators)
            async with asking(yard, "other", case):
                for _ in range(3):
                    assert isinstance(await refusal_of(ask(yard, "split", mixing)), ModelFailed)
            assert await charged(yard, accelerators) == before
            for name, each in (("other", case), ("whole", mixing)):
                assert not (await ask(yard, name, each)).served.cold
