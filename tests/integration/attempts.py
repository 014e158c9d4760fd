"""One output directory, and the runs that start, end and resume on it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import yaml

from calibration.runs.journal import RunDirectory
from tests.integration.interrupted_runs import KillAt, finish
from tests.outputs import contents

TARGETS = [r"re:^model\.layers\.\d+\..*(proj|w[123])$"]


class Case:
    """A recipe of a tiny model, and what an uninterrupted run of it writes; `arguments` are further ones of the modifier,
    `smooth` is one that stands before it."""

    def __init__(
        self,
        directory: Path,
        source: Path,
        modifier: str,
        targets: list[str] = TARGETS,
        calibration: dict[str, Any] | None = None,
        preset: str | None = None,
        smooth: dict[str, Any] | None = None,
        budget: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        self.directory = directory
        directory.mkdir()
        self.body: dict[str, Any] = {
            "source": {"checkpoint": str(source)},
            "output": "unset",
            "modifiers": [
                *([smooth] if smooth else []),
                {modifier: {"targets": targets, "scheme": "NVFP4"} | arguments},
            ],
            "calibration": calibration
            or {"dataset": "bundled", "num_samples": 6, "max_seq_length": 64, "batch_size": 2},
            "verify": {"structure": False, "fidelity": False},
            **({"preset": preset} if preset else {}),
            **({"budget": budget} if budget else {}),
        }
        began = time.monotonic()
        self.reference = Attempt(self, "reference", KillAt(0, directory / "steps"))
        self.seconds = time.monotonic() - began
        self.steps = int((directory / "steps").read_text())
        assert self.reference.code == 0, self.reference.text


class Attempt:
    """One output directory and the runs that work on it."""

    def __init__(self, case: Case, name: str, prepare: Any = None, run: bool = True, **sections: Any) -> None:
        # The output's name stands in the model card, so every attempt has the same one.
        self.directory = case.directory / name
        self.output, self.run_directory = self.directory / "output", self.directory / "output.run"
        self.log, self.recipe = self.directory / "log", self.directory / "recipe.yaml"
        self.directory.mkdir()
        self.write(case.body | sections)
        if run:
            self.go(prepare)

    def write(self, body: dict[str, Any]) -> None:
        self.recipe.write_text(yaml.safe_dump(body | {"output": str(self.output)}))

    def go(self, prepare: Any = None, *options: str) -> int:
        self.code, self.text = finish([str(self.recipe), "--no-rehearsal", *options], self.log, prepare)
        return self.code

    def journal(self, fact: str = "shards") -> list[dict[str, Any]]:
        """The lines of one kind; a torn one is left out."""
        return RunDirectory(self.output).facts(fact)

    def loaded(self) -> list[int | None]:
        """The blocks that the last run loaded, in order; None is what stands before the blocks."""
        events = RunDirectory(self.output).events()
        begin = max(number for number, event in enumerate(events) if event["event"] == "plan")
        return [event["block"] for event in events[begin:] if event["event"] == "load"]

    def files(self) -> dict[str, bytes]:
        """Everything in the output, but for the run's own path and times."""
        return contents(self.output, self.directory)


def same(attempt: Attempt, case: Case) -> None:
    assert attempt.code == 0, attempt.text
    mine, reference = attempt.files(), case.reference.files()
    assert mine.keys() == reference.keys()
    assert [name for name in reference if mine[name] != reference[name]] == []
    assert list(attempt.run_directory.glob("activations/*")) == []


SOURCE, ENVIRONMENT, INTERRUPTED, KILLED = 3, 4, 130, -signal.SIGKILL


def kill_behind(block: int) -> None:
    """Kills the process just after the journal line of `block`, while the activations before it are still there."""
    from calibration.runs.journal import RunDirectory

    record = RunDirectory.record

    def recorded(self: RunDirectory, name: str, /, **facts: Any) -> None:
        record(self, name, **facts)
        if name == "shards" and facts["block"] == block:
            os.kill(os.getpid(), signal.SIGKILL)

    RunDirectory.record = recorded  # type: ignore[method-assign]


def slow_blocks(seconds: float = 0.5) -> None:
    from calibration.engine import walk as sequential

    work = sequential.Walk._work

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return work(*args)

    sequential.Walk._work = slow  # type: ignore[method-assign]


def poison(block: int) -> None:
    from calibration.checkpoint.formats import Formats

    read = Formats.read

    def poisoned(self: Formats, name: str, *args: Any) -> Any:
        value = read(self, name, *args)
        return value * 3e38 if f"layers.{block}.self_attn.v_proj" in name else value

    Formats.read = poisoned  # type: ignore[method-assign]
