"""What the zygote and the server agree on, apart from either: neither imports the other."""

from __future__ import annotations

__all__ = ["MAX_PACKET_BYTES"]

MAX_PACKET_BYTES = 2**20
"""Largest message to or from the zygote."""
