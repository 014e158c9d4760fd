"""Turns a source checkpoint into an NVFP4 checkpoint, block by block, with llm-compressor."""
