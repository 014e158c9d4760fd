"""GPTQ with `quantized_inputs`: one Hessian for every input, of the inputs as served, damped until it has a factor."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe, update_qparams
from torch import nn

from calibration.checkpoint import nvfp4
from calibration.checkpoint.nvfp4 import RANGE, quantize_dequantize
from calibration.engine import gptq
from calibration.engine.attachment import link_fused
from calibration.engine.gptq import StreamingGPTQModifier

WIDTH, OUT = 128, 48


def linear(seed: int = 0, out: int = OUT) -> nn.Linear:
    made = nn.Linear(WIDTH, out, bias=False, dtype=torch.bfloat16)
    made.weight.data = torch.randn(out, WIDTH, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    preset = preset_name_to_scheme("NVFP4", ["Linear"])
    weights = preset.weights.model_copy(update={"actorder": "static"})
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=preset.input_activations)
    initialize_module_for_quantization(made, scheme)
    made.quantization_enabled = False
    initialize_observer(made, "weight")
    return made


def tokens(count: int = 512) -> torch.Tensor:
    """Correlated inputs with outliers in some channels."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(24, WIDTH, generator=generator)
    made = torch.randn(count, 24, generator=generator) @ mixing + torch.randn(count, WIDTH, generator=generator)
    return (made * torch.where(torch.arange(WIDTH) % 16 == 3, 8.0, 1.0)).to(torch.bfloat16)


def run(modifier: GPTQModifier, modules: list[nn.Linear], batches: list[torch.Tensor]) -> None:
    modifier._module_names = {module: f"module {number}" for number, module in enumerate(modules)}
    for batch in batches:
        for module in modules:
            modifier.calibrate_module(module, (batch,), None)
    observe(modules, "weight")
    modifier.compress_modules()


def served_error(module: nn.Linear, original: torch.Tensor, inputs: torch.Tensor) -> float:
    """Of the packed weight on quantized inputs, against the original weight on the same quantized inputs."""
    packed, _ = nvfp4.pack(module.weight.data, module.weight_scale.data, module.weight_global_scale.data)
    stored = nvfp4.dequantize(packed, module.weight_scale.data, module.weight_global_scale.data)
    seen = quantize_dequantize(inputs, (RANGE / inputs.abs().amax().float()).reshape(1)).double()
    return float((seen @ (stored - original.float()).double().T).square().sum())


def test_the_served_layer_s_error_is_below_round_to_nearest_s_and_the_original_s() -> None:
    inputs, errors = tokens(), {}
    for name, modifier in {"nearest": None, "original": GPTQModifier(), "quantized": StreamingGPTQModifier()}.items():
        module = linear()
        original = module.weight.data.clone()
        if modifier is None:
            observe([module], "weight")
            update_qparams([module], "weight")
        else:
            run(modifier, [module], list(inputs.split(128)))
        errors[name] = served_error(module, original, inputs)
    assert errors["quantized"] < 0.98 * errors["original"] < 0.7 * errors["nearest"]


def test_layers_that_share_an_input_share_one_hessian_and_get_what_each_would_get_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factors: list[int] = []
    factorize = gptq._factorize
    monkeypatch.setattr(gptq, "_factorize", lambda h, d: factors.append(len(h)) or factorize(h, d))
    modifier, together = StreamingGPTQModifier(), [linear(0), linear(1, 32), linear(2)]
    link_fused([together])
    batches = list(tokens().split(256))
    run(modifier, together, batches)
    assert factors == [WIDTH]
    alone = [linear(0), linear(1, 32), linear(2)]
    link_fused([alone])
    for module in alone:
        other = StreamingGPTQModifier()
        other._module_names = dict.fromkeys(alone, "module")
        for batch in batches:
            other.calibrate_module(module, (batch,), None)
        observe(alone, "weight")
        other.compress_modules()
    for mine, its in zip(together, alone, strict=True):
        assert torch.equal(mine.weight_global_scale, its.weight_global_scale)
        assert torch.equal(mine.weight_scale, its.weight_scale)
        assert (mine.weight.data != its.weight.data).float().mean() < 0.01


def test_another_tensor_with_the_same_values_is_another_input() -> None:
    modifier, modules = StreamingGPTQModifier(), [linear(0), linear(1)]
    batch = tokens(64)
    modifier.calibrate_module(modules[0], (batch,), None)
    modifier.calibrate_module(modules[1], (batch.clone(),), None)
    assert len(modifier._hessians) == 2
    batch.mul_(2)
    with pytest.raises(Exception, match="shares its input in some batches only"):
        modifier.calibrate_module(modules[1], (batch,), None)
        modifier.calibrate_module(modules[0], (batch,), None)
        modifier.calibrate_module(modules[1], (batch,), None)


def test_damping_is_raised_until_there_is_a_factor() -> None:
    indefinite = torch.eye(32) - 0.035 * torch.ones(32, 32)  # one eigenvalue is -0.12
    assert not gptq._factorize(indefinite, 0.02).failed
    assert gptq._factorize(indefinite - 100 * torch.eye(32), 0.01).failed


def test_a_channel_that_was_always_zero_keeps_its_weights() -> None:
    inputs, module = tokens(), linear()
    inputs[:, 5] = 0
    before = module.weight.data[:, 5].clone().float()
    run(StreamingGPTQModifier(), [module], [inputs])
    assert (module.weight.data[:, 5].float() - before).abs().max() < 0.3 * module.weight.data.abs().max()
    assert module.weight.data[:, 5].abs().sum() > 0
