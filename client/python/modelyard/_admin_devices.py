"""An operator's calls about devices and the device plan."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard._admin_calls import PAGE_SIZE, AdminCalls, checked_etag, checked_request_id
from modelyard._device_messages import managed_device_from
from modelyard._names import device_name
from modelyard._plan_messages import (
    plan_applied_from,
    plan_from,
    plan_message,
    plan_report_from,
    rebalanced_from,
)
from modelyard.devices import Device
from modelyard.plans import DevicePlan, DrainedDevice, PlanApplied, PlanReport, Rebalanced
from modelyard.resources import ManagedDevice
from modelyard.v1 import device_pb2, device_service_pb2
from modelyard.v1.device_service_pb2_grpc import DeviceServiceStub

__all__ = ["DeviceCalls"]


class DeviceCalls(AdminCalls):
    """Tells what devices hold, and changes budgets, drains and the plan."""

    _devices: DeviceServiceStub

    def get_device(self, device: Device | str, *, timeout_s: float | None = None) -> ManagedDevice:
        """Return one device. Raises ``DeviceNotFound`` and as the class says."""
        request = device_service_pb2.GetDeviceRequest(name=device_name(device))
        response = self._connection.call(self._devices.GetDevice, request, timeout_s)
        return self._read(managed_device_from, response.device)

    def list_devices(self, *, timeout_s: float | None = None) -> tuple[ManagedDevice, ...]:
        """Return every device, in the order of the configuration. ``timeout_s`` is for all."""

        def page(token: str, left_s: float) -> tuple[Sequence[device_pb2.ManagedDevice], str]:
            request = device_service_pb2.ListDevicesRequest(page_size=PAGE_SIZE, page_token=token)
            response = self._connection.call(self._devices.ListDevices, request, left_s)
            return response.devices, response.next_page_token

        return self._list(page, managed_device_from, timeout_s)

    def update_budget(
        self,
        device: Device | str,
        budget_bytes: int,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> ManagedDevice:
        """Change a device's budget while requests flow; return the device right after it.

        A lower budget drains what no longer fits: idle models first, then models in use when
        their requests end. ``deficit_bytes`` of the answer says how much is left to do.

        Args:
            device: which one.
            budget_bytes: the new budget, 0 or more.
            etag: change it only if this is the device's etag.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            DeviceNotFound, EtagMismatch, InvalidRequest: as named.
            BudgetExhausted: pinned models hold more than the new budget.
            CatalogUnavailable: it could not be kept; try again.
            ModelyardError: any other failure.
        """
        # Exactly int: True is no budget, and protobuf would take it.
        if type(budget_bytes) is not int:
            raise TypeError(f"budget_bytes must be an int, got {type(budget_bytes).__name__}")
        request = device_service_pb2.UpdateBudgetRequest(
            name=device_name(device),
            budget_bytes=budget_bytes,
            etag=checked_etag(etag),
            request_id=checked_request_id(request_id),
        )
        response = self._change(self._devices.UpdateBudget, request, timeout_s)
        return self._read(managed_device_from, response.device)

    def drain_device(
        self,
        device: Device | str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> DrainedDevice:
        """Empty a device; returns at once. Idempotent.

        Nothing is loaded onto it any more, and what is there leaves when its requests end; pinned
        models stay. Requests of models that cannot be elsewhere wait until it is undrained.

        Args:
            device: which one.
            etag: drain it only if this is the device's etag.
            request_id: see the class.
            timeout_s: see the class.

        Returns:
            The device right after the call, and the pinned models that stay on it.

        Raises:
            DeviceNotFound, EtagMismatch, InvalidRequest: as named.
            CatalogUnavailable: it could not be kept; try again.
            ModelyardError: any other failure.
        """
        request = device_service_pb2.DrainDeviceRequest(
            name=device_name(device),
            etag=checked_etag(etag),
            request_id=checked_request_id(request_id),
        )
        response = self._change(self._devices.DrainDevice, request, timeout_s)
        return DrainedDevice(
            device=self._read(managed_device_from, response.device),
            pinned_models=tuple(response.pinned_models),
        )

    def undrain_device(
        self,
        device: Device | str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> ManagedDevice:
        """Let a drained device take models again; return it. Idempotent. As ``drain_device``."""
        request = device_service_pb2.UndrainDeviceRequest(
            name=device_name(device),
            etag=checked_etag(etag),
            request_id=checked_request_id(request_id),
        )
        response = self._change(self._devices.UndrainDevice, request, timeout_s)
        return self._read(managed_device_from, response.device)

    def get_plan(self, *, timeout_s: float | None = None) -> DevicePlan:
        """Return the plan in force: every device, and every model with its placement."""
        request = device_service_pb2.GetPlanRequest()
        response = self._connection.call(self._devices.GetPlan, request, timeout_s)
        return self._read(plan_from, response.plan)

    def plan_devices(self, plan: DevicePlan, *, timeout_s: float | None = None) -> PlanReport:
        """Return what applying a plan would do; changes nothing.

        A plan that cannot be applied is answered too: ``obstacles`` says why. The plan's etag is
        not looked at.

        Raises:
            InvalidRequest: it names no such device or model, or a budget out of range.
            ModelyardError: any other failure.
        """
        request = device_service_pb2.PlanDevicesRequest(plan=plan_message(plan))
        response = self._connection.call(self._devices.PlanDevices, request, timeout_s)
        return self._read(plan_report_from, response.report)

    def apply_plan(
        self,
        plan: DevicePlan,
        *,
        etag: str | None = None,
        validate_only: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> PlanApplied:
        """Apply a plan, all of it or nothing, while requests flow; return what it did.

        Returns when resident models whose placement changes are loaded in their new places, so
        allow for that with ``timeout_s``. A call that is not done by then, or is broken off with
        Ctrl-C, leaves the plan as it was.

        Args:
            plan: the change; what it does not name stays as it is.
            etag: apply it only if this is the etag of the plan in force. None takes the one that
                ``plan`` has, as a plan from ``get_plan`` does; ``""`` applies to whatever it is.
            validate_only: check everything and change nothing.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            InvalidRequest, EtagMismatch: as named.
            PlacementInvalid, ModelNeverFits, BudgetExhausted: it cannot be applied.
            LoadFailed: a model could not be loaded in its new place.
            DeadlineExceeded: not done in time.
            CatalogUnavailable: it could not be kept; try again.
            ModelyardError: any other failure.
        """
        if etag is not None:
            checked_etag(etag)
        request = device_service_pb2.ApplyPlanRequest(
            plan=plan_message(plan, etag),
            validate_only=validate_only,
            request_id=checked_request_id(request_id, validate_only=validate_only),
        )
        response = self._change(self._devices.ApplyPlan, request, timeout_s)
        return self._read(plan_applied_from, response)

    def rebalance_devices(
        self, *, validate_only: bool = False, timeout_s: float | None = None
    ) -> Rebalanced:
        """Even out the devices; return what was moved.

        Models that are balanced or sequential are cut again for the budgets of today, and models
        that may be anywhere move from the fullest devices to the emptiest. Each is loaded in its
        new place before it leaves the old one; pinned models stay.

        Args:
            validate_only: say what would be moved, and move nothing.
            timeout_s: see the class.

        Raises:
            LoadFailed, DeadlineExceeded: the moves made before stay.
            ModelyardError: any other failure.
        """
        request = device_service_pb2.RebalanceDevicesRequest(validate_only=validate_only)
        response = self._connection.call(self._devices.RebalanceDevices, request, timeout_s)
        return self._read(rebalanced_from, response)
