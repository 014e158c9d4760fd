"""Forward fidelity with the real models of transformers: what the output's blocks do, from the bytes on disk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.nvfp4 import quantize_dequantize
from calibration.families.registry import family_of
from recipes.checks import Fidelity
from recipes.schema import Calibration
from tests.exported import EXPERTS, export, recipe
from tests.models import deepseek_v4, standard
from tests.reference import nvfp4 as reference
from verify.fidelity.fidelity import verify_with_forward
from verify.fidelity.forward import InputSeen, measure_blocks, quantize_dequantize_groups, verify_forward
from verify.fidelity.input_scales import input_scale_check
from verify.known import Known
from verify.structure.structure import verify_structure

LINEAR = r"re:^model\.layers\.\d+\..*(proj|w[123])$"
BLOCK = "model.layers.0.block_sparse_moe"
TEXT = Calibration(dataset="bundled")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_quantized_as_compressed_tensors_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator) * 10 ** torch.linspace(-6, 1.5, 64)[:, None]
    x[3] = 0
    x, scale = x.to(dtype), torch.tensor([2688 / 40.0])
    arguments = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    scales, zero_points = compute_dynamic_scales_and_zp(x, arguments, torch.nn.Linear(1, 1), global_scale=scale)
    made = quantize_dequantize(x, scale)
    if dtype == torch.float32:  # in BF16 it rounds amax / 6 once more, which no kernel does
        assert torch.equal(made, fake_quantize(x, scales, zero_points, arguments, global_scale=scale))
    expected = reference.fake_quantize(x, scale)
    # Float64 and float32 part where amax / 6 lies between two E4M3 codes, which BF16 values often hit exactly.
    apart = (made.double() - expected).abs() > 2**-8 * expected.abs()
    assert float(apart.float().mean()) < 0.01
    assert quantize_dequantize(x[:0], scale).shape == (0, 256)
    fp8 = quantize_dequantize_groups(x)
    assert float((fp8 - x).norm() / x.norm()) < 0.04 and not torch.equal(fp8, x)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("forward")
    source = standard.write(base / "source", "mixtral")
    export(source, base / "output", recipe(source, base / "output", LINEAR))
    return source, base / "output"


def test_a_copy_of_the_source_has_cosine_one_and_quantization_costs(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = mixtral
    opened = Checkpoint.open(source)
    same = measure_blocks(source, opened, TEXT, Fidelity(tokens=200))
    assert [b.block for b in same] == [0, 1] and all(b.tokens == 256 for b in same)
    assert all(b.cosine == pytest.approx(1, abs=1e-5) and b.propagated == pytest.approx(1, abs=1e-5) for b in same)
    weights_only = tmp_path / "a16"
    export(source, weights_only, recipe(source, weights_only, LINEAR, "NVFP4A16"))
    w4a16, w4a4 = (
        measure_blocks(directory, opened, TEXT, Fidelity(tokens=200)) for directory in (weights_only, output)
    )
    assert all(0.9 < both.cosine < alone.cosine < 1 for both, alone in zip(w4a4, w4a16, strict=True))
    assert w4a4[-1].propagated < w4a16[-1].propagated < 1


def spelled(directory: Path, dtype: torch.dtype) -> Path:
    """A Llama whose values BF16, F16 and F32 all hold exactly, stored in `dtype`."""
    source = standard.write(directory / "source", "llama", shards=1)
    path = source / "model.safetensors"
    tensors = {name: value.half() for name, value in load_file(path).items()}
    # Below 2^-14 F16 has fewer bits than BF16.
    tensors = {name: torch.where(value.abs() < 2**-14, 0, value) for name, value in tensors.items()}
    save_file({name: value.to(dtype) for name, value in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (source / "config.json").write_text(json.dumps(config))
    return source


def judged(directory: Path, dtype: torch.dtype) -> dict[str, tuple[str, list[float]]]:
    """Verdicts and figures of one source's output, with its plan and as a foreign checkpoint."""
    source, output = spelled(directory, dtype), directory / "output"
    plan, formats = export(source, output, recipe(source, output, LINEAR))
    found = {}
    for given in (plan, None):
        checks = verify_structure(output, Known(given, formats))
        checks += verify_with_forward(output, given, formats, Fidelity(tokens=64), TEXT).checks
        for check in checks:
            numbers = [float(n) for n in re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?", check.figure)]
            found[f"{check.id}, {'plan' if given else 'no plan'}"] = (check.verdict, numbers)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["F16", "F32"])
def test_the_spelling_of_the_source_changes_no_verdict_and_no_figure(tmp_path: Path, dtype: torch.dtype) -> None:
    usual, other = judged(tmp_path / "bf16", torch.bfloat16), judged(tmp_path / "other", dtype)
    assert {id: verdict for id, (verdict, _) in other.items()} == {id: verdict for id, (verdict, _) in usual.items()}
    assert "FAIL" not in {verdict for verdict, _ in other.values()}
    for id, (_, numbers) in other.items():
        if "structure.bits" not in id:  # what is kept takes the source's bits
            assert numbers == pytest.approx(usual[id][1], rel=1e-2), id


def test_a_low_cosine_is_a_warning_if_rounding_alone_costs_as_much(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    """Random weights lose more than a trained model's: the thresholds say nothing about those."""
    source, output = mixtral
    strict = Fidelity(tokens=64, min_block_cosine=0.9999, min_propagated_cosine=0.99999)
    checks, blocks = verify_forward(output, Checkpoint.open(source), strict, TEXT)
    assert checks[0].verdict == "WARN" and "is what the source's block rounded to nearest has" in checks[0].figure
    assert all(block.rounded is not None and 0.9 < block.rounded < 0.9999 for block in blocks)
    assert checks[1].verdict == "WARN" and "the source's blocks rounded to nearest have" in checks[1].figure
    chain = blocks[-1].chain_rounded
    assert chain is not None and chain == pytest.approx(blocks[-1].propagated, abs=0.02) and chain < 0.99999
    damaged = Path(shutil.copytree(output, tmp_path / "damaged"))
    for shard in damaged.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, value in tensors.items():
            if name.endswith("layers.1.self_attn.o_proj.weight_packed"):
                value ^= 0x88  # every sign
        save_file(tensors, shard, metadata={"format": "pt"})
    checks, blocks = verify_forward(damaged, Checkpoint.open(source), strict, TEXT)
    assert checks[0].verdict == "FAIL" and blocks[1].cosine < (blocks[1].rounded or 0) - 0.02
    assert checks[1].verdict == "FAIL" and blocks[-1].propagated < (blocks[-1].chain_rounded or 0) - 0.05


def test_deepseek_v4_passes(tmp_path: Path) -> None:
    source, output = deepseek_v4.write(tmp_path / "source", "fp8_mxfp4"), tmp_path / "output"
    export(source, output, recipe(source, output, EXPERTS))
    checks, blocks = verify_forward(output, Checkpoint.open(source), Fidelity(tokens=256), None)
    assert [check.verdict for check in checks] == ["PASS", "PASS"], checks
    assert [block.block for block in blocks] == [0, 1, 2]


@pytest.mark.parametrize("factor", [1e3, 1e-6], ids=["saturating", "underflowing"])
def test_input_scales_that_no_weight_check_can_see(mixtral: tuple[Path, Path], tmp_path: Path, factor: float) -> None:
    output = Path(shutil.copytree(mixtral[1], tmp_path / "output"))
    for shard in sorted(output.glob("*.safetensors")):
        tensors = load_file(shard)
        wrong = {n: t * factor for n, t in tensors.items() if "layers.1." in n and n.endswith("input_global_scale")}
        save_file(tensors | wrong, shard)
    strict = Fidelity(tokens=128, min_propagated_cosine=0.95)  # two blocks cannot turn a residual stream by more
    checks, blocks = verify_forward(output, Checkpoint.open(mixtral[0]), strict, None)
    assert [check.verdict for check in checks] == ["FAIL", "FAIL"], checks
    assert "(block 1)" in checks[0].figure and blocks[0].cosine > 0.9


def scales(directory: Path, edit: Callable[[str, float], float], name: str) -> Path:
    """A copy whose input global scales are edited by module and value."""
    output = Path(shutil.copytree(directory, directory.with_name(name)))
    for shard in sorted(output.glob("*.safetensors")):
        tensors = load_file(shard)
        changed = {n: torch.tensor([edit(n.rpartition(".")[0], float(t))]) for n, t in tensors.items()
                   if n.endswith("input_global_scale")}  # fmt: skip
        save_file(tensors | changed, shard)
    return output


@pytest.fixture(scope="module")
def calibrated(mixtral: tuple[Path, Path]) -> Path:
    """Input scales as a calibration on the very text makes them, every expert its own."""
    blocks = measure_blocks(mixtral[1], Checkpoint.open(mixtral[0]), TEXT, Fidelity(tokens=200))
    largest = {seen.module: seen.seen for block in blocks for seen in block.inputs}
    assert len(largest) == 2 * (4 + 4 * 3) and all(largest.values())
    return scales(mixtral[1], lambda module, _: 2688 / largest[module], "calibrated")


@pytest.mark.parametrize(
    ("name", "edit", "expected", "word"),
    [
        ("as they are", lambda m, s: s, "PASS", "median 1,"),
        ("1.5 x too small a range", lambda m, s: s * 1.5, "PASS", "median 0.667"),
        ("4 x too small a range", lambda m, s: s * 4, "FAIL", "4 times what its scale admits"),
        ("4 x too large a range", lambda m, s: s / 4, "WARN", "all scales are wide"),
        ("one 3 x too small", lambda m, s: s * 3 if m.endswith("1.self_attn.o_proj") else s, "FAIL", "1.self_attn.o_proj"),
        ("one 40 x too large", lambda m, s: s / 40 if m.endswith("1.self_attn.o_proj") else s, "WARN", "1.self_attn.o_proj"),
        ("one 1000 x too large", lambda m, s: s / 1000 if m.endswith("3.w2") else s, "FAIL", "experts.3.w2"),
        ("a constant", lambda m, s: 1.0, "WARN", "one constant for all 32 modules"),
        ("a constant that saturates", lambda m, s: 2688.0, "FAIL", "they saturate"),
    ],
)  # fmt: skip
def test_input_scales_are_judged_by_the_inputs_that_the_source_has(
    mixtral: tuple[Path, Path],
    calibrated: Path,
    name: str,
    edit: Callable[[str, float], float],
    expected: str,
    word: str,
) -> None:
    output = scales(calibrated, edit, name.replace(" ", "-"))
    source = Formats(Checkpoint.open(mixtral[0]))
    found = {c.id: c for c in verify_with_forward(output, None, source, Fidelity(tokens=200), TEXT).checks}
    assert (found["fidelity.input_scales"].verdict, word in found["fidelity.input_scales"].figure) == (
        expected,
        True,
    ), found["fidelity.input_scales"]


def test_text_that_calibration_did_not_see_is_run_through_the_source_too(
    mixtral: tuple[Path, Path], calibrated: Path
) -> None:
    blocks = measure_blocks(calibrated, Checkpoint.open(mixtral[0]), TEXT, Fidelity(tokens=200))
    for block in blocks:
        assert not any(seen.beyond for seen in block.inputs), "the text that these scales were made for"
        assert sum(seen.values for seen in block.unseen) == sum(seen.values for seen in block.inputs)
        assert {seen.seen for seen in block.unseen} != {seen.seen for seen in block.inputs}
        assert 0 < sum(seen.beyond for seen in block.unseen) < 0.01 * sum(seen.values for seen in block.unseen)
    narrow = scales(calibrated, lambda _, scale: scale * 1.9, "narrow")
    source = Formats(Checkpoint.open(mixtral[0]))
    found = {c.id: c for c in verify_with_forward(narrow, None, source, Fidelity(tokens=200), TEXT).checks}
    assert found["fidelity.saturated_inputs"].verdict == "WARN" and found["fidelity.input_scales"].verdict != "FAIL"


def test_experts_that_saw_no_token_are_counted_not_judged() -> None:
    family = family_of({"model_type": "mixtral"})
    seen = [InputSeen(f"{BLOCK}.experts.{expert}.w2", 2.0, 1.5 * (expert > 0), expert) for expert in range(4)]
    (found,) = input_scale_check(seen, family, Fidelity(), "")
    assert found.verdict == "PASS" and found.figure.endswith("; 1 of 4 modules saw no token")
    (found,) = input_scale_check(seen[:1], family, Fidelity(), "")
    assert found.verdict == "UNCHECKED"
    assert input_scale_check([], family, Fidelity(), "") == []


def test_without_text_or_tokenizer_nothing_is_proven(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(mixtral[0], tmp_path / "source"))
    for path in source.glob("tokenizer*"):
        path.unlink()
    for directory, options in ((mixtral[0], Fidelity(tokens=0)), (source, Fidelity())):
        checks, blocks = verify_forward(mixtral[1], Checkpoint.open(directory), options, None)
        assert [check.verdict for check in checks] == ["UNCHECKED", "UNCHECKED"] and blocks == []


def test_the_command_line_without_a_recipe(mixtral: tuple[Path, Path], calibrated: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(calibrated, tmp_path / "output"))
    # What plain llm-compressor leaves there is a recipe of its own form.
    (output / "recipe.yaml").write_text("default_stage:\n  default_modifiers: {}\n")
    command = [
        sys.executable,
        "-m",
        "verify",
        str(output),
        "--source",
        str(mixtral[0]),
        "--level",
        "fidelity",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verdicts"]["fidelity"] == "PASS", result["checks"]
    ids = {check["id"] for check in result["checks"]}
    assert {"fidelity.weights", "fidelity.block_cosine", "fidelity.propagated_cosine"} <= ids
