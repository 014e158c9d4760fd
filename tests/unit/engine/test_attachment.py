"""What quantizes a block is there while the block is in memory, and nothing of it afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, quant_metadata
from compressed_tensors.quantization.lifecycle import initialize
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.observers import Observer
from torch import nn

from calibration.engine.attachment import BlockQuantizationModifier


class Block(nn.Module):
    """A pair that is fused, under names that llm-compressor does not know, and a layer that is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = (nn.Linear(32, 16, bias=False, device="meta") for _ in range(3))


def modifier(*blocks: Block) -> BlockQuantizationModifier:
    made = BlockQuantizationModifier(targets=["Linear"], scheme="NVFP4")
    modules = [module for block in blocks for module in (block.one, block.two)]
    made.choose(dict.fromkeys(modules, "group_0"), [(block.one, block.two) for block in blocks])
    return made


def test_only_the_block_at_work_has_scales_observers_and_hooks() -> None:
    first, second = Block(), Block()
    plain = {name: set(vars(module)) for name, module in first.named_modules()}
    quantization = modifier(first, second)
    assert quantization.quantizes(first.one) and not quantization.quantizes(first.other)
    quantization.attach([first])
    assert [is_module_quantized(module) for module in (first.one, first.two, first.other, second.one)] == [1, 1, 0, 0]
    assert set(dict(first.one.named_parameters())) == {
        "weight", "weight_scale", "weight_global_scale", "input_global_scale"
    }  # fmt: skip
    assert "forward" not in vars(first.one) and len(first.one._forward_pre_hooks) == 1
    observers = [weakref.ref(module) for module in first.modules() if isinstance(module, Observer)]
    assert len(observers) == 4
    gc.disable()
    try:
        quantization.detach()
        assert [observer() for observer in observers] == [None] * 4  # without the garbage collector
    finally:
        gc.enable()
    left = {name: set(vars(module)) - {"quantization_enabled"} for name, module in first.named_modules()}
    assert left == plain and not first.one._forward_pre_hooks
    assert set(dict(first.named_parameters())) == {"one.weight", "two.weight", "other.weight"}


def test_scales_come_and_go_without_the_contexts_of_offloading(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for modules of an offloaded model, and cost a third of attaching a block of a thousand modules."""

    def refuse() -> None:
        raise AssertionError

    monkeypatch.setattr(quant_metadata, "disable_onloading", refuse)
    monkeypatch.setattr(initialize, "set_forward_quantized", lambda _: refuse())
    block = Block()
    made = BlockQuantizationModifier(targets=["Linear"], scheme="W4A16_ASYM")
    made.choose({block.one: "group_0"}, [])
    for module in (block.one, block.two):
        initialize.initialize_qparams(
            module, "output", QuantizationArgs(), (16,), torch.bfloat16
        )  # of an earlier scheme
    made.attach([block])
    assert set(dict(block.one.named_parameters())) == {"weight", "weight_scale", "weight_zero_point"}
    made.detach()
    assert [name for name, _ in block.one.named_parameters()] == ["weight"]
    assert [name for name, _ in block.two.named_parameters()] == ["weight", "output_scale", "output_zero_point"]


def test_a_fused_group_finds_one_global_scale() -> None:
    block = Block()
    for number, module in enumerate((block.one, block.two, block.other)):
        module.weight = nn.Parameter(torch.full((16, 32), 1.0 + number), requires_grad=False)
    modifier(block).attach([block])
    scales = []
    for module in (block.one, block.two):
        observer = module.weight_observer
        assert isinstance(observer, Observer)
        scales.append(float(observer(module.weight).get_global_scale()))
    assert scales == [448 * 6 / 2] * 2


def test_a_forward_that_was_replaced_stays_so() -> None:
    block = Block()
    replaced = block.one.forward = lambda value: value
    quantization = modifier(block)
    quantization.attach([block])
    assert block.one.forward is replaced
    quantization.detach()
    assert block.one.forward is replaced
