"""Predicts what a run costs before it starts."""
