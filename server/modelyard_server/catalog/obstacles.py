"""What can stand in the way of a device plan: each case as an Obstacle, with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.forecasts import Obstacle
from modelyard_server.catalog.model import Model
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placed import PlacedAs
from modelyard_server.errors import QuotaViolation, Reason, Refusal, Violation
from modelyard_server.residency.rehearsal import NoRoom, Rehearsal

__all__ = [
    "beaten",
    "closed_to",
    "fits_somewhere",
    "never_fitting",
    "no_room_for",
    "overfull",
    "refused",
]

Held = Mapping[str, Mapping[int, int]]
"""Bytes that pinned models hold, by the model's id and by position of the device."""


def fits_somewhere(ways: Sequence[PlacedAs], budgets: Sequence[int]) -> bool:
    """True if budgets hold a model in one of its ways."""
    return any(
        all(needed <= budgets[device] for device, needed in way.charges.items()) for way in ways
    )


def refused(model: Model, refusal: Refusal) -> Obstacle:
    """Its new placement was refused."""
    return Obstacle(
        subject=f"models/{model.id}",
        refusal=refusal,
        needed_bytes=int(refusal.metadata.get("needed_bytes", 0)),
        available_bytes=int(refusal.metadata.get("budget_bytes", 0)),
    )


def beaten(model: Model, warnings: Sequence[str]) -> Obstacle:
    """Its options beat any placement."""
    text = f"a placement would have no effect: {'; '.join(warnings)}"
    return Obstacle(subject=f"models/{model.id}", refusal=Refusal(Reason.PLACEMENT_INVALID, text))


def never_fitting(
    catalog: Catalog,
    ways_of: Mapping[str, Sequence[PlacedAs]],
    devices: Sequence[ManagedDevice],
    now: Sequence[int],
    budgets: Sequence[int],
) -> Iterator[Obstacle]:
    """Models that fit today, or are to be placed anew, and fit no budget after the change.

    Args:
        catalog: all models.
        ways_of: how the models that change may be loaded, by id.
        devices: by position.
        now: the budgets of today.
        budgets: those after the change.
    """
    for model in catalog.models():
        ways = ways_of.get(model.id, model.ways)
        if fits_somewhere(ways, budgets):
            continue
        if model.id not in ways_of and not fits_somewhere(ways, now):
            continue  # No matter of this change.
        short = [
            (needed - budgets[device], device, needed)
            for way in ways
            for device, needed in way.charges.items()
            if needed > budgets[device]
        ]
        _, device, needed = min(short)
        name = devices[device].name
        yield Obstacle(
            subject=f"models/{model.id}",
            refusal=Refusal(
                Reason.MODEL_NEVER_FITS,
                f"needs {needed} bytes on {name}, whose budget would be {budgets[device]} bytes",
                metadata={
                    "device": name,
                    "needed_bytes": str(needed),
                    "budget_bytes": str(budgets[device]),
                },
                violations=tuple(
                    Violation(devices[i].name, f"needs {n} bytes, budget {budgets[i]} bytes")
                    for _, i, n in short
                ),
            ),
            needed_bytes=needed,
            available_bytes=budgets[device],
        )


def overfull(
    rehearsal: Rehearsal, owed: Sequence[int], devices: Sequence[ManagedDevice], pinned: Held
) -> Iterator[Obstacle]:
    """Devices on which more is kept than their budget, and more so than before.

    Args:
        rehearsal: of the change; has ended.
        owed: the deficits before it, by position, when what ran had ended.
        devices: by position.
        pinned: what pinned models hold.
    """
    for i, device in enumerate(devices):
        account = rehearsal.account(i)
        if account.deficit <= owed[i]:
            continue
        text = (
            f"pinned models hold {account.used} bytes on {device.name}, and its budget would be "
            f"{account.budget} bytes; unpin some of them first"
        )
        yield _exhausted(device.name, device.name, text, account.used, account.budget, i, pinned)


def no_room_for(
    model_id: str, short: NoRoom, devices: Sequence[ManagedDevice], pinned: Held
) -> Obstacle:
    """A pinned model for which others that are pinned leave no room in its new place."""
    i, name = short.device, devices[short.device].name
    free = max(0, short.budget - sum(charges.get(i, 0) for charges in pinned.values()))
    text = (
        f"is pinned and needs {short.needed} bytes on {name}, where other pinned models leave "
        f"{free} of {short.budget} bytes"
    )
    return _exhausted(f"models/{model_id}", name, text, short.needed, free, i, pinned)


def closed_to(model_id: str, way: PlacedAs, device: int, name: str) -> Obstacle:
    """A pinned model whose new place would be drained.

    Args:
        model_id: its id.
        way: the preferred way to load it.
        device: position of the drained device of that way.
        name: of the device.
    """
    needed = way.charges[device]
    text = f"is pinned and needs {needed} bytes on {name}, which would be drained"
    return _exhausted(f"models/{model_id}", name, text, needed, 0, device, {})


def _exhausted(
    subject: str,
    device: str,
    text: str,
    needed_bytes: int,
    free_bytes: int,
    position: int,
    pinned: Held,
) -> Obstacle:
    held = [(charges.get(position, 0), name) for name, charges in pinned.items()]
    holders = ", ".join(f"{name}={size}" for size, name in sorted(held, reverse=True) if size)
    refusal = Refusal(
        Reason.BUDGET_EXHAUSTED,
        text,
        metadata={
            "device": device,
            "needed_bytes": str(needed_bytes),
            "free_bytes": str(free_bytes),
            "holders": holders,
        },
        quota=(QuotaViolation(device, text),),
    )
    return Obstacle(
        subject=subject, refusal=refusal, needed_bytes=needed_bytes, available_bytes=free_bytes
    )
