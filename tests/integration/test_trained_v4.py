"""The trained tiny DeepSeek-V4 of the benchmarks: what two steps make of the random one."""

from __future__ import annotations

from pathlib import Path

import torch

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from tests.models import deepseek_v4, trained_v4


def test_training_is_repeatable_and_writes_every_tensor_of_the_random_one(tmp_path: Path) -> None:
    lines: list[str] = []
    weights, again = (trained_v4.train(2, rows=1, length=32, report=lines.append) for _ in range(2))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    assert len(lines) == 4 and lines[1].startswith("step 2: loss")
    random = Checkpoint.open(deepseek_v4.write(tmp_path / "random", "fp8_mxfp4", seed=trained_v4.SEED))
    trained = Checkpoint.open(trained_v4.write(tmp_path / "trained", "fp8_mxfp4", weights))
    assert {name: (t.dtype, t.shape) for name, t in trained.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in random.tensors.items()
    }
    before, after = Formats(random), Formats(trained)
    for name in ("layers.2.ffn.experts.5.w2.weight", "layers.1.attn.wq_a.weight", "head.weight"):
        assert not torch.equal(before.read(name), after.read(name)), name
    mtp, table = "mtp.0.ffn.shared_experts.w1.weight", "layers.0.ffn.gate.tid2eid"
    assert torch.equal(before.read(mtp), after.read(mtp)) and torch.equal(random.read(table), trained.read(table))
    training, held_out = trained_v4.texts()
    assert held_out and not set(training) & set(held_out)
