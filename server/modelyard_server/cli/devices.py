"""``modelyard devices``: what devices hold, their budgets, and emptying and evening them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from modelyard_server.cli import plans as plan_commands
from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    AsJson,
    DeviceName,
    Server,
    Timeout,
    ask,
    exit_codes,
    refuse_options_before,
)
from modelyard_server.cli.printing import (
    charges,
    print_devices,
    print_json,
    print_line,
    print_table,
    short_name,
)
from modelyard_server.cli.printing import size as size_text
from modelyard_server.devices.sizes import parse_size

if TYPE_CHECKING:
    from modelyard import Admin, ManagedDevice, Residency

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    devices = typer.Typer(help="Devices, their budgets and the device plan.")
    devices.callback(invoke_without_command=True)(_group)
    devices.command("list")(_list)
    plan_commands.register(devices)
    devices.command("drain")(_drain)
    devices.command("undrain")(_undrain)
    devices.command("rebalance")(_rebalance)
    devices.command("budget")(_budget)
    app.add_typer(devices, name="devices")
    app.command("budget")(_budget)


def _group(
    ctx: typer.Context,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """List the devices, or do what a command says."""
    if ctx.invoked_subcommand is None:
        _list(server, timeout, as_json)
    else:
        refuse_options_before(ctx)


def _list(
    server: Server = DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """List the devices, their budgets and what they hold; and the host tier, if there is one."""
    devices, tier = ask(
        server,
        timeout,
        # Programs are told of the tier by `stats`: here they get devices, as ever.
        lambda admin: (admin.list_devices(), None if as_json else admin.stats().host_tier),
    )
    if as_json:
        print_json(devices)
        return
    print_devices(devices)
    if tier is not None:
        print_line(
            f"host tier: {size_text(tier.accounted_bytes)} of {size_text(tier.budget_bytes)} "
            f"in {tier.copy_count} copies"
        )


def _drain(
    device: DeviceName,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when all but pinned models have left.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Empty a device: nothing is loaded onto it, and what is there leaves when it is idle.

    Pinned models stay. Returns at once, or with --wait when the device is empty.
    """
    from modelyard import Admin, DrainedDevice

    with exit_codes(), Admin(server, timeout_s=timeout) as admin:
        drained = admin.drain_device(device)
        if wait:
            _wait_until_left(admin, drained.device, timeout)
            drained = DrainedDevice(
                device=admin.get_device(device), pinned_models=drained.pinned_models
            )
    if as_json:
        print_json(drained)
        return
    print_devices([drained.device])
    if drained.pinned_models:
        print_line(f"pinned, so they stay: {', '.join(map(short_name, drained.pinned_models))}")


def _wait_until_left(admin: Admin, device: ManagedDevice, timeout_s: float) -> None:
    """Follow what is in memory until only pinned models hold anything on a device."""
    standing: dict[str, Residency] = {}
    said: list[str] = []
    with admin.watch_residencies(timeout_s=timeout_s) as watch:
        for change in watch:
            if change.snapshot_begins:
                standing.clear()
            standing.update({residency.name: residency for residency in change.residencies})
            for name in change.removed:
                standing.pop(name, None)
            if change.snapshot and not change.snapshot_complete:
                continue
            staying = sorted(
                short_name(residency.model)
                for residency in standing.values()
                if not residency.pinned
                and any(
                    charge.device == device.name and charge.size_bytes
                    for charge in residency.charges
                )
            )
            if not staying:
                return
            if staying != said:
                print_line(f"still on {short_name(device.name)}: {', '.join(staying)}", err=True)
                said = staying


def _undrain(
    device: DeviceName,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Let a drained device take models again."""
    changed = ask(server, timeout, lambda admin: admin.undrain_device(device))
    if as_json:
        print_json(changed)
    else:
        print_devices([changed])


def _rebalance(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be moved, and move nothing.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Even out the devices: cut balanced models again, and move others to where there is room."""
    done = ask(server, timeout, lambda admin: admin.rebalance_devices(validate_only=dry_run))
    if as_json:
        print_json(done)
        return
    if done.moves:
        print_table(
            ["model", "from", "to"],
            (
                [short_name(move.model), charges(move.source), charges(move.destination)]
                for move in done.moves
            ),
        )
    else:
        print_line("nothing to move")
    plan_commands.print_forecasts(done.devices)


def _budget(
    device: DeviceName,
    size: Annotated[
        str,
        typer.Argument(
            metavar="BYTES", help="New budget, such as 300MB or 1.5GiB.", show_default=False
        ),
    ],
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Change the budget of a device while requests flow."""
    with exit_codes():
        budget_bytes = parse_size(size)
    changed = ask(server, timeout, lambda admin: admin.update_budget(device, budget_bytes))
    if as_json:
        print_json(changed)
    else:
        print_devices([changed])
