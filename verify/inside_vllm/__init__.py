"""Runs inside vLLM's own interpreter; imports nothing of this project."""
