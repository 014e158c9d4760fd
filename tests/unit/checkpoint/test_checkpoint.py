"""Headers, index, stored formats, NVFP4 arithmetic: against the real libraries, and on damaged files."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from calibration.checkpoint import nvfp4
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.header import read_header
from calibration.checkpoint.index import INDEX_NAME, Checkpoint
from recipes.errors import SourceError
from tests.models import deepseek_v4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepseek_v4.write(tmp_path_factory.mktemp("source") / "v4", "fp8_mxfp4")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def test_headers_agree_with_the_library(source: Path) -> None:
    for path in source.glob("*.safetensors"):
        assert {n: h.shape for n, h in read_header(path).items()} == {
            n: tuple(t.shape) for n, t in load_file(path).items()
        }


def test_bytes_and_tensors_agree_with_the_library(source: Path) -> None:
    checkpoint = Checkpoint.open(source)
    for path in source.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert checkpoint.read_bytes(name) == raw
            assert checkpoint.read(name).reshape(-1).view(torch.uint8).numpy().tobytes() == raw


def damage(path: Path, edit: object) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    edit(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def shift(header: dict) -> None:
    first = sorted(header, key=lambda n: header[n].get("data_offsets", [0])[0])[3]
    header[first]["data_offsets"] = [n + 2 for n in header[first]["data_offsets"]]


def grow(header: dict) -> None:
    name = next(n for n in header if n != "__metadata__")
    header[name]["shape"] = [1, *header[name]["shape"], 2]


def test_damaged_shards_are_refused_by_name(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    for spoil, word in (
        (lambda: shard.write_bytes(whole[:-100]), "truncated"),
        (lambda: shard.write_bytes(whole[:5]), "not a whole safetensors file"),
        (lambda: shard.write_bytes(whole + b"x"), "longer than its header"),
        (lambda: shard.write_bytes(b"\xff" * 8 + whole[8:]), "not a whole safetensors file"),
        (lambda: shard.write_bytes(whole[:8] + b"}" + whole[9:]), "damaged"),
        (lambda: damage(shard, shift), "expected"),
        (lambda: damage(shard, grow), "takes"),
        (lambda: damage(shard, lambda h: h[next(n for n in h if n != "__metadata__")].update(dtype="F3")), "not known"),
    ):
        shard.write_bytes(whole)
        spoil()
        with pytest.raises(SourceError, match=word) as caught:
            Checkpoint.open(copy)
        assert shard.name in str(caught.value)
    shard.write_bytes(whole)
    Checkpoint.open(copy)


def test_every_missing_or_escaping_shard_is_named(copy: Path) -> None:
    index = json.loads((copy / INDEX_NAME).read_text())
    names = sorted(set(index["weight_map"].values()))
    (copy / names[0]).unlink()
    victim = next(t for t, s in index["weight_map"].items() if s == names[1])
    index["weight_map"][victim] = "../x.safetensors"
    (copy / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(SourceError) as caught:
        Checkpoint.open(copy)
    assert names[0] in str(caught.value) and "../x.safetensors" in str(caught.value)


def test_index_and_headers_must_agree(copy: Path) -> None:
    index = json.loads((copy / INDEX_NAME).read_text())
    names = sorted(set(index["weight_map"].values()))
    victim = next(t for t, s in index["weight_map"].items() if s == names[1])
    index["weight_map"][victim] = names[0]
    (copy / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(SourceError, match="the index promises"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("stored", ["fp8", "fp8_mxfp4"])
def test_dequantization_equals_transformers(stored: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(deepseek_v4.write(tmp_path / "v4", stored))
    formats, theirs, compared = Formats(checkpoint), Fp8Dequantize(None), set()
    for name in checkpoint.tensors:
        found = formats.of(name)
        if found.kind == "plain":
            continue
        weight, scale = checkpoint.read(name), checkpoint.read(next(iter(found.companions.values())))
        if found.kind == "fp8_tiles" and any(n % 128 and g > 1 for n, g in zip(weight.shape, scale.shape, strict=True)):
            continue  # transformers divides evenly by the scale grid (160 rows / 2) or refuses: not 128-row tiles
        expected = theirs._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
        assert torch.equal(formats.read(name), expected), name
        compared.add(found.kind)
    assert compared == ({"fp8_tiles"} if stored == "fp8" else {"fp8_tiles", "mxfp4"})


def test_odd_tile_edges() -> None:
    """576 rows in tiles of 128 have 5 scale rows; rows 512 to 575 take the fifth, not the quotient 576/5."""
    from calibration.checkpoint.dequantize import StoredFormat, dequantize

    weight = torch.ones(576, 130).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 11.0).reshape(5, 2)
    value = dequantize(
        StoredFormat("fp8_tiles", (576, 130), {}, (128, 128)), weight, {"tile_scale": scale}, torch.float32
    )
    assert value[511, 0] == 7 and value[512, 0] == 9 and value[575, 129] == 10 and value[575, 127] == 9


def test_a_wrong_scale_grid_is_refused(copy: Path) -> None:
    index = json.loads((copy / INDEX_NAME).read_text())["weight_map"]
    shard = copy / index["layers.0.attn.wq_b.scale"]
    tensors = load_file(shard)
    tensors["layers.0.attn.wq_b.scale"] = tensors["layers.0.attn.wq_b.scale"][:-1].clone()
    save_file(tensors, shard)
    with pytest.raises(SourceError, match=r"wq_b\.weight.*needs \[8, 1\] scales"):
        Formats(Checkpoint.open(copy))


def test_nan_names_its_tensor(copy: Path) -> None:
    index = json.loads((copy / INDEX_NAME).read_text())["weight_map"]
    shard = copy / index["layers.1.attn_norm.weight"]
    tensors = load_file(shard)
    tensors["layers.1.attn_norm.weight"][5] = torch.nan
    save_file(tensors, shard)
    formats = Formats(Checkpoint.open(copy))
    with pytest.raises(
        SourceError, match=r"layers\.1\.attn_norm\.weight: 1 of 64 values are NaN or Inf, the first at \[5\]"
    ):
        formats.read("layers.1.attn_norm.weight", None)


def test_what_a_modifier_writes_into_a_weight_is_not_read_again(source: Path) -> None:
    formats = Formats(Checkpoint.open(source))
    for name, dtype in (("layers.0.ffn.gate.weight", torch.bfloat16), ("layers.0.ffn.gate.tid2eid", None)):
        before = formats.checkpoint.read_bytes(name)
        formats.read(name, dtype).zero_()
        again = formats.read(name, dtype)
        assert again.any() and formats.checkpoint.read(name).view(torch.uint8).numpy().tobytes() == before


def scales_of(weight: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    largest = weight.float().reshape(weight.shape[0], -1, nvfp4.GROUP).abs().amax(-1)
    scale = (global_scale * (largest / 6)).to(torch.float8_e4m3fn).float()
    return torch.where(scale == 0, 0.125, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "outlier", "tiny"])
def test_packing_is_bit_identical_to_compressed_tensors(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 256)
    if kind == "ties":
        weight = (torch.randint(-24, 25, (200, 256)) / 4).float()
        weight[:, ::16] = 6.0
    if kind == "zeros":
        weight[3], weight[:, 16:32], weight[5, 7] = 0, 0, -0.0
    if kind == "outlier":
        weight[7, 9] = 3000
    if kind == "tiny":
        weight *= 1e-6
    weight = weight.to(dtype)
    global_scale = torch.tensor([1.0]) if kind == "ties" else nvfp4.RANGE / weight.float().abs().max().reshape(1)
    scale = scales_of(weight, global_scale)
    arguments = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    quantized = ct_quantize(weight, scale, None, arguments, global_scale=global_scale)
    packed, error = nvfp4.pack(weight, scale, global_scale)
    assert torch.equal(packed, pack_fp4_to_uint8(quantized))
    restored = nvfp4.dequantize(packed, scale.to(torch.float8_e4m3fn), global_scale)
    unpacked = unpack_fp4_from_uint8(packed, *weight.shape, dtype=torch.float32)
    theirs = ct_dequantize(unpacked, scale, None, arguments, global_scale=global_scale)
    assert torch.equal(restored, theirs)
    expected = ((restored - weight.float()).double().norm() / weight.double().norm()).item()
    assert error == pytest.approx(expected, rel=1e-6)


def test_ties_round_to_even() -> None:
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -0.75, -5.0, -0.01, 0.0])
    assert nvfp4.e2m1_codes(values).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8, 10, 14, 8, 0]


def test_tensors_lie_in_memory_of_their_own_and_no_file_is_mapped(source: Path) -> None:
    formats, name = Formats(Checkpoint.open(source)), "layers.0.attn.wq_a.weight"
    raw, value = formats.checkpoint.read(name), formats.read(name)
    assert str(source) not in Path("/proc/self/maps").read_text()
    before = formats.checkpoint.read_bytes(name)
    raw.view(torch.uint8).zero_(), value.zero_()
    assert formats.checkpoint.read_bytes(name) == before and formats.read(name).any()


def test_codes_of_one_weight_are_not_taken_for_those_of_another(source: Path) -> None:
    """With `out` they lie in memory that the next read takes again."""
    formats = Formats(Checkpoint.open(source))
    names = [name for name in formats.checkpoint.tensors if formats.of(name).kind != "plain"][:8]
    values = [torch.empty(formats.of(name).shape, dtype=torch.bfloat16) for name in names]
    for name, value in zip(names, values, strict=True):
        assert formats.read(name, torch.bfloat16, value) is value
    assert all(torch.equal(value, formats.read(name)) for name, value in zip(names, values, strict=True))


def test_a_shard_that_changes_under_a_reader_is_an_error_by_shard_and_tensor(copy: Path) -> None:
    """Truncated (a memory map would end the process by SIGBUS), written to, replaced, gone."""
    checkpoint, name = Checkpoint.open(copy), "layers.0.attn.wq_a.weight"
    shard, header = checkpoint.path(name), checkpoint.tensors[name]
    stat, data = shard.stat(), shard.read_bytes()
    for harm, message in (
        (lambda: os.truncate(shard, header.begin + 10), "ends early"),
        (lambda: shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1])), "is another file, or was written to"),
        (lambda: shard.rename(shard.with_suffix(".away")), "cannot be read"),
    ):
        harm()
        for read in (checkpoint.read, checkpoint.read_bytes, Formats(checkpoint).read):
            with pytest.raises(SourceError, match=rf"{shard.name}: .*{re.escape(name)}.*|.*{message}") as caught:
                read(name)
            assert message in str(caught.value) and name in str(caught.value)
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert checkpoint.read(name).numel()
