"""Group scales by the error they leave, against every candidate tried with the packing that writes the bytes."""

from __future__ import annotations

import pytest
import torch

from calibration.checkpoint import nvfp4
from calibration.checkpoint.nvfp4 import GROUP, RANGE
from calibration.checkpoint.scale_search import NEIGHBORS, search_group_scales

ROWS, COLUMNS = 24, 128


@pytest.fixture
def weight() -> torch.Tensor:
    made = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    made[3, :GROUP] = 0  # a group of zeros
    made[4, :GROUP] *= 1e-7  # far below the smallest normal group scale
    made[5, GROUP - 1] = 0.4  # the largest group, an outlier in it
    return made.to(torch.bfloat16)


def global_scale(weight: torch.Tensor, room: float = 1.5) -> torch.Tensor:
    return (RANGE / (room * weight.abs().amax().float())).reshape(1)


def nearest(weight: torch.Tensor, glob: torch.Tensor) -> torch.Tensor:
    """E4M3 codes of amax / 6."""
    largest = weight.float().view(ROWS, -1, GROUP).abs().amax(-1)
    return (glob * (largest / 6)).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).int()


def errors(weight: torch.Tensor, codes: torch.Tensor, glob: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of every group, of the packed bytes, in float64."""
    scales = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    packed, _ = nvfp4.pack(weight, scales, glob)
    difference = (nvfp4.dequantize(packed, scales, glob) - weight.float()).double()
    return (difference.square() * importance).view(ROWS, -1, GROUP).sum(-1)


@pytest.mark.parametrize("neighbors", [NEIGHBORS, (0, 5)])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_packed_bytes_have_the_least_weighted_error_of_all_candidates(
    weight: torch.Tensor, weighted: bool, neighbors: tuple[int, ...]
) -> None:
    glob = global_scale(weight)
    importance = (
        torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else torch.ones(COLUMNS)
    )
    found = search_group_scales(weight, importance if weighted else None, glob, neighbors)
    mine = errors(weight, found.view(torch.uint8).int(), glob, importance.double())
    base = nearest(weight, glob)
    tried = torch.stack([errors(weight, (base + n).clamp(1, 126), glob, importance.double()) for n in neighbors])
    normal = base >= 8
    assert torch.allclose(mine[normal], tried.amin(0)[normal], rtol=1e-5, atol=0)
    assert mine[normal].sum() < 0.95 * tried[0][normal].sum()


def test_importance_decides_between_two_weights_of_a_group() -> None:
    """Under amax / 6 the small weight is rounded badly, under amax / 4 the large one: who counts more gets the scale."""
    weight = torch.zeros(1, GROUP)
    weight[0, 0], weight[0, 1] = 6.0, 2.5  # 2.5 lies between 2 and 3; under 7.5 / 6 it is 2, and 6 is 4.8
    glob = torch.tensor([32.0])
    large, small = torch.zeros(GROUP), torch.zeros(GROUP)
    large[0], small[1] = 1.0, 1.0
    scales = [search_group_scales(weight, importance, glob).float() / glob for importance in (large, small)]
    assert scales[0].item() == 1.0
    assert scales[1].item() in (0.8125, 1.25)


def test_groups_without_a_choice_keep_their_scale(weight: torch.Tensor) -> None:
    glob = global_scale(weight)
    found = search_group_scales(weight, None, glob).view(torch.uint8).int()
    assert found[3, 0] == 1 and found[4, 0] == nearest(weight, glob)[4, 0].clamp_min(1)


def test_no_importance_at_all_is_no_error(weight: torch.Tensor) -> None:
    glob = global_scale(weight)
    found = search_group_scales(weight, torch.zeros(COLUMNS), glob).view(torch.uint8).int()
    assert torch.equal(found, nearest(weight, glob).clamp_min(1))


def test_rows_may_be_searched_in_any_parts(weight: torch.Tensor) -> None:
    glob, importance = global_scale(weight), torch.rand(COLUMNS)
    whole = search_group_scales(weight, importance, glob).view(torch.uint8)
    parts = [search_group_scales(part, importance, glob).view(torch.uint8) for part in weight.split(5)]
    assert torch.equal(whole, torch.cat(parts))
