"""The faster search for extremes gives what llm-compressor's own does, for every way a tensor is observed."""

from __future__ import annotations

import pytest
import torch
from llmcompressor.observers import min_max

from calibration.checkpoint import native
from calibration.engine.observers import _extremes, fast_extremes, row_extremes

STOCK = min_max._get_min_max


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    made.view(-1)[:: made.numel() // 3] = torch.tensor([-7.0, 9.0, 0.0, -0.0], dtype=dtype)[
        : len(made.view(-1)[:: made.numel() // 3])
    ]
    return made


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 16), (24, 6, 16), (1, 24, 6, 16), (3, 2, 6, 16), (1, 5, 7), (1, 1, 640)])
def test_extremes_equal_stock(level: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if level == "cuda":
        pytest.skip("the extremes of tensors on a GPU are torch's own")
    for observed in (
        values(*shape, dtype=dtype),
        values(*shape, dtype=dtype).abs().neg(),
        torch.zeros(shape, dtype=dtype),
    ):
        wanted = STOCK(observed)
        with native.use(level), fast_extremes():
            found = min_max._get_min_max(observed)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)
    assert min_max._get_min_max is STOCK


@pytest.mark.skipif(not native.compiled(), reason="no compiled kernels here")
def test_weights_take_the_compiled_way_only_where_it_fits() -> None:
    """Groups of 16 beside each other in memory; everything else is left to torch."""
    weight = values(1, 24, 6, 16)
    assert _extremes(weight) is not None
    assert _extremes(values(1, 24, 6, 32)) is None
    assert _extremes(weight.transpose(1, 2)) is None
    assert _extremes(weight.to(torch.float64)) is None


@pytest.mark.parametrize("level", native.levels())
def test_nan_is_not_lost(level: str) -> None:
    if level == "cuda":
        pytest.skip("the extremes of tensors on a GPU are torch's own")
    for shape in ((96, 16), (24, 6, 16), (1, 24, 6, 16)):
        observed = values(*shape)
        observed.view(-1)[77] = torch.nan
        with native.use(level), fast_extremes():
            low, high = min_max._get_min_max(observed)
        assert bool(torch.isnan(low).any() | torch.isnan(high).any())


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("shape", [(24, 96), (24, 40), (1, 16), (3, 2048)])
def test_extremes_of_rows_are_torchs(level: str, shape: tuple[int, int]) -> None:
    if level == "cuda":
        pytest.skip("the extremes of tensors on a GPU are torch's own")
    for observed in (values(*shape), values(2 * shape[0], shape[1])[::2], values(*shape, dtype=torch.float32)):
        with native.use(level):
            low, high = row_extremes(observed)
        assert torch.equal(low, observed.amin(1)) and torch.equal(high, observed.amax(1))
