"""Reads and writes checkpoints: headers, index, stored formats, NVFP4 arithmetic, side files.

Knows no llm-compressor and no transformers. `verify` imports everything here but `writer`.
"""
