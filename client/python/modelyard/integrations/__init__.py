"""Bridges between modelyard's values and those of other libraries, one module a library.

A module needs its library: importing it without raises ``ImportError`` that names the extra to
install. ``import modelyard`` imports none of them.
"""
