"""Checkpoints as bytes: headers, index, stored formats, family grammar, plan, NVFP4 arithmetic, writer.

Knows no llm-compressor and no transformers. `verify` imports everything here but `writer`.
"""
