"""LongCat-Flash's q_b_proj is given what vLLM gives it, and the model computes the same."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.model.scaled_latents import scale_latents
from calibration.model.skeleton import build_skeleton
from tests.models import any_family


def test_the_factor_of_queries_is_before_their_projection() -> None:
    torch.manual_seed(0)
    config = any_family.empty_model("longcat_flash").config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    given: dict[str, list[torch.Tensor]] = {"q_b_proj": [], "kv_b_proj": []}
    for name, module in model.named_modules():
        for leaf, seen in given.items():
            if name.endswith(leaf):
                module.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        names = list(model.state_dict())
        before = {leaf: seen[:] for leaf, seen in given.items()}
        for seen in given.values():
            seen.clear()
        scale_latents(model)
        made = model(input_ids=tokens, use_cache=False).logits
    assert list(model.state_dict()) == names and torch.allclose(made, expected, rtol=1e-4, atol=1e-5)
    # (256 / 64)^0.5
    assert len(given["q_b_proj"]) == 4 and torch.equal(given["q_b_proj"][0], 2 * before["q_b_proj"][0])
    assert torch.equal(given["kv_b_proj"][0], before["kv_b_proj"][0])


def test_a_model_that_is_calibrated_has_its_factors_before_the_projections(tmp_path: Path) -> None:
    source = Checkpoint.open(any_family.write(tmp_path / "source", "longcat_flash"))
    model = build_skeleton(Formats(source), tmp_path / "work", False, torch.device("cpu")).model
    attentions = [module for module in model.modules() if hasattr(module, "mla_scale_q_lora")]
    assert [(a.mla_scale_q_lora, a.q_a_layernorm.factor) for a in attentions] == [(1.0, 2.0)] * 4
