"""Which bytes a verification judged: recorded at its end, compared before an output is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from calibration.checkpoint.direct import Buffer, digest
from calibration.checkpoint.files import file_digest, read_json_or_none
from calibration.checkpoint.index import Checkpoint
from calibration.runs.journal import RunDirectory
from recipes.errors import EnvironmentProblem, SourceError
from verify.checks import Check, Verdict, overall, to_json

#: Files that are written after the verdict: the card shows it, and the signature covers the card.
_AFTER = ("README.md", "model.sig")


@dataclass(frozen=True)
class Judged:
    """The last verification of an output: its checks (empty: there was none) and the digests of what it judged, shards as the
    run's journal has them (sha256 hex or `crc32:<hex>:<bytes>`)."""

    checks: Sequence[Check]
    files: dict[str, str]

    @property
    def verdict(self) -> Verdict:
        """The overall verdict; UNCHECKED if there was no verification."""
        return overall(self.checks)

    def changed(self, output: Checkpoint) -> list[str]:
        """The files of `output` that are not those that were judged, each with what happened to it. Reads every byte."""
        shards, buffer = set(output.shards), Buffer(8 << 20)
        found = {name: "not there when it was verified" for name in small_files(output) if name not in self.files}
        found |= dict.fromkeys(shards - self.files.keys(), "not there when it was verified")
        for name, before in self.files.items():
            path = output.directory / name
            if not path.is_file():
                found[name] = "gone"
                continue
            now = digest(path, buffer) if before.startswith("crc32:") else _digest(path)
            if now != before:
                found[name] = "changed since it was verified"
        return [f"{name}: {what}" for name, what in sorted(found.items())]


def small_files(output: Checkpoint) -> list[str]:
    """Every regular file beside the shards that a verdict is about, at any depth, but hidden ones."""
    directory = output.directory
    names = (str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file())
    kept = set(output.shards) | set(_AFTER)
    return [name for name in names if name not in kept and not any(part.startswith(".") for part in Path(name).parts)]


def record_judged(directory: RunDirectory, output: Path) -> None:
    """Journals the digests of the small files; the shards' are in the journal already. Records nothing of an output that cannot
    be opened: its verdict is no PASS. Raises EnvironmentProblem for a file that cannot be read."""
    try:
        opened = Checkpoint.open(output)
    except SourceError:
        return
    directory.record("judged", files={name: _digest(output / name) for name in small_files(opened)})


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be read: {error.strerror}; check the permissions") from None


def read_judged(directory: RunDirectory, shards: Sequence[str]) -> Judged:
    """The last verification in a run directory; without checks if there is none, or if verify.json is not its."""
    facts = directory.facts()
    verified = next((fact for fact in reversed(facts) if fact["fact"] == "verified"), None)
    small = next((fact.get("files") for fact in reversed(facts) if fact["fact"] == "judged"), None)
    if verified is None or not isinstance(small, dict):
        return Judged((), {})
    written = {name: mark for fact in facts if fact["fact"] == "shards" for name, mark in fact["shards"].items()}
    listed = (read_json_or_none(directory.path / "verify.json") or {}).get("checks")
    try:
        checks = TypeAdapter(list[Check]).validate_python(listed)
        files = TypeAdapter(dict[str, str]).validate_python(small)
    except ValidationError:
        return Judged((), {})
    if to_json(checks)["verdicts"] != {key: value for key, value in verified.items() if key not in ("fact", "time")}:
        return Judged((), {})
    return Judged(checks, files | {name: written[name] for name in shards if name in written})
