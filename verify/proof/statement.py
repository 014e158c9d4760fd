"""What a proof states, as an in-toto Statement (https://in-toto.io/Statement/v1): JSON that can be signed and kept.

The subject lists the files that were compared, with their sha256; the predicate says with what, and what was not proven. It
holds names of files, no path of the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import file_digest, is_file
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint, changed_shards, shard_state
from calibration.checkpoint.side_files import side_files
from calibration.plan.output_files import planned_files
from calibration.plan.task import Task
from calibration.plan.versions import versions
from recipes.errors import SourceError
from recipes.loader import recipe_digest
from recipes.portable import source_name
from verify.checks import PROOF, Check, level_verdicts
from verify.proof.rederive import Derived

_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:nvfp4-workflows:proof:v1"
#: Differing tensors that a statement names.
_MOST = 100


def make_statement(output: Checkpoint, task: Task, found: Derived, checks: Sequence[Check]) -> dict[str, Any]:
    """The statement of a proof. Reads every shard of output and source once more, for their digests."""
    source = task.source
    copied = [str(path.relative_to(source.directory)) for path in side_files(source.directory).copied]
    compared = [*output.shards, *planned_files(task.plan, source.config), *copied]
    ours, theirs = _digests(output, compared), _digests(source, [*source.shards, CONFIG_NAME, INDEX_NAME, *copied])
    unproven = {"recorded": found.recorded, "tuned": found.tuned, "calibrated": found.calibrated}
    return {
        "_type": _TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in ours.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "source": {
                "name": source_name(task.recipe.source),
                "revision": task.recipe.source.revision,
                "sha256": theirs,
            },
            "recipe": {"sha256": recipe_digest(task.recipe)},
            "plan": task.plan.digest,
            "versions": versions(),
            "tensors": {
                "derived": len(found.proven),
                "bytes": sum(found.proven.values()),
                "of_bytes": output.total_bytes,
                **{kind: len(names) for kind, names in unproven.items()},
            },
            "differences": [str(difference) for difference in found.differences[:_MOST]],
            "verdict": level_verdicts(checks)[PROOF],
            "checks": {check.id: {"verdict": check.verdict, "figure": check.figure} for check in checks},
        },
    }


def _digests(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """File name -> sha256, of those that exist. Raises SourceError if a shard changed since it was opened."""

    def digest(path: Path) -> str:
        try:
            return file_digest(path)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from None

    there = sorted({name for name in names if is_file(checkpoint.directory / name)})
    with ThreadPoolExecutor() as pool:
        found = dict(zip(there, pool.map(digest, (checkpoint.directory / name for name in there)), strict=True))
    if changed := changed_shards(checkpoint.state, shard_state(checkpoint.directory, checkpoint.shards)):
        raise SourceError(
            f"{checkpoint.directory}: changed while it was read: {changed[0]}; run the same command again"
        )
    return found
