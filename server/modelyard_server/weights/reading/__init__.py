"""The ways in which the bytes of a stored model become tensors; see api.py."""
