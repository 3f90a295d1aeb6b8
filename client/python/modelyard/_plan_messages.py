"""Device plans and what they do as messages, and back."""

from __future__ import annotations

from collections.abc import Iterable

from modelyard._admin_messages import charges_from, placed_model_from, time_from
from modelyard._device_messages import placement_from, set_placement
from modelyard.plans import (
    DeviceForecast,
    DevicePlan,
    DeviceSetting,
    Displacement,
    ModelForecast,
    ModelPlacement,
    Move,
    Obstacle,
    PlanApplied,
    PlanReport,
    Rebalanced,
)
from modelyard.v1 import device_service_pb2, plan_pb2

__all__ = [
    "plan_applied_from",
    "plan_from",
    "plan_message",
    "plan_report_from",
    "rebalanced_from",
]


def plan_message(plan: DevicePlan, etag: str | None = None) -> plan_pb2.DevicePlan:
    """Return a plan as a message.

    Args:
        plan: the change.
        etag: instead of the plan's own; None keeps that.

    Raises:
        TypeError: ``plan`` is no plan, or ``etag`` no text.
    """
    if not isinstance(plan, DevicePlan):
        raise TypeError(
            f"plan must be a DevicePlan, got {type(plan).__name__}: DevicePlan.from_dict makes one"
        )
    message = plan_pb2.DevicePlan(
        devices=(
            plan_pb2.DeviceSetting(
                device=setting.device,
                # None leaves a field unset, which is not 0 or False.
                budget_bytes=setting.budget_bytes,
                budget_percent=setting.budget_percent,
                drained=setting.drained,
            )
            for setting in plan.devices
        ),
        etag=plan.etag if etag is None else etag,
    )
    for entry in plan.models:
        set_placement(message.models.add(model=entry.model), entry.placement)
    return message


def plan_from(message: plan_pb2.DevicePlan) -> DevicePlan:
    """Return a plan. Raises ``ValueError`` if it breaks a rule of plans or placements."""
    return DevicePlan(
        devices=tuple(
            DeviceSetting(
                device=setting.device,
                budget_bytes=setting.budget_bytes if setting.HasField("budget_bytes") else None,
                budget_percent=(
                    setting.budget_percent if setting.HasField("budget_percent") else None
                ),
                drained=setting.drained if setting.HasField("drained") else None,
            )
            for setting in message.devices
        ),
        models=tuple(
            ModelPlacement(model=entry.model, placement=placement_from(entry))
            for entry in message.models
        ),
        etag=message.etag,
        revision=message.revision,
        updated_at=time_from(message.update_time) if message.HasField("update_time") else None,
    )


def plan_report_from(message: plan_pb2.PlanReport) -> PlanReport:
    """Return what a plan does."""
    return PlanReport(
        models=tuple(
            ModelForecast(
                model=model.model,
                alternatives=tuple(map(placed_model_from, model.alternatives)),
                placement_changed=model.placement_changed,
                current=charges_from(model.current),
                planned=charges_from(model.planned),
                staged=model.staged,
            )
            for model in message.models
        ),
        displaced=tuple(
            Displacement(
                model=displaced.model,
                charges=charges_from(displaced.charges),
                cause=displaced.cause,
                in_use=displaced.in_use,
            )
            for displaced in message.displaced
        ),
        obstacles=tuple(
            Obstacle(
                subject=obstacle.subject,
                reason=obstacle.reason,
                description=obstacle.description,
                needed_bytes=obstacle.needed_bytes,
                available_bytes=obstacle.available_bytes,
            )
            for obstacle in message.obstacles
        ),
        devices=_forecasts_from(message.devices),
    )


def plan_applied_from(message: device_service_pb2.ApplyPlanResponse) -> PlanApplied:
    """Return the plan in force and what it did. Raises as ``plan_from``."""
    return PlanApplied(plan=plan_from(message.plan), report=plan_report_from(message.report))


def rebalanced_from(message: device_service_pb2.RebalanceDevicesResponse) -> Rebalanced:
    """Return what was moved."""
    return Rebalanced(
        moves=tuple(
            Move(
                model=move.model,
                source=charges_from(move.source),
                destination=charges_from(move.destination),
            )
            for move in message.moves
        ),
        devices=_forecasts_from(message.devices),
    )


def _forecasts_from(messages: Iterable[plan_pb2.DeviceForecast]) -> tuple[DeviceForecast, ...]:
    return tuple(
        DeviceForecast(
            device=device.device,
            budget_bytes=device.budget_bytes,
            used_bytes=device.used_bytes,
            drained=device.drained,
        )
        for device in messages
    )
