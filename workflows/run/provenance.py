"""provenance.json: how an output was made, enough to make it again. Lies in the output and in its run directory.

It names files, data and packages, never a path, a host or a user of the machine. All of it but `times` is the same whenever a
run is repeated on machines that round alike.
"""

from __future__ import annotations

import hashlib
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calibration.checkpoint import native
from calibration.checkpoint.files import write_json
from calibration.checkpoint.index import Checkpoint
from calibration.plan.versions import versions
from calibration.runs.fingerprint import source_digest
from calibration.runs.journal import RunDirectory
from recipes.portable import portable_recipe, revision, source_name
from verify.proof.statistics import PROVENANCE_NAME, input_scale_statistics
from workflows.run.state import Run


def write_provenance(run: Run) -> None:
    """Writes provenance.json of a finished output into it and into the run directory. Raises EnvironmentProblem if it cannot be
    written."""
    made = provenance(run)
    for directory in (run.directory.path, run.output):
        write_json(directory / PROVENANCE_NAME, made)


def provenance(run: Run) -> dict[str, Any]:
    """The content of provenance.json, from the journal, the events, the source and the output of a run."""
    recipe, plan, source = run.recipe, run.plan, run.source
    facts = [fact for fact in run.directory.facts() if fact.get("plan") in (None, plan.digest)]
    parts = _last(facts, "fingerprint").get("parts", {})
    content = portable_recipe(recipe)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    shards = {shard: digest for fact in facts if fact["fact"] == "shards" for shard, digest in fact["shards"].items()}
    made: dict[str, Any] = {
        "format": 1,
        "source": {
            "name": source_name(recipe.source),
            "revision": revision(recipe.source),
            "family": plan.family.name,
            "sha256_of_headers_and_samples": source_digest(source),
            "files": {shard: _file(source.directory / shard) for shard in source.shards},
            "tokenizer_sha256": parts.get("tokenizer"),
        },
        "recipe": {"sha256": hashlib.sha256(canonical.encode()).hexdigest(), "content": content},
        "plan": plan.digest,
        "data": _data(content.get("calibration"), parts.get("data"), _last(facts, "calibrated")),
        "versions": versions(),
        "machine": _machine(_last(facts, "products")),
        "times": _times(run.directory),
        "output": {"bytes": plan.output_bytes, "shards": dict(sorted(shards.items()))},
    }
    if recipe.method == "calibrate":
        names = [o.name for step in plan.quantized.values() for o in step.outputs[3:]]
        made["statistics"] = input_scale_statistics(Checkpoint.open(run.output), names).model_dump()
    return made


def _last(facts: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((fact for fact in reversed(facts) if fact["fact"] == kind), {})


def _file(path: Path) -> dict[str, Any]:
    """The size of a source's file, and its sha256 where the hub's cache has it in the file's name."""
    blob = path.resolve().name
    known = path.is_symlink() and len(blob) == 64 and all(letter in "0123456789abcdef" for letter in blob)
    return {"bytes": path.stat().st_size, **({"sha256": blob} if known else {})}


def _data(options: dict[str, Any] | None, digest: str | None, calibrated: dict[str, Any]) -> dict[str, Any] | None:
    """The calibration data: what the recipe names, the sha256 of all token rows, and the beginning of that of each row."""
    if options is None or digest is None:
        return None
    named = {key: options[key] for key in ("dataset", "config_name", "split", "seed", "num_samples", "max_seq_length")}
    return named | {"revision": calibrated.get("revision"), "sha256": digest, "rows": calibrated.get("rows", [])}


def _machine(products: dict[str, Any]) -> dict[str, Any]:
    """What the bytes may depend on: device and how its products round (methods that calibrate), processor, Python."""
    return {
        "device": products.get("device"),
        "products": products.get("digest"),
        "processor": platform.machine(),
        "kernels": native.level(),
        "python": platform.python_version(),
    }


def _times(directory: RunDirectory) -> dict[str, Any]:
    """When the first stage began and the last one ended (UTC), and the seconds of every stage, in its last attempt."""
    events = [event for event in directory.events() if event["event"] in ("stage_started", "stage_finished")]
    stages = {event["stage"]: round(event["seconds"], 1) for event in events if event["event"] == "stage_finished"}
    if not events:
        return {}
    began, ended = (
        datetime.fromtimestamp(event["time"], UTC).isoformat(timespec="seconds") for event in (events[0], events[-1])
    )
    return {"began": began, "ended": ended, "seconds": stages}
