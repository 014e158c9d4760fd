"""Importance of input channels: exact sums, shared where the input is; and the scales that follow from it."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe, update_qparams
from torch import nn

from calibration.checkpoint import nvfp4
from calibration.engine.experts import ExpertCalibration, Pass
from calibration.engine.weighted import Importance, weighted_observer
from tests.unit.engine.expert_models import EXPERTS, HIDDEN, batches, make_experts, watch


def observed(linear: nn.Linear, observer: str) -> nn.Linear:
    """The layer with an NVFP4 weight observer, hooks attached."""
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    weights = scheme.weights.model_copy(update={"observer": observer})
    initialize_module_for_quantization(linear, QuantizationScheme(targets=["Linear"], weights=weights))
    linear.quantization_enabled = False
    initialize_observer(linear, "weight")
    return linear


def scaled(linear: nn.Linear) -> nn.Linear:
    observe([linear], "weight")
    update_qparams([linear], "weight")
    return linear


def output_error(linear: nn.Linear, inputs: torch.Tensor) -> float:
    """Of the packed weight's products with `inputs`, in float64."""
    packed, _ = nvfp4.pack(linear.weight.data, linear.weight_scale.data, linear.weight_global_scale.data)
    stored = nvfp4.dequantize(packed, linear.weight_scale.data, linear.weight_global_scale.data)
    return float((inputs.double() @ (stored - linear.weight.data.float()).double().T).square().sum())


def skewed(tokens: int = 64, width: int = 128) -> torch.Tensor:
    """Inputs of which a few channels are 30 times as large as the others."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tokens, width, generator=generator) * torch.where(torch.arange(width) % 16 == 5, 30.0, 1.0)


def test_weighted_scales_lose_less_of_the_output_than_unweighted_ones() -> None:
    torch.manual_seed(0)
    weight, inputs, errors = torch.randn(64, 128).to(torch.bfloat16), skewed(), {}
    for name in ("memoryless_minmax", "nvfp4_four_six", "nvfp4_mse", "nvfp4_weighted"):
        linear = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
        linear.weight.data = weight.clone()
        observed(linear, name)(inputs.to(torch.bfloat16))
        errors[name] = output_error(scaled(linear), inputs)
    assert errors["nvfp4_weighted"] < 0.6 * errors["nvfp4_mse"] < 0.6 * errors["memoryless_minmax"]
    assert errors["nvfp4_four_six"] < errors["memoryless_minmax"]


def test_a_layer_that_saw_no_token_weighs_all_alike() -> None:
    torch.manual_seed(0)
    blind, plain = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)
    plain.weight.data = blind.weight.data.clone()
    scaled(observed(blind, "nvfp4_weighted")), scaled(observed(plain, "nvfp4_mse"))
    assert torch.equal(blind.weight_scale, plain.weight_scale)


def test_importance_is_the_sum_of_squares_whatever_the_order() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(7, 16).mul_(10.0 ** float(p)) for p in torch.arange(-5.0, 6.0)]
    sums = []
    for order in (parts, parts[::-1]):
        importance = Importance()
        for part in order:
            importance.add(part[None])
        sums.append(importance.sums)
    assert torch.equal(sums[0], sums[1])  # type: ignore[arg-type]
    vector = importance.vector()
    assert vector is not None
    assert torch.allclose(vector.double(), torch.cat(parts).double().square().sum(0), rtol=1e-6)


def test_importance_of_a_tensor_that_was_written_to_is_summed_again() -> None:
    inputs, first, second = torch.ones(3, 16), Importance(), Importance()
    first.add(inputs)
    inputs.mul_(2)
    second.add(inputs)
    second.add(inputs)
    assert first.vector().tolist() == [3.0] * 16 and second.vector().tolist() == [24.0] * 16  # type: ignore[union-attr]


def test_layers_that_see_one_tensor_have_sums_of_their_own() -> None:
    """Ranks add theirs to each in place."""
    inputs, first, second = torch.ones(3, 16), Importance(), Importance()
    first.add(inputs)
    second.add(inputs)
    assert first.sums is not None and second.sums is not None
    first.sums += 1
    assert torch.equal(first.sums, second.sums + 1)


def test_importance_takes_inputs_that_overflow_a_sum() -> None:
    importance = Importance()
    importance.add(torch.full((2, 16), 3e38))
    vector = importance.vector()
    assert vector is not None and torch.isfinite(vector).all()


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v4"])
def test_experts_that_share_an_input_share_one_vector_and_down_has_its_own(kind: str) -> None:
    experts, calibration = make_experts(kind), ExpertCalibration()
    watch(experts)
    for number in range(EXPERTS):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(experts[number], leaf)
            linear.quantization_scheme.weights.observer = "nvfp4_weighted"
            initialize_observer(linear, "weight")
    seen = dict[int, list[torch.Tensor]]()
    with moe_calibration_context(), calibration.installed(), torch.no_grad():
        for hidden, index, weights in batches():
            experts(hidden, index, weights)
            with calibration.running(Pass.REPEAT):
                experts(hidden * 2, index, weights)
            for number in range(EXPERTS):
                expert = experts[number]
                both = torch.cat([expert.gate_proj.weight @ hidden.T, expert.up_proj.weight @ hidden.T]).T
                seen.setdefault(number, []).append(expert._apply_gate(both))
    shared = {weighted_observer(getattr(experts[n], leaf)).importance for n in range(EXPERTS)  # type: ignore[union-attr]
              for leaf in ("gate_proj", "up_proj")}  # fmt: skip
    assert len(shared) == 1
    vector = shared.pop().vector()
    inputs = torch.cat([hidden for hidden, _, _ in batches()]).double()
    assert vector is not None and vector.shape == (HIDDEN,)
    assert torch.allclose(vector.double(), inputs.square().sum(0), rtol=1e-5)
    for number, parts in seen.items():
        own = weighted_observer(experts[number].down_proj).importance.vector()  # type: ignore[union-attr]
        assert own is not None
        assert torch.allclose(own.double(), torch.cat(parts).double().square().sum(0), rtol=1e-2)
