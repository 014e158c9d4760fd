"""What the environment forces on processes that tests start: uneven products (tests/uneven.py), and what vLLM is told of the
CPU (TEST_PROCESSOR, tests/reference/engine.py).

`python -m tests.forced MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS` with both.
"""

from __future__ import annotations

import os
import runpy
import sys
from functools import partial

TOLD = "TEST_PROCESSOR"


def force_if_asked() -> None:
    """For good, in this process, if the environment asks for it."""
    import workflows  # noqa: F401  before llm-compressor, which otherwise logs to standard output
    from tests.uneven import install_if_asked

    install_if_asked()
    if os.environ.get(TOLD):
        from tests.reference.engine import PROCESSOR
        from verify.serving import serving

        serving.Experiment = partial(serving.Experiment, processor=PROCESSOR)  # type: ignore[assignment,misc]


def command(module: str) -> list[str]:
    """What follows `python` to run `module` in an interpreter of its own, forced if asked."""
    from tests.uneven import ASKED

    return ["-m", "tests.forced", module] if os.environ.get(ASKED) or os.environ.get(TOLD) else ["-m", module]


if __name__ == "__main__":
    force_if_asked()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
