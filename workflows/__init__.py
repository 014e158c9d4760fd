"""Command lines: run, inspect_checkpoint. The top layer; nothing imports it."""

import os

# Before torch loads OpenMP: idle threads that spin cost ten times the work where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# llm-compressor logs to stdout, which belongs to --json; its warnings come through `calibration.engine.oneshot.quiet` instead.
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "CRITICAL")
