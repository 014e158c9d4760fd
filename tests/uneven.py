"""Linear layers whose bits depend on the number of rows, as on AMX processors and GPUs, forced on any machine.

`UNEVEN_PRODUCTS=1 pytest ...` runs a whole suite so, with the processes that its tests start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from compressed_tensors.utils import patch_attr

from calibration.model.parity import BF16_STEP

ASKED = "UNEVEN_PRODUCTS"
#: How far input global scales may be apart where only the last bits of products differ: what enters a down projection is
#: the product of two products, each of which BF16 rounds.
ROUNDED = 3 * BF16_STEP
even_linear = F.linear


def uneven_linear(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A BF16 product whose float32 sums are off by up to 2^-11, as the number of rows says: one value in about 16
    comes out one BF16 rounding away."""
    rows = value.numel() // value.shape[-1]
    if value.dtype != torch.bfloat16 or value.device.type != "cpu":
        return even_linear(value, weight, bias)
    made = (even_linear(value.float(), weight.float()) * (1 + rows // 16 % 3 * 2.0**-12)).to(value.dtype)
    return made if bias is None else made + bias


@contextmanager
def uneven_products() -> Iterator[None]:
    """Linear layers inside are uneven."""
    with patch_attr(F, "linear", uneven_linear):
        yield


def install_if_asked() -> None:
    """For good, in this process, if the environment asks for it."""
    if os.environ.get(ASKED):
        F.linear = uneven_linear
