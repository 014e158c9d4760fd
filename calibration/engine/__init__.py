"""Runs llm-compressor's sequential oneshot with one block in memory at a time."""
