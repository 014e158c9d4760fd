"""A proof derives what the real engine wrote, from the source alone: the same bytes, without llm-compressor."""

from __future__ import annotations

from pathlib import Path

from tests.integration.whole_runs import run, write_recipe
from tests.models import standard
from verify.__main__ import prove_checkpoint

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
        "proof.tensors": "PASS", "proof.input_scales": "UNCHECKED", "proof.files": "PASS",
    }, checks  # fmt: skip

    again = tmp_path / "again"
    again.mkdir()
    modifiers = [
        {"QuantizationModifier": {"targets": SEARCHED, "scheme": "NVFP4", "weight_observer": "memoryless_mse"}}
    ]
    done = run(write_recipe(again, source, [], modifiers=modifiers, verify={"fidelity": False}))
    assert done.returncode == 0, done.stderr
    checks = {check.id: check for check in prove_checkpoint(again / "output", source, None).checks}
    assert checks["proof.tensors"].verdict == "PASS" and checks["proof.scales"].verdict == "UNCHECKED", checks
