"""Why an attempt ended, and what follows."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from workflows.batch import outcome
from workflows.batch.outcome import judge_attempt
from workflows.batch.state import Entry
from workflows.progress import Reporter


@pytest.mark.parametrize(
    ("code", "problems", "log", "outcome", "reason"),
    [
        (-9, [], "", "transient", "killed by SIGKILL (out of memory?)"),
        (-11, [], "", "transient", "killed by SIGSEGV"),
        (1, [], "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n", "transient", "CUDA out of memory"),
        (1, [], "Traceback\nImportError: /x.so: failed to map segment from shared object", "transient", "/x.so"),
        (1, [], "Traceback\nImportError: /x.so: failed to map segment from shared object: Operation not permitted", "failed",
         "/x.so"),
        (4, ["shard-1: cannot be written: [Errno 12] Cannot allocate memory"], "", "transient", "shard-1"),
        (1, [], "Traceback\nKeyError: 'x'", "failed", "KeyError: 'x'"),
        (1, [], "Signal 9 (SIGKILL) received by PID 77\nChildFailedError", "transient", "killed by SIGKILL"),
        (2, [], "error: r.yaml:1: x: unknown key", "failed", "r.yaml:1: x: unknown key"),
        (3, ["shard is gone", "more"], "", "failed", "shard is gone"),
        (1, ["shard is gone"], "ChildFailedError", "failed", "shard is gone"),
        (4, ["out/x: the disk is full: 5 bytes wanted; free some space"], "", "space", "the disk is full"),
        (4, [], "error: out.run: another process works on this output; wait", "transient", "another process"),
        (4, ["no vLLM"], "", "failed", "no vLLM"),
        (5, ["out: verification failed: 1 of 9", "serving.load: NaN"], "", "failed", "serving.load: NaN"),
        (130, ["stopped"], "", "transient", "from outside"),
        (None, [], "block 1/3", "transient", "no batch was watching"),
    ],
)  # fmt: skip
def test_why_an_attempt_ended(
    tmp_path: Path, code: int | None, problems: list[str], log: str, outcome: str, reason: str
) -> None:
    entry = Entry("a", "a.yaml", str(tmp_path / "a.yaml"), str(tmp_path / "out"))
    entry.run.path.mkdir()
    entry.run.event("error", exit_code=3, problems=["an error of an earlier attempt"])
    began = entry.run.events()[-1]["time"] + 0.001
    if problems:
        (entry.run.path / "events.jsonl").write_text(
            json.dumps({"time": began, "event": "error", "exit_code": 3 if code == 1 else code, "problems": problems})
        )
    (tmp_path / "log").write_text("error: an earlier attempt\n" + log)
    found = judge_attempt(entry, code, began, tmp_path / "log", len("error: an earlier attempt\n"), False)
    assert (found.kind, reason in found.reason) == (outcome, True), found


def test_a_killed_engine_says_nothing_about_the_checkpoint(tmp_path: Path) -> None:
    entry = Entry("a", "a.yaml", str(tmp_path / "a.yaml"), str(tmp_path / "out"))
    entry.run.path.mkdir()
    (entry.run.path / "serving.json").write_text(json.dumps({"exit_code": -signal.SIGKILL}))
    assert judge_attempt(entry, 5, 0.0, tmp_path / "log", 0, False).kind == "transient"
    (entry.run.path / "serving.json").write_text(json.dumps({"exit_code": 0}))
    assert judge_attempt(entry, 5, 0.0, tmp_path / "log", 0, False).kind == "failed"


def test_a_log_on_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    reporter = Reporter()
    with open("/dev/full", "w", buffering=1) as full:
        reporter.console = Console(file=full)
        reporter.say("block 1/3")
        with pytest.raises(OSError, match="No space left"):
            reporter.console.print("the disk is full indeed")
        with contextlib.suppress(OSError):
            full.close()
    # Nor is a crash for which it had no words held against the recipe.
    entry = Entry("a", "a.yaml", str(tmp_path / "a.yaml"), str(tmp_path / "out"))
    log = tmp_path / "log"
    log.write_text("Traceback\nOSError: [Errno 28] No space left on device\n")
    assert judge_attempt(entry, 1, 0.0, log, 0, False).kind == "space"
    log.write_text("Traceback\nOSError: [Errno 27] File too large\n")
    assert judge_attempt(entry, 1, 0.0, log, 0, False).kind == "failed"


def test_the_words_that_decide_an_outcome_are_words_of_messages() -> None:
    """A message that is worded anew elsewhere would turn a loss that passes by itself into a failure of the night."""
    root = Path(outcome.__file__).parents[2]
    files = [path for folder in ("calibration", "workflows/run") for path in (root / folder).rglob("*.py")]
    said = [node.value for path in files for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    kernel = {os.strerror(errno.ENOSPC), os.strerror(errno.ENOMEM)}
    words = {*outcome._FULL, *outcome._PASSES} - kernel
    assert len(words) == 7 and {word for word in words if not any(word in text for text in said)} == set()
