"""Prove that every parameter trains as its author thinks: look once, then let the rules reason."""
