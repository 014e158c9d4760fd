"""A checkpoint grants itself nothing: what its files may decide when somebody verifies or calibrates it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.permissions import refuse_outside, requests, without_choices
from calibration.data.batches import load_tokenizer
from calibration.model.skeleton import build_skeleton
from recipes.checks import Fidelity, Serving
from recipes.errors import EnvironmentProblem, SourceError
from recipes.loader import dump_recipe
from tests.exported import export, recipe
from tests.faults.editing import config, json_file, values
from tests.models import standard
from verify import __main__ as command
from verify.checks import Check
from verify.known import Known
from verify.levels import Settings
from verify.structure.structure import verify_structure

LOOSE = {
    "worst_error": 1e6, "min_cosine": -1.0, "min_sqnr": -1000.0, "max_saturated": 1.0, "max_zero_groups": 1.0,
    "max_group_gain": 1e9, "min_block_cosine": -1.0, "min_propagated_cosine": -1.0, "tokens": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("stranger")
    source, output = Path(standard.write(base / "source", "llama")), base / "output"
    export(source, output, recipe(source, output, [r"re:.*_proj$"]))
    return source, output


@pytest.fixture
def output(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "output"))


def own_recipe(output: Path, **sections: Any) -> None:
    made = yaml.safe_load((output / "recipe.yaml").read_text())
    (output / "recipe.yaml").write_text(yaml.safe_dump(made | sections))


def by_id(checks: list[Check]) -> dict[str, Check]:
    return {check.id: check for check in checks}


def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command line hands to the levels; the levels themselves are left out."""
    seen: dict[str, Any] = {}

    def levels(directory: Path, known: Known, settings: Settings) -> tuple[list[Check], dict[str, Any]]:
        seen.update(vars(known) | vars(settings))
        return [], {}

    monkeypatch.setattr(command, "verify_levels", levels)
    monkeypatch.setattr(command, "check_serving", lambda options, *strangers: None)
    return seen


def test_the_recipe_inside_a_checkpoint_gives_the_plan_and_nothing_else(
    pair: tuple[Path, Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_recipe(
        output,
        source={"checkpoint": str(pair[0]), "trust_remote_code": True},
        calibration={"dataset": "somebody/data"},
        verify={"fidelity": LOOSE, "serving": {"python": "/bin/chosen", "text": "/etc/passwd", "prompts": ["theirs"]}},
    )
    seen = given(monkeypatch)
    command.verify(output, pair[0], None, "serving")
    assert seen["plan"] is not None and seen["plan"].quantized
    assert (seen["trust_remote_code"], seen["text"]) == (False, None)
    assert (seen["fidelity"], seen["serving"]) == (Fidelity(), Serving())
    command.verify(output, pair[0], output / "recipe.yaml", "serving")  # named by the caller: now it counts
    assert (seen["trust_remote_code"], seen["text"].dataset) == (True, "somebody/data")
    assert (seen["fidelity"].worst_error, seen["serving"].python) == (1e6, "/bin/chosen")


def test_trust_comes_from_the_command_line(
    pair: tuple[Path, Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = given(monkeypatch)
    assert command.main([str(output), "--source", str(pair[0])]) == 0 and seen["trust_remote_code"] is False
    assert command.main([str(output), "--source", str(pair[0]), "--trust-remote-code"]) == 0
    assert seen["trust_remote_code"] is True


def test_noise_fails_whatever_thresholds_the_checkpoint_brings(pair: tuple[Path, Path], output: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values("weight_packed", lambda w: torch.randint(0, 256, w.shape, dtype=torch.uint8, generator=generator))(output)
    own_recipe(output, verify={"fidelity": LOOSE})
    found = by_id(command.verify(output, pair[0], None, "fidelity")[0])
    assert found["fidelity.weights"].verdict == "FAIL" and found["fidelity.cosine"].verdict == "FAIL"


@pytest.mark.parametrize(
    "text",
    [
        "source: 1\noutput: 2\n",
        "a: " + "[" * 5000,
        "\t",
        "source: {checkpoint: x}\noutput: y\n",
    ],
)
def test_a_recipe_inside_that_is_broken_is_doubted_and_refuses_nothing(
    pair: tuple[Path, Path], output: Path, text: str
) -> None:
    (output / "recipe.yaml").write_text(text)
    found = by_id(command.verify(output, pair[0], None, "structure")[0])
    assert found["structure.recipe"].verdict == "WARN" and "--recipe" in found["structure.recipe"].figure
    assert found["structure.finite"].verdict == "PASS"
    assert command.main([str(output), "--level", "structure"]) == 0


def test_a_recipe_of_llm_compressor_is_left_alone(pair: tuple[Path, Path], output: Path) -> None:
    (output / "recipe.yaml").write_text("default_stage: {default_modifiers: {QuantizationModifier: {}}}\n")
    assert "structure.recipe" not in by_id(command.verify(output, pair[0], None, "structure")[0])


def test_the_output_of_a_run_says_that_its_own_recipe_fits(pair: tuple[Path, Path]) -> None:
    assert (pair[1] / "recipe.yaml").read_text() == dump_recipe(recipe(*pair, [r"re:.*_proj$"]))
    assert by_id(command.verify(pair[1], pair[0], None, "structure")[0])["structure.recipe"].verdict == "PASS"


def test_an_interpreter_inside_the_checkpoint_is_not_started(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interpreter, ran = output / Serving().python, output / "ran"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f"#!/bin/sh\ntouch '{ran}'\n")
    interpreter.chmod(0o755)
    monkeypatch.chdir(output)  # where the default, a relative path, is the checkpoint's own file
    assert command.main(["."]) == EnvironmentProblem.exit_code and not ran.exists()
    assert "lies inside the checkpoint" in capsys.readouterr().err
    monkeypatch.chdir(output.parent)
    assert (
        command.main([str(output), "--python", str(interpreter)]) == EnvironmentProblem.exit_code and not ran.exists()
    )


REQUESTS: list[tuple[str, Callable[[dict[str, Any]], object], str, str]] = [
    ("config.json", lambda c: c.update(auto_map={"AutoModel": "m.M"}), "WARN", "auto_map"),
    ("config.json", lambda c: c.update(attn_implementation="evil/kernel"), "WARN", "attn_implementation"),
    ("config.json", lambda c: c.update(text_config={"_experts_implementation": "a/b"}), "WARN", "text_config."),
    ("tokenizer_config.json", lambda c: c.update(vocab_file="/etc/passwd"), "FAIL", "vocab_file"),
    ("tokenizer_config.json", lambda c: c.update(tokenizer_file="../../secret"), "FAIL", "tokenizer_file"),
    ("generation_config.json", lambda c: c.update(custom_generate="evil/generate"), "WARN", "custom_generate"),
]


@pytest.mark.parametrize(("name", "edit", "verdict", "word"), REQUESTS)
def test_what_a_file_asks_for_is_reported_by_its_key(
    output: Path, name: str, edit: Callable[[dict[str, Any]], object], verdict: str, word: str
) -> None:
    json_file(name, edit)(output)
    found = by_id(verify_structure(output))["structure.requests"]
    assert found.verdict == verdict and f"{name}: {word}" in found.figure


def test_a_path_outside_is_refused_before_a_library_opens_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(pair[0], tmp_path / "source"))
    refuse_outside(source)
    json_file("tokenizer_config.json", lambda c: c.update(vocab_file="/etc/passwd"))(source)
    with pytest.raises(SourceError, match="vocab_file: names a file outside"):
        load_tokenizer(source, trust_remote_code=True)


def test_a_config_does_not_choose_what_computes_a_layer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(pair[0], tmp_path / "source"))
    (source / "own.py").write_text("raise SystemExit('executed')\n")
    config(lambda c: c.update(attn_implementation="evil/kernel", experts_implementation="evil/kernel"))(source)
    build_skeleton(Formats(Checkpoint.open(source)), tmp_path / "run", False)
    written = json.loads((tmp_path / "run" / "skeleton" / "config.json").read_text())
    assert "evil/kernel" not in json.dumps(written) and not (tmp_path / "run" / "skeleton" / "own.py").exists()
    assert without_choices({"a": [{"_attn_implementation": "x", "b": 1}]}) == {"a": [{"b": 1}]}
    assert [request.kind for request in requests(source)] == ["fetch", "fetch"]


EVIL = """open({path!r}, "w").write("ran")
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_a_tokenizer_with_code_of_its_own_runs_on_trust_alone(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source, ran = Path(shutil.copytree(pair[0], tmp_path / "source")), tmp_path / "ran"
    (source / "evil.py").write_text(EVIL.format(path=str(ran)))
    own = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    json_file("tokenizer_config.json", lambda settings: settings.update(own))(source)
    try:
        load_tokenizer(source, trust_remote_code=trusted)
    except SourceError as error:
        assert not trusted, error
    assert ran.exists() is trusted
