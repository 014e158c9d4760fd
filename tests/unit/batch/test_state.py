"""What lies in the directory of a batch: which outputs are done, progress, and a batch.json that is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import EnvironmentProblem
from tests.unit.batch.batches import entry_of, finish, looked_at, recipe
from workflows.batch.state import BatchDirectory


def test_what_an_output_holds_decides_what_is_done(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    path = recipe(tmp_path, "a", source)
    entry = entry_of(batch, path)
    assert entry.output_state().kind == "open"
    finish(entry)
    assert entry.output_state().kind == "done"
    # Other checks alone are asked for: nothing is computed again. Another recipe's checkpoint is not touched.
    recipe(tmp_path, "a", source, verify={"fidelity": False})
    assert entry_of(batch, path).output_state().kind == "verify"
    recipe(tmp_path, "a", source, export={"max_shard_size": "1MB"})
    assert "name another output, or pass --overwrite" in looked_at(batch, path).problems[0][1]
    assert not looked_at(batch, path, overwrite=True).problems
    recipe(tmp_path, "a", source)
    (Path(entry.output) / "model-1.safetensors").unlink()
    assert "has lost files" in entry.output_state().why
    (Path(entry.output) / "model-1.safetensors").write_text("x")
    entry.run.record("verified", structure="FAIL")
    assert entry.output_state().kind == "verify"


def test_an_engine_that_is_killed_each_time_is_no_progress(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    (entry,) = looked_at(batch, recipe(tmp_path, "a", source)).entries
    finish(entry, serving="FAIL")
    before = entry.progress()
    entry.run.record("exported", plan=entry.plan_digest)
    entry.run.record("verified", serving="FAIL")
    assert entry.progress() == before
    entry.run.record("shards", plan=entry.plan_digest, block=1, shards={"model-2.safetensors": "d"})
    assert entry.progress() == before + 1


def test_a_measurement_that_goes_on_is_progress_and_one_that_starts_over_is_none(
    tmp_path: Path, source: Path, batch: BatchDirectory
) -> None:
    entry = replace(entry_of(batch, recipe(tmp_path, "a", source)), budget="asked")
    entry.run.path.mkdir(parents=True, exist_ok=True)
    for found, event in enumerate(({"block": 0}, {"block": 1}, {"sample": 0}, {"sample": 1}), 1):
        for _ in range(2):
            with (entry.run.path / "events.jsonl").open("a") as file:
                file.write(json.dumps({"event": "measured", **event}) + "\n")
                file.write('{"event": "measured", "block": [1]}\n')
            assert entry.progress() == found
    assert replace(entry, budget="").progress() == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "../../x"}, "no name of a run"),
        ({"name": 3}, "name"),
        ({"output": "a\0b"}, "no output"),
        ({"output": "/"}, "no output"),
        ({"output_bytes": "1"}, "output_bytes"),
        ({"problems": "x"}, "problems"),
        ({"unknown": 1}, None),
    ],
)
def test_a_batch_json_whose_fields_mean_nothing_is_one_message(
    tmp_path: Path, change: dict[str, Any], problem: str | None
) -> None:
    batch = BatchDirectory(tmp_path)
    run = {"name": "a", "given": "a.yaml", "recipe": "a.yaml", "output": str(tmp_path / "out"), **change}
    (tmp_path / "batch.json").write_text(json.dumps({"slots": 1, "runs": [run]}))
    if problem is None:
        assert batch.load()[0][0].name == "a"
        return
    with pytest.raises(EnvironmentProblem, match=problem):
        batch.load()


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_damaged_batch_json_is_not_a_batch_that_was_never_started(tmp_path: Path, text: str) -> None:
    batch = BatchDirectory(tmp_path)
    with pytest.raises(EnvironmentProblem, match="no batch was started there"):
        batch.load()
    (tmp_path / "batch.json").write_text(text)
    with pytest.raises(EnvironmentProblem, match=r"batch\.json.*the file is damaged or of another version"):
        batch.load()
