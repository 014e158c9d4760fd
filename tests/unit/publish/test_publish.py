"""Only what was verified is published: those bytes, those files, and a card that says what was not proven.

huggingface_hub has no server to test against, so the commit that would be sent is what is tested, and how it fails without a
network or a token.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from calibration.checkpoint.files import write_json
from calibration.checkpoint.index import Checkpoint
from calibration.runs.journal import RunDirectory
from recipes.schema import Recipe
from tests.converted import converting, run
from tests.exported import task_of
from tests.models import standard
from tests.unit.structure.keys import write_keys
from verify.checks import LEVELS, Check, to_json
from verify.signature import SIGNATURE_NAME, signature_check
from workflows.publish.__main__ import main, operations
from workflows.publish.publication import named_card, prepare
from workflows.run.card import model_card
from workflows.run.judged import record_judged

PASSED = [Check(f"{level}.x", "PASS", "what", "1", "1", "how") for level in LEVELS]
REPOSITORY = "some-one/llama-NVFP4"


def judge(made: Recipe, checks: list[Check]) -> None:
    """Records a verification that said `checks`, as the verify stage does."""
    output, directory = Path(made.output), RunDirectory(Path(made.output))
    (output / "README.md").write_text(model_card(task_of(made), checks, {}))
    write_json(directory.path / "verify.json", to_json(checks))
    record_judged(directory, output)
    directory.record("verified", **to_json(checks)["verdicts"])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    place = tmp_path_factory.mktemp("published")
    made = converting(standard.write(place / "source", "llama"), place / "output", "Linear", "NVFP4A16")
    run(made)
    judge(made, PASSED)
    return made


@pytest.fixture
def made(converted: Recipe, tmp_path: Path) -> Recipe:
    """A copy of a run with a PASS."""
    for name in ("output", "output.run"):
        shutil.copytree(Path(converted.output).with_name(name), tmp_path / name)
    return converted.model_copy(update={"output": str(tmp_path / "output")})


def publish(made: Recipe, *arguments: str) -> int:
    return main([made.output, REPOSITORY, *arguments])


def test_a_dry_run_names_every_file_and_writes_none(made: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    output = Path(made.output)
    (output / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    (output / "notes.txt").unlink()
    judge(made, PASSED)
    (output / "notes.txt").write_text("mine")
    assert publish(made, "--dry-run") == 5  # added since
    assert "notes.txt: not there when it was verified" in capsys.readouterr().err
    judge(made, PASSED)
    assert publish(made, "--dry-run") == 0
    printed = capsys.readouterr().out
    opened = Checkpoint.open(output)
    for name in (*opened.shards, "config.json", "model.safetensors.index.json", "README.md", "tokenizer.json"):
        assert f"  {name}  " in printed
    assert "left out: notes.txt" in printed and "note: recipe.yaml names paths of this machine" in printed
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_the_commit_holds_what_the_index_names_and_no_stranger(made: Recipe) -> None:
    output = Path(made.output)
    for name in ("extra.safetensors", "pytorch_model.bin", "x.partial", ".env", "optimizer.pt"):
        (output / name).write_bytes(b"x")
    publication = prepare(Checkpoint.open(output))
    names = {operation.path_in_repo for operation in operations(publication)}
    assert names == {
        *Checkpoint.open(output).shards, "config.json", "model.safetensors.index.json", "README.md", "recipe.yaml",
        "LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert set(publication.left_out) == {"extra.safetensors", "pytorch_model.bin", "x.partial", "optimizer.pt"}


def _flip(output: Path) -> None:
    shard = next(output.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_flip, "safetensors: changed since it was verified"),
        (lambda output: (output / "tokenizer.json").write_text("{}"), "tokenizer.json: changed since it was verified"),
        (lambda output: (output / "LICENSE").unlink(), "LICENSE: gone"),
        (lambda output: (output / "modeling.py").write_text("x"), "modeling.py: not there when it was verified"),
        (lambda output: shutil.rmtree(output.with_name("output.run")), "no verdict of a run is recorded"),
        (lambda output: (output.with_name("output.run") / "verify.json").write_text("{}"), "no verdict of a run"),
    ],
    ids=["shard", "tokenizer", "license", "code", "no-run", "other-verdict"],
)  # fmt: skip
def test_other_bytes_than_those_that_were_judged_are_refused(
    change: Any, said: str, made: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    change(Path(made.output))
    assert publish(made, "--dry-run") == 5
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("verdict", ["FAIL", "UNCHECKED", "WARN"])
def test_no_verdict_but_pass_is_published_without_a_reason(
    verdict: Any, made: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(made, [*PASSED, replace(PASSED[0], id="serving.y", verdict=verdict, figure="the figure")])
    assert publish(made, "--dry-run") == 5
    error = capsys.readouterr().err
    assert f"the verdict is {verdict} ({verdict} serving.y: the figure)" in error and "--despite REASON" in error
    assert publish(made, "--dry-run", "--despite", "for a test") == 0
    assert "despite: " in capsys.readouterr().out


def test_a_level_that_was_not_run_is_named_with_what_to_ask_for(
    made: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(made, [check for check in PASSED if not check.id.startswith("serving.")])
    assert publish(made, "--dry-run") == 5
    said = "the verdict is UNCHECKED (not run: serving); ask for it in the recipe (verify.serving) and run the recipe again"
    assert said in capsys.readouterr().err


def test_the_card_names_the_repository_and_shows_why_it_was_published(made: Recipe) -> None:
    card = (Path(made.output) / "README.md").read_text()
    assert "vllm serve OWNER/NAME" in card and "python -m verify OWNER/NAME" in card
    named = named_card(card, REPOSITORY, None, "a |<b> reason\n# x")
    assert (
        f"vllm serve {REPOSITORY}" in named
        and f"python -m verify {REPOSITORY}\n" in named
        and "OWNER/NAME" not in named
    )
    assert "## Published despite its verdict\n\na \\|&lt;b&gt; reason # x\n" in named
    again = named_card(named, "other/name", "org/base", None)
    assert "despite" not in again and REPOSITORY not in again and "vllm serve other/name" in again
    read = ModelCard(again)
    assert read.data.base_model == "org/base" and read.data.base_model_relation == "quantized"
    assert named_card(again, None, "org/base", None) == again


@pytest.mark.parametrize("card", ["no metadata", "---\n- a\n---\n", "---\na: [\n---\n", ""])
def test_a_card_without_metadata_is_refused_in_one_message(
    card: str, made: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(made.output) / "README.md").write_text(card)
    assert publish(made, "--dry-run", "--base-model", "a/b") == 2
    assert "has no metadata to put it into" in capsys.readouterr().err


def test_signing_alone_writes_the_signature_and_needs_no_network(made: Recipe, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    assert main([made.output, "--sign", str(private)]) == 0
    check = signature_check(Path(made.output), public)
    assert check is not None and check.verdict == "PASS"
    assert publish(made, "--dry-run") == 0  # the signature is no change of what was judged
    assert SIGNATURE_NAME in prepare(Checkpoint.open(Path(made.output))).files
    _flip(Path(made.output))
    check = signature_check(Path(made.output), public)
    assert check is not None and check.verdict == "FAIL"
    assert main([made.output, "--sign", str(private)]) == 5


def test_an_output_that_was_signed_alone_is_not_published_with_a_signature_that_its_card_breaks(
    made: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = write_keys(tmp_path)
    assert main([made.output, "--sign", str(private)]) == 0
    assert f"python -m verify {made.output} --public-key" in capsys.readouterr().out
    assert publish(made, "--dry-run") == 0
    assert "note: model.sig is of the card as it is" in capsys.readouterr().out
    assert publish(made) == 2
    assert "sign again with --sign KEY, or remove model.sig" in capsys.readouterr().err
    assert publish(made, "--dry-run", "--sign", str(private)) == 0
    assert "is of the card" not in capsys.readouterr().out
    check = signature_check(Path(made.output), public)
    assert check is not None and check.verdict == "PASS"


def test_a_dry_run_says_what_readers_of_the_card_will_miss(made: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(made, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "note: the card names no base_model" in printed and "note: the card names no license" in printed
    assert publish(made, "--dry-run", "--base-model", "a/b") == 0
    assert "base_model" not in capsys.readouterr().out


def test_shards_are_listed_in_order(made: Recipe) -> None:
    output = Checkpoint.open(Path(made.output))
    mixed: Any = SimpleNamespace(directory=output.directory, shards=sorted(output.shards, reverse=True))
    assert list(prepare(mixed).files)[: len(mixed.shards)] == sorted(output.shards) != mixed.shards


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["OUTPUT", "no owner/x"], 2, "REPOSITORY: Repo id"),
        (["OUTPUT", "alone"], 2, "name the owner too"),
        (["OUTPUT"], 2, "name one, or sign alone"),
        (["OUTPUT", "a/b", "--despite", " "], 2, "--despite: needs a reason"),
        (["OUTPUT", "a/b", "--sign", "none.pem"], 2, "--sign: none.pem"),
        (["OUTPUT", "a/b", "--base-model", "x"], 2, "--base-model"),
        (["nowhere", "a/b"], 3, "no such checkpoint directory"),
    ],
)  # fmt: skip
def test_wrong_commands_end_in_one_message(
    arguments: list[str], code: int, said: str, made: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([made.output if word == "OUTPUT" else word for word in arguments]) == code
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1


def test_without_a_token_nothing_is_written_and_one_message_says_so(
    made: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.utils._auth as auth

    monkeypatch.setattr(auth, "get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    before = (Path(made.output) / "README.md").read_text()
    assert publish(made) == 4
    assert f"error: {REPOSITORY}: " in capsys.readouterr().err
    assert (Path(made.output) / "README.md").read_text() == before


def test_a_verdict_of_another_verification_is_none(made: Recipe) -> None:
    """verify.json was written, and the run was killed before its journal line."""
    directory = RunDirectory(Path(made.output))
    failed = [replace(PASSED[0], verdict="FAIL"), *PASSED[1:]]
    write_json(directory.path / "verify.json", to_json(failed))
    assert publish(made, "--dry-run") == 5
    assert json.loads((directory.path / "verify.json").read_text())["verdict"] == "FAIL"
