"""What a key means: resolve(table, key) -> the model. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from modelyard_server.catalog.model import Model, is_key
from modelyard_server.errors import Reason, Refusal, Resource, Violation

__all__ = ["resolve"]


def resolve(table: Mapping[str, Model], key: str) -> Model:
    """The model a key means.

    Args:
        table: what each key means.
        key: what the client asks for.

    Raises:
        Refusal: KEY_NOT_FOUND, or INVALID_FIELD for what can be no key.
    """
    model = table.get(key)
    if model is not None:
        return model
    if not is_key(key):
        text = "must match [A-Za-z0-9][A-Za-z0-9._:/-]{0,255} and hold no '..'"
        raise Refusal(Reason.INVALID_FIELD, f"key: {text}", violations=(Violation("key", text),))
    shown = key if len(key) <= 64 else f"{key[:61]}..."
    raise Refusal(
        Reason.KEY_NOT_FOUND,
        f"no model goes by the key {shown!r}",
        resource=Resource("key", shown),
    )
