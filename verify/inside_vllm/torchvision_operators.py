"""Lets torchvision be imported beside a torch without CUDA if its compiled part was built for CUDA, as PyPI's wheel is.

vLLM's and transformers' classes of vision models import torchvision, and so does vLLM itself if it is installed. Without its
compiled part torchvision says that its operators are not there when one is called, but two of them (of 0.28) are given a fake
implementation while it is imported, and torch refuses that for operators that nobody declared.

Runs inside vLLM's interpreter: imports the standard library and torch only.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch
from torch import library

#: As torchvision/csrc/ops/nms.cpp and ops/quantized/cpu/qnms_kernel.cpp declare them.
OPERATORS = dict.fromkeys(("nms", "qnms"), "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
#: The part of torch that such a compiled part is linked against and that a torch without CUDA does not have.
_CUDA_LIBRARY = "libc10_cuda"


def declare() -> list[str]:
    """Declares OPERATORS without an implementation: torchvision and torch raise if one is called. Call before anything imports
    torchvision. Returns what is left out, for the report.

    Does nothing if there is no torchvision, or if its compiled part loads or fails for another reason (another release of
    torch, a missing library of the system): `import torchvision` then says so.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or not _needs_cuda(Path(spec.origin).with_name("_C.so")):
        return []
    for name, schema in OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"torchvision::{name}", schema)
    return ["torchvision's compiled part, which was built for CUDA, is left out: its operators raise"]


def _needs_cuda(compiled: Path) -> bool:
    """Whether the library does not load because it wants torch's CUDA part."""
    try:
        ctypes.CDLL(str(compiled))
    except OSError as error:
        return _CUDA_LIBRARY in str(error)
    return False
