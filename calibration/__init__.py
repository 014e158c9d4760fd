"""Calibration: from a source checkpoint to an NVFP4 checkpoint, block by block, around llm-compressor."""
