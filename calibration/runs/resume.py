"""Finds what a run may resume from: the blocks that are finished on disk and the activations between them.

A block is finished if its journal line exists and every shard that the line names has the recorded digest. The order of
writing is: the shards, the activations that enter the next block, the journal line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calibration.checkpoint.files import file_digest
from calibration.checkpoint.index import changed_shards
from calibration.plan.plan import Plan
from calibration.plan.task import Task
from calibration.runs.fingerprint import require_same, require_unchanged
from calibration.runs.journal import RunDirectory
from calibration.runs.output import start_over
from calibration.runs.ranks import Ranks
from recipes.places import own_scratch


def is_boundary(directory: Path, files: Mapping[str, str], run: RunDirectory, output: Path) -> bool:
    """Whether these are saved activations of the run of `output`: in its run directory, or in its own part of some
    offload.directory, not reached through a link. A journal may come from elsewhere and directories of old activations
    are removed, so the journal must not be able to name a directory that the run does not own."""
    parent = Path(os.path.realpath(directory.parent))
    ours = parent == Path(os.path.realpath(run.path)) / "activations" or parent.name == own_scratch(parent, output).name
    ours = ours and not directory.is_symlink()
    named = re.fullmatch(r"boundary-\d{4,}", directory.name) is not None and ".." not in directory.parts
    return ours and named and bool(files) and all(re.fullmatch(r"batch-\d{6,}\.pt", name) for name in files)


def batch_file(number: int) -> str:
    """The name of a boundary's file with the `number`-th batch of the run, whichever rank wrote it."""
    return f"batch-{number:06d}.pt"


@dataclass(frozen=True)
class Boundary:
    """The saved activations that enter a block: file name -> sha256 below `directory`, in the order of the batches."""

    directory: Path
    files: dict[str, str]

    def intact(self, ranks: Ranks) -> bool:
        """Whether every file of this rank's batches is there with its digest."""
        files = enumerate(self.files.items())
        return intact(self.directory, dict(file for number, file in files if ranks.owns(number)))

    @staticmethod
    def whole(parts: list[Boundary | None]) -> Boundary | None:
        """The boundary that all ranks saved together; None if no rank saved one."""
        files = {name: digest for part in parts if part is not None for name, digest in part.files.items()}
        return None if parts[0] is None else Boundary(parts[0].directory, dict(sorted(files.items())))


@dataclass
class Resume:
    """What earlier runs finished. `finished` maps block numbers to the `result` of their journal lines; `boundaries`
    maps block numbers to the checked activations that enter them; `activations` is the directory for further ones;
    `damaged` names the files of finished blocks whose digest has changed."""

    activations: Path
    finished: dict[int, dict[str, Any]] = field(default_factory=dict)
    boundaries: dict[int, Boundary] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    #: Whether the shards outside the blocks are finished.
    rest: bool = False

    def starting_point(self, first: int) -> int:
        """The last block up to `first` whose input activations are saved; 0 means starting at the text itself."""
        return max((number for number in self.boundaries if number <= first), default=0)


def read_resume(task: Task, directory: RunDirectory) -> Resume:
    """What the journal records as finished and the files confirm; later lines override earlier ones. The boundaries are
    not checked yet."""
    plan, output = task.plan, task.output
    resume, blocks = Resume(activations_directory(task.scratch, directory.path, output)), plan.block_numbers
    lines: dict[int, dict[str, Any]] = {}
    boundaries: dict[int, Boundary] = {}
    digests: dict[str, str] = {}
    for fact in directory.facts():
        if fact.get("fact") not in ("shards", "boundary") or fact.get("plan") != plan.digest:
            continue
        if fact["fact"] == "shards":
            digests |= fact["shards"]
            if fact.get("block") is not None:
                lines[fact["block"]] = fact
        saved = fact["activations"]
        if (
            saved
            and fact["block"] is not None
            and is_boundary(Path(saved["directory"]), saved["files"], directory, output)
        ):
            boundaries[fact["block"] + 1] = Boundary(Path(saved["directory"]), saved["files"])
    wanted = {shard.name: shard.block for shard in plan.shards}
    journaled = {name: digest for name, digest in digests.items() if name in wanted}
    broken = {name for name in wanted if name not in journaled} | different(output, journaled)
    resume.damaged = sorted(name for name in broken if name in journaled)
    resume.rest = not any(wanted[name] is None for name in broken)
    unfinished = {wanted[name] for name in broken}
    if not resume.rest and any(plan.family.place(step.source).block is None for step in plan.quantized.values()):
        # Modules quantized outside the blocks (a head) are calibrated with the last block.
        unfinished.add(blocks[-1])
    resume.finished = {
        number: lines[number]["result"] or {} for number in blocks if number in lines and number not in unfinished
    }
    pending = [number for number in blocks if number not in resume.finished]
    resume.boundaries = {n: boundary for n, boundary in boundaries.items() if pending and n <= pending[-1]}
    return resume


#: What a run discards of an earlier one in its directory: nothing (it resumes or is refused), a run that is complete
#: (verified) or has another fingerprint, or everything.
Discard = Literal["nothing", "outdated", "everything"]


def discard_of(restart: bool, overwrite: bool) -> Discard:
    """What the options --restart and --overwrite discard."""
    return "everything" if restart else "outdated" if overwrite else "nothing"


def finished_blocks(directory: RunDirectory, plan: Plan) -> set[int]:
    """The blocks that the journal records as finished with this plan; the files themselves are not checked."""
    facts = directory.facts("shards")
    return {fact["block"] for fact in facts if fact.get("plan") == plan.digest and fact.get("block") is not None}


def open_resume(
    task: Task, directory: RunDirectory, now: dict[str, Any], discard: Discard = "nothing", ranks: Ranks | None = None
) -> Resume:
    """Resumes the run in `directory` if its fingerprint equals `now`. Else starts over: removes journal, shards and
    activations and records the fingerprint.

    Rank 0 does this; every rank checks the saved activations of its own batches. Raises EnvironmentProblem if finished
    blocks have another fingerprint and SourceError if shards of the source have changed since the run began, unless
    `discard` allows it.
    """
    ranks = ranks or Ranks()
    opened = _opened(task, directory, now, discard) if ranks.writes else None
    resume = ranks.all_gather("resume", opened)[0]
    assert resume is not None
    here = {number for number, boundary in resume.boundaries.items() if boundary.intact(ranks)}
    everywhere = set.intersection(*ranks.all_gather("saved activations", here))
    resume.boundaries = {number: b for number, b in resume.boundaries.items() if number in everywhere}
    # The journal has absolute paths, however the output is spelled now.
    kept = {boundary.directory.resolve() for boundary in resume.boundaries.values()}
    for folder in resume.activations.glob("boundary-*"):
        if folder.resolve() not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    ranks.all_gather("old activations", None)  # no rank may write before all have removed the old ones
    return resume


def _opened(task: Task, directory: RunDirectory, now: dict[str, Any], discard: Discard) -> Resume:
    source, output = task.source.state, task.output
    facts, now = directory.facts(), json.loads(json.dumps(now))
    # Another device rounds differently, but that alone does not discard a night's work: the run reports what it costs
    # (calibration.runs.row_invariance).
    here = {"device": now["device"]} if "device" in now else {}
    begun = [fact for fact in facts if fact.get("fact") == "fingerprint"]
    finished = {fact["block"] for fact in facts if fact.get("fact") == "shards"} if begun else set()
    complete = any(fact.get("fact") == "verified" for fact in facts)
    if finished and discard != "everything":
        # Early versions recorded no state of the source.
        changed = changed_shards(begun[-1]["source"], source) if begun[-1]["source"] else []
        if begun[-1]["parts"] | here == now and not changed and not (discard == "outdated" and complete):
            return read_resume(task, directory)
        if discard == "nothing":
            require_same(begun[-1]["parts"] | here, now, directory.path, len(finished))
            require_unchanged(changed, len(source), directory.path)
    blocks = len(task.plan.block_numbers)
    start_over(directory, output, "fingerprint", plan=task.plan.digest, blocks=blocks, parts=now, source=source)
    return Resume(activations_directory(task.scratch, directory.path, output))


def activations_directory(scratch: Path | None, run_directory: Path, output: Path) -> Path:
    """Where a run's activations lie: in its run directory, or below a scratch directory that runs may share."""
    if scratch is None:
        return run_directory.absolute() / "activations"
    return own_scratch(scratch, output)


def different(directory: Path, digests: Mapping[str, str]) -> set[str]:
    """The files that are missing or have another sha256; read in parallel, because a terabyte of shards takes a
    while."""

    def bad(name: str) -> bool:
        try:
            return file_digest(directory / name) != digests[name]
        except OSError:
            return True

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return {name for name, is_bad in zip(digests, pool.map(bad, digests), strict=True) if is_bad}


def intact(directory: Path, digests: Mapping[str, str]) -> bool:
    """Whether every file exists and has its digest."""
    return not different(directory, digests)
