"""Before any test imports torch: idle OpenMP threads must not spin on a machine of few cores. And how tests share them."""

import atexit
import gc
import os
from pathlib import Path

import pytest

from tests.reference.forks import OWNER

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault(OWNER, str(os.getpid()))  # xdist's workers inherit it: one import of vLLM for all
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(700, 10, 1000)  # full collections of half a million objects, see recipes/streams.py
atexit.register(gc.freeze)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means: three workers, the tests of a file on one of them in order; none for single files or one core.

    Two leave two cores idle for a quarter of the time: tests sleep, wait for disks and for each other's processes. A worker and
    what it starts take up to 3 GB. PYTEST_XDIST_AUTO_NUM_WORKERS says otherwise.
    """
    files = [argument for argument in config.args if not Path(argument).is_dir()]
    if files or (os.cpu_count() or 1) < 2:
        return 0
    config.option.dist, config.option.loadscopereorder = "loadfile", False  # the long files come first as it is
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or (3 if memory > 12 << 30 else 2))
