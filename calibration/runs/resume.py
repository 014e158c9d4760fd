"""What a run may go on from: its fingerprint, the blocks that are finished on disk, the activations between them.

A block is finished when its journal line is there and every shard that the line names has the digest it names. The
line is written last: first the shards, then the activations that enter the next block, then the line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint, changed_shards
from calibration.checkpoint.side_files import TOKENIZER_FILES
from calibration.checkpoint.writer import file_digest
from calibration.plan.plan import Plan
from calibration.runs.journal import RunDirectory
from calibration.runs.output import start_over
from calibration.runs.ranks import Ranks
from recipes.errors import EnvironmentProblem, SourceError
from recipes.places import own_scratch
from recipes.schema import Recipe

#: Packages whose arithmetic or file format the output depends on, this one included.
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors", "nvfp4-workflows")
#: What in a recipe changes nothing in what the calibrate stage computes.
_WITHOUT_EFFECT: Any = {"verify": True, "output": True, "offload": True, "convert": True, "calibration": {"exact"}}
_SAMPLE_BYTES = 1 << 16


def is_boundary(directory: Path, files: Mapping[str, str], run: RunDirectory, output: Path) -> bool:
    """Whether these are saved activations of the run of `output`: in its run directory, or in its own part of some
    offload.directory, through no link. A journal may come from elsewhere, and the directories of old activations are
    removed: one of another run, or of nobody's, must not be named."""
    parent = Path(os.path.realpath(directory.parent))
    ours = parent == Path(os.path.realpath(run.path)) / "activations" or parent.name == own_scratch(parent, output).name
    ours = ours and not directory.is_symlink()
    named = re.fullmatch(r"boundary-\d{4,}", directory.name) is not None and ".." not in directory.parts
    return ours and named and bool(files) and all(re.fullmatch(r"batch-\d{6,}\.pt", name) for name in files)


def batch_file(number: int) -> str:
    """The file of a boundary that holds the `number`-th batch of the run, whichever rank wrote it."""
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
        """The boundary that all ranks saved together; None where none did."""
        files = {name: digest for part in parts if part is not None for name, digest in part.files.items()}
        return None if parts[0] is None else Boundary(parts[0].directory, dict(sorted(files.items())))


@dataclass
class Resume:
    """What earlier runs left. `finished` maps the number of a block to the `block` part of its journal line;
    `boundaries` maps the number of a block to the activations that enter it, checked; `activations` is the directory
    for further ones; `damaged` names the finished blocks' files that no longer are what was written."""

    activations: Path
    finished: dict[int, dict[str, Any]] = field(default_factory=dict)
    boundaries: dict[int, Boundary] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    #: Whether the shards outside the blocks are there.
    rest: bool = False

    def starting_point(self, first: int) -> int:
        """The block whose input activations are at hand nearest before block `first`, 0 being the text itself."""
        return max((number for number in self.boundaries if number <= first), default=0)


def versions() -> dict[str, str]:
    """The version of each of PACKAGES."""
    found = dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def fingerprint(recipe: Recipe, plan: Plan, source: Checkpoint, data_digest: str, device: str) -> dict[str, Any]:
    """All that the output's bytes depend on, one readable value per key; two runs with equal fingerprints write equal
    files. `device` names the arithmetic (processor capability or accelerator); a run may go on with another one, but not to
    the same bytes (calibration.runs.row_invariance). The number of ranks is no part of it: what several ranks may calibrate gives
    the same bytes with any number."""
    settings = recipe.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    try:
        tokenizer = _digest_of(path for pattern in TOKENIZER_FILES for path in source.directory.glob(pattern))
        files = _source_digest(source)
    except OSError as error:
        raise SourceError(f"{error.filename}: cannot be read: {error.strerror}; is the source whole?") from None
    return {
        **{f"recipe {key}": value for key, value in sorted(_flat(settings))},
        "data": data_digest,
        "tokenizer": tokenizer,
        "source files": files,
        "plan": plan.digest,
        **{f"version of {package}": number for package, number in versions().items()},
        "device": device,
    }


def require_same(recorded: Mapping[str, Any], now: Mapping[str, Any], where: Path, finished: int) -> None:
    """Raises EnvironmentProblem that names every key whose value changed since the run began, old -> new."""
    changed = [key for key in {**recorded, **now} if recorded.get(key) != now.get(key)]
    if not changed:
        return
    lines = [f"  {key}: {_shown(recorded.get(key))} -> {_shown(now.get(key))}" for key in changed]
    raise EnvironmentProblem(
        f"{where}: this run began with other settings, and its {finished} finished blocks would not fit what would be "
        "calculated now. Changed since:\n" + "\n".join(lines) + "\nRemedy: set it back and run the same command again, "
        "or pass --restart, which begins anew and discards the finished blocks"
    )


def require_unchanged(changed: Sequence[str], shards: int, where: Path) -> None:
    """Raises SourceError if shards of the source, named as `changed_shards` does, changed since the run in `where` began:
    what is finished may be of other bytes than what would be read now."""
    if changed:
        raise SourceError(
            f"{where}: the source changed since this run began ({len(changed)} of {shards} shards: {'; '.join(changed[:3])}"
            + (" ..." if len(changed) > 3 else "")
            + "), and what is finished may not fit it. Remedy: bring the old files back with their times (rsync -a, cp -p); or, "
            "if you know that the bytes are the same, set the old time again (touch -d @SECONDS.NANOSECONDS SHARD); or pass "
            "--restart, which discards what is finished"
        )


def read_resume(directory: RunDirectory, plan: Plan, output: Path, activations: Path) -> Resume:
    """What the journal says is finished and the files prove; later lines count before earlier ones. The boundaries are
    not yet checked."""
    resume, blocks = Resume(activations), plan.block_numbers
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
        # What is quantized outside the blocks (a head) is calibrated with the last block.
        unfinished.add(blocks[-1])
    resume.finished = {
        number: lines[number]["result"] or {} for number in blocks if number in lines and number not in unfinished
    }
    pending = [number for number in blocks if number not in resume.finished]
    resume.boundaries = {n: boundary for n, boundary in boundaries.items() if pending and n <= pending[-1]}
    return resume


def open_resume(
    directory: RunDirectory,
    plan: Plan,
    output: Path,
    activations: Path,
    now: dict[str, Any],
    restart: bool = False,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    source: Checkpoint | None = None,
) -> Resume:
    """Goes on with the run in `directory` when its fingerprint is `now`, else begins anew: journal, shards and
    activations are removed, and the fingerprint is recorded.

    `restart` always begins anew; `overwrite` where the run there is complete (verified) or has another fingerprint.
    Rank 0 does it, and every rank checks the saved activations of its own batches. Raises EnvironmentProblem where
    finished blocks have another fingerprint and neither is given, SourceError where shards of `source` were written to
    since they were begun.
    """
    ranks = ranks or Ranks()
    state = {} if source is None else source.state
    opened = _opened(directory, plan, output, activations, now, state, restart, overwrite) if ranks.writes else None
    resume = ranks.exchange("resume", opened)[0]
    assert resume is not None
    here = {number for number, boundary in resume.boundaries.items() if boundary.intact(ranks)}
    everywhere = set.intersection(*ranks.exchange("saved activations", here))
    resume.boundaries = {number: b for number, b in resume.boundaries.items() if number in everywhere}
    # The journal names them by absolute paths, however the output is spelled now.
    kept = {boundary.directory.resolve() for boundary in resume.boundaries.values()}
    for folder in resume.activations.glob("boundary-*"):
        if folder.resolve() not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    ranks.exchange("old activations", None)  # none may be written before all have removed the old ones
    return resume


def _opened(
    directory: RunDirectory,
    plan: Plan,
    output: Path,
    activations: Path,
    now: dict[str, Any],
    source: Mapping[str, list[int]],
    restart: bool,
    overwrite: bool,
) -> Resume:
    facts, now = directory.facts(), json.loads(json.dumps(now))
    # Another device rounds differently, and what that costs is told (calibration.runs.row_invariance): no reason to lose a night.
    here = {"device": now["device"]} if "device" in now else {}
    begun = [fact for fact in facts if fact.get("fact") == "fingerprint"]
    finished = {fact["block"] for fact in facts if fact.get("fact") == "shards"} if begun else set()
    complete = any(fact.get("fact") == "verified" for fact in facts)
    if finished and not restart:
        # Runs before this one recorded no state of the source.
        changed = changed_shards(begun[-1]["source"], source) if begun[-1]["source"] else []
        if begun[-1]["parts"] | here == now and not changed and not (overwrite and complete):
            return read_resume(directory, plan, output, activations)
        if not overwrite:
            require_same(begun[-1]["parts"] | here, now, directory.path, len(finished))
            require_unchanged(changed, len(source), directory.path)
    start_over(
        directory, output, "fingerprint", plan=plan.digest, blocks=len(plan.block_numbers), parts=now, source=source
    )
    return Resume(activations)


def activations_directory(scratch: Path | None, run_directory: Path, output: Path) -> Path:
    """Where a run's activations lie: in its run directory, or below a scratch directory that runs may share."""
    if scratch is None:
        return run_directory.absolute() / "activations"
    return own_scratch(scratch, output)


def different(directory: Path, digests: Mapping[str, str]) -> set[str]:
    """The files that are missing or have another sha256; read in parallel, for a terabyte of shards takes a while."""

    def bad(name: str) -> bool:
        try:
            return file_digest(directory / name) != digests[name]
        except OSError:
            return True

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return {name for name, is_bad in zip(digests, pool.map(bad, digests), strict=True) if is_bad}


def intact(directory: Path, digests: Mapping[str, str]) -> bool:
    """Whether every file is there with its digest."""
    return not different(directory, digests)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, value)]


def _source_digest(source: Checkpoint) -> str:
    """Names, sizes and a sample of the bytes of every shard, and the config: reading all of it would take hours."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, INDEX_NAME, *source.shards):
        path = source.directory / name
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            file.seek(max(0, (size - _SAMPLE_BYTES) // 2) if name in source.shards else 0)
            digest.update(file.read(_SAMPLE_BYTES if name in source.shards else size))
    return digest.hexdigest()


def _digest_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]
    return text if len(text) <= 200 else text[:197] + "..."
