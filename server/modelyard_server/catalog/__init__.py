"""The registered models and their keys."""
