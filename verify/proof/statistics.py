"""The calibrated input scales of a checkpoint as one digest, and what a run recorded of them in provenance.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calibration.checkpoint.files import MissingFile, read_json_object
from calibration.checkpoint.index import Checkpoint
from recipes.errors import SourceError
from recipes.places import run_directory

#: The file that says how a checkpoint was made, in it and in its run directory.
PROVENANCE_NAME = "provenance.json"
_MOST_BYTES = 64 << 20


class Statistics(BaseModel):
    """The number of calibrated input scales, and the digest of their names and values."""

    model_config = ConfigDict(strict=True, extra="forbid")
    input_scales: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Provenance(BaseModel):
    """What is read of provenance.json here."""

    statistics: Statistics


@dataclass(frozen=True)
class Recorded:
    """The `statistics` that a run recorded, and the file they are from. `own`: the file lies inside the checkpoint, so whoever
    edits one can edit the other."""

    statistics: Statistics
    path: Path
    own: bool


def input_scale_statistics(checkpoint: Checkpoint, names: Iterable[str]) -> Statistics:
    """The digest of the input scales `names`, over lines of name and bytes. Raises SourceError if one cannot be read."""
    ordered = sorted(names)
    digest = hashlib.sha256()
    for name in ordered:
        digest.update(f"{name} {checkpoint.read_bytes(name).hex()}\n".encode())
    return Statistics(input_scales=len(ordered), sha256=digest.hexdigest())


def recorded_statistics(output: Path, named: Path | None = None) -> Recorded | None:
    """What is recorded of the input scales of `output`: in the file `named` by the user, in the run directory beside it, or in
    the checkpoint itself; None if nowhere. Raises SourceError if `named` has no such record."""
    if named is not None:
        return Recorded(_read(named), named, own=False)
    for path, own in ((run_directory(output) / PROVENANCE_NAME, False), (output / PROVENANCE_NAME, True)):
        try:
            return Recorded(_read(path), path, own)
        except MissingFile:
            continue
        except SourceError:
            if own:
                return None
    return None


def _read(path: Path) -> Statistics:
    content = read_json_object(path, max_bytes=_MOST_BYTES)
    try:
        return _Provenance.model_validate(content).statistics
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise SourceError(f"{path}: {where}: {error.errors()[0]['msg']}; name the provenance.json of a run") from None
