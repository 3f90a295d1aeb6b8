"""Benchmarks: ratios taken in one run, with the machine and commit they belong to."""
