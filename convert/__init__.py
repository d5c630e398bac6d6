"""Checkpoints of others as models of this package."""
