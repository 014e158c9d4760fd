"""Command lines: run, inspect_checkpoint. The top layer, which nothing else imports."""

import os

from recipes.streams import begin_command

begin_command()
# Set before torch loads OpenMP: on shared cores, spinning idle threads cost ten times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# llm-compressor logs what no operator reads; `calibration.engine.oneshot.quiet` passes its warnings on.
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "CRITICAL")
if os.environ.get("WORLD_SIZE", "1") != "1":
    # Also before torch is imported: if a rank or torchrun is gone, each call to its store logs the error that it raises,
    # with twenty frames of C++, before our one message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
