"""The reference's own arithmetic against tables written out by hand and against compressed-tensors."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

from tests.reference import nvfp4


def test_every_tie_goes_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(nvfp4.e2m1_round(ties), even)
    assert torch.equal(nvfp4.e2m1_round(-ties), -even)
    assert torch.equal(nvfp4.e2m1_round(torch.tensor([7.0, 6.1, -100.0])), torch.tensor([6.0, 6.0, -6.0]))


def test_rounding_agrees_with_compressed_tensors() -> None:
    v = torch.linspace(-6, 6, 24001)
    assert torch.equal(nvfp4.e2m1_round(v) + 0.0, cast_to_fp4(v.clone()) + 0.0)


def test_low_nibble_is_the_first_element() -> None:
    packed = torch.tensor([[0x21, 0x93, 0, 0, 0, 0, 0, 0x7F]], dtype=torch.uint8)
    scale = torch.tensor([[2.0]]).to(torch.float8_e4m3fn)
    weight = nvfp4.dequantize(packed, scale, torch.tensor([4.0]))
    assert weight[0, :4].tolist() == [0.25, 0.5, 0.75, -0.25]
    assert weight[0, -2:].tolist() == [-3.0, 3.0]


def test_quantize_and_dequantize_are_inverse_on_representable_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 64), generator=generator)
    codes[:, ::16] = 7  # every group holds a 6, which fixes its scale
    values = torch.where(codes >= 8, -nvfp4.E2M1[codes & 7], nvfp4.E2M1[codes & 7]) * 0.5
    divisor = torch.tensor([448.0])
    packed, scale = nvfp4.quantize(values, divisor)
    assert torch.equal(nvfp4.dequantize(packed, scale, divisor), values)
    unpacked = unpack_fp4_from_uint8(packed, 8, 64, torch.float32)
    assert torch.equal(unpacked.double() * 0.5 + 0.0, values + 0.0)


def test_activations_that_are_zero_stay_zero() -> None:
    x = torch.zeros(2, 32)
    x[0, 0] = 1e-12  # a group scale that underflows
    assert torch.equal(nvfp4.fake_quantize(x, torch.tensor([100.0])), torch.zeros(2, 32, dtype=torch.float64))
