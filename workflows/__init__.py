"""Command lines: run, inspect_checkpoint. The top layer; nothing imports it."""
