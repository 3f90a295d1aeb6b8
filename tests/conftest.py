"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# Tests do not depend on how fast the machine is, nor do examples of one.
settings.register_profile("modelyard", deadline=None)
settings.load_profile("modelyard")
