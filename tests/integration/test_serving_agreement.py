"""The engine's float32 logits against the independent reference, for every family: the strict gate for W4A4."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.families import served
from calibration.families.derived import TESTED
from tests.models import any_family, deepseek_v4, standard
from tests.reference.compare import compare
from tests.reference.engine import random_prompts, serve
from tests.reference.model import decided, logits, reference_model
from tests.reference.rtn import load, write_nvfp4

TOP1, KL = 0.995, 1e-4
LENGTHS = (1, 3, 40, 300, *[8] * 24)
"""Of a derived family's prompts: a position that noise decides spoils those after it, so many prompts are short."""

V4_EXPERTS = r"^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"
V4_EXPERT_TARGET = r"re:(?:.*\.)?layers\.(?:0|1|2)\.ffn\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"
V4_SHARED_TARGET = r"re:(?:.*\.)?layers\.(?:0|1|2)\.ffn\.shared_experts\.(w1|w2|w3|down_proj)$"
V4_ATTENTION = r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)"


@dataclass(frozen=True)
class Case:
    source: Any  # writes the source checkpoint into a directory
    pattern: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    block_fp8: tuple[str, tuple[str, ...]] | None = None
    per_expert_inputs: bool = False
    config: tuple[tuple[str, str], ...] = ()


CASES = {
    "llama": Case(lambda d: standard.write(d, "llama"), r"layers\.\d+\..*_proj$", (r"re:.*layers.*_proj$",)),
    "qwen3": Case(lambda d: standard.write(d, "qwen3"), r"layers\.\d+\..*_proj$", (r"re:.*layers.*_proj$",)),
    "qwen3_moe": Case(lambda d: standard.write(d, "qwen3_moe"), r"layers\.\d+\..*_proj$", (r"re:.*layers.*_proj$",)),
    "mixtral, input scales per expert": Case(
        lambda d: standard.write(d, "mixtral"),
        r"(_proj|\.w[123])$",
        (r"re:.*_proj$", r"re:.*\.experts\.\d+\.w[123]$"),
        per_expert_inputs=True,
    ),
    "deepseek_v4 bf16": Case(
        lambda d: deepseek_v4.write(d, "bf16"),
        r"^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$",
        (V4_EXPERT_TARGET, V4_SHARED_TARGET),
    ),
    "deepseek_v4 fp8, attention and shared experts in FP8": Case(
        lambda d: deepseek_v4.write(d, "fp8"),
        V4_EXPERTS,
        (V4_EXPERT_TARGET,),
        block_fp8=(
            rf"^layers\.\d+\.({V4_ATTENTION}|ffn\.shared_experts\.w[123])",
            (rf"re:.*layers\.(?:0|1|2)\.{V4_ATTENTION}$", V4_SHARED_TARGET),
        ),
        config=(("expert_dtype", "nvfp4"),),
    ),
    "deepseek_v4 fp8 and mxfp4, attention in FP8": Case(
        lambda d: deepseek_v4.write(d, "fp8_mxfp4"),
        r"^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$",
        (V4_EXPERT_TARGET, V4_SHARED_TARGET),
        block_fp8=(rf"^layers\.\d+\.{V4_ATTENTION}", (rf"re:.*layers\.(?:0|1|2)\.{V4_ATTENTION}$",)),
        config=(("expert_dtype", "nvfp4"),),
    ),
}


#: What test_end_to_end also shows with the product's own output runs with the slow tests only.
ALWAYS = ("mixtral, input scales per expert", "deepseek_v4 fp8, attention and shared experts in FP8")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in CASES])
def test_engine_agrees_with_the_reference(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source, output = tmp_path / "source", tmp_path / "output"
    case.source(source)
    write_nvfp4(
        source,
        output,
        case.pattern,
        case.targets,
        ignore=case.ignore,
        block_fp8=case.block_fp8,
        per_expert_inputs=case.per_expert_inputs,
        config=dict(case.config),
    )
    checks, result, ids, engine = serve(output, tmp_path / "logs", random_prompts(1024))
    expected = {"serving.input_scales": "WARN"} if case.per_expert_inputs else {}
    # Greedy text of random weights may loop.
    verdicts = {c.id: c.verdict for c in checks.values() if c.verdict != "PASS" and c.id != "serving.coherent"}
    assert verdicts == expected, checks
    assert result["w4a4"] is True
    assert [len(i) for i in ids] == [1, 3, 40, 300]

    agreement = compare(logits(reference_model(output), ids), engine)
    print(name, agreement)
    assert agreement.top1 >= TOP1, agreement
    assert agreement.kl < KL, agreement

    # The gate can tell: without activation quantization the same reference must fail it.
    control = compare(logits(reference_model(output, quantize_inputs=False), ids), engine)
    assert control.top1 < TOP1, control
    assert control.kl > 10 * KL, control


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == TESTED[0] else pytest.mark.slow) for f in TESTED])
def test_engine_agrees_with_the_reference_on_a_derived_family(family: str, tmp_path: Path) -> None:
    """Where float32 noise does not decide: random weights of these classes amplify the last bit of a sum."""
    source, output = tmp_path / "source", tmp_path / "output"
    any_family.write(source, family)
    kept = served.rows()[family].unquantized if family in served.rows() else ()
    not_these = "".join(rf"(?!{re.escape(name).replace('N', '[0-9]+')}$)" for name in kept)
    not_these += r"(?!.*\.fused_)" if kept else ""  # what vLLM makes of them
    linear = rf"layers\.\d+\.{not_these}.*(_proj|_proj_with_mqa|\.c_fc|\.w[123])$"
    write_nvfp4(source, output, linear, [f"re:.*{linear}"])
    # vLLM runs a prompt of one token as it decodes: there latent attention takes kv_b_proj's weights, not its quantized input.
    decoded = any(module.endswith("kv_b_proj.weight_packed") for module in load(output))
    _, result, ids, engine = serve(output, tmp_path / "logs", random_prompts(1024, LENGTHS[1:] if decoded else LENGTHS))
    assert result["ok"] and result["w4a4"] is True
    reference = reference_model(output)
    expected = logits(reference, ids)
    masks = decided(reference, ids, expected)
    agreement = compare(expected, engine, masks)
    control = compare(logits(reference_model(output, quantize_inputs=False), ids), engine, masks)
    print(family, agreement, control)
    assert agreement.positions > 20, agreement
    assert agreement.top1 >= TOP1 and agreement.kl < KL, agreement
    assert control.top1 < TOP1 and control.kl > KL, control


def test_collapsed_input_scales_are_another_model(tmp_path: Path) -> None:
    """One input global scale per layer (FlashInfer) differs from one per expert, and the emulation can do both."""
    case = CASES["mixtral, input scales per expert"]
    case.source(tmp_path / "source")
    write_nvfp4(tmp_path / "source", tmp_path / "output", case.pattern, case.targets, per_expert_inputs=True)
    _, result, ids, engine = serve(
        tmp_path / "output", tmp_path / "logs", random_prompts(1024), moe_input_scales="collapsed"
    )
    assert any("collapsed" in text for text in result["engine"]["emulations"])
    stored = logits(reference_model(tmp_path / "output"), ids)
    agreement = compare(stored, engine)
    assert agreement.kl > KL, agreement
    # The same process also ran the other mode, and that one is the reference's.
    scales = result["input_scales"]
    assert (scales["layers"], scales["shared"], scales["experts"]) == (2, 0, 8), scales
    losses = [
        -row.log_softmax(-1)[:-1].gather(-1, torch.tensor(i[1:])[:, None]) for row, i in zip(stored, ids, strict=True)
    ]
    nll = float(torch.cat(losses).mean())
    assert math.log(scales["other"]["perplexity"]) == pytest.approx(nll, abs=1e-4)
    assert abs(math.log(result["perplexity"]) - nll) > 10 * 1e-4
    assert scales["other"]["mode"] == "stored" and scales["other"]["kl"] > KL
