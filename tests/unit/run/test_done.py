"""The same command after a run that came to its end: it says so, with the verdict and the exit code of then."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from calibration.runs.journal import RunDirectory
from recipes.errors import EnvironmentProblem, VerificationFailed
from tests.models import standard
from workflows.run import __main__ as run
from workflows.run import stages


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a recipe and the output of its verified run."""
    folder = tmp_path_factory.mktemp("done")
    source = standard.write(folder / "source", "llama")
    body = {"source": {"checkpoint": str(source)}, "output": str(folder / "out"), "method": "plain"}
    write(folder, body | {"verify": {"fidelity": False}})
    assert run.main([str(folder / "r.yaml"), "--no-rehearsal"]) == 0
    return folder


def write(folder: Path, body: dict[str, object]) -> None:
    (folder / "r.yaml").write_text(yaml.safe_dump(body))


@pytest.fixture
def folder(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As the run left it, and any stage that does something is an error."""
    kept = finished / "kept"
    for name in ("out", "out.run"):
        if kept.exists():
            shutil.rmtree(finished / name)
            shutil.copytree(kept / name, finished / name)
    if not kept.exists():
        for name in ("out", "out.run"):
            shutil.copytree(finished / name, kept / name)
    monkeypatch.setattr(stages, "calibrate", lambda run: pytest.fail("calibrates again"))
    monkeypatch.setattr(stages, "verify", lambda run: pytest.fail("verifies again"))
    return finished


def files(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and folder / "kept" not in path.parents
    }


def again(folder: Path, *options: str) -> int:
    return run.main([str(folder / "r.yaml"), *options])


def test_the_same_command_says_that_it_is_done_and_touches_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    for options in ([], ["--no-rehearsal"]):
        assert again(folder, *options) == 0
        said = capsys.readouterr()
        assert "done and verified before by this recipe and plan (structure PASS" in said.err
        assert "structure: PASS" in said.out and len(said.out.splitlines()) <= 15
    assert again(folder, "--details") == 0
    assert "structure.tensors" in (said := capsys.readouterr()).out and "structure: PASS" in said.out
    assert again(folder, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdicts"]["structure"] == "PASS" and told["exit_code"] == 0
    assert files(folder) == before


def test_a_failed_verdict_fails_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = RunDirectory(folder / "out").open()
    opened.record("verified", structure="FAIL", fidelity="UNCHECKED", serving="UNCHECKED")
    opened.close()
    assert again(folder) == VerificationFailed.exit_code
    said = capsys.readouterr()
    assert (
        "structure.verdict" in said.err and "FAIL structure.verdict" in said.out
    )  # verify.json is of the verification before
    checks = json.loads((folder / "out.run" / "verify.json").read_text())
    checks["checks"][0]["verdict"] = "FAIL"
    (folder / "out.run" / "verify.json").write_text(json.dumps(checks))
    assert again(folder) == VerificationFailed.exit_code
    said = capsys.readouterr()
    assert checks["checks"][0]["id"] in said.err and f"FAIL {checks['checks'][0]['id']}: " in said.out
    assert len((said.out + said.err).splitlines()) <= 16  # and that the run is done
    assert again(folder, "--details") == VerificationFailed.exit_code
    assert f"{checks['checks'][0]['id']}: " in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["other recipe", "other source", "lost shard", "short shard", "restart", "hostile"])
def test_whatever_is_not_the_same_is_not_done(folder: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = (folder / "r.yaml").read_text()
    shard, source = next((folder / "out").glob("*.safetensors")), next((folder / "source").glob("*.safetensors"))
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    options, said = [], ""
    if harm == "other recipe":
        (folder / "r.yaml").write_text(recipe + "export: {max_shard_size: 1MB}\n")
    elif harm == "other source":
        os.utime(source, ns=(1, 1))
        said = "the source changed since"
    elif harm == "lost shard":
        shard.unlink()
    elif harm == "short shard":
        os.truncate(shard, shard.stat().st_size - 1)
        said = "was finished and is damaged"
    elif harm == "restart":
        options = ["--restart", "--stages", "inspect"]
    else:
        (folder / "out.run" / "verify.json").write_text('{"checks": [{"id": 3}]}')
    try:
        assert again(folder, *options) == {"restart": 0, "hostile": 0}.get(harm, EnvironmentProblem.exit_code)
    finally:
        (folder / "r.yaml").write_text(recipe)
        os.utime(source, ns=times)
    err = capsys.readouterr().err
    assert said in err and ("done and verified" in err) == (harm == "hostile")
    assert ("output is not empty" in err) == (harm not in ("restart", "hostile"))
