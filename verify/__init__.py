"""Verifies an output checkpoint: structure, fidelity, serving. Reads checkpoints, never writes them."""

from recipes.streams import begin_command

begin_command()
