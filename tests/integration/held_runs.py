"""Runs that wait inside a block until a test lets them go: what it does there, it does there on a machine of any speed.

`python -m tests.integration.held_runs BLOCK FOLDER -m MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS`, held.
"""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.batch_runs import wait_for


@dataclass(frozen=True)
class Hold:
    """Where runs wait: in `block` (from 0), as soon as it is loaded. Files in `folder` say who has got how far."""

    folder: Path
    block: int

    @property
    def launcher(self) -> list[str]:
        """The arguments before `-m workflows.run`."""
        return ["-m", "tests.integration.held_runs", str(self.block), str(self.folder)]

    def reached(self, ranks: int = 1) -> bool:
        """Whether all ranks of a run wait there, or have waited."""
        return all((self.folder / f"reached.{rank}").exists() for rank in range(ranks))

    def let_go(self) -> None:
        """For this run and those that come later."""
        (self.folder / "let_go").touch()

    def install(self) -> None:
        """For good, in this process."""
        self.folder.mkdir(exist_ok=True)
        from workflows.progress import Reporter

        event = Reporter.event

        def held(reporter: Reporter, name: str, /, **facts: Any) -> None:
            event(reporter, name, **facts)
            if name == "load" and facts["block"] == self.block:
                (self.folder / f"reached.{os.environ.get('RANK', 0)}").touch()
                wait_for((self.folder / "let_go").exists, "the end of the hold", 120)

        Reporter.event = held  # type: ignore[method-assign]


if __name__ == "__main__":
    import workflows  # noqa: F401  before llm-compressor, which otherwise logs to standard output

    Hold(Path(sys.argv[2]), int(sys.argv[1])).install()
    sys.argv = sys.argv[4:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
