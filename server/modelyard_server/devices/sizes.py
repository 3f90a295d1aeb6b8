"""Sizes in bytes as people write them; see ``modelyard.sizes``, which plan files are read with."""

from __future__ import annotations

from modelyard.sizes import MAX_SIZE_BYTES, UNITS, format_size, parse_size

__all__ = ["MAX_SIZE_BYTES", "UNITS", "format_size", "parse_size"]
