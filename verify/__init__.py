"""Verifies an output checkpoint: structure, fidelity, serving. Reads checkpoints, never writes them."""
