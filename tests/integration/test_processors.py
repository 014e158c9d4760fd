"""The processor decides neither a float32 verdict nor whether a test runs: vLLM's own choice of kernels, forced both ways."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exported import export, recipe
from tests.models import deepseek_v4, standard
from tests.reference import forks
from tests.reference.compare import compare
from tests.reference.engine import FORKED_PYTHON, VLLM_PYTHON, random_prompts, serve
from tests.reference.model import decided, reference_model
from tests.reference.model import logits as reference_logits
from verify.checks import Check
from verify.serving.engine import environment

Served = tuple[dict[str, Check], dict[str, Any], list[list[int]], list[torch.Tensor]]
PROMPTS = random_prompts(1024, (40, 40))
TOP1, KL = 0.995, 1e-4
AMX = {"amx": True}
AVX512 = {"avx512_bf16": False}
AVX2 = {"avx512": False, "avx512_bf16": False}
NATIVE, EMULATED = "CPUFp8BlockScaledMMKernel", "CpuFp8BlockLinearKernel"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVFP4 experts beside attention in block FP8."""
    directory = tmp_path_factory.mktemp("deepseek_v4")
    export(deepseek_v4.write(directory / "source", "fp8"), directory / "output")
    return directory / "output"


def failing(checks: dict[str, Check]) -> list[Check]:
    return [check for check in checks.values() if check.verdict == "FAIL"]


def fp8_kernels(result: dict[str, Any]) -> set[str]:
    return {layer["kernel"] for layer in result["layers"] if layer["format"] == "fp8"}


@pytest.fixture(scope="module")
def float32(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(checkpoint, tmp_path_factory.mktemp("float32"), PROMPTS, processor=AMX)


def test_float32_takes_no_amx_kernel(float32: Served) -> None:
    """With the answers of a processor with AMX, vLLM 0.32 takes its AMX kernel in float32 too and dies of it."""
    checks, result, _, _ = float32
    assert failing(checks) == []
    assert result["engine"]["processor"]["amx"] == "hidden" and fp8_kernels(result) == {EMULATED}
    figure = checks["serving.load"].figure
    assert f"x linear {EMULATED}" in figure and "amx hidden" in figure and NATIVE not in figure


def test_bfloat16_serves_on_every_processor(checkpoint: Path, float32: Served, tmp_path: Path) -> None:
    """vLLM's own FP8 kernel with AMX, ours without, and no kernel of vLLM's for DeepSeek-V4 with AVX2 alone: as far from
    float32, one as the other."""
    kl = {}
    for name, processor in {"no AMX": {"amx": False}, "AMX": AMX, "AVX2": AVX2}.items():
        checks, result, _, logits = serve(checkpoint, tmp_path / name, PROMPTS, processor=processor, dtype="bfloat16")
        if name == "AMX" and result["engine"]["processor"]["avx512_bf16"] == "no":
            continue  # vLLM builds its FP8 kernel for processors that have AVX-512 with BF16
        assert failing(checks) == []
        assert fp8_kernels(result) == {NATIVE if name == "AMX" else EMULATED}
        assert f"x linear {NATIVE if name == 'AMX' else EMULATED}" in checks["serving.load"].figure
        kl[name] = compare(float32[3], logits).kl
    print(kl)
    assert max(kl.values()) < 2 * min(kl.values()), kl
    if "AMX" not in kl:
        pytest.skip("all but vLLM's own FP8 kernel, which needs AMX, or AVX-512 with BF16, to run")


@pytest.mark.parametrize("processor", [AVX2, pytest.param(AVX512, marks=pytest.mark.slow)], ids=str)
def test_float32_is_the_same_on_every_processor(
    checkpoint: Path, float32: Served, tmp_path: Path, processor: dict[str, bool]
) -> None:
    """vLLM has three builds of its kernels for x86, and the two for lesser processors have none for DeepSeek-V4."""
    checks, _, _, logits = serve(checkpoint, tmp_path, PROMPTS, processor=processor)
    assert failing(checks) == []
    if FORKED_PYTHON != VLLM_PYTHON:
        told = environment() | {forks.PROCESSOR: json.dumps(processor)}
        maps = subprocess.run(
            [FORKED_PYTHON, "-c", "print(open('/proc/self/maps').read())"], env=told, capture_output=True
        )
        assert (b"_C_AVX2" if processor == AVX2 else b"_C_AVX512") in maps.stdout
    agreement = compare(float32[3], logits)
    print(agreement)
    assert agreement.top1 >= TOP1 and agreement.kl < KL, agreement


def test_experts_that_stay_fp8_serve_without_amx(tmp_path: Path) -> None:
    """vLLM has FP8 experts on a CPU for AMX alone, and in BF16: elsewhere it says "Unsupported FP8 MoE backend"."""
    source = deepseek_v4.write(tmp_path / "source", "fp8")
    output = tmp_path / "output"
    export(source, output, recipe(source, output, [r"re:^layers\.\d+\.attn\.wo_b$"]))
    checks, result, ids, logits = serve(output, tmp_path / "logs", PROMPTS, processor={"amx": False})
    assert failing(checks) == []
    experts = [layer for layer in result["layers"] if layer["kind"] == "experts"]
    assert [(layer["format"], layer["kernel"]) for layer in experts] == [("fp8", "CPU_EMULATION")]
    model = reference_model(output)
    expected = reference_logits(model, ids)
    agreement = compare(expected, logits, decided(model, ids, expected))
    print(agreement)
    assert agreement.top1 >= TOP1 and agreement.kl < KL, agreement


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("processor", [AMX, AVX2, AVX512], ids=str)
@pytest.mark.parametrize("model", ["mixtral", "llama"])
def test_other_families_serve_on_every_processor(
    tmp_path: Path, model: str, processor: dict[str, bool], dtype: str
) -> None:
    """The output and, with experts and attention unquantized, its source."""
    if processor == AMX and dtype == "bfloat16" and not torch.cpu._is_amx_tile_supported():
        pytest.skip(
            "vLLM's attention in BF16 executes AMX instructions: SIGILL where there are none; python -m tests.amx"
        )
    source = standard.write(tmp_path / "source", model)  # type: ignore[arg-type]
    output = tmp_path / "output"
    export(source, output, recipe(source, output, [r"re:.*layers\..*(_proj|\.w[123])$"]))
    for directory in (source, output):
        checks, _, _, _ = serve(directory, tmp_path / "logs", PROMPTS, processor=processor, dtype=dtype)
        assert failing(checks) == []
