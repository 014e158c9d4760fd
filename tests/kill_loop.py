"""Conversions killed at random moments: a server process forks the conversion, kills it, and at last lets it finish.

    python -m tests.kill_loop SOURCE OUTPUT KILLS SEED [KEPT]

Prints, as JSON, how many kills hit a running conversion, how many left some shards finished, and the sha256 of every
output shard. Forking saves the seconds of imports that a fresh interpreter takes for each kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from calibration.convert.pipeline import Conversion, convert
from calibration.runs.journal import RunDirectory
from tests.exported import recipe, task_of


def run(source: Path, output: Path, kept: str) -> Conversion:
    """One call of `convert` as the stage makes it, with shards small enough that there are many."""
    made = recipe(source, output, method="convert", calibration=None, export={"max_shard_size": 200_000, "kept": kept})
    directory = RunDirectory(output).open()
    try:
        return convert(task_of(made), directory)
    finally:
        directory.close()


def _alive(child: int) -> bool:
    """Whether the child has not ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main(source: Path, output: Path, kills: int, seed: int, kept: str = "native") -> None:
    """See the module's docstring."""
    begun = time.monotonic()
    run(source, output.with_name("timing"), kept)
    whole, hit, partly = time.monotonic() - begun, 0, 0
    moments = random.Random(seed)
    journal = output.with_name(output.name + ".run") / "journal.jsonl"
    for number in range(kills):
        before = journal.stat().st_size if journal.exists() else 0
        child = os.fork()
        if child == 0:
            run(source, output, kept)
            os._exit(0)
        # A resumed run is shorter: where it ends before its kill, the next one begins anew.
        # Every second one is killed only behind its first journal line, however slow the machine is.
        while number % 2 and (not journal.exists() or journal.stat().st_size <= before) and _alive(child):
            time.sleep(0.001)
        time.sleep(whole * moments.random() / (1 + number % 2))
        os.kill(child, signal.SIGKILL)
        hit += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        text = journal.read_text() if journal.exists() else ""
        partly += '"shards"' in text and '"converted"' not in text
        if '"converted"' in text:
            journal.unlink()  # it came to its end: the next kills shall hit a run from the start again
    run(source, output, kept)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.iterdir())}
    print(json.dumps({"hit": hit, "partly": partly, "digests": digests}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
