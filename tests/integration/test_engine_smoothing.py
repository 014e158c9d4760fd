"""Smoothing in the engine: the model stays what it was, bit for bit, and what is observed is the smoothed model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch import nn

from calibration.engine import smoothing
from calibration.engine.smoothing import Factors
from recipes.errors import RecipeError
from tests.integration import engine_runs
from tests.integration.engine_runs import TARGETS, Run, differing, family, ours, recipe, skeleton, stock
from tests.models import uneven_norms

SMOOTH: dict[str, dict[str, Any]] = {"SmoothQuant": {"SmoothQuantModifier": {}}, "AWQ": {"AWQModifier": {"n_grid": 4}}}


@pytest.fixture(autouse=True)
def sources_with_uneven_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_runs.model_directory
    directory = cache(lambda name: uneven_norms.write(real(name), tmp_path / name))
    monkeypatch.setattr(engine_runs, "model_directory", directory)


def smoothed(name: str, modifier: dict[str, Any], **sections: Any) -> Run:
    groups = {"config_groups": {"group": {"targets": [TARGETS[family(name)]], "scheme": "NVFP4"}}}
    return ours(recipe(name, [modifier, {"QuantizationModifier": groups}], **sections), skeleton(name))


def factors_of(run: Run) -> dict[str, Factors]:
    return {module: found for result in run.results for module, found in result.factors.items()}


@pytest.mark.parametrize("modifier", SMOOTH)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral"])
def test_a_smoothed_run_has_the_scales_of_a_plain_run_of_the_smoothed_source(
    name: str, modifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Input scales too: they are those of the inputs after the scaling. The router's columns take the factors in, or
    tokens would go to other experts."""
    run = smoothed(name, SMOOTH[modifier])
    factors = factors_of(run)
    assert len(factors) > 8
    exponents = [f.log2() for x in factors.values() for f in (x.rows, x.columns) if f is not None]
    assert not torch.cat(exponents).frac().any() and torch.cat(exponents).any()
    routers = [module for module in factors if module.endswith(".gate")]
    assert len(routers) == (0 if name == "llama" else run.summary.blocks)

    assert all(factors[router].columns.log2().any() for router in routers)  # type: ignore[union-attr]
    source = engine_runs.model_directory(name)
    unscaled = ours(recipe(name), skeleton(name))
    scaled = uneven_norms.rewritten(
        source, tmp_path / "scaled", lambda key, tensor: factors.get(key.rpartition(".")[0], Factors()).apply(tensor)
    )
    monkeypatch.setattr(engine_runs, "model_directory", lambda name: scaled)
    plain = ours(recipe(name), skeleton(name))
    assert differing(run.parameters, plain.parameters) == []
    assert [r.tokens_per_expert for r in run.results] == [r.tokens_per_expert for r in plain.results]
    assert [key for key in differing(run.scales, unscaled.scales) if key.endswith("input_global_scale")]
    assert [r.tokens_per_expert for r in run.results] == [r.tokens_per_expert for r in unscaled.results]


def test_factors_are_stocks_rounded_to_powers_of_two() -> None:
    """SmoothQuant of llm-compressor, on the norms: |x|^0.5 / (2 |w|)^0.5, up to one constant for all channels."""
    norms = [
        [["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"],
        [["re:.*gate_proj$", "re:.*up_proj$"], "re:.*post_attention_layernorm$"],
    ]
    run = smoothed("llama", {"SmoothQuantModifier": {"mappings": norms}})
    source = skeleton("llama")
    theirs = stock("llama", source, [SmoothQuantModifier(), QuantizationModifier()])
    plain = stock("llama", source, [QuantizationModifier()])
    factors = factors_of(run)
    assert len([f for f in factors.values() if f.rows is not None]) == 4
    for module, found in factors.items():
        if found.rows is not None:
            theirs_rows = (theirs[f"{module}.weight"].float() / plain[f"{module}.weight"].float()).log2()
            ours_rows = found.rows.log2()
            # Stock measures max - min, ours the largest magnitude: half a power of two for rounding, half for that.
            away = (ours_rows - theirs_rows) - (ours_rows - theirs_rows).median()
            assert float(away.abs().max()) <= 1.05, module


def test_a_reader_that_the_names_do_not_tell_is_found_by_what_the_block_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mapping without the router: what the plan would do if it did not know it."""
    real = smoothing.Smoother._site

    def forgetful(self: Any, planned: Any) -> Any:
        site = real(self, planned)
        site.readers = [r for r in site.readers if not isinstance(r, nn.Module) or r.weight.shape[0] > 8]
        return site

    monkeypatch.setattr(smoothing.Smoother, "_site", forgetful)
    run = smoothed("qwen3_moe", SMOOTH["SmoothQuant"])
    left = [event["left_out"] for event in run.events if event["event"] == "smooth"]
    assert left == [[f"model.layers.{n}.post_attention_layernorm"] for n in range(len(left))] and left
    assert not any(module.endswith(("post_attention_layernorm", "mlp.gate")) for module in factors_of(run))
    mapping = {"smooth_layer": "re:.*post_attention_layernorm", "balance_layers": ["re:.*gate_proj"]}
    with pytest.raises(
        RecipeError, match=r"block 0: .*post_attention_layernorm cannot be smoothed: it is read by more"
    ):
        smoothed("qwen3_moe", {"AWQModifier": {"mappings": [mapping]}})


def test_a_projection_whose_values_are_clamped_is_left_as_it_is() -> None:
    """DeepSeek-V4 bounds up at 10: no value comes near it in the sample, and scaling would move the bound."""
    run = smoothed("bf16", SMOOTH["SmoothQuant"])
    events = [event for event in run.events if event["event"] == "smooth"]
    assert len(events) == 3 and all(event["sites"] == 0 and event["left_out"] for event in events)
    assert factors_of(run) == {}
    assert differing(run.scales, ours(recipe("bf16"), skeleton("bf16")).scales) == []


def test_gptq_after_smoothing_quantizes_the_smoothed_weights() -> None:
    groups = {"config_groups": {"group": {"targets": [TARGETS["other"]], "scheme": "NVFP4"}}}
    run = ours(recipe("llama", [SMOOTH["SmoothQuant"], {"GPTQModifier": groups}]), skeleton("llama"))
    nearest = smoothed("llama", SMOOTH["SmoothQuant"])
    key = "model.layers.0.self_attn.q_proj"
    assert torch.equal(run.parameters[f"{key}.weight_global_scale"], nearest.parameters[f"{key}.weight_global_scale"])
    assert not torch.equal(run.parameters[f"{key}.weight"], nearest.parameters[f"{key}.weight"])
