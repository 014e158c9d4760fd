"""Command lines: run, inspect_checkpoint. The top layer, which nothing else imports."""

import os

from recipes.streams import begin_command

begin_command()
# Set before torch loads OpenMP: on shared cores, spinning idle threads cost ten times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# llm-compressor logs what no operator reads; `calibration.engine.oneshot.quiet` passes its warnings on.
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "CRITICAL")
