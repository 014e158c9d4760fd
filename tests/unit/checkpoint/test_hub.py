"""What a command line calls a checkpoint: a directory, or a repository of the hub, from its cache if there is no network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from calibration.checkpoint.hub import named_directory
from recipes.errors import SourceError
from tests.models import standard
from verify.__main__ import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def downloaded(cache: Path, name: str) -> None:
    """A repository as huggingface_hub leaves it in its cache."""
    place = cache / f"models--{name.replace('/', '--')}"
    source = standard.write(cache / "made", "llama")
    (place / "snapshots").mkdir(parents=True)
    shutil.move(source, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


def test_a_repository_is_verified_by_its_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downloaded(cache, "some-org/a-model")
    assert main(["some-org/a-model", "--level", "structure", "--details"]) in (0, 5)
    assert "structure.open" in capsys.readouterr().out


def test_a_name_that_is_nowhere_ends_in_one_message(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["some-org/none", "--level", "structure"]) == 3
    error = capsys.readouterr().err
    assert "CHECKPOINT: some-org/none: no such directory, and the hub snapshot" in error and "Traceback" not in error


def test_paths_are_never_asked_of_the_hub(cache: Path, tmp_path: Path) -> None:
    for text in (str(tmp_path / "none"), "./a", "a", "../a/b", "~/a", ".hidden/x"):
        assert named_directory(Path(text), "x") == Path(text)
    (tmp_path / "there").mkdir()
    assert named_directory(tmp_path / "there", "x") == tmp_path / "there"
    with pytest.raises(SourceError, match="revision v1"):
        named_directory(Path("some-org/none@v1"), "x")
