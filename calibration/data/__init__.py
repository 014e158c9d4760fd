"""Reads calibration data in the forms people have it, and turns it into batches of token ids.

A script needs `from calibration.data import load_batches, load_tokenizer`. They come when they are asked for, because they
import torch and transformers.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("load_batches", "load_tokenizer"):
        return getattr(importlib.import_module("calibration.data.batches"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
