"""Decides whether a run may resume: compares everything its bytes depend on, one readable value per key, with the
recorded values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import file_digest
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint
from calibration.checkpoint.side_files import TOKENIZER_FILES
from calibration.plan.task import Task
from calibration.plan.versions import versions
from recipes.errors import EnvironmentProblem, SourceError

#: The parts of a recipe that do not affect what the calibrate stage computes.
_WITHOUT_EFFECT: Any = {
    "verify": True, "rehearse": True, "output": True, "offload": True, "convert": True, "calibration": {"exact"},
}  # fmt: skip
_SAMPLE_BYTES = 1 << 16


def fingerprint(task: Task, data_digest: str, device: str) -> dict[str, Any]:
    """Everything that the output's bytes depend on, one readable value per key; two runs with equal fingerprints write
    equal files. `device` names the arithmetic (processor capability or accelerator); a run may resume with another one,
    but its bytes differ then (calibration.runs.row_invariance). The fingerprint excludes the number of ranks: any
    number gives the same bytes. Raises SourceError if a file of the source cannot be read."""
    source = task.source
    settings = task.recipe.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    if task.recipe.calibration:
        # Runs from before these keys existed can still resume.
        if task.recipe.calibration.input_headroom == 1:
            del settings["calibration"]["input_headroom"]
        settings["calibration"]["all_experts"] = task.recipe.calibration.experts == "all"
        if not task.recipe.calibration.topped_up:
            del settings["calibration"]["experts"]
    try:
        tokenizer = _digest_of(path for pattern in TOKENIZER_FILES for path in source.directory.glob(pattern))
        files = source_digest(source)
    except OSError as error:
        raise SourceError(f"{error.filename}: cannot be read: {error.strerror}; is the source whole?") from None
    return {
        **{f"recipe {key}": value for key, value in sorted(_flat(settings))},
        "data": data_digest,
        "tokenizer": tokenizer,
        "source files": files,
        "plan": task.plan.digest,
        **{f"version of {package}": number for package, number in versions().items()},
        "device": device,
    }


def require_same(recorded: Mapping[str, Any], now: Mapping[str, Any], where: Path, finished: int) -> None:
    """Raises EnvironmentProblem that lists every key whose value changed since the run began, old -> new."""
    changed = [key for key in {**recorded, **now} if recorded.get(key) != now.get(key)]
    if not changed:
        return
    lines = [f"  {key}: {_shown(recorded.get(key))} -> {_shown(now.get(key))}" for key in changed]
    raise EnvironmentProblem(
        f"{where}: this run began with other settings, and its {finished} finished blocks would not fit what would be "
        "calculated now. Changed since:\n" + "\n".join(lines) + "\nRemedy: set it back and run the same command again, "
        "or pass --restart, which starts over and discards the finished blocks"
    )


def require_unchanged(changed: Sequence[str], shards: int, where: Path) -> None:
    """Raises SourceError if shards of the source changed since the run in `where` began: the finished part may come
    from other bytes than a resumed run would read. `changed` is the result of `changed_shards`."""
    if changed:
        raise SourceError(
            f"{where}: the source changed since this run began ({len(changed)} of {shards} shards: {'; '.join(changed[:3])}"
            + (" ..." if len(changed) > 3 else "")
            + "), and what is finished may not fit it. Remedy: bring the old files back with their times (rsync -a, cp -p); or, "
            "if you know that the bytes are the same, set the old time again (touch -d @SECONDS.NANOSECONDS SHARD); or pass "
            "--restart, which discards what is finished"
        )


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, value)]


def source_digest(source: Checkpoint) -> str:
    """A digest of the config and of every shard's name, size and a sample of its bytes: reading all bytes would take
    hours."""
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
