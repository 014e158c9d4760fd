"""How the queue of one machine starts, retries, waits and stops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import RecipeError
from tests.unit.batch.batches import looked_at, recipe
from workflows.batch.attempt import Child, Slot
from workflows.batch.outcome import Outcome
from workflows.batch.queue import Queue, Rules, Waiting
from workflows.batch.state import BatchDirectory, Entry


def queue_of(batch: BatchDirectory, entries: list[Entry], rules: Rules) -> Queue:
    return Queue(batch, entries, [Slot()], rules, lambda text, level: None)


def test_until_starts_nothing_after_its_hour(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    until = datetime(2025, 1, 31, 7, 5).timestamp()
    queue = queue_of(batch, looked_at(batch, recipe(tmp_path, "a", source)).entries, Rules(until=until))
    queue.work()
    assert queue.outcomes["a"] == Outcome("stopped", "reached --until (07:05)")
    assert [attempt["fact"] for attempt in batch.attempts("a")] == ["queued"]


def test_attempts_that_finish_nothing_are_bounded_and_come_later_each_time(
    tmp_path: Path, source: Path, batch: BatchDirectory
) -> None:
    (entry,) = looked_at(batch, recipe(tmp_path, "a", source)).entries
    queue, waiting, killed = queue_of(batch, [entry], Rules(3, 30.0)), Waiting(entry), Outcome("transient", "killed")
    delays = []
    for progressed in (False, True, False):
        queue.waiting.clear()
        queue._retry_later(waiting, killed, progressed)
        delays.append(round(waiting.not_before - time.time()))
    assert delays == [30, 30, 120] and not queue.outcomes
    queue._retry_later(waiting, killed, False)
    assert queue.outcomes["a"] == Outcome("failed", "killed (3 attempts in a row finished nothing)")
    assert batch.attempts("a")[-1]["fact"] == "gave_up"


def test_a_full_disk_is_waited_for(
    tmp_path: Path, source: Path, batch: BatchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = looked_at(batch, recipe(tmp_path, "a", source)).entries
    queue, waiting = queue_of(batch, [entry], Rules(backoff=0.0)), Waiting(entry)
    usage = shutil.disk_usage(tmp_path)
    queue._retry_later(waiting, Outcome("space", "the disk is full"), False)
    waiting.entry = replace(entry, activation_bytes=50_000_000)
    wanted = entry.output_bytes + 50_000_000 + 2 * (1 << 20)  # and room for lines and pages
    for free, ready in ((wanted - 1, False), (wanted, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert queue._is_ready(waiting) is ready
    # What an earlier attempt left there counts.
    (entry.run.path / "activations").mkdir(parents=True)
    (entry.run.path / "activations" / "batch").write_bytes(b"x" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=wanted - 1000))
    assert queue._is_ready(waiting)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    waiting.starved_since = time.time() - 3601
    assert not queue._is_ready(waiting)
    assert re.match(r"no space came back in 60 min: .*0 bytes free, the run needs [\d,]+ ", queue.outcomes["a"].reason)


def test_runs_share_what_their_rehearsals_have_proven(
    tmp_path: Path, source: Path, batch: BatchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Process:
        pid = os.getpid()

        def __init__(self, command: list[str], **options: Any) -> None:
            commands.append(command)

    monkeypatch.setattr(subprocess, "Popen", Process)
    for entry in looked_at(batch, recipe(tmp_path, "a", source), recipe(tmp_path, "b", source)).entries:
        Child.start(batch, entry, Slot(), overwrite=False)
    places = [command[command.index("--rehearsals") + 1] for command in commands]
    assert places == [str(batch.path / "rehearsals")] * 2


def test_rules_that_mean_nothing_are_refused_by_their_options() -> None:
    with pytest.raises(RecipeError) as caught:
        Rules(tries=0, backoff=float("nan"), space_patience=-60.0)
    assert caught.value.problems == [
        "--tries 0: must be at least 1",
        "--backoff nan: must be a number of seconds that is not negative",
        "--space-patience -1: must be a number of minutes that is not negative",
    ]
