"""Weights: reading safetensors, importing other checkpoints, counting what is really held."""
