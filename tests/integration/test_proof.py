"""A proof derives what the real engine wrote, from the source alone: the same bytes, without llm-compressor."""

from __future__ import annotations

import getpass
import json
from pathlib import Path

import yaml

from tests.integration.whole_runs import run, write_recipe
from tests.models import standard
from tests.outputs import contents
from verify.__main__ import prove_checkpoint
from verify.proof.statistics import PROVENANCE_NAME

TILED, NVFP4, SEARCHED = ([rf"re:^model\.layers\.\d+\..*({names})_proj$"] for names in ("o|down", "q|k|v", "gate|up"))


def test_what_the_engine_wrote_is_derived_to_the_byte(tmp_path: Path) -> None:
    """NVFP4 and tiles from BF16 weights; codes from scales that a search chose."""
    source, groups = standard.write(tmp_path / "source", "llama"), {
        "tiles": {"targets": TILED, "scheme": "FP8_BLOCK"}, "nvfp4": {"targets": NVFP4, "scheme": "NVFP4"},
    }  # fmt: skip
    modifiers = [{"QuantizationModifier": {"config_groups": groups}}]
    assert run(write_recipe(tmp_path, source, [], modifiers=modifiers, verify={"fidelity": False})).returncode == 0
    checks = {check.id: check for check in prove_checkpoint(tmp_path / "output", source, None).checks}
    assert {id: check.verdict for id, check in checks.items()} == {
        "proof.tensors": "PASS", "proof.input_scales": "PASS", "proof.files": "PASS",
    }, checks  # fmt: skip
    repeat(tmp_path / "output", source, tmp_path / "repeated")

    again = tmp_path / "again"
    again.mkdir()
    modifiers = [
        {"QuantizationModifier": {"targets": SEARCHED, "scheme": "NVFP4", "weight_observer": "memoryless_mse"}}
    ]
    done = run(write_recipe(again, source, [], modifiers=modifiers, verify={"fidelity": False}))
    assert done.returncode == 0, done.stderr
    checks = {check.id: check for check in prove_checkpoint(again / "output", source, None).checks}
    assert checks["proof.tensors"].verdict == "PASS" and checks["proof.scales"].verdict == "UNCHECKED", checks


def repeat(output: Path, source: Path, place: Path) -> None:
    """Makes an output again from its provenance.json and its source alone: the same bytes."""
    made = json.loads((output / PROVENANCE_NAME).read_text())
    text = json.dumps(made)
    assert str(output.parent) not in text and getpass.getuser() not in json.dumps(made["recipe"])
    body = made["recipe"]["content"]
    body["source"]["checkpoint"], body["output"] = str(source), str(place / "output")
    place.mkdir()
    (place / "recipe.yaml").write_text(yaml.safe_dump(body | {"verify": {"fidelity": False}}))
    done = run(place / "recipe.yaml", "--no-rehearsal")
    assert done.returncode == 0, done.stderr
    mine, theirs = contents(place / "output", place), contents(output, output.parent)
    assert mine.keys() == theirs.keys() and {name for name in mine if mine[name] != theirs[name]} <= {
        "recipe.yaml",
        "README.md",
    }
    assert json.loads((place / "output" / PROVENANCE_NAME).read_text())["output"] == made["output"]
    assert len(made["data"]["rows"]) == 8 and made["times"]["seconds"]["calibrate"] > 0
