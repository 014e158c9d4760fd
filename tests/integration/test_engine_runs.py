"""What a run of the engine guarantees: memory, statistics, experts, GPTQ, activations, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.quantization import calibration as stock_calibration
from llmcompressor.modifiers.utils.hooks import HooksMixin

from calibration.engine import walk as sequential
from calibration.engine.activations import ActivationCache
from calibration.engine.results import BlockResult
from calibration.plan.matching import resolved_targets
from recipes.errors import RecipeError, SourceError, WorkflowError
from tests.integration.engine_runs import (
    TARGETS,
    Run,
    batches,
    differing,
    even_products,
    family,
    loader,
    ours,
    recipe,
    skeleton,
)


def groups(name: str) -> dict[str, Any]:
    return {"config_groups": {"group": {"targets": [TARGETS[family(name)]], "scheme": "NVFP4"}}}


def test_one_block_is_in_memory_at_a_time() -> None:
    source, seen = skeleton("qwen3_moe"), list[tuple[int | None, set[str]]]()

    def watch(result: BlockResult) -> None:
        blocks = {name.split(".")[2] for name in source.loaded() if name.startswith("model.layers.")}
        seen.append((result.block, blocks))

    run = ours(recipe("qwen3_moe"), source, watch=watch)
    assert seen == [(0, {"0"}), (1, {"1"}), (2, {"2"})]
    assert source.loaded() == set()
    assert all(parameter.is_meta for parameter in source.model.parameters())
    assert [event["event"] for event in run.events if event["event"] != "batch"].count("block") == 3


def test_progress_reports_every_block_and_batch() -> None:
    run = ours(recipe("mixtral"), skeleton("mixtral"))
    assert [e["block"] for e in run.events if e["event"] == "block"] == [0, 1]
    batch = [(e["block"], e["batch"]) for e in run.events if e["event"] == "batch"]
    assert batch == [(block, number) for block in (None, 0, 1) for number in range(4)]
    tokens = run.summary.tokens_per_expert
    # Two of the experts per token and block, 3 batches of 2 x 40 tokens; 10 of them are padding and in no batch.
    top_k = run.source.model.config.num_experts_per_tok
    assert {block: sum(count.values()) for block, count in tokens.items()} == dict.fromkeys((0, 1), 230 * top_k)


def test_tokens_per_expert_are_the_routers_choices() -> None:
    """Counted independently, from what each router returns."""
    source, chosen = skeleton("qwen3_moe"), dict[int, torch.Tensor]()
    config = source.model.config
    for number, block in enumerate(source.blocks.values()):

        def record(module: Any, args: Any, output: Any, number: int = number) -> None:
            if not HooksMixin._HOOKS_DISABLED:
                counted = torch.bincount(output[2].flatten(), minlength=config.num_experts)
                chosen[number] = chosen.get(number, 0) + counted

        block.mlp.gate.register_forward_hook(record)
    run = ours(recipe("qwen3_moe"), source)
    for number, counted in chosen.items():
        assert run.summary.tokens_per_expert[number] == dict(enumerate(counted.tolist()))


@pytest.mark.parametrize("order", ["as drawn", "reversed"])
def test_scales_do_not_depend_on_the_order_of_batches(order: str) -> None:
    loader = batches()
    if order == "reversed":
        loader.dataset.reverse()  # type: ignore[attr-defined]
    one = ours(recipe("qwen3"), skeleton("qwen3")).scales
    assert differing(one, ours(recipe("qwen3"), skeleton("qwen3"), loader).scales) == []


def test_routed_only_fills_starving_experts_from_their_peers() -> None:
    """Some of 64 experts see no token: gate/up and down take the largest amax, so the smallest divisor, of the peers
    that saw at least the asked number of tokens."""
    loader = batches(count=1, size=1, tokens=12)
    chosen = recipe("bf16", calibration={"dataset": "bundled", "all_experts": False, "min_tokens_per_expert": 2})
    run = ours(chosen, skeleton("bf16"), loader)
    for result in run.results:
        tokens = result.tokens_per_expert
        starving = [number for number, count in tokens.items() if count < 2]
        assert result.filled_experts == starving
        assert 0 in tokens.values()
        for leaves in (("w1", "w3"), ("w2",)):
            scale = {
                number: run.scales[f"{result.name}.ffn.experts.{number}.{leaf}.input_global_scale"].item()
                for number in tokens
                for leaf in leaves
            }
            least = min(value for number, value in scale.items() if number not in starving)
            for number in starving:
                assert scale[number] <= least
                assert tokens[number] or scale[number] == least


def test_all_experts_gives_more_than_routed_tokens() -> None:
    routed = recipe("mixtral", calibration={"dataset": "bundled", "all_experts": False})
    everything, some = ours(recipe("mixtral"), skeleton("mixtral")), ours(routed, skeleton("mixtral"))
    assert everything.summary.tokens_per_expert == some.summary.tokens_per_expert
    down = [name for name in everything.scales if name.endswith("w2.input_global_scale")]
    assert all(everything.scales[name] <= some.scales[name] for name in down)
    assert any(everything.scales[name] < some.scales[name] for name in down)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "bf16"])
def test_topped_up_calibrates_every_expert_whatever_the_batches(name: str) -> None:
    """With N at least as large as the calibration, every expert sees every token, as with `all`; with few tokens the
    scales lie between those of routed and all. The outputs of a block are the model's own in any case."""

    def run(experts: Any, size: int = 1, backwards: bool = False) -> Run:
        data = list(batches(count=8, size=1, tokens=24))
        data = data[::-1] if backwards else data
        joined = [
            {key: torch.cat([d[key] for d in data[at : at + size]]) for key in data[0]} for at in range(0, 8, size)
        ]
        calibration = {"dataset": "bundled", "experts": experts}
        return ours(recipe(name, calibration=calibration), skeleton(name), loader(joined))

    every, routed, few = run("all"), run("routed"), run({"topped_up": 100})
    if not even_products(every):
        pytest.skip("products depend on the number of rows here: outputs of blocks are not the same bits")
    assert every.summary.tokens_per_expert == few.summary.tokens_per_expert == routed.summary.tokens_per_expert
    assert differing(few.scales, run({"topped_up": 100}, 4).scales) == []
    assert differing(few.scales, run({"topped_up": 100}, 2, True).scales) == []
    hashed = {number for number in (0, 1, 2) if any(f"block {number} " in e.get("message", "") for e in few.events)}
    for result, less in zip(few.results, routed.results, strict=True):
        tokens, added = result.tokens_per_expert, result.topped_up
        starving = [number for number, count in tokens.items() if count < 100]
        if result.block in hashed:
            assert result.filled_experts == starving and not added
            continue
        assert added == {number: 100 - tokens[number] for number in starving} and not result.filled_experts
        for scale in every.scales:
            expert = re.search(rf"{re.escape(result.name)}\..*experts\.(\d+)\.(w2|down_proj)\.input_global", scale)
            if expert and int(expert[1]) not in less.filled_experts:
                assert every.scales[scale] <= few.scales[scale] <= routed.scales[scale]
    assert few.summary.topped_up and bool(hashed) == (name == "bf16")
    if not hashed:
        assert differing(every.scales, run({"topped_up": 1000}).scales) == []


def test_an_observer_that_saw_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock llm-compressor logs a warning and writes an uninitialised scale."""
    monkeypatch.setattr(sequential, "fill_from_peers", lambda *_: [])
    chosen = recipe("bf16", calibration={"dataset": "bundled", "all_experts": False})
    with pytest.raises(WorkflowError, match=r"block 0 \(layers\.0\): no calibration token reached layers\.0\.ffn\.exp"):
        ours(chosen, skeleton("bf16"), batches(count=1, size=1, tokens=12))


def test_a_scale_that_was_never_computed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales begin as NaN, so that a module passed over by the modifier cannot slip through."""
    original = stock_calibration.update_qparams

    def forgetful(module: Any, base_name: Any, only_update_onload: bool = False) -> None:
        if isinstance(module, list) and base_name == "weight":
            module = module[1:]
        original(module, base_name, only_update_onload)

    monkeypatch.setattr("llmcompressor.modifiers.quantization.quantization.base.update_qparams", forgetful)
    monkeypatch.setattr(sequential, "update_qparams", lambda *_: None)
    with pytest.raises(WorkflowError, match=r"block 0 .*weight_(global_)?scale: nan is not a finite positive scale"):
        ours(recipe("llama"), skeleton("llama"))


def test_hidden_states_that_overflow_name_block_batch_and_module(monkeypatch: pytest.MonkeyPatch) -> None:
    source = skeleton("mixtral")
    read = source.formats.read

    def huge(name: str, *given: Any) -> torch.Tensor:
        value: torch.Tensor = read(name, *given)
        return value * 3e38 if name == "model.layers.1.self_attn.v_proj.weight" else value

    monkeypatch.setattr(source.formats, "read", huge)
    with pytest.raises(SourceError, match=r"block 1 .*, batch 0: .* is model\.layers\.1\.self_attn\.v_proj;"):
        ours(recipe("mixtral"), source)


def test_gptq_corrects_weights_and_the_next_block_sees_them() -> None:
    plain = ours(recipe("llama"), skeleton("llama"))
    gptq = ours(recipe("llama", [{"GPTQModifier": groups("llama")}]), skeleton("llama"))
    assert gptq.scales.keys() == plain.scales.keys()
    changed = {name for name in plain.parameters if not torch.equal(plain.parameters[name], gptq.parameters[name])}
    assert {name for name in plain.parameters if name.endswith("proj.weight")} <= changed
    # Both passes ran, and the second pass's outputs entered block 1: its input scales moved, those of block 0 did not.
    assert not any("layers.0" in name and "input_global" in name for name in changed)
    assert any("layers.1" in name and "input_global" in name for name in changed)
    assert {event["kind"] for event in gptq.events if event["event"] == "batch"} == {"calibrate", "propagate"}
    assert {event["kind"] for event in plain.events if event["event"] == "batch"} == {"calibrate"}


def test_gptq_rounds_experts_without_tokens_to_nearest_and_says_so() -> None:
    calibration = {"dataset": "bundled", "all_experts": False}
    chosen = recipe("qwen3_moe", [{"GPTQModifier": groups("qwen3_moe")}], calibration=calibration)
    run = ours(chosen, skeleton("qwen3_moe"), batches(count=1, size=1, tokens=4))
    for result in run.results:
        unseen = {number for number, count in result.tokens_per_expert.items() if not count}
        assert {int(re.findall(r"experts\.(\d+)", name)[0]) for name in result.rounded_to_nearest} == unseen
    assert run.summary.rounded_to_nearest


def test_gptq_corrects_topped_up_experts_too() -> None:
    """Their further tokens enter the Hessians, in an order that batches do not change."""
    calibration = {"dataset": "bundled", "experts": {"topped_up": 16}}
    chosen = recipe("qwen3_moe", [{"GPTQModifier": groups("qwen3_moe")}], calibration=calibration)
    run = ours(chosen, skeleton("qwen3_moe"), batches(count=1, size=1, tokens=12))
    assert run.summary.topped_up and not run.summary.rounded_to_nearest


def test_spilled_activations_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spilled: list[int] = []
    keep = ActivationCache._keep

    def watched(self: ActivationCache, *args: Any) -> None:
        keep(self, *args)
        assert self.held_bytes <= 64 * 1024
        spilled.append(len(self.spilled))

    held = ours(recipe("mixtral"), skeleton("mixtral"), batches(count=8)).scales
    monkeypatch.setattr(ActivationCache, "_keep", watched)
    chosen = recipe("mixtral", offload={"max_host_memory": "64KiB"})
    run = ours(chosen, skeleton("mixtral"), batches(count=8))
    assert 2 < max(spilled) < 8
    assert differing(held, run.scales) == []
    scratch = Path(run.source.model.config.name_or_path).parents[1] / "scratch"
    assert list(scratch.glob("activations-*")) == []


def test_arguments_that_llm_compressor_refuses_are_named() -> None:
    gptq = {"GPTQModifier": groups("llama") | {"block_size": "many", "batched_quantization": -3}}
    with pytest.raises(RecipeError, match=r"modifiers\.0\.GPTQModifier\.block_size: .*integer") as caught:
        ours(recipe("llama", [gptq]), skeleton("llama"))
    assert "batched_quantization" in str(caught.value)
    assert caught.value.exit_code == 2


def test_no_batch_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no batch"):
        ours(recipe("llama"), skeleton("llama"), batches(count=0))


def test_class_patches_are_undone_after_a_failure() -> None:
    forward = LinearExperts2D.forward
    with pytest.raises(RecipeError):
        ours(recipe("mixtral"), skeleton("mixtral"), batches(count=0))
    assert LinearExperts2D.forward is forward
    ours(recipe("mixtral"), skeleton("mixtral"))
    assert LinearExperts2D.forward is forward


def test_resolved_targets_match_exactly_and_are_few() -> None:
    everything = [
        f"model.layers.{b}.mlp.experts.{e}.{p}_proj" for b in range(12) for e in range(20) for p in ("up", "down")
    ]
    everything += [f"model.layers.{b}.mlp.experts" for b in range(12)]
    up = [name for name in everything if name.endswith("up_proj")]
    assert resolved_targets(up, everything) == [r"re:^model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj$"]
    late = [name for name in up if int(name.split(".")[2]) >= 10]
    assert len(resolved_targets(late, everything)) == 1
    assert "(?:10|11)" in resolved_targets(late, everything)[0]
    ragged = [up[0], up[30]]
    (target,) = resolved_targets(ragged, everything)
    assert {name for name in everything if re.match(target[3:], name)} == set(ragged)
