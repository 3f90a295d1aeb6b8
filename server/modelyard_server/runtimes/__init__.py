"""Runtimes: one file per kind of model, behind the contract in api.py."""
