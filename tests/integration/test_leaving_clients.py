"""Clients that leave, and deadlines: what they waited for is given back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.support import faulty_models
from tests.support.bare_calls import PREDICT, X_TENSOR, Refused, request_of, send, send_refused
from tests.support.config_text import CPU, device_table, model_table
from tests.support.faulty_yards import X, stuck_model, torch_model, yard_with
from tests.support.server import eventually, refusal_of, running_app

from modelyard import Admin, DeadlineExceeded, ManagedDevice, ModelyardError, ResidencyState
from modelyard_server.config import ServerConfig

LONG_S = 60.0
"""A deadline that no call here comes to by itself."""


def pass_time(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Moves the time of the loop's timers on. That of gRPC, which sends deadlines, it does not."""
    loop = asyncio.get_running_loop()
    time_before = loop.time
    patch.setattr(loop, "time", lambda: time_before() + seconds)


async def test_a_client_that_leaves_while_it_waits_gives_its_ticket_back(tmp_path: Path) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInLoad")) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            waiters = [asyncio.create_task(yard.client.predict("stuck", X)) for _ in range(20)]
            await eventually("the load is stuck", gate.is_waited_at)

            async def waiting(count: int) -> bool:
                return (await yard.residency("stuck")).waiting_request_count == count

            await eventually("all wait", lambda: waiting(20))
            for waiter in waiters[:19]:
                waiter.cancel()
            await eventually("one waits", lambda: waiting(1))
            waiters[19].cancel()
            await eventually("nobody waits", lambda: waiting(0))
            # The load itself is not given up for it.
            assert (await yard.residency("stuck")).state is ResidencyState.LOADING
        await asyncio.gather(*waiters, return_exceptions=True)
        await yard.becomes("stuck", ResidencyState.RESIDENT)
        stats = await yard.admin(Admin.stats)
        assert stats.active_request_count == 0


async def test_the_last_client_that_leaves_a_queue_stops_the_load_from_beginning(
    tmp_path: Path,
) -> None:
    faulty_models.make_weights(tmp_path / "store" / "behind")
    config = CPU + stuck_model(tmp_path, "StuckInLoad") + torch_model("behind", "Adding")
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            await yard.admin(Admin.load, "stuck")
            await eventually("the load is stuck", gate.is_waited_at)
            waiter = asyncio.create_task(yard.client.predict("behind", X))
            await yard.becomes("behind", ResidencyState.QUEUED)
            waiter.cancel()
            await yard.becomes("behind", ResidencyState.COLD)
            await asyncio.gather(waiter, return_exceptions=True)
        await yard.becomes("stuck", ResidencyState.RESIDENT)
        assert (await yard.residency("behind")).load_count == 0


async def test_a_client_that_leaves_while_its_model_runs_keeps_it_in_use_until_it_ends(
    tmp_path: Path,
) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInRun")) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            call = asyncio.create_task(yard.client.predict("stuck", X))
            await eventually("the model runs", gate.is_waited_at)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

            async def server_knows() -> bool:
                stats = await yard.admin(Admin.stats)
                return stats.active_request_count == 0

            await eventually("the server knows that the client left", server_knows)
            assert (await yard.residency("stuck")).lease_count == 1

            unload = asyncio.create_task(yard.admin(Admin.unload, "stuck"))
            draining = await yard.becomes("stuck", ResidencyState.DRAINING)
            assert draining.lease_count == 1
            device = await yard.device()
            assert device.draining_bytes == 4 * faulty_models.ROWS
            assert not unload.done()
        unloaded = await unload
        assert unloaded.state is ResidencyState.COLD
        assert unloaded.lease_count == 0
        assert unloaded.quarantined == ()


async def test_work_that_nobody_waits_for_any_more_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInRun")) as yard:

        async def leases(count: int) -> bool:
            return (await yard.residency("good")).lease_count == count

        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            running = asyncio.create_task(yard.client.predict("stuck", X, timeout_s=3 * LONG_S))
            await eventually("the model runs", gate.is_waited_at)
            behind = [
                asyncio.create_task(refusal_of(yard.client.predict("good", X, timeout_s=LONG_S)))
                for _ in range(3)
            ]
            await eventually("they are behind it", lambda: leases(3))
            pass_time(monkeypatch, LONG_S)
            assert {(await error).reason for error in behind} == {"DEADLINE_IN_RUN"}
            # Queued behind the one that runs, and counted until their turn has come.
            assert await leases(3)
        await running
        await eventually("their leases are back", lambda: leases(0))


async def test_a_deadline_that_passes_while_the_model_runs_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInRun")) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            call = asyncio.create_task(
                refusal_of(yard.client.predict("stuck", X, timeout_s=LONG_S))
            )
            await eventually("the model runs", gate.is_waited_at)
            pass_time(monkeypatch, LONG_S)
            error = await call
            assert isinstance(error, DeadlineExceeded)
            assert error.phase == "run"
            assert (await yard.residency("stuck")).lease_count == 1


async def test_deadlines_of_nothing_and_in_the_past_end_the_call_and_leave_nothing(
    tmp_path: Path,
) -> None:
    async with yard_with(tmp_path, CPU + stuck_model(tmp_path, "StuckInLoad")) as yard:
        with faulty_models.closed_gate(tmp_path / "gate"):
            for timeout_s in (0.0, -1.0, -1e9, 1e-9, 1e-6, 1e-3):
                body = request_of("stuck", X_TENSOR)
                refused = await send_refused(yard, PREDICT, body, timeout_s=timeout_s)
                assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
                # gRPC rounds up to its smallest unit: a hit may make it.
                try:
                    await send(yard, PREDICT, request_of("echo", X_TENSOR), timeout_s=timeout_s)
                except Refused as late:
                    assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED

            async def nobody_waits() -> bool:
                return (await yard.admin(Admin.stats)).waiting_request_count == 0

            await eventually("nobody waits", nobody_waits)


async def test_calls_without_a_deadline_get_the_servers(tmp_path: Path) -> None:
    config = "[server]\ndefault_deadline_s = 0.3\n" + CPU + stuck_model(tmp_path, "StuckInLoad")
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate"):
            body = request_of("stuck", X_TENSOR)
            # Less than the server has where nothing is said, and much more than it takes.
            async with asyncio.timeout(ServerConfig().default_deadline_s * 0.9):
                refused = await send_refused(yard, PREDICT, body, timeout_s=None)
            assert refused.reason == "DEADLINE_IN_LOAD"


async def test_deadlines_of_years_are_cut_to_the_servers_longest(tmp_path: Path) -> None:
    config = "[server]\ndefault_deadline_s = 0.2\nmax_deadline_s = 0.3\n"
    config += CPU + stuck_model(tmp_path, "StuckInLoad")
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate"):
            body = request_of("stuck", X_TENSOR)
            async with asyncio.timeout(LONG_S):
                refused = await send_refused(yard, PREDICT, body, timeout_s=10 * 365 * 86400.0)
            assert refused.reason == "DEADLINE_IN_LOAD"


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(tmp_path: Path) -> None:
    """Six models, room for two, and nobody waits for longer than chance lets them."""
    config = device_table("cpu", 2_500_000)
    for index in range(6):
        config += model_table(f"m-{index}", "identity", options={"size_bytes": 1_000_000})
    chance = np.random.default_rng(17)
    async with running_app(config, tmp_path) as yard:

        async def come_and_go(index: int, patience_s: float) -> str:
            try:
                async with asyncio.timeout(patience_s):
                    await yard.client.predict(f"m-{index % 6}", X)
            except TimeoutError:
                return "left"
            except ModelyardError as error:
                return str(error.reason)
            return "answered"

        patience = chance.exponential(0.01, 300)
        ends = await asyncio.gather(
            *(come_and_go(index, float(patience_s)) for index, patience_s in enumerate(patience))
        )
        assert set(ends) <= {"left", "answered"}
        assert "left" in ends
        await yard.at_rest()
        stats = await yard.admin(Admin.stats)
        assert (stats.active_request_count, stats.waiting_request_count) == (0, 0)
        device: ManagedDevice = await yard.device()
        assert device.peak_accounted_bytes <= device.budget_bytes
        assert device.peak_measured_bytes <= device.budget_bytes
        for index in range(6):
            await yard.client.predict(f"m-{index}", X)


async def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    config = "[yard]\nmax_waiting_per_model = 3\n" + CPU + stuck_model(tmp_path, "StuckInLoad")
    async with yard_with(tmp_path, config) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            waiters = [asyncio.create_task(yard.client.predict("stuck", X)) for _ in range(3)]
            await eventually("the load is stuck", gate.is_waited_at)

            async def all_wait() -> bool:
                return (await yard.residency("stuck")).waiting_request_count == 3

            await eventually("all wait", all_wait)
            error = await refusal_of(yard.admin(Admin.load, "stuck"))
            assert error.reason == "QUEUE_FULL"
            assert error.retry_after_s is not None
            assert error.retry_after_s > 0
            assert "retry_after_ms=" in str(error)
        await asyncio.gather(*waiters)
