"""Whether all values of a tensor are finite is found from two of them, for every stored dtype."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calibration.checkpoint.dequantize import is_finite, is_positive


class Operations(TorchDispatchMode):
    """The names of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))  # type: ignore[operator, dict-item]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_one_bad_value_shows_wherever_it_is(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    good = torch.tensor([[largest, 0.5], [-1.0, -largest]], dtype=torch.float64)
    assert is_finite(good.to(dtype)) and is_positive(good.abs().to(dtype))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in range(4):
            spoiled = good.clone()
            spoiled.view(-1)[place] = bad
            wanted = bool(torch.isfinite(spoiled.to(dtype).to(torch.float64)).all())  # E4M3 has no Inf
            assert is_finite(spoiled.to(dtype)) == wanted
            assert not is_positive(spoiled.to(dtype))
    assert not is_positive(torch.tensor([1.0, 0.0], dtype=dtype))


def test_a_small_tensor_takes_one_operation_and_two_numbers() -> None:
    with Operations() as seen:
        assert is_finite(torch.ones(8, dtype=torch.bfloat16))
    assert [name for name in seen.names if "ones" not in name] == [
        "aten.aminmax.default",
        *["aten._local_scalar_dense.default"] * 2,
    ]
