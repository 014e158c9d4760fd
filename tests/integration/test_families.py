"""Families whose grammar is derived, from checkpoint to verified NVFP4: each kind of them once, all of them when asked
(`make test-families`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import families
from tests.models import any_family
from verify.checks import LEVELS

#: A gate of one row beside the router, served; zero-centered norms, which llm-compressor would replace; latent attention with
#: a dense block and a fused pair of its own.
KINDS = {"qwen2_moe": True, "gemma3_text": False, "deepseek_v3": False}


def judged_good(done: families.Outcome, levels: tuple[str, ...]) -> None:
    assert done.exit_code == 0, done.messages
    assert {level: done.verdicts[level] for level in levels} == {
        level: done.verdicts[level] for level in levels if done.verdicts[level] in ("PASS", "WARN")
    }, done.notes
    assert not [text for text in done.notes.values() if text.startswith("FAIL")]


@pytest.mark.parametrize(("family", "served"), KINDS.items())
def test_a_derived_family_is_calibrated_and_verified(family: str, served: bool, tmp_path: Path) -> None:
    done = families.run(family, "calibrate", tmp_path, serve=served)
    judged_good(done, LEVELS if served else LEVELS[:2])


#: Each form in which these families are released, with one of them: tiles of DeepSeek-V3 and Kimi-K2, FP8 per channel and
#: per tensor of compressed-tensors, INT4 experts of Kimi-K2.5, whose language model's config declares them.
STORED = [
    ("kimi_k25", "int4"),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("kimi_k2", "fp8_tiles"), ("deepseek_v3", "fp8_tiles"), ("glm4_moe", "fp8_channel"), ("minimax_m2", "fp8_tiles"),
        ("qwen3_5_moe", "fp8_tiles"), ("olmoe", "fp8_tensor"), ("kimi_k2", "int4"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("family", "form"), STORED)
@pytest.mark.parametrize("method", ["calibrate", pytest.param("convert", marks=pytest.mark.slow)])
def test_a_stored_form_is_read_in_a_derived_family(family: str, form: str, method: str, tmp_path: Path) -> None:
    judged_good(families.run(family, method, tmp_path, serve=False, form=form), LEVELS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("method", families.METHODS)
@pytest.mark.parametrize("family", any_family.FAMILIES)
def test_every_family_of_the_matrix(family: str, method: str, tmp_path: Path) -> None:
    done = families.run(family, method, tmp_path, serve=True)
    judged_good(done, LEVELS[:2])
    assert done.verdicts["serving"] != "FAIL", done.notes
