"""`python -m verify OUTPUT --source SOURCE --prove`: derives every byte again, and says of which it could not."""

from __future__ import annotations

import filecmp
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calibration.checkpoint.files import is_file, json_text, read_bytes
from calibration.checkpoint.header import read_metadata
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.side_files import side_files
from calibration.plan.output_files import planned_files
from calibration.plan.task import Task
from recipes.errors import SourceError
from verify.checks import Check, unchecked, verdict
from verify.proof.rederive import Derived, Rederiver
from verify.proof.statement import make_statement
from verify.proof.statistics import Recorded, input_scale_statistics

#: `progress(done, total)` in bytes of the output.
Progress = Callable[[int, int], None]
#: Files of an output that tell of it and are derived from nothing: card, recipe, provenance, signature, the hub's own.
_TELLING = frozenset({"README.md", "recipe.yaml", "provenance.json", "model.sig", ".gitattributes"})
_HOW = "source read again, bytes compared"
_TENSORS = "every byte of a weight follows from source and recipe"


@dataclass(frozen=True)
class Proof:
    """`checks`, and the `statement` (see `verify.proof.statement`), which says what was compared with what."""

    checks: list[Check]
    statement: dict[str, Any] = field(default_factory=dict)


def prove(directory: Path, task: Task, recorded: Recorded | None = None, progress: Progress | None = None) -> Proof:
    """Derives the checkpoint in `directory` again from the source and the recipe of `task`. `recorded` is what a run recorded of
    its input scales. Never raises for a broken checkpoint; raises SourceError for a damaged source."""
    try:
        output = Checkpoint.open(directory)
    except SourceError as error:
        return Proof([verdict("proof.tensors", _TENSORS, error.problems, [], _HOW)])
    misfits = _misfits(output, task)
    found = Derived()
    if not misfits:
        found = _derive(output, task, progress)
    checks = [
        _tensors_check(output, found, misfits),
        *_unproven(found),
        *([_input_check(output, found, recorded)] if found.calibrated else []),
        _files_check(output, task),
    ]
    return Proof(checks, make_statement(output, task, found, checks))


def _derive(output: Checkpoint, task: Task, progress: Progress | None) -> Derived:
    rederiver, found, total, done = Rederiver(task, output), Derived(), output.total_bytes, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread per unit is faster than torch's own, which would wait for each other
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for unit in pool.map(rederiver.derive, rederiver.units()):
            found.add(unit)
            done += sum(unit.proven.values())
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return found


def _misfits(output: Checkpoint, task: Task) -> list[str]:
    """What the headers have otherwise than the plan: then there is nothing to compare."""
    planned, stored = task.plan.outputs, output.tensors
    problems = [f"{name}: missing" for name in sorted(planned.keys() - stored.keys())]
    problems += [f"{name}: does not follow from the source" for name in sorted(stored.keys() - planned.keys())]
    problems += [
        f"{name}: {stored[name].dtype} {list(stored[name].shape)}, planned {want.dtype} {list(want.shape)}"
        for name, want in planned.items()
        if name in stored and (stored[name].dtype, stored[name].shape) != (want.dtype, want.shape)
    ]
    return problems


def _tensors_check(output: Checkpoint, found: Derived, misfits: list[str]) -> Check:
    figure = f"{len(found.proven):,} tensors, {sum(found.proven.values()):,} of {output.total_bytes:,} bytes derived"
    if not misfits and not found.proven:
        return unchecked("proof.tensors", _TENSORS, "nothing of it can be derived")
    worst = sorted(found.differences, key=lambda difference: -difference.count)
    return verdict("proof.tensors", _TENSORS, [*misfits, *map(str, worst)], [], _HOW, figure)


def _unproven(found: Derived) -> list[Check]:
    """A check for what was taken as recorded, and one for what depends on data; none if there is nothing."""
    checks = []
    for id, what, names in (
        (
            "proof.scales",
            "group scales and smoothing factors follow from the source: a search chose these",
            found.recorded,
        ),
        ("proof.tuned", "codes follow from the source: these depend on calibration data", found.tuned),
    ):
        if names:
            reasons = "; ".join(f"{why}: {count:,} tensors" for why, count in Counter(names.values()).items())
            first = ", ".join(list(names)[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
            checks.append(unchecked(id, what, f"{reasons} not derived ({first}): run the recipe again to repeat them"))
    return checks


def _input_check(output: Checkpoint, found: Derived, recorded: Recorded | None) -> Check:
    id, what = "proof.input_scales", "the calibrated input scales are those that the run recorded"
    count = f"{len(found.calibrated):,} input scales come from calibration"
    if recorded is None:
        return unchecked(id, what, f"{count} and no provenance.json of the run is at hand; name one with --provenance")
    now = input_scale_statistics(output, found.calibrated)
    if now != recorded.statistics:
        was = recorded.statistics
        problem = (
            f"{now.input_scales:,} scales, {now.sha256[:12]}; the run recorded {was.input_scales:,}, {was.sha256[:12]}"
        )
        return verdict(id, what, [problem], [], f"digest in {recorded.path.name}")
    if recorded.own:
        why = f"{count} and agree with the provenance.json inside the checkpoint alone, which proves nothing: name the run's own"
        return unchecked(id, what, f"{why} with --provenance, or verify the signature with --public-key")
    return verdict(id, what, [], [], f"digest in {recorded.path.name} of the run", f"{now.input_scales:,} scales")


def _files_check(output: Checkpoint, task: Task) -> Check:
    """The files beside the tensors: what the plan says, what the source has, and nothing else but what tells of the output."""
    directory, source = output.directory, task.source.directory
    planned = {
        name: json_text(content).encode() for name, content in planned_files(task.plan, task.source.config).items()
    }
    copied = {str(path.relative_to(source)): path for path in side_files(source).copied}
    problems, doubts = list(_headers(output)), list[str]()
    for name in sorted({*planned, *copied}):
        path = directory / name
        if not is_file(path):
            problems.append(f"{name}: missing")
        elif name in planned and read_bytes(path) != planned[name]:
            problems.append(f"{name}: is not what the plan says")
        elif name not in planned and not filecmp.cmp(path, copied[name], shallow=False):
            problems.append(f"{name}: is not the source's")
    listed = {str(path.relative_to(directory)) for path in directory.rglob("*") if is_file(path)}
    told = {name for name in listed if name in _TELLING or name.startswith(".cache/")}
    doubts += [f"{name}: follows from nothing" for name in sorted(listed - told - {*planned, *copied, *output.shards})]
    figure = f"{len(planned) + len(copied)} files and {len(output.shards)} headers"
    figure += f"; {', '.join(sorted(told - {'.gitattributes'}))} tell of it and follow from nothing" if told else ""
    return verdict("proof.files", "config, index, side files and headers follow from source and plan", problems, doubts,
                   "bytes compared", figure)  # fmt: skip


def _headers(output: Checkpoint) -> Iterable[str]:
    """Yields what a shard's header says beside names, dtypes, shapes and places."""
    for shard in output.shards:
        said = read_metadata(output.directory / shard)
        if said != {"format": "pt"}:
            yield f"{shard}: its header holds other metadata than a run writes ({', '.join(sorted(said))[:80]})"
