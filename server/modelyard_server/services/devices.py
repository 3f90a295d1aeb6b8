"""modelyard.v1.DeviceService."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard.v1 import device_pb2, plan_pb2
from modelyard.v1 import device_service_pb2 as pb
from modelyard_server.catalog.plans import Applied, DevicePlans, PlanChange
from modelyard_server.catalog.writes import Writes
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.execution.engine import Engine
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import DeviceUse
from modelyard_server.services.handler import invalid
from modelyard_server.services.models import deadline_ns_of
from modelyard_server.services.once import Answered, once
from modelyard_server.services.paging import page
from modelyard_server.services.placements import charge_messages, device_message
from modelyard_server.services.plan_messages import (
    change_of,
    device_forecast_messages,
    plan_message,
    report_message,
)
from modelyard_server.transport.api import Call

__all__ = ["DeviceService"]


class DeviceService:
    """Tells what the devices hold and changes the device plan.

    Args:
        devices: by position.
        residency: what they hold.
        engine: what is measured on them.
        plans: the plan.
        writes: makes changes durable, one at a time.
        max_deadline_s: for calls that load something.
    """

    def __init__(
        self,
        *,
        devices: Sequence[ManagedDevice],
        residency: Residency,
        engine: Engine,
        plans: DevicePlans,
        writes: Writes,
        max_deadline_s: float,
    ) -> None:
        self._devices = tuple(devices)
        self._names = tuple(device.name for device in devices)
        self._residency = residency
        self._engine = engine
        self._plans = plans
        self._writes = writes
        self._max_deadline_s = max_deadline_s

    # --- Devices ------------------------------------------------------------------------------

    async def list_devices(
        self, request: pb.ListDevicesRequest, call: Call
    ) -> pb.ListDevicesResponse:
        """See DeviceService.ListDevices."""
        # In the order of the configuration, which is the order of positions: page by those.
        chosen, token = page(
            range(len(self._devices)),
            size=request.page_size,
            token=request.page_token,
            name=lambda i: f"{i:04}",
        )
        return pb.ListDevicesResponse(devices=[self._now(i) for i in chosen], next_page_token=token)

    async def get_device(self, request: pb.GetDeviceRequest, call: Call) -> pb.GetDeviceResponse:
        """See DeviceService.GetDevice."""
        return pb.GetDeviceResponse(device=self._now(self._position(request.name)))

    async def update_budget(
        self, request: pb.UpdateBudgetRequest, call: Call
    ) -> pb.UpdateBudgetResponse:
        """See DeviceService.UpdateBudget."""
        position = self._position(request.name)

        def answer(use: DeviceUse) -> pb.UpdateBudgetResponse:
            drained = self._residency.is_closed(position)
            return pb.UpdateBudgetResponse(device=self._message(position, use, drained))

        async def change(answered: Answered) -> pb.UpdateBudgetResponse:
            return await self._plans.change_device(
                position,
                answer=answer,
                etag=request.etag,
                budget_bytes=request.budget_bytes,
                remember=answered,
            )

        return await once(self._writes, request, pb.UpdateBudgetResponse, change)

    async def drain_device(
        self, request: pb.DrainDeviceRequest, call: Call
    ) -> pb.DrainDeviceResponse:
        """See DeviceService.DrainDevice."""
        position = self._position(request.name)

        def answer(use: DeviceUse) -> pb.DrainDeviceResponse:
            return pb.DrainDeviceResponse(
                device=self._message(position, use, drained=True),
                pinned_models=self._plans.pinned_on(position),
            )

        async def change(answered: Answered) -> pb.DrainDeviceResponse:
            return await self._plans.change_device(
                position, answer=answer, etag=request.etag, drained=True, remember=answered
            )

        return await once(self._writes, request, pb.DrainDeviceResponse, change)

    async def undrain_device(
        self, request: pb.UndrainDeviceRequest, call: Call
    ) -> pb.UndrainDeviceResponse:
        """See DeviceService.UndrainDevice."""
        position = self._position(request.name)

        def answer(use: DeviceUse) -> pb.UndrainDeviceResponse:
            return pb.UndrainDeviceResponse(device=self._message(position, use, drained=False))

        async def change(answered: Answered) -> pb.UndrainDeviceResponse:
            return await self._plans.change_device(
                position, answer=answer, etag=request.etag, drained=False, remember=answered
            )

        return await once(self._writes, request, pb.UndrainDeviceResponse, change)

    # --- The plan -----------------------------------------------------------------------------

    async def get_plan(self, request: pb.GetPlanRequest, call: Call) -> pb.GetPlanResponse:
        """See DeviceService.GetPlan."""
        return pb.GetPlanResponse(plan=plan_message(self._plans.plan(), self._names))

    async def plan_devices(
        self, request: pb.PlanDevicesRequest, call: Call
    ) -> pb.PlanDevicesResponse:
        """See DeviceService.PlanDevices."""
        wanted = self._change_of(request.plan)
        # In its turn: half a plan is no ground for another.
        async with self._writes.alone():
            report = await self._plans.forecast(wanted)
        return pb.PlanDevicesResponse(report=report_message(report, self._names))

    async def apply_plan(self, request: pb.ApplyPlanRequest, call: Call) -> pb.ApplyPlanResponse:
        """See DeviceService.ApplyPlan."""
        wanted = self._change_of(request.plan)
        deadline_ns = deadline_ns_of(call, self._max_deadline_s)

        def answer(applied: Applied) -> pb.ApplyPlanResponse:
            return pb.ApplyPlanResponse(
                plan=plan_message(applied.plan, self._names),
                report=report_message(applied.report, self._names),
            )

        async def change(answered: Answered) -> pb.ApplyPlanResponse:
            applied = await self._plans.apply(
                wanted,
                etag=request.plan.etag,
                deadline_ns=deadline_ns,
                validate_only=request.validate_only,
                remember=lambda found: answered(answer(found)),
            )
            return answer(applied)

        return await once(self._writes, request, pb.ApplyPlanResponse, change)

    async def rebalance_devices(
        self, request: pb.RebalanceDevicesRequest, call: Call
    ) -> pb.RebalanceDevicesResponse:
        """See DeviceService.RebalanceDevices."""
        deadline_ns = deadline_ns_of(call, self._max_deadline_s)
        async with self._writes.alone():
            moves, devices = await self._plans.rebalance(
                deadline_ns=deadline_ns, validate_only=request.validate_only
            )
        return pb.RebalanceDevicesResponse(
            moves=[
                pb.Move(
                    model=f"models/{move.model}",
                    source=charge_messages(move.current, self._names),
                    destination=charge_messages(move.planned, self._names),
                )
                for move in moves
            ],
            devices=device_forecast_messages(devices),
        )

    def _change_of(self, plan: plan_pb2.DevicePlan) -> PlanChange:
        return change_of(plan, self._devices, self._position)

    def _position(self, name: str) -> int:
        if not name.startswith("devices/"):
            raise invalid(Violation("name", 'must be "devices/{device}"'))
        for i, device in enumerate(self._devices):
            if device.name == name:
                return i
        there = ", ".join(str(device.device) for device in self._devices)
        raise Refusal(
            Reason.DEVICE_NOT_FOUND,
            f"the server manages no device {name.removeprefix('devices/')[:64]!r}; "
            f"there are: {there}",
            resource=Resource("device", name[:64]),
        )

    def _now(self, position: int) -> device_pb2.ManagedDevice:
        return self._message(
            position, self._residency.device_use(position), self._residency.is_closed(position)
        )

    def _message(self, position: int, use: DeviceUse, drained: bool) -> device_pb2.ManagedDevice:
        device = self._devices[position]
        memory = self._engine.memory(position)
        return device_pb2.ManagedDevice(
            name=device.name,
            device=device_message(device.device),
            logical=device.logical,
            budget_bytes=use.budget,
            reserved_bytes=use.reserved,
            resident_bytes=use.resident,
            draining_bytes=use.draining,
            quarantined_bytes=use.quarantined,
            deficit_bytes=use.deficit,
            peak_accounted_bytes=use.peak,
            measured_bytes=memory.measured_bytes,
            peak_measured_bytes=memory.peak_measured_bytes,
            load_count=use.load_count,
            eviction_count=use.eviction_count,
            etag=self._plans.device_etag(position, budget_bytes=use.budget, drained=drained),
            drained=drained,
            total_bytes=device.total_bytes,
            transfer_bytes_per_second=device.transfer_bytes_per_s,
            saved_bytes=use.saved,
        )
