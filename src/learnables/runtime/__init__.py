"""Carried out for a whole model while it runs: precision, layout, checkpoints."""
