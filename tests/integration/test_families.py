"""Families whose grammar is derived, from checkpoint to verified NVFP4: each kind of them once, all of them when asked
(`make test-families`), which writes docs/families.json and the table of docs/families.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.checkpoint.index import Checkpoint
from tests import families
from tests.models import any_family
from verify.checks import LEVELS

#: A gate of one row beside the router, served; zero-centered norms, which llm-compressor would replace; latent attention with
#: a dense block and a fused pair of its own.
KINDS = {"qwen2_moe": True, "gemma3_text": False, "deepseek_v3": False}


def judged_good(done: families.Outcome, levels: tuple[str, ...]) -> None:
    row = done.row
    assert row.exit_code == 0, done.messages
    assert {level: row.verdicts[level] for level in levels} == {
        level: row.verdicts[level] for level in levels if row.verdicts[level] in ("PASS", "WARN")
    }, row.notes
    assert not [text for text in row.notes.values() if text.startswith("FAIL")]


@pytest.mark.parametrize(("family", "served"), KINDS.items())
def test_a_derived_family_is_calibrated_and_verified(family: str, served: bool, tmp_path: Path) -> None:
    done = families.run(family, "calibrate", tmp_path, serve=served)
    judged_good(done, LEVELS if served else LEVELS[:2])


def test_int4_experts_are_read_in_a_derived_family(tmp_path: Path) -> None:
    judged_good(families.run("kimi_k25", "calibrate", tmp_path, serve=False, form="int4"), LEVELS[:2])


def test_layers_and_embeddings_before_the_blocks_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma-4 E2B and E4B: inputs of each block from an embedding of its own and from a projection before the blocks."""
    monkeypatch.setitem(
        any_family.FAMILIES, "gemma4_text", any_family.FAMILIES["gemma4_text"] | any_family.PER_LAYER_INPUTS
    )
    judged_good(families.run("gemma4_text", "calibrate", tmp_path, serve=False), LEVELS[:2])
    tensors = Checkpoint.open(tmp_path / "gemma4_text-calibrate" / "output").tensors
    assert {
        f"model.{name}.weight" for name in ("embed_tokens_per_layer", "per_layer_model_projection")
    } <= tensors.keys()
    assert "model.layers.1.per_layer_projection.weight_packed" in tensors


@pytest.mark.slow
@pytest.mark.parametrize("method", families.METHODS)
@pytest.mark.parametrize(("family", "form"), families.cases())
def test_every_case_of_the_matrix(family: str, form: str | None, method: str, tmp_path: Path) -> None:
    done = families.run_and_keep(family, method, tmp_path, form is None, form)
    judged_good(done, LEVELS[:2])
    assert done.row.verdicts.get("serving") != "FAIL", done.row.notes
