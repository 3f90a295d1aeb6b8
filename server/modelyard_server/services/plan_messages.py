"""Device plans as messages, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from modelyard.placements import Placement
from modelyard.v1 import plan_pb2
from modelyard_server.catalog.forecasts import DeviceForecast, PlanReport
from modelyard_server.catalog.model import is_model_id
from modelyard_server.catalog.plans import Plan, PlanChange
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Refusal, Violation
from modelyard_server.services.handler import invalid
from modelyard_server.services.placements import (
    charge_messages,
    put_placement,
    read_placement_of,
    way_message,
)

__all__ = ["change_of", "device_forecast_messages", "plan_message", "report_message"]


def change_of(
    plan: plan_pb2.DevicePlan,
    devices: Sequence[ManagedDevice],
    position_of: Callable[[str], int],
) -> PlanChange:
    """The change that a message asks for.

    Args:
        plan: the message.
        devices: by position.
        position_of: of a device's resource name; raises Refusal for none.

    Raises:
        Refusal: INVALID_FIELD, with every violation at once.
    """
    violations: list[Violation] = []
    budgets: dict[int, int] = {}
    drained: dict[int, bool] = {}
    placements: dict[str, Placement | None] = {}
    seen: set[int] = set()
    for i, setting in enumerate(plan.devices):
        field = f"plan.devices[{i}]"
        try:
            position = position_of(setting.device)
        except Refusal as refusal:
            found = [each.description for each in refusal.violations] or [refusal.text]
            violations += (Violation(f"{field}.device", text) for text in found)
            continue
        if position in seen:
            violations.append(Violation(f"{field}.device", f"{setting.device} is there twice"))
        seen.add(position)
        if setting.HasField("budget_bytes") and setting.HasField("budget_percent"):
            violations.append(
                Violation(field, "give budget_bytes or budget_percent, not both of them")
            )
        elif setting.HasField("budget_bytes"):
            budgets[position] = setting.budget_bytes
        elif setting.HasField("budget_percent"):
            percent = setting.budget_percent
            if not 0 < percent <= 100:  # NaN is not, either.
                violations.append(
                    Violation(f"{field}.budget_percent", "must be above 0 and at most 100")
                )
            else:
                device = devices[position]
                available = max(0, device.total_bytes - device.reserve_bytes)
                budgets[position] = int(Fraction(percent) * available / 100)
        if setting.HasField("drained"):
            drained[position] = setting.drained
    for i, wanted in enumerate(plan.models):
        field = f"plan.models[{i}]"
        model_id = wanted.model.removeprefix("models/")
        if model_id == wanted.model or not is_model_id(model_id):
            violations.append(Violation(f"{field}.model", 'must be "models/{model}"'))
            continue
        if model_id in placements:
            violations.append(Violation(f"{field}.model", f"{wanted.model} is there twice"))
            continue
        try:
            placements[model_id] = read_placement_of(
                wanted, wanted.WhichOneof("where"), f"{field}."
            )
        except Refusal as refusal:
            violations += refusal.violations
    if violations:
        raise invalid(*violations)
    return PlanChange(budgets=budgets, drained=drained, placements=placements)


def plan_message(plan: Plan, device_names: Sequence[str]) -> plan_pb2.DevicePlan:
    """The message of the plan in force."""
    message = plan_pb2.DevicePlan(
        devices=[
            plan_pb2.DeviceSetting(
                device=name, budget_bytes=state.budget_bytes, drained=state.drained
            )
            for name, state in zip(device_names, plan.devices, strict=True)
        ],
        etag=plan.etag,
        revision=plan.revision,
    )
    for model_id, placement in plan.placements.items():
        put_placement(message.models.add(model=f"models/{model_id}"), placement)
    if plan.changed is not None:
        message.update_time.FromDatetime(plan.changed)
    return message


def report_message(report: PlanReport, device_names: Sequence[str]) -> plan_pb2.PlanReport:
    """The message of a forecast."""
    return plan_pb2.PlanReport(
        models=[
            plan_pb2.ModelForecast(
                model=f"models/{model.model}",
                alternatives=[way_message(way, device_names) for way in model.ways],
                placement_changed=model.placement_changed,
                current=charge_messages(model.current, device_names),
                planned=charge_messages(model.planned, device_names),
                staged=model.staged,
            )
            for model in report.models
        ],
        displaced=[
            plan_pb2.Displacement(
                model=each.model,
                charges=charge_messages(each.charges, device_names),
                cause=each.cause,
                in_use=each.in_use,
            )
            for each in report.displaced
        ],
        obstacles=[
            plan_pb2.Obstacle(
                subject=each.subject,
                reason=each.refusal.reason.name,
                description=each.refusal.text,
                needed_bytes=each.needed_bytes,
                available_bytes=each.available_bytes,
            )
            for each in report.obstacles
        ],
        devices=device_forecast_messages(report.devices),
    )


def device_forecast_messages(devices: Sequence[DeviceForecast]) -> list[plan_pb2.DeviceForecast]:
    """The messages of devices as they will be."""
    return [
        plan_pb2.DeviceForecast(
            device=device.device,
            budget_bytes=device.budget_bytes,
            used_bytes=device.used_bytes,
            drained=device.drained,
        )
        for device in devices
    ]
