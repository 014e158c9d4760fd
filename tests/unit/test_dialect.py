"""A checkpoint in one dialect and in the other: the same bytes, the inverse scales, the configs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint.dialect import inverse, returns
from calibration.checkpoint.index import Checkpoint
from tests.converted import LINEAR, converting, digests, run, tensors
from tests.models import deepseek_v4, standard
from workflows import convert_dialect

ROUTED = [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"]
BASES = ("deepseek_v4", "deepseek_v4 bf16", "llama", "qwen3_moe", "mixtral", "llama weight-only")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base -> a compressed-tensors checkpoint of it, in `<base>/out`, of the source `<base>/source`."""
    root, found = tmp_path_factory.mktemp("dialects"), dict[str, Path]()
    for base in BASES:
        source, output = root / base / "source", root / base / "out"
        family = base.partition(" ")[0]
        if family == "deepseek_v4":
            deepseek_v4.write(source, "bf16" if base.endswith("bf16") else "fp8_mxfp4", experts=8)
        else:
            standard.write(source, family)  # type: ignore[arg-type]
        scheme = "NVFP4A16" if base.endswith("weight-only") else "NVFP4"
        # Not a power of two: its inverse is rounded.
        options: dict[str, Any] = {"convert": {"input_amax": 77.7}}
        run(converting(source, output, ROUTED if family == "deepseek_v4" else LINEAR, scheme, **options))
        found[base] = output
    return found


def respell(source: Path, output: Path, to: str, *further: str) -> int:
    return convert_dialect.main([str(source), str(output), "--to", to, *further])


@pytest.mark.parametrize("base", BASES)
def test_there_and_back_gives_the_same_bytes(made: dict[str, Path], tmp_path: Path, base: str) -> None:
    assert respell(made[base], tmp_path / "nvidia", "nvidia") == 0
    assert respell(tmp_path / "nvidia", tmp_path / "back", "compressed_tensors") == 0
    ours, theirs, back = (tensors(path) for path in (made[base], tmp_path / "nvidia", tmp_path / "back"))
    assert ours.keys() == back.keys()
    one_way = json.loads((tmp_path / "nvidia.run" / "one_way.json").read_text())
    for name, tensor in ours.items():
        module, _, leaf = name.rpartition(".")
        spelled = {
            "weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale",
        }.get(leaf, leaf)  # fmt: skip
        if leaf == "weight_scale" and f"{module}.weight_packed" not in ours:
            spelled, tensor = "scale", tensor.to(torch.float8_e8m0fnu)
        found = theirs.pop(f"{module}.{spelled}" if module else name)
        if leaf.endswith("global_scale"):
            assert found.shape == () and found.dtype == torch.float32
            assert float(found) == float(inverse(float(tensor)))
            assert (back[name].item() == tensor.item()) == (name not in one_way), name
        else:
            assert found.dtype == tensor.dtype
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name
            assert torch.equal(back[name].view(torch.uint8), ours[name].view(torch.uint8)), name
    assert not theirs
    configs = [json.loads((path / "config.json").read_text()) for path in (made[base], tmp_path / "back")]
    groups = [config.pop("quantization_config").pop("config_groups") for config in configs]
    assert configs[0] == configs[1]
    assert sorted(map(str, groups[0].values())) == sorted(map(str, groups[1].values()))


def test_nvidia_deepseek_v4_holds_the_source_s_own_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    """All that is not routed experts: FP8 with E8M0 scales, and the draft head in FP8 and MXFP4."""
    assert respell(made["deepseek_v4"], tmp_path / "out", "nvidia") == 0
    source, output = (Checkpoint.open(path) for path in (made["deepseek_v4"].parent / "source", tmp_path / "out"))
    kept = [name for name in source.tensors if not name.startswith("layers") or ".ffn.experts." not in name]
    assert len(kept) > 100
    assert all(source.read_bytes(name) == output.read_bytes(name) for name in kept)


def test_configs_are_those_that_engines_read(made: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for base in BASES:
        assert respell(made[base], tmp_path / base, "nvidia") == 0
        config = json.loads((tmp_path / base / "config.json").read_text())
        beside = json.loads((tmp_path / base / "hf_quant_config.json").read_text())
        found[base] = (config, config["quantization_config"], beside["quantization"])
        assert beside["producer"]["name"] == "modelopt"
        assert beside["quantization"]["exclude_modules"] == config["quantization_config"]["ignore"]

    config, said, beside = found["deepseek_v4"]
    assert config["expert_dtype"] == "fp4"
    assert (said["quant_method"], said["moe_quant_algo"], said["quant_algo"]) == ("fp8", "NVFP4", "MIXED_PRECISION")
    assert said["weight_block_size"] == [128, 128] and said["scale_fmt"] == "ue8m0" and "ignored_layers" not in said
    assert "mtp.*" in said["ignore"]
    assert list(beside["quantized_layers"]) == [f"layers.{block}.ffn.experts" for block in range(3)]

    config, said, beside = found["deepseek_v4 bf16"]
    assert {"layers.0.attn.wq_a", "layers.2.ffn.shared_experts.w2"} <= set(said["ignored_layers"])
    assert not any(name.endswith(("gate", "head", "wgate", "weights_proj")) for name in said["ignored_layers"])

    config, said, beside = found["qwen3_moe"]
    assert (said["quant_method"], said["quant_algo"], beside["quant_algo"]) == ("modelopt", "NVFP4", "NVFP4")
    assert {"lm_head", "model.layers.0.mlp.gate"} <= set(said["ignore"])
    assert "quantization_config" in config and "expert_dtype" not in config
    assert found["llama weight-only"][1]["quant_algo"] == "W4A16_NVFP4"
    assert found["llama weight-only"][1]["config_groups"]["group_0"]["input_activations"] is None


def test_what_does_not_come_back_is_counted_and_named(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert respell(made["llama"], tmp_path / "out", "nvidia") == 0
    scales = {n: t.item() for n, t in tensors(made["llama"]).items() if n.endswith("global_scale")}
    expected = sorted(name for name, value in scales.items() if not returns(value))
    told = capsys.readouterr().out
    assert json.loads((tmp_path / "out.run" / "one_way.json").read_text()) and expected
    assert sorted(json.loads((tmp_path / "out.run" / "one_way.json").read_text())) == expected
    assert f"{len(expected)} of {len(scales)} inverses do not give their scale back" in told
    assert any(name in told for name in expected)


def test_a_scale_comes_back_if_and_only_if_float32_has_its_inverse() -> None:
    drawn = np.random.default_rng(0).uniform(1, 2, 5000).astype(np.float32)
    for scale in drawn:
        back = np.float32(1) / (np.float32(1) / scale)
        assert returns(scale) == bool(back == scale)
    # Below the square root of two every float32 comes back; above it many have no inverse at all.
    assert all(returns(scale) for scale in drawn[drawn < 2**0.5])
    assert not all(returns(scale) for scale in drawn)


def _edit(directory: Path, change: Any) -> None:
    """Applies `change` to the tensors of each shard, which it may rename."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        changed = change(load_file(shard))
        save_file(changed, shard)
        index["weight_map"] |= dict.fromkeys(changed, shard.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def _one_in_the_other_spelling(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    module = "layers.1.ffn.experts.3.w2"
    names = {f"{module}.weight_packed": f"{module}.weight", f"{module}.weight_global_scale": f"{module}.weight_scale_2",
             f"{module}.input_global_scale": f"{module}.input_scale"}  # fmt: skip
    return {names.get(name, name): tensor.reshape(()) if tensor.numel() == 1 and name in names else tensor
            for name, tensor in found.items()}  # fmt: skip


def _tile_scales_times_three(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t * 3 if n.endswith("attn.wq_b.weight_scale") else t for n, t in found.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _one_in_the_other_spelling,
            "is in both dialects: 71 weights in compressed_tensors (layers.0.ffn.experts.0.w1",
        ),
        (_tile_scales_times_three, "attn.wq_b.weight_scale: holds tile scales that are no powers of two"),
    ],
)
def test_a_checkpoint_that_has_no_other_spelling_is_refused_before_anything_is_written(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    source = _copy(made["deepseek_v4"], tmp_path / "source")
    _edit(source, change)
    assert respell(source, tmp_path / "out", "nvidia") == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_refusals(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = made["llama"]

    def refused(code: int, message: str, source: Path, output: Path, to: str = "nvidia", *further: str) -> None:
        assert respell(source, output, to, *further) == code
        assert message in capsys.readouterr().err

    refused(2, "is in the dialect compressed_tensors already", good, tmp_path / "a", "compressed_tensors")
    refused(2, "lies inside the source checkpoint", good, good / "inside")
    refused(2, "is the source checkpoint's own directory", good, good)
    refused(2, "holds the source checkpoint", good, good.parent)
    refused(3, "holds no NVFP4 weight", good.parent / "source", tmp_path / "a")
    refused(3, "no such checkpoint directory", tmp_path / "none", tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(4, "is not empty (first: notes.txt)", good, tmp_path / "full")
    refused(4, "--overwrite replaces nothing else", good, tmp_path / "full", "nvidia", "--overwrite")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"

    shared = tmp_path / "shared"
    every = [r"re:^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$"]
    run(converting(made["deepseek_v4"].parent / "source", shared, every))
    refused(3, "has NVFP4 in routed experts alone", shared, tmp_path / "a")
    with_cache = _copy(good, tmp_path / "cache")
    config = json.loads((with_cache / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (with_cache / "config.json").write_text(json.dumps(config))
    refused(3, "kv_cache_scheme", with_cache, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_same_command_resumes_to_the_same_bytes_and_only_overwrite_replaces_another_checkpoint(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = made["deepseek_v4"], tmp_path / "out"
    assert respell(source, output, "nvidia") == 0
    whole, shards = digests(output), sorted(output.glob("*.safetensors"))
    # As a kill leaves it: the last shard unfinished, the index not written.
    shards[-1].rename(shards[-1].with_name(shards[-1].name + ".partial"))
    (output / "model.safetensors.index.json").unlink()
    capsys.readouterr()
    assert respell(source, output, "nvidia") == 0
    assert f"{len(shards)} shards ({len(shards) - 1} finished before)" in capsys.readouterr().out
    assert digests(output) == whole
    assert respell(made["llama"], output, "nvidia") == 4
    assert digests(output) == whole
    assert respell(made["llama"], output, "nvidia", "--overwrite") == 0
    assert Checkpoint.open(output).config["model_type"] == "llama"
