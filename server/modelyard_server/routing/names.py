"""What keys and ids look like. Pure."""

from __future__ import annotations

import re

__all__ = ["KEY_PATTERN", "MODEL_ID_PATTERN", "is_key", "is_model_id"]

MODEL_ID_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
"""What an id of a model or route looks like; it also holds no "..", as it is in resource names."""

KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,255}")
"""What a key looks like; it also holds no ".."."""


def is_model_id(text: str) -> bool:
    """True if the text can be the id of a model or route."""
    return MODEL_ID_PATTERN.fullmatch(text) is not None and ".." not in text


def is_key(text: str) -> bool:
    """True if the text can be a key."""
    return KEY_PATTERN.fullmatch(text) is not None and ".." not in text
