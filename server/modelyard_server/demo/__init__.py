"""Real models for `modelyard demo`: text the project ships, quick fine-tunes, real checkpoints."""
