"""Kernels: every level gives the bytes of compressed-tensors' own quantize and pack (float32) for the same scales."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from torch.overrides import TorchFunctionMode

from calibration.checkpoint import kernels, native, nvfp4
from calibration.checkpoint.dequantize import StoredFormat, dequantize
from calibration.checkpoint.kernels import NotFinite, Stripe
from calibration.plan.schemes import NVFP4A16
from tests.models.storage import to_mxfp4, to_tiles
from tests.reference.compressed_tensors import of_compressed_tensors

TILE = (128, 128)
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}


class DividesAsCuda(TorchFunctionMode):
    """Division by a number or by a scalar on the processor as CUDA does it (ATen's BinaryDivTrueKernel.cu): times the
    reciprocal, up to 1 ulp off. Code that is right under it divides by tensors of the same device alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.div, torch.Tensor.div, torch.Tensor.__truediv__) and isinstance(args[1], float | int):
            return args[0] * (1 / torch.tensor(args[1], dtype=torch.float32))
        return func(*args, **(kwargs or {}))


ON_CPU = [name for name in native.levels() if name != "cuda"]


@pytest.fixture(params=[*ON_CPU, "cuda on the CPU", pytest.param("cuda", marks=pytest.mark.gpu)])
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every level; what level cuda does runs on the CPU too, without a GPU."""
    if request.param == "cuda on the CPU":
        with native.use("cuda", device="cpu"):
            yield
    else:
        with native.use(request.param):
            yield


def fp8_stripe(codes: torch.Tensor, grid: torch.Tensor) -> Stripe:
    stored = StoredFormat("fp8_tiles", tuple(codes.shape), {"tile_scale": "s"}, TILE)
    return Stripe(stored, "F8_E4M3", codes.view(torch.uint8).numpy(), grid.to(torch.float32).numpy())


def plain_stripe(weight: torch.Tensor) -> Stripe:
    raw = weight.contiguous().view(torch.uint8).numpy()
    return Stripe(StoredFormat("plain", tuple(weight.shape)), NAMES[weight.dtype], raw)


def mxfp4_stripe(codes: torch.Tensor, scales: torch.Tensor) -> Stripe:
    stored = StoredFormat("mxfp4", (codes.shape[0], codes.shape[1] * 2), {"group_scale": "s"})
    return Stripe(stored, "I8", codes.view(torch.uint8).numpy(), scales.view(torch.uint8).numpy())


def quantized(stripe: Stripe, scale: np.float32 | None = None) -> tuple[np.ndarray, np.ndarray, np.float32]:
    packed = np.full((stripe.rows, stripe.columns // 2), 0xAA, np.uint8)
    scales = np.full((stripe.rows, stripe.columns // 16), 0xAA, np.uint8)
    largest = kernels.amax(stripe)
    scale = kernels.global_scale(largest) if scale is None else scale
    kernels.quantize(stripe, scale, packed, scales)
    return packed, scales, scale


def assert_same(stripe: Stripe, weight: torch.Tensor, scale: float | None = None) -> None:
    given = None if scale is None else torch.tensor([scale], dtype=torch.float32)
    packed, scales, used = quantized(stripe, None if scale is None else np.float32(scale))
    wanted = of_compressed_tensors(weight, given)
    assert torch.equal(torch.tensor(used), wanted[2][0])
    assert np.array_equal(scales, wanted[1].numpy())
    assert np.array_equal(packed, wanted[0].numpy())


def random(rows: int, columns: int, std: float = 0.02) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * std


def test_the_compiled_levels_are_there_where_a_compiler_is() -> None:
    assert "torch" in native.levels()
    if shutil.which("cc"):
        assert "portable" in native.levels(), "not built: run pip install -e . again"


def test_without_the_compiled_module_torch_does_the_work() -> None:
    code = (
        "import sys; sys.modules['calibration.checkpoint._kernels'] = None\n"
        "import torch; from calibration.checkpoint import native, nvfp4\n"
        "assert native.levels()[0] == 'torch' and not set(native.levels()) & set(native.LEVELS), native.levels()\n"
        "print(nvfp4.pack(torch.eye(16), torch.ones(16, 1), torch.ones(1))[0].sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == nvfp4.pack(torch.eye(16), torch.ones(16, 1), torch.ones(1))[0].sum().item()


def test_a_module_of_older_sources_is_told_and_not_used() -> None:
    code = (
        "import sys, types, _ctypes; old = types.ModuleType('old'); old.__file__ = _ctypes.__file__\n"
        "sys.modules['calibration.checkpoint._kernels'] = old\n"
        "from calibration.checkpoint import native; print(native.levels())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not any(level in done.stdout for level in native.LEVELS)
    assert "built from older sources" in done.stderr and "make venv" in done.stderr


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(576, 528), (128, 4224), (1, 16), (130, 272), (256, 1088)])
def test_fp8_tiles(level: None, shape: tuple[int, int], scales: torch.dtype) -> None:
    codes, grid = to_tiles(random(*shape), scales)
    assert grid.shape[0] == (5 if shape[0] == 576 else -(-shape[0] // 128))
    stripe = fp8_stripe(codes, grid)
    assert_same(stripe, dequantize(stripe.stored, codes, {"tile_scale": grid}, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_dtypes(level: None, dtype: torch.dtype) -> None:
    weight = random(67, 336).to(dtype)
    assert_same(plain_stripe(weight), weight)


def test_mxfp4_again(level: None) -> None:
    codes, scales = to_mxfp4(random(96, 320))
    stripe = mxfp4_stripe(codes, scales)
    assert_same(stripe, dequantize(stripe.stored, codes, {"group_scale": scales}, torch.float32))


@pytest.mark.parametrize("exponent", [-149, -140, -135, -127, -120, -60, -9, 0, 40, 100, 117])
@pytest.mark.parametrize("factor", [1.0, 1.3, 0.077])
def test_every_fp8_byte_under_scales_from_subnormal_to_huge(level: None, exponent: int, factor: float) -> None:
    """Each group holds one maximum and walks through the bytes, so that every threshold of every maximum is met."""
    scale = torch.tensor(2.0**exponent).mul(factor).clamp_min(2.0**-149)
    magnitudes = torch.arange(0x7F, dtype=torch.uint8)
    rows = torch.stack([torch.minimum(magnitudes, m).repeat_interleave(2) for m in magnitudes])
    rows[:, 1::2] |= 0x80
    # Sixteen bytes a group: the row's maximum and fifteen of its bytes, so that every group has that maximum.
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 15)).reshape(len(rows), -1, 15)
    groups = torch.cat([magnitudes[:, None, None].expand(-1, padded.shape[1], 1), padded], -1).flatten(1)
    codes = groups.contiguous().view(torch.float8_e4m3fn)
    grid = scale.expand(-(-codes.shape[0] // 128), -(-codes.shape[1] // 128)).contiguous()
    stripe = fp8_stripe(codes, grid)
    weight = dequantize(stripe.stored, codes, {"tile_scale": grid}, torch.float32)
    assert_same(stripe, weight)
    for global_scale in (1.0, 2.0**-30, 3.7e5):
        largest = float(weight.abs().max())
        if largest * global_scale <= 2688:
            assert_same(fp8_stripe(codes, grid), weight, global_scale)


def test_zero_groups_small_negatives_and_subnormal_scales(level: None) -> None:
    weight = random(8, 64)
    weight[0, :16] = 0.0
    weight[1, 16:32] = -0.0
    weight[2, 32:48] = -1e-30
    weight[3, :16] *= 2e-5
    weight[4, :16] = 1e-42
    packed, scales, _ = quantized(plain_stripe(weight))
    assert_same(plain_stripe(weight), weight)
    assert scales[0, 0] == scales[2, 2] == scales[4, 0] == 0x20, "0.125 in place of a scale of zero"
    assert not packed[0, :8].any() and not packed[1, 8:16].any(), "-0 is code 0"
    assert (packed[2, 16:24] == 0x88).all(), "a negative that rounds to zero keeps its sign"
    assert 0 < scales[3, 0] < 8, "a subnormal E4M3 scale"
    assert_same(plain_stripe(torch.zeros(4, 32)), torch.zeros(4, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused(level: None, dtype: torch.dtype, value: float) -> None:
    weight = torch.ones(128, 48)
    weight[77, 47] = value
    stored = weight.to(dtype)
    if dtype == torch.float8_e4m3fn:
        stored.view(torch.uint8)[77, 47] = 0xFF
        stripe = fp8_stripe(stored, torch.ones(1, 1))
    else:
        stripe = plain_stripe(stored)
    with pytest.raises(NotFinite, match="NaN or Inf"):
        kernels.amax(stripe)
    assert not kernels.finite(NAMES[dtype], stripe.codes.reshape(-1))
    stored.view(torch.uint8)[77, -1 if stored.itemsize == 1 else -stored.itemsize :] = 0
    assert kernels.finite(NAMES[dtype], stripe.codes.reshape(-1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 1e38])
def test_bad_tile_scales_are_refused(level: None, bad: float) -> None:
    codes, grid = to_tiles(random(256, 256), torch.float32)
    grid[1, 1] = bad
    with pytest.raises(NotFinite):
        kernels.amax(fp8_stripe(codes, grid))


def test_nan_among_mxfp4_scales_is_refused(level: None) -> None:
    codes, scales = to_mxfp4(random(4, 64))
    scales.view(torch.uint8)[2, 1] = 0xFF
    with pytest.raises(NotFinite, match="NaN"):
        kernels.exponents(mxfp4_stripe(codes, scales))


@pytest.mark.parametrize("spread", [0, 5, 17, 18])
def test_mxfp4_respelled_has_the_same_values_bit_for_bit(level: None, spread: int) -> None:
    codes, scales = to_mxfp4(random(32, 128))
    raw = scales.view(torch.uint8)
    raw[:] = 110
    raw[3, 1] = 110 - spread
    codes[5, 16:32] = 0
    raw[5, 1] = 0  # a group of zeros: its scale must not count
    codes[6, :16] = -0x78  # codes of minus zero keep their sign
    stripe = mxfp4_stripe(codes, scales)
    span = kernels.exponents(stripe)
    assert span == (110 - spread - 127, 110 - 127)
    scale = kernels.lossless_scale(*span)
    if spread > 17:
        assert scale is None, "E4M3 holds the powers of two 2^-9 ... 2^8"
        return
    packed, group = np.zeros((32, 64), np.uint8), np.zeros((32, 8), np.uint8)
    kernels.respell(stripe, scale, packed, group)
    before = dequantize(stripe.stored, codes, {"group_scale": scales}, torch.float32)
    spelled = torch.from_numpy(group).view(torch.float8_e4m3fn)
    after = nvfp4.dequantize(torch.from_numpy(packed), spelled, torch.tensor([scale]))
    assert torch.equal(before.view(torch.int32), after.view(torch.int32))
    assert bool((spelled.to(torch.float32) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_with_given_scales_is_the_same_at_every_level(level: None, dtype: torch.dtype) -> None:
    weight = random(65, 96).to(dtype)
    scale = (torch.rand(65, 6) * 300 + 1).to(torch.float8_e4m3fn)
    glob = torch.tensor([12345.6])
    packed, error = nvfp4.pack(weight, scale, glob)
    with native.use("torch"):
        wanted, wanted_error = nvfp4.pack(weight, scale, glob)
    assert torch.equal(packed, wanted) and error == pytest.approx(wanted_error, rel=1e-5)
    values = ct_quantize(weight.float(), scale.float(), None, QuantizationArgs(**NVFP4A16.weights), global_scale=glob)
    assert torch.equal(packed, pack_fp4_to_uint8(values))
    assert torch.equal(nvfp4.pack(weight.t().contiguous().t(), scale, glob)[0], wanted)


def test_every_16_bit_float_and_every_tie(level: None) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(2**16).to(torch.int16)[
            torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
        ]
        weight = patterns.view(dtype).where(patterns.view(dtype).isfinite(), 0).reshape(-1, 64)
        assert_same(plain_stripe(weight), weight)
        ties = torch.arange(-28, 28).repeat(64).reshape(-1, 64).to(dtype) / 4
        scale, glob = torch.ones(len(ties), 4).to(torch.float8_e4m3fn), torch.ones(1)
        values = ct_quantize(ties.float(), scale.float(), None, QuantizationArgs(**NVFP4A16.weights), global_scale=glob)
        assert torch.equal(nvfp4.pack(ties, scale, glob)[0], pack_fp4_to_uint8(values))


def test_the_cuda_path_divides_exactly_where_cuda_would_multiply_by_a_reciprocal() -> None:
    # Found by search: the last bit of largest / 6 decides the scale's code.
    scale = np.float32(648.07177734375)
    weight = torch.tensor([2.518239736557007, 0.2684887945652008, 2.8145029544830322])[:, None].repeat(1, 16)
    with native.use("cuda", device="cpu"), DividesAsCuda():
        packed, scales, _ = quantized(plain_stripe(weight), scale)
    wanted = of_compressed_tensors(weight, torch.tensor([scale]))
    assert np.array_equal(scales, wanted[1].numpy()) and np.array_equal(packed, wanted[0].numpy())


def test_levels_that_do_not_run_here_are_refused() -> None:
    with pytest.raises(ValueError, match="does not run here"), native.use("abacus"):
        pass


@pytest.mark.parametrize("shape", [(256, 256), (160, 192), (130, 64)])
def test_fp8_tiles_to_bf16(level: str, shape: tuple[int, int]) -> None:
    """All 254 finite codes, subnormals too, times scales from tiny to huge; ragged tiles; NaN stays NaN."""
    codes = torch.arange(shape[0] * shape[1]).remainder(256).to(torch.uint8).reshape(shape)
    grid = torch.logspace(-30, 30, -(-shape[0] // 128) * -(-shape[1] // 128)).reshape(-(-shape[0] // 128), -1)
    stored, tensor = StoredFormat("fp8_tiles", shape, {}, TILE), codes.view(torch.float8_e4m3fn)
    tiles = grid.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    wanted = (tensor.to(torch.float32) * tiles).to(torch.bfloat16)
    found = dequantize(stored, tensor, {"tile_scale": grid}, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and torch.equal(torch.isnan(found), (codes & 0x7F) == 0x7F)
    assert torch.equal(found.nan_to_num(0.5).view(torch.int16), wanted.nan_to_num(0.5).view(torch.int16))


def test_mxfp4_to_bf16(level: str) -> None:
    """Every code under every E8M0 scale, into memory of the caller."""
    codes = torch.arange(256 * 16).remainder(251).to(torch.uint8).reshape(256, 16)
    scales = torch.arange(256, dtype=torch.uint8).reshape(256, 1).view(torch.float8_e8m0fnu)
    out = torch.empty(256, 32, dtype=torch.bfloat16)
    stored = StoredFormat("mxfp4", (256, 32), {})
    found = dequantize(stored, codes.view(torch.int8), {"group_scale": scales}, torch.bfloat16, out)
    wanted = (nvfp4.unpack(codes) * scales.to(torch.float32)).to(torch.bfloat16)
    assert found is out and bool(torch.isnan(found[255]).all())
    assert torch.equal(found[:255].view(torch.int16), wanted[:255].view(torch.int16))
