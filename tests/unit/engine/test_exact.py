"""MXFP4 weights of a calibrated block: NVFP4 holds the source's very values, or says that they were requantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.engine.exact import ExactWeights
from calibration.engine.export import Exporter
from calibration.runs.finish import finish_output
from recipes.errors import SourceError
from tests.exported import calibrated, recipe, task_of
from tests.faults.editing import value
from tests.models import deepseek_v4

ROUTED = [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(deepseek_v4.write(tmp_path / "source", "fp8_mxfp4"))


def written(source: Path, output: Path, **sections: Any) -> tuple[Exporter, Formats, Formats]:
    """The exporter after block 1, and the formats of source and output."""
    task = task_of(recipe(source, output, ROUTED, **sections))
    plan, formats, exporter = task.plan, task.formats, Exporter(task)
    for block in plan.block_numbers:
        exporter.block(block, calibrated(plan, formats, block))
    exporter.rest({})
    finish_output(task, "source: x\n")
    return exporter, formats, Formats(Checkpoint.open(output))


def test_released_values_stay_bit_for_bit_under_calibrated_input_scales(source: Path, tmp_path: Path) -> None:
    exporter, theirs, ours = written(source, tmp_path / "out")
    assert exporter.exact and all(exporter.exact.values()) and set(exporter.errors.values()) == {0.0}
    for step in exporter.plan.quantized.values():
        packed = ours.checkpoint.read(f"{step.module}.weight_packed")
        assert torch.equal(packed, theirs.checkpoint.read(step.source).view(torch.uint8))
        assert torch.equal(
            ours.read(f"{step.module}.weight_packed", torch.float32), theirs.read(step.source, torch.float32)
        )
        assert f"{step.module}.input_global_scale" in ours.checkpoint.tensors
    for gate, up in ((f"layers.1.ffn.experts.{e}.w1", f"layers.1.ffn.experts.{e}.w3") for e in range(4)):
        scales = [ours.checkpoint.read(f"{module}.weight_global_scale") for module in (gate, up)]
        assert torch.equal(*scales)


def test_scales_too_far_apart_are_requantized_with_their_fused_partner(source: Path, tmp_path: Path) -> None:
    def widen(scales: torch.Tensor) -> torch.Tensor:
        raw = scales.view(torch.uint8).clone()
        raw[3, 0] -= 40
        return raw.view(scales.dtype)

    value("layers.1.ffn.experts.5.w3.scale", widen)(source)
    exporter, _, _ = written(source, tmp_path / "out")
    assert {name for name, exact in exporter.exact.items() if not exact} == {
        "layers.1.ffn.experts.5.w1",
        "layers.1.ffn.experts.5.w3",
    }


def test_finding_an_exact_scale_reads_the_scales_alone_unless_they_lie_far_apart(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = "layers.1.ffn.experts.5.w3"
    value(f"{far}.scale", lambda s: (s.view(torch.uint8) - 40 * (torch.arange(s.numel()) == 7).reshape(s.shape)).to(
        torch.uint8).view(s.dtype))(source)  # fmt: skip
    task = task_of(recipe(source, tmp_path / "out", ROUTED))
    read: list[str] = []
    original = Checkpoint.read

    def recorded(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return original(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "read", recorded)
    exact = ExactWeights(task)
    scales = [exact.scale(step) for step in task.plan.quantized.values()]
    assert scales.count(None) == 2 and len(read) == len(set(read)) + 1
    assert [name for name in read if name.endswith(".weight")] == [f"{far}.weight"]


@pytest.mark.parametrize(
    "sections",
    [
        {"export": {"mxfp4": "requantize"}},
        {"modifiers": [{"GPTQModifier": {"targets": ROUTED, "scheme": "NVFP4"}}]},
    ],
)
def test_what_is_asked_to_be_requantized_or_edited_is(source: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    task = task_of(recipe(source, tmp_path / "out", ROUTED, **sections))
    exact = ExactWeights(task)
    steps = list(task.plan.quantized.values())
    assert steps and all(exact.is_mxfp4(step) and exact.tensors(step) is None for step in steps)


def test_weights_in_other_formats_have_no_exact_form(source: Path, tmp_path: Path) -> None:
    task = task_of(recipe(source, tmp_path / "out"))
    exact = ExactWeights(task)
    shared = [step for step in task.plan.quantized.values() if "shared" in step.module]
    assert shared and not any(exact.is_mxfp4(step) for step in shared) and exact.scale(shared[0]) is None


def test_a_nan_among_the_scales_names_the_tensor(source: Path, tmp_path: Path) -> None:
    name = "layers.1.ffn.experts.5.w2"
    value(f"{name}.scale", lambda s: s.view(torch.uint8).clone().fill_(0xFF).view(s.dtype))(source)
    task = task_of(recipe(source, tmp_path / "out", ROUTED))
    with pytest.raises(SourceError, match=f"{name}.weight"):
        ExactWeights(task).tensors(task.plan.quantized[name])
