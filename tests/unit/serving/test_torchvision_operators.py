"""When torchvision's operators are not declared. The real torchvision: tests/integration/test_torchvision.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from verify.inside_vllm import torchvision_operators


def installed(place: Path, monkeypatch: pytest.MonkeyPatch, compiled: bytes | None) -> None:
    """A package torchvision whose compiled part has these bytes."""
    package = place / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    if compiled is not None:
        (package / "_C.so").write_bytes(compiled)
    monkeypatch.syspath_prepend(place)


@pytest.mark.parametrize("compiled", [None, b"no library"])
def test_a_compiled_part_that_fails_otherwise_is_left_to_torchvision(
    compiled: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, compiled)
    assert torchvision_operators.declare() == []
    assert not hasattr(torch.ops.torchvision, "nms")


def test_nothing_is_declared_without_torchvision() -> None:
    assert torchvision_operators.declare() == []
    assert not hasattr(torch.ops.torchvision, "nms")
