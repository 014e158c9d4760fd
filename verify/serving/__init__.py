"""Runs a checkpoint in the real vLLM and judges the results."""
