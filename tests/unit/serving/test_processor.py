"""What vLLM is told of the CPU: no processor that cannot exist, and no AMX in float32."""

from __future__ import annotations

import pytest
import torch

from verify.inside_vllm.processor import PROBES, set_features

ALL, NO_AMX = set(PROBES), {"avx512", "avx512_bf16"}


@pytest.mark.parametrize(
    ("has", "pretended", "dtype", "told"),
    [
        (ALL - {"amx_fp16"}, {}, "bfloat16", ["yes", "yes", "yes", "no"]),
        (ALL, {}, "float32", ["yes", "yes", "hidden", "hidden"]),
        (ALL, {"amx": False}, "bfloat16", ["yes", "yes", "hidden", "hidden"]),
        (ALL, {"avx512": False}, "bfloat16", ["hidden"] * 4),
        (ALL, {"avx512_bf16": False}, "bfloat16", ["yes", "hidden", "hidden", "hidden"]),
        (NO_AMX, {"amx": True}, "bfloat16", ["yes", "yes", "claimed", "no"]),
        (NO_AMX, {"amx": True}, "float32", ["yes", "yes", "hidden", "no"]),
        (set[str](), {}, "bfloat16", ["no"] * 4),
        ({"avx512", "amx"}, {}, "bfloat16", ["yes", "no", "hidden", "no"]),
    ],
)
def test_answers(
    monkeypatch: pytest.MonkeyPatch, has: set[str], pretended: dict[str, bool], dtype: str, told: list[str]
) -> None:
    for feature, probe in PROBES.items():
        monkeypatch.setattr(torch.cpu, probe, lambda feature=feature: feature in has)
    assert set_features(pretended, dtype) == dict(zip(PROBES, told, strict=True))
    assert [getattr(torch.cpu, probe)() for probe in PROBES.values()] == [word in ("yes", "claimed") for word in told]


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(ValueError, match="sse5"):
        set_features({"sse5": True}, "float32")
