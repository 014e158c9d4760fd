"""The processor decides neither a float32 verdict nor whether a test runs: vLLM's own choice of kernels, forced both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exported import export
from tests.models import deepseek_v4
from tests.reference.compare import compare
from tests.reference.engine import random_prompts, serve
from verify.checks import Check

Served = tuple[dict[str, Check], dict[str, Any], list[list[int]], list[torch.Tensor]]
PROMPTS = random_prompts(1024, (40, 40))
NATIVE, EMULATED = "CPUFp8BlockScaledMMKernel", "CpuFp8BlockLinearKernel"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NVFP4 experts beside attention in block FP8."""
    directory = tmp_path_factory.mktemp("deepseek_v4")
    export(deepseek_v4.write(directory / "source", "fp8"), directory / "output")
    return directory / "output"


def fp8_kernels(result: dict[str, Any]) -> set[str]:
    return {layer["kernel"] for layer in result["layers"] if layer["format"] == "fp8"}


@pytest.fixture(scope="module")
def float32(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(checkpoint, tmp_path_factory.mktemp("float32"), PROMPTS, processor={"amx": True})


def test_float32_takes_no_amx_kernel(float32: Served) -> None:
    """With the answers of a processor with AMX, vLLM 0.32 takes its AMX kernel in float32 too and dies of it."""
    checks, result, _, _ = float32
    assert {c.id for c in checks.values() if c.verdict == "FAIL"} == set(), checks
    assert result["engine"]["processor"]["amx"] == "hidden" and fp8_kernels(result) == {EMULATED}
    figure = checks["serving.load"].figure
    assert f"x linear {EMULATED}" in figure and "amx hidden" in figure and NATIVE not in figure


def test_bfloat16_serves_with_and_without_amx(checkpoint: Path, float32: Served, tmp_path: Path) -> None:
    """vLLM's own kernel where the processor says AMX, ours where it does not: as far from float32, one as the other."""
    kl = {}
    for amx, kernel in ((False, EMULATED), (True, NATIVE)):
        checks, result, _, logits = serve(
            checkpoint, tmp_path / kernel, PROMPTS, processor={"amx": amx}, dtype="bfloat16"
        )
        if result["engine"]["processor"]["avx512_bf16"] == "no":
            pytest.skip("vLLM's build of its kernels for this processor has no FP8 kernel: needs AVX-512 with BF16")
        assert fp8_kernels(result) == {kernel}
        assert {c.id for c in checks.values() if c.verdict == "FAIL"} == set(), checks
        assert f"x linear {kernel}" in checks["serving.load"].figure
        kl[kernel] = compare(float32[3], logits).kl
    print(kl)
    assert kl[NATIVE] < 2 * kl[EMULATED] and kl[EMULATED] < 2 * kl[NATIVE], kl
