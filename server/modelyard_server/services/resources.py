"""What the services of models and routes share: names, etags and field masks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from modelyard_server.catalog.model import is_model_id
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.services.handler import invalid

__all__ = ["check_etag", "id_in", "unknown_fields"]


def id_in(name: str, kind: str, field: str) -> str:
    """The id in a resource name.

    Args:
        name: for instance "models/sentiment".
        kind: "model" or "route".
        field: where the name stands in the request.

    Raises:
        Refusal: INVALID_FIELD.
    """
    found = name.removeprefix(f"{kind}s/")
    if found == name or not is_model_id(found):
        raise invalid(Violation(field, f'must be "{kind}s/{{{kind}}}"'))
    return found


def check_etag(kind: str, name: str, *, given: str, current: str) -> None:
    """Raises Refusal ETAG_MISMATCH if a request was made for another state of what it changes."""
    if given and given != current:
        raise Refusal(
            Reason.ETAG_MISMATCH,
            f"{name} has changed since its etag was read",
            resource=Resource(kind, name),
        )


def unknown_fields(paths: Collection[str], known: Sequence[str]) -> list[Violation]:
    """What is wrong with the paths of an update mask, each in their order."""
    return [
        Violation("update_mask", f"{path[:64]!r} cannot be changed; {', '.join(known)} can")
        for path in paths
        if path not in known
    ]
