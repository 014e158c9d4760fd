"""workflows.compare: what it shows of finished runs, what it calls noise, and what it refuses to compare."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from calibration.runs.journal import RunDirectory
from recipes.errors import RecipeError, SourceError
from tests import synthetic_run
from workflows.batch.state import BatchDirectory
from workflows.compare.__main__ import main, page
from workflows.compare.runs import differences, read_runs


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    outputs = [tmp_path / name for name in ("rtn", "gptq", "awq")]
    for output in outputs:
        synthetic_run.write(output, blocks=2, experts=2)
    synthetic_run.remeasure(outputs[1], [1.52, 1.61, 1.53], 4.73)  # a tenth better in every window
    synthetic_run.remeasure(outputs[2], [1.63, 1.68, 1.64], 5.21)  # better here, worse there
    return outputs


def test_differences_are_paired_by_window_and_noise_is_named(runs: list[Path]) -> None:
    pairs = {(pair.left, pair.right): pair for pair in differences(read_runs(runs))}
    better, even = pairs["rtn", "gptq"], pairs["rtn", "awq"]
    assert better.mean == pytest.approx(0.29 / 3) and not better.noise
    # The spread of the losses themselves is ten times that of their differences.
    assert better.error == pytest.approx(math.sqrt(sum((d - 0.29 / 3) ** 2 for d in (0.1, 0.09, 0.1)) / 6))
    assert even.noise


def test_the_table_shows_what_each_run_costs_and_keeps(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, runs), "--matrix"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "1,573,000,000,000 parameters",
        "911.3 GB",
        "4.630",
        "98.2%",
        "95.7%",
        "best",
        "gptq is better",
        "within noise",
    ):
        assert part in shown, part
    assert main([*map(str, runs), "--json"]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)["runs"]] == ["rtn", "gptq", "awq"]


def test_a_run_directory_and_a_batch_stand_for_their_runs(runs: list[Path], tmp_path: Path) -> None:
    assert [run.name for run in read_runs([RunDirectory(runs[0]).path, runs[0], runs[1]])] == ["rtn", "gptq"]
    batch = BatchDirectory(tmp_path / "night.run")
    entries = synthetic_run.batch(batch, tmp_path)
    for entry in entries:
        if not RunDirectory(Path(entry.output)).path.is_dir():
            synthetic_run.write(Path(entry.output), blocks=2, experts=2, verified=False)
    batch.save(entries, slots=1)
    assert len(read_runs([batch.path])) == len(entries)


def test_other_text_another_source_and_no_run_are_refused(runs: list[Path], tmp_path: Path) -> None:
    synthetic_run.remeasure(runs[1], [1.5, 1.6, 1.5], 4.7, scored={"digest": "e" * 64})
    with pytest.raises(RecipeError, match="gptq: measured on other text than rtn"):
        read_runs(runs[:2])
    synthetic_run.remeasure(runs[1], [1.5], 4.7, scored=None)
    with pytest.raises(RecipeError, match="other text"):
        read_runs(runs[:2])
    plan = RunDirectory(runs[2]).path / "plan.json"
    plan.write_text(plan.read_text().replace("139583", "139584"))
    with pytest.raises(RecipeError, match=r"awq: made from deepseek_v4, .* 139584 tensors, rtn from"):
        read_runs([runs[0], runs[2]])
    for number, output in enumerate(("a", "b")):
        synthetic_run.write(tmp_path / output, blocks=1, experts=1)
        RunDirectory(tmp_path / output).record(
            "fingerprint", plan="p" * 64, blocks=1, parts={"source files": str(number)}
        )
    with pytest.raises(RecipeError, match="with other bytes in its shards"):
        read_runs([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(RecipeError, match="1 run; name at least two"):
        read_runs(runs[:1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "batch.json").write_text('{"slots": 1, "runs": []}')
    with pytest.raises(RecipeError, match="empty: 0 run; name at least two to compare"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(SourceError, match=re.escape("/: no run: /.run is no directory")):
        read_runs([Path("/")])
    with pytest.raises(SourceError, match="nowhere: no run"):
        read_runs([tmp_path / "nowhere"])


def test_a_run_that_was_not_served_is_shown_without_figures(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (RunDirectory(runs[1]).path / "serving.json").unlink()
    (RunDirectory(runs[2]).path / "serving.json").write_text(
        '{"windows": 3, "scored": [], "samples": {}, "perplexity": "x"}'
    )
    assert main([*map(str, runs)]) == 0
    assert "gptq" in capsys.readouterr().out


def test_a_damaged_file_is_no_run_that_was_not_served(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (RunDirectory(runs[1]).path / "serving.json").write_text('{"windows": ')
    assert main([*map(str, runs)]) == 3
    said = capsys.readouterr().err
    assert "gptq.run/serving.json" in said and "verify again" in said and "Traceback" not in said


def test_the_page_holds_runs_pairs_plots_and_samples_and_runs_nothing(runs: list[Path], tmp_path: Path) -> None:
    made = page(found := read_runs(runs), differences(found))
    for part in (
        "KL against size",
        "Perplexity against size",
        "gptq is better",
        "The capital of France is",
        "&lt;img src=",
    ):
        assert part in made, part
    assert "<script" not in made and "<img" not in made
    assert main([*map(str, runs), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert main([*map(str, runs), "--html", str(tmp_path / "page.html" / "page.html")]) == 4
    assert main([*map(str, runs), "--html", str(runs[0] / "page.html")]) == 2  # a hub repository holds no report
