"""The engine's worker for tests, without the 6 CPU-s in which every process imports vLLM: imported once, forked for each run.

    python -P preloaded.py WORKER      # in vLLM's interpreter; a line of stdin is a run: [REQUEST, RESULT, LOG]

Answers each line with the process id of the run, a line, and its exit code, a line. A run is what `worker.py` does
in a process of its own: same stages, own process group and log, nothing left by another run, since this process imports
and does nothing else. With OMP_NUM_THREADS=1, or the import starts threads, which a fork loses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    """Serves the lines of stdin until it closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = load(path)
    # pyarrow, which vLLM imports if lm-eval is installed beside it, brings an allocator with a thread of its own.
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    worker.sibling("torchvision_operators").declare()
    from vllm import LLM, SamplingParams  # noqa: F401

    for name in ("processor", "sentinel", "watch", "prompts", "cpu_nvfp4", "cpu_repairs"):
        worker.sibling(name)
    assert len(os.listdir("/proc/self/task")) == 1, "importing vLLM started threads"
    for line in sys.stdin:
        request, result, log = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            replace(0, os.devnull, os.O_RDONLY)
            for output in (1, 2):
                replace(output, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            worker.end(worker.main(request, result))
        print(child, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)


def load(path: str) -> Any:
    """The worker as a module."""
    spec = importlib.util.spec_from_file_location("vllm_worker", Path(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replace(descriptor: int, path: str, flags: int) -> None:
    opened = os.open(path, flags, 0o644)
    os.dup2(opened, descriptor)
    os.close(opened)


if __name__ == "__main__":
    main(sys.argv[1])
