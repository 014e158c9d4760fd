"""Presents a checkpoint in NVIDIA's dialect as one in compressed-tensors' dialect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from calibration.checkpoint.dialect import COMPRESSED_TENSORS, NVIDIA, inverse
from calibration.checkpoint.header import TensorHeader
from calibration.checkpoint.index import Checkpoint


class _Respelled(Checkpoint):
    """A checkpoint under other tensor names. `inverted` names the tensors whose values are the inverse of the stored
    float32."""

    def __init__(self, stored: Checkpoint, tensors: dict[str, TensorHeader], inverted: frozenset[str]) -> None:
        super().__init__(stored.directory, stored.config, tensors, stored.shards, stored.state)
        self.inverted = inverted

    def _fill(self, name: str, target: memoryview, offset: int = 0) -> None:
        super()._fill(name, target, offset)
        if name in self.inverted:
            target[:] = memoryview(inverse(np.frombuffer(target, np.float32)[0]).tobytes())


def as_compressed_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with NVIDIA's NVFP4 weights under compressed-tensors' names and their global scales inverted on
    reading; the same object if it has no such weights. Files, config and every other tensor are unchanged."""
    tensors, inverted = dict[str, TensorHeader](), set[str]()
    for name, header in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        spelled = name
        if f"{module}.{NVIDIA.global_scale}" in checkpoint.tensors:
            role = next((r for r in ("packed", "global_scale", "input_scale") if getattr(NVIDIA, r) == leaf), None)
            if role is not None:
                spelled = f"{module}.{getattr(COMPRESSED_TENSORS, role)}"
                header = replace(header, name=spelled)
            if role in ("global_scale", "input_scale") and header.dtype == "F32" and header.numel == 1:
                header = replace(header, shape=COMPRESSED_TENSORS.scalar)
                inverted.add(spelled)
        tensors[spelled] = header
    return _Respelled(checkpoint, tensors, frozenset(inverted)) if inverted else checkpoint
