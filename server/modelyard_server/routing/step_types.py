"""Whether the steps of a sequence can follow one another, as far as their tasks tell. Pure.

Of the transformers runtime it is known what each task takes and gives, whatever the model. Of other
runtimes, of transformations and of routes that lead to no one model nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from modelyard_server.routing.target_json import Finding
from modelyard_server.routing.targets import Link, Sequence
from modelyard_server.runtimes.hf.signatures import signature_of
from modelyard_server.runtimes.signature import Signature, TensorKind

__all__ = ["SignatureOf", "known_signature", "steps_that_do_not_meet"]

SignatureOf = Callable[[Link], Signature | None]
"""What the model behind a step takes and gives; None if nobody can say."""


def known_signature(runtime: str, task: str, options: Mapping[str, Any]) -> Signature | None:
    """What every model of a task takes and gives, whatever its files hold; None if that varies.

    Args:
        runtime: of the model.
        task: one that the runtime has.
        options: of the model.
    """
    if runtime != "transformers":
        return None
    return signature_of(task, str(options.get("pooling", "")))


def steps_that_do_not_meet(sequence: Sequence, signature_of: SignatureOf) -> list[Finding]:
    """What steps cannot take of what the step before gives, each with its path.

    Args:
        sequence: whose steps are looked at two by two.
        signature_of: of the model behind a step.
    """
    findings: list[Finding] = []
    gives: Mapping[str, TensorKind] | None = None
    for i, step in enumerate(sequence.steps):
        path = f"sequence.steps[{i}]"
        signature = signature_of(step.does) if isinstance(step.does, Link) else None
        if gives is not None:
            there = ", ".join(gives)
            lost = [name for name in step.rename if name and name not in gives]
            findings += [
                (f"{path}.rename", f"{name[:64]!r} is no output of the step before: {there}")
                for name in lost
            ]
            if "" in step.rename and len(gives) != 1:
                text = f'"" is for one output; the step before has {there}'
                findings.append((f"{path}.rename", text))
            elif not lost and signature is not None:
                got = [gives[name] for name in step.rename if name] or list(gives.values())
                findings += [(path, text) for text in _mismatch(signature, got)]
        gives = None
        if signature is not None:
            gives = {kind.name: kind for kind in signature.outputs}
    return findings


def _mismatch(takes: Signature, got: list[TensorKind]) -> list[str]:
    """Why a model cannot take tensors; empty if it can, or if nobody can say."""
    (wanted,) = takes.inputs  # Every task has one, whatever it is called.
    text = f"takes one input, {_described(wanted)}; the step before gives "
    text += " and ".join(f"{kind.name}, {_described(kind)}" for kind in got)
    fitting = [
        kind
        for kind in got
        if len(kind.shape) == len(wanted.shape)
        and (kind.dtype is wanted.dtype or not takes.is_exact)
    ]
    if len(got) == 1:
        return [] if fitting else [text]
    return [text + (": name one of them in rename" if fitting else "")]


def _described(kind: TensorKind) -> str:
    count = len(kind.shape)
    return f"{kind.dtype.value} of {count} dimension{'' if count == 1 else 's'}"
