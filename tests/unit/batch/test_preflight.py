"""What the preflight finds before the first run: problems, shared sources, disks, claims; and what a dry run leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from calibration.forecast.cost import boundary_bytes, scratch_bytes
from calibration.runs import disk
from recipes.errors import EnvironmentProblem, RecipeError, SourceError
from tests.unit.batch.batches import looked_at, recipe
from workflows.batch import preflight as batch_plan
from workflows.batch.__main__ import main
from workflows.batch.preflight import Wanted, predict_ends, preflight
from workflows.batch.state import BatchDirectory, Entry


def test_preflight_tells_every_problem_at_once(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    good = recipe(tmp_path, "good", source)
    paths = [
        good,
        recipe(tmp_path, "same", source, output=str(tmp_path / "out" / "good")),
        recipe(tmp_path, "no_source", tmp_path / "nowhere"),
        recipe(
            tmp_path,
            "no_match",
            source,
            modifiers=[{"QuantizationModifier": {"targets": ["re:^x$"], "scheme": "NVFP4A16"}}],
        ),
        recipe(tmp_path, "unknown", source, mehtod="convert"),
    ]
    found = looked_at(batch, *paths)
    with pytest.raises(RecipeError) as error:
        found.require_sound()
    for part in (
        "same: output", "is also the output of good", f"{tmp_path / 'nowhere'}: no such directory",
        "no_match: ", "matches no module", "mehtod: unknown key; did you mean 'method'?",
    ):  # fmt: skip
        assert part in str(error.value), part
    assert {entry.name: bool(entry.problems) for entry in found.entries} == dict.fromkeys(
        ("good", "same", "no_source", "no_match", "unknown"), True
    )
    with pytest.raises(SourceError):
        looked_at(batch, paths[2]).require_sound()


def test_a_shared_source_is_opened_once(
    tmp_path: Path, source: Path, batch: BatchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = [], batch_plan.open_source
    monkeypatch.setattr(batch_plan, "open_source", lambda path: (opened.append(path), real(path))[1])
    found = looked_at(batch, *(recipe(tmp_path, name, source) for name in ("a", "b", "c")))
    assert not found.problems and opened == [source]
    assert all(entry.seconds is not None and entry.seconds > 0 for entry in found.entries)


def test_the_disk_is_compared_with_all_outputs_together(
    tmp_path: Path, source: Path, batch: BatchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [recipe(tmp_path, name, source) for name in ("a", "b", "c")]
    one = looked_at(batch, paths[0]).entries[0].output_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=2 * one))
    looked_at(batch, *paths[:2]).require_sound()
    with pytest.raises(EnvironmentProblem, match=f"needs {3 * one:,}"):
        looked_at(batch, *paths).require_sound()


def test_two_batches_cannot_share_an_output(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    path, other = recipe(tmp_path, "a", source), BatchDirectory(tmp_path / "other.run")
    batch.open()
    assert not preflight([Wanted("a", path)], batch, 1, False, lambda text: None).problems
    with pytest.raises(
        EnvironmentProblem, match=rf"belongs to the batch {re.escape(str(batch.path))}, pid {os.getpid()}"
    ):
        looked_at(other, path).require_sound()
    with pytest.raises(EnvironmentProblem, match="already at work"):
        BatchDirectory(batch.path).open()
    batch.close()
    looked_at(other, path).require_sound()


def test_a_checkpoint_that_no_run_made_is_not_touched(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    path = recipe(tmp_path, "a", source)
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "config.json").write_text("{}")
    assert "output is not empty" in looked_at(batch, path).problems[0][1]


def test_runs_end_in_the_order_that_the_slots_allow() -> None:
    entries = [Entry(name, "", "", "", seconds=seconds) for name, seconds in (("long", 9.0), ("b", 2.0), ("c", 3.0))]
    assert predict_ends(entries, 2) == [("b", 2.0), ("c", 5.0), ("long", 9.0)]
    assert predict_ends([*entries, Entry("d", "", "", "")], 1) == [("long", 9.0), ("b", 11.0), ("c", 14.0), ("d", None)]


def test_the_preflight_reckons_activations_as_the_rehearsal_does(
    tmp_path: Path, source: Path, batch: BatchDirectory
) -> None:
    """Hidden states, ids and positions, and the causal mask of every sample, which grows with the square of its length."""
    data = {"dataset": "bundled", "num_samples": 10, "max_seq_length": 256, "batch_size": 4}
    entry = looked_at(batch, recipe(tmp_path, "a", source, method="calibrate", calibration=data)).entries[0]
    config = json.loads((source / "config.json").read_text())
    boundary = boundary_bytes(config["hidden_size"], [(4, 256), (4, 256), (2, 256)])
    assert boundary >= 10 * 256 * 256 * 2
    assert entry.activation_bytes == scratch_bytes(boundary, config["num_hidden_layers"], None) > 0
    assert boundary_bytes(2048, [(1, 2048)] * 256) > 2 * (2 * 2048 * 256 * 2048)  # Qwen3-30B-A3B, 256 x 2048


def test_a_dry_run_of_a_batch_leaves_nothing_behind(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [recipe(tmp_path, name, source) for name in ("a", "b")]
    before = sorted(tmp_path.rglob("*"))
    assert main([*map(str, paths), "--dry-run"]) == 0
    assert "2 of 2 runs are to be done" in "".join(capsys.readouterr())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_a_batch_sees_what_is_at_work_and_what_cannot_be_written(
    tmp_path: Path,
    source: Path,
    batch: BatchDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path, "a", source)
    batch.open()
    assert batch.claim(tmp_path / "out" / "a") is None
    assert main([str(path), "--dry-run", "--directory", str(batch.path)]) == 4
    assert "this batch is already at work" in "".join(capsys.readouterr())
    assert main([str(path), "--dry-run"]) == 4
    assert "belongs to the batch" in "".join(capsys.readouterr())
    batch.close()
    (tmp_path / "file").write_text("")
    assert main([str(path), "--dry-run", "--set", f"output={tmp_path}/file/out"]) == 4
    assert "cannot be written" in "".join(capsys.readouterr())
