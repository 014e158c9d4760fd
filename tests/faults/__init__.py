"""Corruptions of good checkpoints, each with the level and the check that must catch it; see docs/faults.md."""
