"""`modelyard serve`, with the core's books looked into after every event.

    python -m bench.audited_server --config FILE --report FILE

It is the same server, on the same core; the class of the core is replaced by one that checks itself
each time something has changed it. When the server ends, the report says how many events there were
and after which of them a device held more than it may.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from modelyard_server import _core
from modelyard_server.config import load_config
from modelyard_server.lifecycle import run_server

__all__ = ["Steps", "audited", "may_hold"]

_EVENTS: Final = frozenset(
    {
        "add_model",
        "add_share",
        "cancel",
        "copy_dropped",
        "copy_in_use",
        "copy_lost",
        "forget_share",
        "forgive",
        "load_done",
        "load_failed",
        "lost",
        "pin",
        "reclaimed",
        "release",
        "remeasured",
        "remove_model",
        "request",
        "set_aside",
        "set_budget",
        "set_device_closed",
        "set_tier_budget",
        "split_share",
        "tick",
        "try_acquire",
        "unload",
        "unload_done",
        "unpin",
        "update_placements",
    }
)
_LOOKS: Final = frozenset(
    {
        "account",
        "audit",
        "clone",
        "copy_exclusive",
        "counters",
        "departure_counts",
        "device_closed",
        "device_count",
        "device_counters",
        "entry",
        "exclusive",
        "explanations",
        "explanations_after",
        "held_with_shares",
        "last_explained",
        "leader",
        "lease_count",
        "leases_of",
        "lru_seconds",
        "model_count",
        "policy",
        "saved",
        "shadow_seconds",
        "share_count",
        "tier",
        "victim_ages",
        "waiting_count",
    }
)
_MOST_TEXTS: Final = 20


def may_hold(budget: int, held_before: int) -> int:
    """Most bytes that a device may hold after an event.

    Above its budget only what it held already, when the budget was lowered: an event that makes it
    more has admitted something that does not fit. Stricter than the ledger's own rule, which grants
    a model that turns out larger than its estimate a deficit.
    """
    return max(budget, held_before)


class Steps:
    """Counts events, and those after which something was wrong.

    Attributes:
        count: events.
        wrong: those after which a device held too much, or the core's audit failed.
        texts: the first of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.wrong = 0
        self.texts: list[str] = []
        self._held: dict[int, int] = {}

    def look(self, yard: _core.Yard, event: str) -> None:
        """Looks at a yard after an event."""
        self.count += 1
        found = []
        for device in range(yard.device_count + (yard.tier is not None)):
            account = yard.account(device)
            held = account.reserved + account.resident + account.draining + account.quarantined
            if held > may_hold(account.budget, self._held.get(device, 0)):
                found.append(f"device {device} holds {held} of {account.budget} bytes")
            if held > account.budget + account.deficit:
                found.append(f"device {device}: the deficit is only {account.deficit} bytes")
            self._held[device] = held
        try:
            yard.audit()
        except RuntimeError as error:
            found.append(f"audit: {error}")
        if found:
            self.wrong += 1
            if len(self.texts) < _MOST_TEXTS:
                self.texts.append(f"event {self.count}, {event}: {'; '.join(found)}")


def audited(steps: Steps) -> type[_core.Yard]:
    """The core's class, with `steps` looking at it after each event.

    Raises:
        RuntimeError: it has methods of which is not known whether they change something.
    """
    public = {name for name in vars(_core.Yard) if not name.startswith("_")}
    if unknown := public ^ (_EVENTS | _LOOKS):
        raise RuntimeError(f"is it an event of the core, or a look at it: {sorted(unknown)}")

    class AuditedYard(_core.Yard):
        pass

    for name in _EVENTS:
        setattr(AuditedYard, name, _looked_at(name, steps))
    return AuditedYard


def _looked_at(name: str, steps: Steps) -> Callable[..., Any]:
    event: Any = getattr(_core.Yard, name)

    def method(yard: _core.Yard, *args: Any, **settings: Any) -> Any:
        answer = event(yard, *args, **settings)
        steps.look(yard, name)
        return answer

    return method


def main() -> int:
    """Serves until SIGTERM, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    steps = Steps()
    _core.Yard = audited(steps)  # type: ignore[misc]
    exit_code = run_server(load_config(arguments.config))
    report = {"steps": steps.count, "wrong": steps.wrong, "texts": steps.texts}
    arguments.report.write_text(json.dumps(report))
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
