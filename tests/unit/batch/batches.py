"""Recipes of a tiny source, looked at by the preflight, and the marks of a finished run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from workflows.batch import preflight as batch_plan
from workflows.batch.preflight import preflight, wanted_runs
from workflows.batch.state import BatchDirectory, Entry

BODY: dict[str, Any] = {
    "method": "convert",
    "modifiers": [{"QuantizationModifier": {"targets": [r"re:^model\.layers\..*proj$"], "scheme": "NVFP4A16"}}],
}


def recipe(folder: Path, name: str, source: Path, **sections: Any) -> Path:
    path = folder / f"{name}.yaml"
    body = BODY | {"source": {"checkpoint": str(source)}, "output": str(folder / "out" / name)} | sections
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def looked_at(batch: BatchDirectory, *paths: Path, overwrite: bool = False) -> batch_plan.Preflight:
    batch.open()
    try:
        return preflight(wanted_runs(paths, [], []), batch, 1, overwrite, lambda text: None)
    finally:
        batch.close()


def entry_of(batch: BatchDirectory, path: Path) -> Entry:
    return looked_at(batch, path).entries[0]


def finish(entry: Entry, **verdicts: str) -> None:
    """Leaves what a finished run leaves: shards, index, events, journal."""
    output, run = Path(entry.output), entry.run
    output.mkdir(parents=True)
    for name in ("model-1.safetensors", "model.safetensors.index.json"):
        (output / name).write_text("x")
    run.event("plan", digest=entry.plan_digest, recipe=entry.recipe_digest)
    shutil.copy(entry.recipe, run.path / "recipe.yaml")
    run.record("shards", plan=entry.plan_digest, block=0, shards={"model-1.safetensors": "d"})
    run.record("exported", plan=entry.plan_digest)
    run.record("verified", **({"structure": "PASS", "fidelity": "PASS", "serving": "UNCHECKED"} | verdicts))
