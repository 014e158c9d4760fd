"""The fixtures are what the checkpoint grammar says: names, dtypes, shapes, scales, shards, index, values."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open

from tests.models import deepseek_v4, routers, standard
from tests.models.smollm2 import undo_rope_permutation
from tests.models.tokenizer import SPECIAL_TOKENS, trained

ROOT = Path(__file__).parents[3]
STORED: tuple[deepseek_v4.Stored, ...] = get_args(deepseek_v4.Stored)
FAMILIES: tuple[standard.Family, ...] = get_args(standard.Family)
Header = dict[str, tuple[str, tuple[int, ...]]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("deepseek_v4")
    return {stored: deepseek_v4.write(root / stored, stored) for stored in STORED}


def header(directory: Path) -> Header:
    found: Header = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (safe_open is no dict)
                view = reader.get_slice(name)
                assert name not in found, f"{name} is in two shards"
                found[name] = (view.get_dtype(), tuple(view.get_shape()))
    return found


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as reader:
            found.update({name: reader.get_tensor(name) for name in reader.keys()})  # noqa: SIM118
    return found


def expected(stored: str, dspark: bool = False) -> Header:
    """The table of the grammar, written out for hidden D, M, 2 heads, 64 experts, vocabulary 1024."""
    d, m, heads, experts, vocab, rank, groups, group_rank, index_heads = 64, 128, 2, 64, 1024, 128, 2, 96, 8
    table: Header = {}

    def put(name: str, dtype: str, *shape: int) -> None:
        table[name] = (dtype, shape)

    def tiled(name: str, rows: int, columns: int) -> None:
        if stored == "bf16":
            return put(f"{name}.weight", "BF16", rows, columns)
        put(f"{name}.weight", "F8_E4M3", rows, columns)
        scale = "F32" if stored == "fp8" else "F8_E8M0"
        return put(f"{name}.scale", scale, (rows + 127) // 128, (columns + 127) // 128)

    def routed(name: str, rows: int, columns: int) -> None:
        if stored != "fp8_mxfp4":
            return tiled(name, rows, columns)
        put(f"{name}.weight", "I8", rows, columns // 2)
        return put(f"{name}.scale", "F8_E8M0", rows, columns // 32)

    def compressor(name: str, ratio: int, head: int) -> None:
        width = 2 * head if ratio == 4 else head
        put(f"{name}.ape", "F32", ratio, width)
        put(f"{name}.norm.weight", "BF16", head)
        put(f"{name}.wkv.weight", "BF16", width, d)
        put(f"{name}.wgate.weight", "BF16", width, d)

    def block(name: str, ratio: int, hashed: bool) -> None:
        for norm, width in (("attn_norm", d), ("ffn_norm", d), ("attn.q_norm", rank), ("attn.kv_norm", 512)):
            put(f"{name}.{norm}.weight", "BF16", width)
        put(f"{name}.attn.attn_sink", "F32", heads)
        tiled(f"{name}.attn.wq_a", rank, d)
        tiled(f"{name}.attn.wq_b", heads * 512, rank)
        tiled(f"{name}.attn.wkv", 512, d)
        tiled(f"{name}.attn.wo_a", groups * group_rank, heads * 512 // groups)
        tiled(f"{name}.attn.wo_b", d, groups * group_rank)
        if ratio:
            compressor(f"{name}.attn.compressor", ratio, 512)
        if ratio == 4:
            tiled(f"{name}.attn.indexer.wq_b", index_heads * 128, rank)
            put(f"{name}.attn.indexer.weights_proj.weight", "BF16", index_heads, d)
            compressor(f"{name}.attn.indexer.compressor", ratio, 128)
        for site in ("attn", "ffn"):
            put(f"{name}.hc_{site}_fn", "F32", 24, 4 * d)
            put(f"{name}.hc_{site}_base", "F32", 24)
            put(f"{name}.hc_{site}_scale", "F32", 3)
        put(f"{name}.ffn.gate.weight", "BF16", experts, d)
        if hashed:
            put(f"{name}.ffn.gate.tid2eid", "I64", vocab, 6)
        else:
            put(f"{name}.ffn.gate.bias", "F32", experts)
        for w, rows, columns in (("w1", m, d), ("w2", d, m), ("w3", m, d)):
            tiled(f"{name}.ffn.shared_experts.{w}", rows, columns)
            for expert in range(experts):
                routed(f"{name}.ffn.experts.{expert}.{w}", rows, columns)

    put("embed.weight", "BF16", vocab, d)
    put("head.weight", "BF16", vocab, d)
    put("norm.weight", "BF16", d)
    for layer, (ratio, hashed) in enumerate([(0, True), (4, True), (128, False)]):
        block(f"layers.{layer}", ratio, hashed)
    block("mtp.0", 0, False)
    if dspark:
        block("mtp.1", 0, False)
        block("mtp.2", 0, False)
        tiled("mtp.0.main_proj", d, 3 * d)
        put("mtp.0.main_norm.weight", "BF16", d)
        put("mtp.2.norm.weight", "BF16", d)
        put("mtp.2.markov_head.markov_w1.weight", "BF16", vocab, 32)
        put("mtp.2.markov_head.markov_w2.weight", "BF16", vocab, 32)
        put("mtp.2.confidence_head.proj.weight", "BF16", 1, d + 32)
    else:
        for norm in ("enorm", "hnorm", "norm"):
            put(f"mtp.0.{norm}.weight", "BF16", d)
        tiled("mtp.0.e_proj", d, d)
        tiled("mtp.0.h_proj", d, d)
    for prefix in ("", "mtp.2." if dspark else "mtp.0."):
        put(f"{prefix}hc_head_fn", "F32", 4, 4 * d)
        put(f"{prefix}hc_head_base", "F32", 4)
        put(f"{prefix}hc_head_scale", "F32", 1)
    return table


@pytest.mark.parametrize("stored", STORED)
def test_names_dtypes_and_shapes_are_those_of_the_grammar(checkpoints: dict[str, Path], stored: str) -> None:
    assert header(checkpoints[stored]) == expected(stored)


def test_the_dspark_head_has_the_tensors_of_the_released_one(tmp_path: Path) -> None:
    """`num_nextn_predict_layers` stays 1 there, beside three draft blocks."""
    directory = deepseek_v4.write(tmp_path / "source", "fp8_mxfp4", draft_blocks=3)
    assert header(directory) == expected("fp8_mxfp4", dspark=True)
    config = json.loads((directory / "config.json").read_text())
    assert (config["num_nextn_predict_layers"], config["dspark_target_layer_ids"]) == (1, [0, 1, 2])
    assert config["compress_ratios"] == [0, 4, 128, 0, 0, 0]


@pytest.mark.parametrize("stored", STORED)
def test_config_is_in_hub_form(checkpoints: dict[str, Path], stored: str) -> None:
    config = json.loads((checkpoints[stored] / "config.json").read_text())
    assert config["model_type"] == "deepseek_v4"
    assert config["compress_ratios"] == [0, 4, 128, 0]
    assert (config["num_hidden_layers"], config["num_hash_layers"], config["num_nextn_predict_layers"]) == (3, 2, 1)
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (64, 6)
    assert config.get("expert_dtype") == {"bf16": None, "fp8": "fp8", "fp8_mxfp4": "fp4"}[stored]
    quantization = config.get("quantization_config", {})
    assert quantization.get("weight_block_size") == (None if stored == "bf16" else [128, 128])
    assert quantization.get("scale_fmt") == ("ue8m0" if stored == "fp8_mxfp4" else None)


@pytest.mark.parametrize("stored", STORED)
def test_index_and_split_pairs(checkpoints: dict[str, Path], stored: str) -> None:
    directory = checkpoints[stored]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    where: dict[str, str] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            where.update(dict.fromkeys(reader.keys(), file.name))
    assert index["weight_map"] == where
    assert len(set(where.values())) == 3
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors(directory).values())

    names = [name for name in where if name.endswith(".weight")]
    gate_up = [(n, n.replace(".w1.", ".w3.")) for n in names if ".experts." in n and ".w1." in n]
    query_kv = [(n, n.replace(".wq_a.", ".wkv.")) for n in names if ".wq_a." in n]
    companions = [(n, n.removesuffix("weight") + "scale") for n in names]
    for pairs in [gate_up, query_kv, *([companions] if stored != "bf16" else [])]:
        assert any(where[a] != where[b] for a, b in pairs if b in where)


def test_fp8_dequantizes_to_bf16_within_the_formats_error(checkpoints: dict[str, Path]) -> None:
    """E4M3 has 3 mantissa bits: half a step is 2^-4 of the value, 2^-10 of the scale for subnormals."""
    plain = tensors(checkpoints["bf16"])
    for stored in ("fp8", "fp8_mxfp4"):
        found = tensors(checkpoints[stored])
        for name in (n for n in found if found[n].dtype == torch.float8_e4m3fn):
            scale = found[name.removesuffix("weight") + "scale"].float()
            rows, columns = found[name].shape
            scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            want = plain[name].float()
            error = (found[name].float() * scale - want).abs()
            assert (error <= want.abs() * 2.0**-4 * (1 + 1e-6) + scale * 2.0**-10).all(), name
            assert error.max() > 0, name


def test_mxfp4_dequantizes_to_bf16_within_the_formats_error(checkpoints: dict[str, Path]) -> None:
    """E2M1 has 1 mantissa bit: half a step is 1/4 of the value at most, 1/4 of the scale below 1."""
    plain, found = tensors(checkpoints["bf16"]), tensors(checkpoints["fp8_mxfp4"])
    codes = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 3.0, 6: 4.0, 7: 6.0}
    values = torch.tensor([codes[i] for i in range(8)] + [-codes[i] for i in range(8)])
    names = [n for n in found if found[n].dtype == torch.int8]
    assert len(names) == 4 * 64 * 3
    for name in names:
        packed = found[name].view(torch.uint8).int()
        code = torch.zeros(packed.shape[0], packed.shape[1] * 2, dtype=torch.int32)
        code[:, 0::2], code[:, 1::2] = packed & 15, packed >> 4
        stored_scale = found[name.removesuffix("weight") + "scale"]
        exponent = stored_scale.view(torch.uint8).float() - 127
        scale = torch.pow(2.0, exponent).repeat_interleave(32, 1)
        want = plain[name].float()
        error = (values[code] * scale - want).abs()
        assert (error <= torch.maximum(want.abs(), scale) * 0.25).all(), name
        assert {values[i].abs().item() for i in set(code.flatten().tolist())} == set(codes.values()), name


@pytest.mark.parametrize("stored", STORED)
def test_unquantized_tensors_are_the_same_in_all_formats(checkpoints: dict[str, Path], stored: str) -> None:
    plain, found = tensors(checkpoints["bf16"]), tensors(checkpoints[stored])
    kept = [n for n in plain if found[n].dtype == plain[n].dtype]
    table, plain_table = expected(stored), expected("bf16")
    assert set(kept) == {n for n in plain_table if table[n] == plain_table[n]}
    for name in kept:
        assert torch.equal(found[name], plain[name]), name


def test_hash_tables_use_every_expert_and_float32_needs_its_bits(checkpoints: dict[str, Path]) -> None:
    found = tensors(checkpoints["bf16"])
    for layer in (0, 1):
        table = found[f"layers.{layer}.ffn.gate.tid2eid"]
        assert set(table.flatten().tolist()) == set(range(64))
        assert all(len(set(row)) == 6 for row in table.tolist())
    for name, tensor in found.items():
        if tensor.dtype == torch.float32:
            assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} would survive a BF16 round trip"


@pytest.mark.parametrize("written", ["fp8_mxfp4", "mixtral"])
def test_two_processes_write_the_same_bytes(checkpoints: dict[str, Path], tmp_path: Path, written: str) -> None:
    there = tmp_path / "there"
    if written == "mixtral":
        here, module, option = standard.write(tmp_path / "here", "mixtral"), "standard", "--family"
    else:
        here, module, option = checkpoints[written], "deepseek_v4", "--stored"
    command = [sys.executable, "-m", f"tests.models.{module}", str(there), option, written]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    files = sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(there) for path in there.rglob("*") if path.is_file())
    for file in files:
        assert (here / file).read_bytes() == (there / file).read_bytes(), file


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    one, two = (tensors(standard.write(tmp_path / str(seed), "llama", seed=seed)) for seed in (0, 1))
    assert all(not torch.equal(one[name], two[name]) for name in one)


def test_sizes_and_one_shard(tmp_path: Path) -> None:
    small = deepseek_v4.write(tmp_path / "v4", "fp8", shards=1, hidden=192, layers=5, experts=8, moe_intermediate=160)
    assert not (small / "model.safetensors.index.json").exists()
    found = header(small)
    assert found["layers.4.ffn.experts.7.w2.scale"] == ("F32", (2, 2))
    assert found["layers.4.attn.compressor.ape"] == ("F32", (128, 512))
    assert json.loads((small / "config.json").read_text())["compress_ratios"] == [0, 4, 128, 4, 128, 0]
    with pytest.raises(ValueError, match="multiples of 32"):
        deepseek_v4.write(tmp_path / "bad", "fp8_mxfp4", hidden=72)
    with pytest.raises(FileExistsError):
        deepseek_v4.write(small, "fp8")
    with pytest.raises(ValueError, match="too many"):
        standard.write(tmp_path / "many", "llama", shards=9)


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_families_have_hub_names(tmp_path: Path, family: standard.Family) -> None:
    directory = standard.write(tmp_path / family, family)
    found = header(directory)
    for name, (dtype, shape) in found.items():
        assert dtype == ("F32" if name.endswith("e_score_correction_bias") else "BF16") and len(shape) <= 2
    assert ("lm_head.weight" in found) is (family not in ("llama", "qwen3"))
    if family == "qwen3_moe":
        assert found["model.layers.2.mlp.experts.7.gate_proj.weight"] == ("BF16", (96, 64))
        assert found["model.layers.2.mlp.experts.7.down_proj.weight"] == ("BF16", (64, 96))
    if family == "mixtral":
        assert found["model.layers.1.block_sparse_moe.experts.3.w1.weight"] == ("BF16", (224, 128))
        assert found["model.layers.1.block_sparse_moe.gate.weight"] == ("BF16", (4, 128))
    for name, (_, shape) in found.items():
        assert len(shape) == 1 or shape[1] % 16 == 0, f"{name}: NVFP4 needs in features in sixteens"
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(found)
    gates = [n for n in index if ".gate_proj." in n or ".w1." in n]
    ups = [n.replace(".gate_proj.", ".up_proj.").replace(".w1.", ".w3.") for n in gates]
    assert any(index[gate] != index[up] for gate, up in zip(gates, ups, strict=True))


def test_special_tokens_have_their_ids() -> None:
    added = {token["content"]: token["id"] for token in json.loads(trained(1024))["added_tokens"]}
    assert added == {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    assert SPECIAL_TOKENS[0] == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


def test_the_shipped_encoding_is_python(checkpoints: dict[str, Path]) -> None:
    source = (checkpoints["bf16"] / "encoding" / "encoding_dsv4.py").read_text()
    space: dict[str, object] = {}
    exec(compile(ast.parse(source), "encoding_dsv4.py", "exec"), space)
    encode = space["encode"]
    assert callable(encode)
    assert encode("hi") == SPECIAL_TOKENS[0] + SPECIAL_TOKENS[2] + "hi" + SPECIAL_TOKENS[3]


def test_rope_permutation_is_undone() -> None:
    """llama.cpp's permute, as convert_hf_to_gguf.py has it, followed by ours gives the weight back."""
    heads, rows, columns = 3, 24, 5
    weight = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns).numpy()
    permuted = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    assert (undo_rope_permutation(permuted, heads) == weight).all()
    assert not (permuted == weight).all()


def test_a_trained_router_sends_tokens_of_a_kind_to_one_expert_and_about_as_many_to_each() -> None:
    """Of 12 kinds of token four experts get four shares, where a random router leaves one of them next to none."""
    kinds = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1200, 32, generator=torch.Generator().manual_seed(2))
    inputs = (kinds.repeat(100, 1) + 0.1 * noise).to(torch.bfloat16)
    router = routers.train(inputs, 4, "router", rate=0.05)
    chosen = (inputs @ router.T).argmax(-1)
    shares = chosen.bincount(minlength=4) / len(chosen)
    assert shares.min() > 0.15, shares
    alike = [(chosen[kind::12] == chosen[kind]).float().mean().item() for kind in range(12)]
    assert min(alike) > 0.98, alike
    assert router.dtype == torch.bfloat16 and torch.equal(router, routers.train(inputs, 4, "router", rate=0.05))
