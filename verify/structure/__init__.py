"""Checks, reading every byte, that a checkpoint contains what its config promises."""
