"""What a study says: as a table, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from modelyard_server.devices.sizes import format_size
from modelyard_server.simulation.machine_text import describe_budgets
from modelyard_server.simulation.outcome import Outcome
from modelyard_server.simulation.places import Places
from modelyard_server.simulation.study import BASE_POLICY, Study

__all__ = ["cause_lines", "json_of", "rows_of", "title_of", "wait_rows", "what_if_rows"]

_USUAL_CAUSE: Final = "idle_for_model"
_PLACED: Final = MappingProxyType(
    {
        Places.TRACE: ", models where the trace says",
        Places.DEALT: ", models dealt out for good",
        Places.ANYWHERE: "",
    }
)


def title_of(study: Study) -> str:
    """Return one line about what was replayed on what."""
    trace, machine = study.trace, study.machine
    footprint = trace.footprint_bytes()
    mode = "timed" if study.timed else "serial"
    text = (
        f"{trace.name}: {len(trace)} requests for {len(trace.used())} models of "
        f"{format_size(footprint)}; {mode}, "
        f"{describe_budgets(machine.budgets, machine.device_names)} "
        f"({machine.total_bytes / footprint:.1%} of the models)"
    )
    if machine.host_budget_bytes:
        text += f", host tier {format_size(machine.host_budget_bytes)}"
    text += _PLACED[study.placing.places]
    return f"{text}, {study.label}" if study.label else text


def rows_of(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return the headers and the rows of a table of what was loaded."""
    headers = ["policy", "loads", "load time", "x bound", "x lru", "hits", "evicted"]
    rows = [
        [
            outcome.policy,
            str(outcome.load_count),
            _seconds(outcome.load_s),
            _times(study.ratio_to_bound(outcome)),
            _times(study.ratio_to_base(outcome)),
            f"{outcome.hit_ratio:.1%}",
            str(outcome.eviction_count),
        ]
        for outcome in study.outcomes
    ]
    bound_s = study.offline.bound_s
    base_s = study.outcome_of(BASE_POLICY).load_s
    for name, seconds in (("offline", study.offline.schedule_s), ("bound", bound_s)):
        if seconds is not None:
            over_bound = _times(seconds / bound_s) if bound_s else ""
            over_base = _times(seconds / base_s) if base_s > 0 else ""
            rows.append([name, "", _seconds(seconds), over_bound, over_base, "", ""])
    return headers, rows


def wait_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return the headers and the rows of a table of how long requests waited."""
    headers = ["policy", "served", "refused", "mean wait", "p50", "p99", "longest"]
    rows = [
        [
            outcome.policy,
            str(outcome.served_count),
            str(sum(outcome.refused.values())),
            _seconds(outcome.mean_wait_s()),
            *(_seconds(outcome.wait_quantile(share)) for share in (0.5, 0.99, 1.0)),
        ]
        for outcome in study.outcomes
    ]
    return headers, rows


def cause_lines(study: Study) -> list[str]:
    """Return lines that say why models were evicted, and what the last rows of the table are."""
    lines = [
        f"evicted by {outcome.policy}: {_causes(outcome.evictions)}"
        for outcome in study.outcomes
        if outcome.evictions and set(outcome.evictions) != {_USUAL_CAUSE}
    ]
    if not lines and any(outcome.evictions for outcome in study.outcomes):
        lines.append("evicted: idle models only, each for another model")
    if study.placing.note:
        lines.append(study.placing.note)
    if study.offline.schedule_s is not None:
        text = "offline: the best schedule found by who knows the future"
        if study.offline.bound_s is not None:
            text += "; bound: no schedule loads for less"
        lines.append(text)
    elif study.offline.schedule_note:
        lines.append(study.offline.schedule_note)
    return lines


def what_if_rows(study: Study, others: Sequence[Study]) -> tuple[list[str], list[list[str]]]:
    """Return the headers and the rows of a table that compares budgets.

    Args:
        study: with the budgets as they are.
        others: with other budgets, of the same trace and policies.
    """
    headers = ["policy", "budgets", "loads", "load time", "change", "hits"]
    if study.timed:
        headers += ["mean wait", "p99"]
    rows = []
    for outcome in study.outcomes:
        for other in (study, *others):
            changed = other.outcome_of(outcome.policy)
            saved_s = changed.load_s - outcome.load_s
            share = f" ({saved_s / outcome.load_s:+.1%})" if outcome.load_s > 0 else ""
            row = [
                outcome.policy,
                other.label or "as they are",
                str(changed.load_count),
                _seconds(changed.load_s),
                f"{saved_s:+.0f}s{share}" if other.label else "",
                f"{changed.hit_ratio:.1%}",
            ]
            if study.timed:
                row += [_seconds(changed.mean_wait_s()), _seconds(changed.wait_quantile(0.99))]
            rows.append(row)
    return headers, rows


def json_of(study: Study, others: Sequence[Study] = ()) -> dict[str, Any]:
    """Return a study as JSON has it.

    Args:
        study: the first one.
        others: with other budgets.
    """
    trace, machine = study.trace, study.machine
    told: dict[str, Any] = {
        "trace": trace.name,
        "mode": "timed" if study.timed else "serial",
        "request_count": len(trace),
        "model_count": len(trace.used()),
        "footprint_bytes": trace.footprint_bytes(),
        "compulsory_load_s": trace.compulsory_s(),
        "budgets": list(machine.budgets),
        "devices": list(machine.device_names),
        "host_budget_bytes": machine.host_budget_bytes,
        "places": study.placing.places.value,
        "places_note": study.placing.note,
        "offline_bound_s": study.offline.bound_s,
        "best_offline_s": study.offline.schedule_s,
        "bound_note": study.offline.note,
        "schedule_note": study.offline.schedule_note,
        "policies": [_json_of_outcome(study, outcome) for outcome in study.outcomes],
    }
    if study.label:
        told["what_if"] = study.label
    if others:
        told["what_ifs"] = [json_of(other) for other in others]
    return told


def _json_of_outcome(study: Study, outcome: Outcome) -> dict[str, Any]:
    told: dict[str, Any] = {
        "policy": outcome.policy,
        "leader": outcome.leader,
        "load_count": outcome.load_count,
        "host_load_count": outcome.host_load_count,
        "failed_load_count": outcome.failed_load_count,
        "load_s": outcome.load_s,
        "ratio_to_bound": study.ratio_to_bound(outcome),
        "ratio_to_lru": study.ratio_to_base(outcome),
        "hit_ratio": outcome.hit_ratio,
        "eviction_count": outcome.eviction_count,
        "evictions": dict(outcome.evictions),
        "served_count": outcome.served_count,
        "refused": dict(outcome.refused),
        "cancelled_count": outcome.cancelled_count,
        "makespan_s": outcome.makespan_s,
        "step_count": outcome.step_count,
    }
    if study.timed:
        quantiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
        told["wait_s"] = {
            "mean": _finite(outcome.mean_wait_s()),
            **{name: _finite(outcome.wait_quantile(share)) for name, share in quantiles.items()},
        }
    return told


def _causes(evictions: Mapping[str, int]) -> str:
    return ", ".join(f"{cause.replace('_', ' ')} {count}" for cause, count in evictions.items())


def _seconds(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    return f"{seconds:.0f}s" if seconds >= 1000 else f"{seconds:.2f}s"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
