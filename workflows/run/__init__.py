"""Runs one recipe, from source to verified output: `python -m workflows.run`."""
