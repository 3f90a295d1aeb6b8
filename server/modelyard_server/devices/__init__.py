"""The devices of this machine: sizes, probes, and what a placement means."""
