"""Which layers a recipe smooths: every reader of a norm or none, in llm-compressor's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calibration.plan.plan import Plan
from recipes.errors import RecipeError
from tests.exported import plan_of, recipe
from tests.models import deepseek_v4, standard

LINEAR = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "NVFP4"}
NORM = "model.layers.0.post_attention_layernorm"
ATTENTION = {"smooth_layer": "re:.*input_layernorm$", "balance_layers": ["re:.*q_proj$", "re:.*k_proj$"]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sources")
    made = {name: standard.write(base / name, name) for name in ("llama", "qwen3_moe", "mixtral")}
    return made | {name: deepseek_v4.write(base / name, name) for name in ("bf16", "fp8_mxfp4")}


def make(source: Path, smooth: dict[str, Any] | None = None, name: str = "AWQModifier", **sections: Any) -> Plan:
    modifiers = [{name: smooth}, {"QuantizationModifier": sections.pop("quantized", LINEAR)}]
    return plan_of(source, recipe(source, Path("/nowhere/out"), modifiers=modifiers, **sections))[0]


@pytest.mark.parametrize(("model", "experts", "router"), [
    ("qwen3_moe", "mlp.experts.{}.{}_proj", "mlp.gate"), ("mixtral", "block_sparse_moe.experts.{}.{}", "block_sparse_moe.gate"),
])  # fmt: skip
def test_everything_that_reads_a_norm_takes_its_factors_in_the_router_too(
    sources: dict[str, Path], model: str, experts: str, router: str
) -> None:
    plan = make(sources[model])
    readers = {site.smooth: site.readers for site in plan.smoothed}
    leaves = ("w1", "w3") if model == "mixtral" else ("gate", "up")
    count = 4 if model == "mixtral" else 8
    wanted = {f"model.layers.0.{experts.format(n, leaf)}" for n in range(count) for leaf in leaves}
    assert set(readers[NORM]) == wanted | {f"model.layers.0.{router}"}
    step = plan.steps[f"model.layers.0.{router}.weight"]
    assert (step.action, plan.steps[f"{NORM}.weight"].action) == ("rescale", "rescale")
    assert "router: takes in the factors that post_attention_layernorm loses" in step.reason


def test_a_dense_block_has_four_sites_and_query_heads_share_the_factors_of_their_values(
    sources: dict[str, Path],
) -> None:
    plan = make(sources["llama"])
    sites = {site.smooth.removeprefix("model.layers.1."): site for site in plan.smoothed if ".1." in site.smooth}
    assert list(sites) == ["input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"]
    values = sites["self_attn.v_proj"]
    assert values.channels(8, 4) == [*range(4), *range(4)] or values.head == 32
    assert type(values)("v", ("o",), 2).channels(8, 4) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert {step.source.split(".")[-2] for step in plan.steps.values() if step.action == "rescale"} == {
        "input_layernorm", "post_attention_layernorm"}  # fmt: skip


def test_biases_and_layers_that_stay_bf16_are_rescaled_too(sources: dict[str, Path]) -> None:
    quantized = LINEAR | {"ignore": ["lm_head", "re:.*(q|k|v)_proj"]}
    plan = make(
        sources["llama"], {"mappings": [["re:.*o_proj", "re:.*v_proj"]]}, "SmoothQuantModifier", quantized=quantized
    )
    assert {s.module.rpartition(".")[2] for s in plan.steps.values() if s.action == "rescale"} == {"v_proj"}
    assert make(sources["llama"], {"mappings": [ATTENTION]}, quantized=quantized).smoothed == ()


def test_a_norm_with_a_reader_that_is_not_known_is_left_out_with_its_reason(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    plan = make(sources["bf16"])
    assert {site.smooth.rpartition(".")[2] for site in plan.smoothed} == {"w3"}
    assert any("layers.N.attn_norm is not smoothed" in note for note in plan.warnings)
    with pytest.raises(RecipeError, match=r"layers.0.ffn_norm cannot be smoothed: .* leave it out of mappings"):
        make(sources["bf16"], {"mappings": [{"smooth_layer": "re:.*ffn_norm", "balance_layers": ["re:.*"]}]})


def test_weights_that_keep_their_stored_codes_are_not_smoothed(sources: dict[str, Path]) -> None:
    plan = make(sources["fp8_mxfp4"], quantized={"targets": [r"re:^layers\.\d+\.ffn\..*\.w[123]$"], "scheme": "NVFP4"})
    assert not any("experts." in site.smooth and "shared" not in site.smooth for site in plan.smoothed)
    assert any("keeps its MXFP4 values (export.mxfp4: requantize" in note for note in plan.warnings)


def test_mappings_choose_among_the_sites_and_forgotten_readers_are_added(sources: dict[str, Path]) -> None:
    (first, second) = make(sources["llama"], {"mappings": [ATTENTION]}).smoothed
    assert {reader.rpartition(".")[2] for reader in first.readers} == {"q_proj", "k_proj", "v_proj"}
    assert "layers.1" in second.smooth
    words = {"mappings": [[["re:.*q_proj"], "re:.*input_layernorm"]], "ignore": ["model.layers.1.input_layernorm"]}
    assert make(sources["llama"], words, "SmoothQuantModifier").smoothed == (first,)
    mixtral = make(
        sources["mixtral"], {"mappings": [{"smooth_layer": "re:.*up_proj", "balance_layers": "re:.*down_proj"}]}
    )
    assert {site.smooth.rpartition(".")[2] for site in mixtral.smoothed} == {"w3"}


def test_mappings_that_match_nothing_are_refused(sources: dict[str, Path]) -> None:
    wrong = {"smooth_layer": "re:.*input_layernorm", "balance_layers": ["re:.*down_proj"]}
    with pytest.raises(
        RecipeError, match=r"mappings.0: 're:\.\*input_layernorm' and its balance_layers match no layers"
    ):
        make(sources["llama"], {"mappings": [wrong]})


def test_a_plan_without_smoothing_keeps_its_digest_and_smoothing_is_part_of_it(sources: dict[str, Path]) -> None:
    modifiers = [{"QuantizationModifier": LINEAR}]
    plain, _ = plan_of(sources["llama"], recipe(sources["llama"], Path("/nowhere/out"), modifiers=modifiers))
    assert plain.smoothed == () and "rescale" not in {step.action for step in plain.steps.values()}
    some = make(sources["llama"], {"mappings": [{"smooth_layer": "re:.*up_proj", "balance_layers": "re:.*down_proj"}]})
    assert some.steps == plain.steps and some.digest != plain.digest


def test_a_block_with_an_unknown_norm_or_module_is_not_smoothed_there(sources: dict[str, Path]) -> None:
    from calibration.checkpoint.formats import Formats
    from calibration.checkpoint.index import Checkpoint
    from calibration.plan.smoothing import _Block

    formats = Formats(Checkpoint.open(sources["llama"]))
    names = ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.indexer.wk", "mlp.up_proj")
    reasons: dict[str, str] = {}
    assert [s.smooth for s in _Block({n: n for n in names}, formats, 32).sites(reasons.__setitem__)] == [
        "post_attention_layernorm"]  # fmt: skip
    assert reasons == {"input_layernorm": "self_attn.indexer.wk may read it too"}
    odd = {n: n for n in (*names, "post_feedforward_layernorm")}
    assert [s.smooth for s in _Block(odd, formats, 32).sites(reasons.__setitem__)] == []
