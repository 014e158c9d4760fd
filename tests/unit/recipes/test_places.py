"""Where a run may write and what it may remove: never the source, however it is spelled, and nothing that no run wrote."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from calibration.checkpoint.direct import DirectWriter
from calibration.checkpoint.files import write_text
from calibration.checkpoint.index import INDEX_NAME
from calibration.runs.journal import RunDirectory
from calibration.runs.output import overwrite_problems, remove_unfinished, start_over
from recipes.errors import EnvironmentProblem, RecipeError
from recipes.loader import load_recipe
from recipes.places import is_inside, own_scratch, place_problems, run_directory
from tests.models import standard
from verify import __main__ as verify
from workflows import inspect_checkpoint
from workflows.batch import __main__ as batch
from workflows.run import __main__ as run
from workflows.run.output_state import read_output_state
from workflows.source import require_apart

TARGETS = {"QuantizationModifier": {"targets": [r"re:^model\.layers\..*proj$"], "scheme": "NVFP4A16"}}


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


PLACES: dict[str, Callable[[Path], Path]] = {
    "the source": lambda at: at / "source",
    "another spelling": lambda at: at / "elsewhere" / ".." / "source",
    "a link": lambda at: link(at / "alias", at / "source"),
    "a link to a link": lambda at: link(at / "second", link(at / "alias", at / "source")),
    "below it": lambda at: at / "source" / "NVFP4",
    "below a link": lambda at: link(at / "alias", at / "source") / "a" / "b",
    "above it": lambda at: at,
    "above it by a link": lambda at: link(at / "elsewhere" / "up", at),
}


def made(at: Path) -> Path:
    (at / "elsewhere").mkdir()
    (at / "source").mkdir()
    (at / "source" / "config.json").write_text("{}")
    return at / "source"


def recipe_file(at: Path, source: object, output: object, **sections: Any) -> Path:
    path = at / "r.yaml"
    body = {"source": {"checkpoint": str(source)}, "output": str(output), "method": "convert", "modifiers": [TARGETS]}
    path.write_text(yaml.safe_dump(body | sections))
    return path


@pytest.mark.parametrize("place", PLACES)
def test_no_spelling_of_the_source_is_an_output(tmp_path: Path, place: str) -> None:
    source = made(tmp_path)
    path = recipe_file(tmp_path, source, PLACES[place](tmp_path))
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+: output: .* the source checkpoint.*name another directory"):
        load_recipe(path)


@pytest.mark.parametrize("place", [place for place in PLACES if not place.startswith("above")])
def test_activations_never_lie_in_the_source(tmp_path: Path, place: str) -> None:
    source = made(tmp_path)
    path = recipe_file(tmp_path, source, tmp_path / "out", offload={"directory": str(PLACES[place](tmp_path))})
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+: offload: .* the source checkpoint"):
        load_recipe(path)


def test_scratch_may_hold_source_and_output_but_not_lie_in_the_output(tmp_path: Path) -> None:
    source = made(tmp_path)
    load_recipe(recipe_file(tmp_path, source, tmp_path / "out", offload={"directory": str(tmp_path)}))
    path = recipe_file(tmp_path, source, tmp_path / "out", offload={"directory": str(tmp_path / "out" / "scratch")})
    with pytest.raises(RecipeError, match="lies inside the output"):
        load_recipe(path)


def test_a_run_directory_is_no_source_either(tmp_path: Path) -> None:
    (tmp_path / "model.run").mkdir()
    with pytest.raises(RecipeError, match="source checkpoint's own directory"):
        load_recipe(recipe_file(tmp_path, tmp_path / "model.run", tmp_path / "model"))


def test_what_links_of_the_source_lead_to_is_source(tmp_path: Path) -> None:
    """As in the hub's cache, whose snapshots hold links alone."""
    source = made(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("weights")
    link(source / "model.safetensors", tmp_path / "blobs" / "abc")
    assert "a link in the source checkpoint leads to" in place_problems(source, tmp_path / "blobs", None)[0]
    assert place_problems(source, tmp_path / "out", None) == []


def test_a_second_mount_of_the_source_is_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two directories with one inode, as a bind mount makes them."""
    source, mounted = made(tmp_path), tmp_path / "elsewhere"
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: stat(source if Path(path) == mounted else path, **more))
    assert is_inside(mounted / "NVFP4", source) and is_inside(mounted, source)
    assert not is_inside(tmp_path / "other", source)


def test_what_a_hub_id_resolves_to_is_compared_before_anything_is_written(tmp_path: Path) -> None:
    snapshot = made(tmp_path)
    recipe = load_recipe(recipe_file(tmp_path, "owner/model", snapshot / "out"))
    with pytest.raises(RecipeError, match=r"output: .* lies inside the source checkpoint"):
        require_apart(recipe, snapshot)


def test_overwrite_through_a_link_leaves_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = standard.write(tmp_path / "source", "llama")
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    path = recipe_file(tmp_path, source, link(tmp_path / "alias", source))
    assert run.main([str(path), "--overwrite"]) == RecipeError.exit_code
    assert "source checkpoint's own directory" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == before
    assert inspect_checkpoint.main([str(source), "--json"]) == 0


@pytest.mark.parametrize("option", ["--html", "--logs"])
def test_verification_writes_into_no_checkpoint(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made(tmp_path)
    place = link(tmp_path / "alias", source) / "config.json"
    assert verify.main([str(source), "--level", "structure", option, str(place)]) == RecipeError.exit_code
    assert f"{option}: {place} lies inside the checkpoint" in capsys.readouterr().err
    assert (source / "config.json").read_text() == "{}"


@pytest.mark.parametrize("option", ["--directory", "--mlflow"])
def test_a_batch_keeps_its_books_in_no_checkpoint(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made(tmp_path)
    path, place = recipe_file(tmp_path, source, tmp_path / "out"), link(tmp_path / "alias", source) / "books"
    others = {"--directory": str(tmp_path / "b.run"), option: str(place)}
    code = batch.main([str(path), *(word for pair in others.items() for word in pair)])
    assert code == RecipeError.exit_code
    assert f"{option}: {place} lies inside the source checkpoint" in capsys.readouterr().err
    assert [entry.name for entry in source.iterdir()] == ["config.json"]
    others[option] = str(tmp_path / "out" / "books")
    assert batch.main([str(path), *(word for pair in others.items() for word in pair)]) == RecipeError.exit_code
    assert f"{option}: {others[option]} lies inside the output {tmp_path / 'out'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_spellings_of_an_output_share_one_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link(tmp_path / "link", tmp_path / "real")
    assert run_directory(tmp_path / "link") == run_directory(tmp_path / "real") == tmp_path / "real.run"
    assert own_scratch(tmp_path, tmp_path / "link") == own_scratch(tmp_path, tmp_path / "real")
    assert run_directory(Path("models/out")) == Path("models/out.run")
    first = RunDirectory(tmp_path / "real").open()
    with pytest.raises(EnvironmentProblem, match="another process works on this output"):
        RunDirectory(tmp_path / "link").open()
    first.close()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished checkpoint of a run, and a file of somebody else's in it."""
    output, run = tmp_path / "out", RunDirectory(tmp_path / "out").open()
    output.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json", "notes.txt"):
        (output / name).write_text(name)
    (output / INDEX_NAME).write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    run.record("started", plan="p")
    run.record("shards", plan="p", shards={"model-1.safetensors": "d"})
    run.record("exported", plan="p", files=["config.json", INDEX_NAME])
    run.close()
    return output


def test_starting_over_removes_what_runs_wrote_and_nothing_else(output: Path) -> None:
    start_over(RunDirectory(output), output, "started", plan="q")
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    (fact,) = RunDirectory(output).facts()
    assert fact["plan"] == "q" and "model-2.safetensors" in fact["removes"]


def test_a_kill_while_starting_over_leaves_no_file_without_an_owner(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "model-1.safetensors":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        start_over(RunDirectory(output), output, "started", plan="q")
    monkeypatch.undo()
    assert not (output / INDEX_NAME).exists() and (output / "model-2.safetensors").exists()
    assert overwrite_problems(RunDirectory(output), output) == []
    start_over(RunDirectory(output), output, "started", plan="q")
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "name", ["../precious", "/precious", "sub/../../precious", "linked/precious", "", ".", "sub", "a\0b"]
)
def test_a_hostile_journal_or_index_removes_nothing_outside(output: Path, tmp_path: Path, name: str) -> None:
    for place in (tmp_path, tmp_path / "elsewhere"):
        place.mkdir(exist_ok=True)
        (place / "precious").write_text("precious")
    (output / "sub").mkdir()
    link(output / "linked", tmp_path / "elsewhere")
    name = str(tmp_path / "precious") if name == "/precious" else name
    run = RunDirectory(output).open()
    run.record("exported", files=[name, {"no": "text"}])
    run.record("shards", shards={name: "d"}, removes=7)
    (output / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name, "b": 3}}))
    start_over(run, output, "started")
    run.close()
    assert all((place / "precious").exists() for place in (tmp_path, tmp_path / "elsewhere"))
    assert (output / "sub").is_dir() and (output / "linked").is_symlink() and output.is_dir()


def test_a_link_is_removed_and_not_followed(output: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.safetensors").write_text("kept")
    (output / "model-1.safetensors").unlink()
    link(output / "model-1.safetensors", tmp_path / "kept.safetensors")
    start_over(RunDirectory(output), output, "started")
    assert not (output / "model-1.safetensors").is_symlink() and (tmp_path / "kept.safetensors").read_text() == "kept"


def test_overwrite_replaces_checkpoints_alone(tmp_path: Path, output: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("...")
    assert "holds files (first: thesis.tex) and neither a checkpoint nor a run" in overwrite_problems(
        RunDirectory(home), home
    )[0]  # fmt: skip
    assert overwrite_problems(RunDirectory(output), output) == []
    (output / "mine.safetensors").write_text("x")
    assert "1 safetensors files there are in no index and in no journal (first: mine.safetensors)" in overwrite_problems(
        RunDirectory(output), output
    )[0]  # fmt: skip
    assert "is no directory" in overwrite_problems(RunDirectory(output), output / "notes.txt")[0]


def test_an_output_that_cannot_be_listed_is_a_problem_with_its_name(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # root lists everything

    monkeypatch.setattr(os, "listdir", locked)
    assert overwrite_problems(RunDirectory(output), output) == [
        f"{output}: cannot be read: Permission denied; name another output"
    ]
    found = read_output_state(output, RunDirectory(output), "p", "d", lambda: pytest.fail("asks for the recipe"))
    assert (found.kind, found.why) == ("foreign", "cannot be read: Permission denied")


def test_half_written_files_of_others_stay(output: Path) -> None:
    for name in ("movie.mkv.partial", "model-1.safetensors.partial"):
        (output / name).write_text("x")
    remove_unfinished(output)
    assert (output / "movie.mkv.partial").exists() and not (output / "model-1.safetensors.partial").exists()


def test_no_writer_follows_a_link_in_the_place_of_its_partial_file(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    for name, write in (
        ("a", lambda path: write_text(path, "new")),
        ("b", lambda path: DirectWriter(path, 4096).abandon()),
    ):
        precious.write_text("precious")
        link(tmp_path / f"{name}.partial", precious)
        write(tmp_path / name)
        assert precious.read_text() == "precious"
