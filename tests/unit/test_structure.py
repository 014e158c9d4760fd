"""Structure and fidelity: a good output passes, and each way of breaking it is caught by the check that must."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint
from tests.exported import export, recipe
from tests.models import deepseek_v4
from verify.checks import Check
from verify.fidelity import verify_fidelity
from verify.report import level_verdicts
from verify.structure import verify_structure

EXPERT = "layers.0.ffn.experts.3"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    base = tmp_path_factory.mktemp("structure")
    source = deepseek_v4.write(base / "source", "fp8_mxfp4")
    plan, formats = export(source, base / "output", recipe(source, base / "output"))
    return base / "output", plan, formats


@pytest.fixture
def output(good: tuple, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good[0], tmp_path / "output"))


def check(good: tuple, directory: Path) -> list[Check]:
    return verify_structure(directory, good[1], good[2].checkpoint)


def failing(checks: list[Check]) -> set[str]:
    return {found.id.split(".", 1)[1] for found in checks if found.verdict == "FAIL"}


def test_a_good_output_passes_with_and_without_its_source(good: tuple) -> None:
    assert {found.verdict for found in check(good, good[0])} == {"PASS"}
    alone = {found.id: found.verdict for found in verify_structure(good[0])}
    assert {key for key, verdict in alone.items() if verdict != "PASS"} == {"structure.copies"}
    assert {found.verdict for found in verify_fidelity(*good)} == {"PASS"}


def rewrite(output: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edits the shard that holds tensor `name`, then brings the index in line."""
    index = json.loads((output / INDEX_NAME).read_text())
    shard = output / index["weight_map"][name]
    before = load_file(shard)
    tensors = dict(before)
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, shard, metadata={"format": "pt"})
    for gone in before.keys() - tensors.keys():
        del index["weight_map"][gone]
    index["weight_map"] |= dict.fromkeys(tensors.keys() - before.keys(), shard.name)
    index["metadata"]["total_size"] += sum(t.nbytes for t in tensors.values()) - sum(t.nbytes for t in before.values())
    (output / INDEX_NAME).write_text(json.dumps(index))


def value(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda output: rewrite(output, name, lambda tensors: tensors.update({name: change(tensors[name])}))


def first(replacement: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.to(torch.float32)
        changed.view(-1)[0] = replacement
        return changed.to(tensor.dtype)

    return change


def config(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(output: Path) -> None:
        loaded = json.loads((output / CONFIG_NAME).read_text())
        edit(loaded)
        (output / CONFIG_NAME).write_text(json.dumps(loaded))

    return apply


def wrong_targets(loaded: dict) -> None:
    loaded["quantization_config"]["config_groups"]["experts"]["targets"] = [r"re:.*mlp\.experts.*"]


def total_size(output: Path) -> None:
    index = json.loads((output / INDEX_NAME).read_text())
    index["metadata"]["total_size"] += 1
    (output / INDEX_NAME).write_text(json.dumps(index))


def drop(name: str) -> Callable[[Path], None]:
    return lambda output: rewrite(output, name, lambda tensors: tensors.pop(name) is None)


def misname(old: str, new: str) -> Callable[[Path], None]:
    return lambda output: rewrite(output, old, lambda tensors: tensors.update({new: tensors.pop(old)}))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "input scale missing": (drop(f"{EXPERT}.w1.input_global_scale"), "tensors"),
    "packed weight missing": (drop(f"{EXPERT}.w1.weight_packed"), "tensors"),
    "group scale missing": (drop(f"{EXPERT}.w1.weight_scale"), "companions"),
    "MTP tensor dropped": (drop("mtp.0.enorm.weight"), "tensors"),
    "kv_norm misnamed": (misname("layers.0.attn.kv_norm.weight", "layers.0.attn.norm.weight"), "tensors"),
    "extra expert": (misname(f"{EXPERT}.w1.weight_packed", "layers.0.ffn.experts.64.w1.weight_packed"), "companions"),
    "packed weight transposed": (value(f"{EXPERT}.w1.weight_packed", lambda t: t.t()), "tensors"),
    "router rounded to FP8": (
        value("layers.0.ffn.gate.weight", lambda t: t.to(torch.float8_e4m3fn).to(torch.bfloat16)), "copies"),
    "one Inf": (value(f"{EXPERT}.w2.input_global_scale", first(float("inf"))), "finite"),
    "NaN group scale": (value(f"{EXPERT}.w2.weight_scale", first(float("nan"))), "finite"),
    "zero group scale": (value(f"{EXPERT}.w2.weight_scale", first(0.0)), "scales"),
    "negative global scale": (value(f"{EXPERT}.w2.weight_global_scale", lambda t: -t), "scales"),
    "gate and up differ": (value(f"{EXPERT}.w3.weight_global_scale", lambda t: t * 2), "fused"),
    "input scale not shared": (value(f"{EXPERT}.w2.input_global_scale", lambda t: t * 2), "input_scales"),
    "wrong dtype": (value(f"{EXPERT}.w2.weight_global_scale", lambda t: t.to(torch.bfloat16)), "tensors"),
    "targets in another namespace": (config(wrong_targets), "targets"),
    "a config field lost": (config(lambda c: c.pop("compress_ratios")), "config"),
    "total_size wrong": (total_size, "total_size"),
    "shard half written": (lambda output: (output / "model-x.safetensors.partial").write_bytes(b"x"), "files"),
    "stray shard": (lambda output: save_file({"x": torch.ones(1)}, output / "stray.safetensors"), "files"),
    "truncated shard": (lambda o: (s := sorted(o.glob("*.safetensors"))[0]).write_bytes(s.read_bytes()[:-7]) and None, "open"),
    "missing shard": (lambda output: sorted(output.glob("*.safetensors"))[1].unlink(), "open"),
    "config not JSON": (lambda output: (output / CONFIG_NAME).write_text("{") and None, "open"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught_by_their_check(good: tuple, output: Path, fault: str) -> None:
    spoil, expected = FAULTS[fault]
    spoil(output)
    checks = check(good, output)
    assert expected in failing(checks), {found.id: found.verdict for found in checks}
    assert level_verdicts(checks)["structure"] == "FAIL"


WEIGHT_FAULTS: dict[str, Callable[[Path], None]] = {
    "nibbles swapped": value(f"{EXPERT}.w1.weight_packed", lambda t: (t << 4) | (t >> 4)),
    "global scale inverted": value(f"{EXPERT}.w2.weight_global_scale", lambda t: 1 / t),
    "experts exchanged": lambda output: rewrite(
        output,
        f"{EXPERT}.w1.weight_packed",
        lambda tensors: tensors.update(
            {f"{EXPERT}.w1.weight_packed": tensors["layers.0.ffn.experts.4.w1.weight_packed"].clone()}
        ),
    ),
    "expert zeroed": value(f"{EXPERT}.w2.weight_packed", torch.zeros_like),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_wrong_weights_fail_fidelity(good: tuple, output: Path, fault: str) -> None:
    WEIGHT_FAULTS[fault](output)
    failed = [found for found in verify_fidelity(output, *good[1:]) if found.verdict == "FAIL"]
    assert failed and EXPERT in failed[0].figure


def test_output_is_byte_identical_where_the_plan_copies(good: tuple) -> None:
    output, source = Checkpoint.open(good[0]), good[2].checkpoint
    copied = [step for step in good[1].steps.values() if step.action == "copy"]
    assert len(copied) > 400
    for step in copied:
        assert output.read_bytes(step.outputs[0].name) == source.read_bytes(step.source)


def test_sidecars_travel_and_caches_do_not(good: tuple, tmp_path: Path) -> None:
    source = Path(shutil.copytree(good[2].checkpoint.directory, tmp_path / "source"))
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("x")
    (source / "old.bin").write_text("x")
    export(source, tmp_path / "out")
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    expected = {str(p.relative_to(good[0])) for p in good[0].rglob("*") if p.is_file()}
    assert (
        names == expected
        and {"tokenizer.json", "generation_config.json", "recipe.yaml", CONFIG_NAME, INDEX_NAME} <= names
    )
    assert any("encoding" in name for name in names)
