"""A checkpoint in one dialect and in the other: the same bytes, the inverse scales, the configs, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint.dialect import inverse, returns
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.plan.respelling import require_exact_scales
from recipes.errors import RecipeError, SourceError
from tests.converted import LINEAR, converting, digests, failing, run, tensors
from tests.exported import export, plan_of, recipe
from tests.models import deepseek_v4, standard
from verify.fidelity.fidelity import verify_fidelity
from verify.known import Known
from verify.serving.draft_head import draft_head_checks
from verify.structure.structure import verify_structure
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


@pytest.fixture(scope="module")
def spelled(made: dict[str, Path]) -> dict[str, Path]:
    """Base -> the same checkpoint in NVIDIA's dialect."""
    found = {base: output.parent / "nvidia" for base, output in made.items()}
    for base, output in found.items():
        assert respell(made[base], output, "nvidia") == 0
    return found


def respell(source: Path, output: Path, to: str, *further: str) -> int:
    return convert_dialect.main([str(source), str(output), "--to", to, *further])


@pytest.mark.parametrize("base", BASES)
def test_there_and_back_gives_the_same_bytes(
    made: dict[str, Path], spelled: dict[str, Path], tmp_path: Path, base: str
) -> None:
    assert respell(spelled[base], tmp_path / "back", "compressed_tensors") == 0
    ours, theirs, back = (tensors(path) for path in (made[base], spelled[base], tmp_path / "back"))
    assert ours.keys() == back.keys()
    one_way = json.loads((spelled[base].with_name("nvidia.run") / "one_way.json").read_text())
    for name, tensor in ours.items():
        module, _, leaf = name.rpartition(".")
        theirs_leaf = {
            "weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale",
        }.get(leaf, leaf)  # fmt: skip
        if leaf == "weight_scale" and f"{module}.weight_packed" not in ours:
            theirs_leaf, tensor = "scale", tensor.to(torch.float8_e8m0fnu)
        found = theirs.pop(f"{module}.{theirs_leaf}" if module else name)
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


def test_nvidia_deepseek_v4_holds_the_source_s_own_bytes(made: dict[str, Path], spelled: dict[str, Path]) -> None:
    """All that is not routed experts: FP8 with E8M0 scales, and the draft head in FP8 and MXFP4."""
    source = Checkpoint.open(made["deepseek_v4"].parent / "source")
    output = Checkpoint.open(spelled["deepseek_v4"])
    kept = [name for name in source.tensors if not name.startswith("layers") or ".ffn.experts." not in name]
    assert len(kept) > 100
    assert all(source.read_bytes(name) == output.read_bytes(name) for name in kept)


def test_configs_are_those_that_engines_read(spelled: dict[str, Path]) -> None:
    found = {}
    for base in BASES:
        config = json.loads((spelled[base] / "config.json").read_text())
        beside = json.loads((spelled[base] / "hf_quant_config.json").read_text())
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
    # vLLM builds a head for a model that stores none, and quantizes what no entry leaves out.
    assert not any("lm_head" in name for name in Checkpoint.open(spelled["llama"]).tensors)
    assert found["llama"][1]["ignore"] == ["lm_head"]
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


def _verdicts(directory: Path, source: Path | None = None) -> dict[str, str]:
    """The checks that say neither PASS nor, without a source, what only that could tell."""
    checks = verify_structure(directory, Known(source=Formats(Checkpoint.open(source)) if source else None))
    return {c.id: f"{c.verdict}: {c.figure}" for c in checks if c.verdict not in ("PASS", "UNCHECKED")}


@pytest.mark.parametrize("base", BASES)
def test_verify_finds_in_one_dialect_what_it_finds_in_the_other(
    made: dict[str, Path], spelled: dict[str, Path], base: str
) -> None:
    output, source = spelled[base], made[base].parent / "source"
    # A plain draft head is one that vLLM reads in compressed-tensors' dialect alone.
    own = {"structure.mtp"} if base == "deepseek_v4 bf16" else set()
    assert _verdicts(made[base]) == {} and _verdicts(output).keys() == own
    # Told of a source alone, every other config is a doubt.
    assert _verdicts(output, source).keys() - own == _verdicts(made[base], source).keys() <= {"structure.config"}
    ours, theirs = (verify_fidelity(path, None, Formats(Checkpoint.open(source))) for path in (made[base], output))
    assert [(c.id, c.verdict, c.figure) for c in ours] == [(c.id, c.verdict, c.figure) for c in theirs]
    assert len(ours) > 5


def _said(change: Any) -> Any:
    """A change of the quantization_config of config.json, or with it of the file beside it."""

    def apply(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return apply


def _stored(change: Any) -> Any:
    return lambda directory: _edit(directory, change)


def _of_first(change: Any, leaf: str) -> Any:
    """A change of the first routed expert's tensor of a leaf; None removes it."""

    def apply(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = f"layers.0.ffn.experts.0.w1.{leaf}"
        if name in found:
            changed = change(found.pop(name))
            found |= {} if changed is None else {name: changed}
        return found

    return apply


def _compressed_tensors_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    theirs = json.loads((directory.parent / "theirs.json").read_text())
    config["quantization_config"] = theirs["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "hf_quant_config.json").unlink()


def _back_to_packed(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    module = "layers.1.ffn.experts.3.w2"
    names = {f"{module}.weight": f"{module}.weight_packed", f"{module}.weight_scale_2": f"{module}.weight_global_scale",
             f"{module}.input_scale": f"{module}.input_global_scale"}  # fmt: skip
    return {names.get(name, name): tensor for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("spoil", "check", "figure"),
    [
        (_stored(_back_to_packed), "structure.dialect", "experts.3.w2.weight_packed: is spelled in the dialect compressed"),
        (_compressed_tensors_config, "structure.dialect", "layers.0.ffn.experts.0.w1.weight: is spelled in the dialect nvidia"),
        (_stored(_of_first(lambda t: None, "input_scale")), "structure.companions", "w1.input_scale: missing"),
        (_stored(_of_first(lambda t: None, "weight_scale_2")), "structure.companions", "match neither MXFP4 nor NVFP4"),
        (_stored(_of_first(lambda t: 1 / t, "weight_scale_2")), "structure.scales", "is it inverted?"),
        (_stored(_of_first(lambda t: 2 * t, "weight_scale_2")), "structure.fused", "weight_scale_2: "),
        (_stored(_of_first(lambda t: -t, "weight_scale_2")), "structure.scales", "with a sign"),
        (_stored(_of_first(lambda t: t * float("nan"), "input_scale")), "structure.finite", "input_scale: 1 of 1"),
        (
            _stored(lambda found: {n: t.float() if n == "layers.0.attn.wq_b.scale" else t for n, t in found.items()}),
            "structure.companions", "layers.0.attn.wq_b.scale: F32, needs F8_E8M0",
        ),
        (_said(lambda said: said.update(moe_quant_algo="MXFP4")), "structure.targets", "moe_quant_algo is 'MXFP4'"),
        (_said(lambda said: said.pop("weight_block_size")), "structure.targets", "weight_block_size is None"),
        (_said(lambda said: said["ignore"].append("layers.0.*")), "structure.targets", "layers.0.ffn.experts.0.w1"),
        (_said(lambda said: said["ignore"].append("layers.0.*")), "structure.files", "describes another quantization"),
        (
            _said(lambda said: said.update(ignored_layers=["layers.0.attn.wq_a"])),
            "structure.targets", "ignore names only a part of what is served as one matrix",
        ),
        (
            _said(lambda said: said.update(ignored_layers=["layers.2.ffn.experts"])),
            "structure.targets", "layers.2.ffn.experts.0.w1: stored quantized, ignore names it",
        ),
        (_said(lambda said: said.update(quant_method="modelopt")), "structure.targets", "MIXED_PRECISION is not resolved here"),
    ],
)  # fmt: skip
def test_faults_of_nvidia_s_dialect_are_found(
    made: dict[str, Path], spelled: dict[str, Path], tmp_path: Path, spoil: Any, check: str, figure: str
) -> None:
    output = _copy(spelled["deepseek_v4"], tmp_path / "out")
    (tmp_path / "theirs.json").write_bytes((made["deepseek_v4"] / "config.json").read_bytes())
    spoil(output)
    assert figure in _verdicts(output).get(check, "PASS"), _verdicts(output)


def test_modules_that_a_modelopt_list_leaves_out_are_those_that_vllm_leaves_out(
    spelled: dict[str, Path], tmp_path: Path
) -> None:
    _copy(spelled["qwen3_moe"], tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]

    def with_ignore(entries: list[str]) -> dict[str, str]:
        _said(lambda said: said.update(ignore=entries))(tmp_path / "out")
        (tmp_path / "out" / "hf_quant_config.json").unlink(missing_ok=True)
        return _verdicts(tmp_path / "out")

    assert with_ignore(listed) == {}
    # The same modules in modelopt's words: shell patterns and parts of names.
    assert with_ignore(["lm_head", "*mlp.gate"]) == {}
    assert "lm_head: stored as BF16, NVFP4 says" in with_ignore(["*mlp.gate"])["structure.targets"]
    assert "mlp.gate: stored as BF16" in with_ignore(["lm_head"])["structure.targets"]
    assert "stored quantized, ignore names it" in with_ignore([*listed, "model.layers.1*"])["structure.targets"]
    assert "experts.0.down_proj: stored quantized" in with_ignore([*listed, "*.experts"])["structure.targets"]


def test_a_tied_head_that_no_entry_leaves_out_is_found(spelled: dict[str, Path], tmp_path: Path) -> None:
    """vLLM quantizes the head that it builds, and the checkpoint has no scales for it."""
    _copy(spelled["llama"], tmp_path / "out")
    (tmp_path / "out" / "hf_quant_config.json").unlink()
    _said(lambda said: said.update(ignore=[]))(tmp_path / "out")
    assert "lm_head: is not stored (tied)" in _verdicts(tmp_path / "out")["structure.targets"]


def test_a_plain_draft_head_that_follows_the_blocks_is_left_out_of_modelopt_s_form(tmp_path: Path) -> None:
    """Or vLLM builds it as NVFP4: `is_layer_excluded` takes these entries as shell patterns."""
    source = standard.write(tmp_path / "source", "glm4_moe")
    run(converting(source, tmp_path / "out", LINEAR, "NVFP4"))
    assert respell(tmp_path / "out", tmp_path / "nvidia", "nvidia") == 0
    listed = json.loads((tmp_path / "nvidia" / "config.json").read_text())["quantization_config"]["ignore"]
    assert [entry for entry in listed if "layers.3." in entry] == ["model.layers.3.*"]
    assert "model.layers.1.mlp.gate" in listed and not any(entry.startswith("model.layers.2.self") for entry in listed)
    assert _verdicts(tmp_path / "nvidia") == {}


def _same(one: Path, other: Path) -> None:
    """Both hold the same tensors and the same configs."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        found = theirs[name]
        assert (tensor.dtype, tensor.shape) == (found.dtype, found.shape), name
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, found))), name
    for file in ("config.json", "hf_quant_config.json"):
        assert json.loads((one / file).read_text()) == json.loads((other / file).read_text())


@pytest.mark.parametrize("base", ["deepseek_v4", "qwen3_moe"])
def test_a_recipe_in_nvidia_s_dialect_writes_what_its_checkpoint_is_respelled_to(
    made: dict[str, Path], spelled: dict[str, Path], tmp_path: Path, base: str
) -> None:
    source, targets = made[base].parent / "source", ROUTED if base == "deepseek_v4" else LINEAR
    nvidia = {"dialect": "nvidia"}
    converted = converting(source, tmp_path / "convert", targets, export=nvidia, convert={"input_amax": 77.7})
    run(converted)
    _same(spelled[base], tmp_path / "convert")
    assert failing(converted) == set()
    # The exporter of method calibrate, fed with scales from weight statistics.
    for name, how in (("theirs", nvidia), ("ours", {})):
        export(source, tmp_path / name, recipe(source, tmp_path / name, targets, export=how))
    assert respell(tmp_path / "ours", tmp_path / "respelled", "nvidia") == 0
    _same(tmp_path / "respelled", tmp_path / "theirs")
    assert failing(recipe(source, tmp_path / "theirs", targets, export=nvidia)) == set()


def test_a_respelled_checkpoint_s_recipe_makes_the_plan_of_what_it_is(
    made: dict[str, Path], spelled: dict[str, Path]
) -> None:
    from verify.__main__ import own_plan

    source = Formats(Checkpoint.open(made["deepseek_v4"].parent / "source"))
    plan, checks = own_plan(spelled["deepseek_v4"], source)
    assert plan is not None and [check.verdict for check in checks] == ["PASS"]
    found = verify_structure(spelled["deepseek_v4"], Known(plan, source))
    assert {check.id for check in found if check.verdict not in ("PASS", "UNCHECKED")} == set()


def test_a_source_in_nvidia_s_dialect_is_copied_into_it(spelled: dict[str, Path], tmp_path: Path) -> None:
    done = run(converting(spelled["llama"], tmp_path / "out", LINEAR, export={"dialect": "nvidia"}))
    assert done.inverted == 0
    _same(spelled["llama"], tmp_path / "out")


def test_a_plan_says_what_nvidia_s_dialect_cannot(made: dict[str, Path], tmp_path: Path) -> None:
    def refused(source: Path, targets: list[str], scheme: str = "NVFP4") -> str:
        with pytest.raises(RecipeError) as error:
            plan_of(source, converting(source, tmp_path / "out", targets, scheme, export={"dialect": "nvidia"}))
        return str(error.value)

    v4 = made["deepseek_v4"].parent / "source"
    every = [r"re:^layers\.\d+\.ffn\.(experts\.\d+|shared_experts)\.w[123]$"]
    assert "has NVFP4 in routed experts alone" in refused(v4, every)
    assert "NVFP4A16 has no input scale" in refused(v4, ROUTED, "NVFP4A16")
    source = deepseek_v4.write(tmp_path / "fp8", "fp8", experts=8)
    plan, formats = plan_of(source, converting(source, tmp_path / "out", ROUTED, export={"dialect": "nvidia"}))
    with pytest.raises(SourceError, match="holds tile scales that are no powers of two"):
        require_exact_scales(plan, formats)


def _draft(directory: Path) -> str:
    check = next(c for c in verify_structure(directory) if c.id == "structure.mtp")
    return f"{check.verdict}: {check.figure}"


def test_a_draft_head_that_vllm_would_misread_is_said_so(
    made: dict[str, Path], spelled: dict[str, Path], tmp_path: Path
) -> None:
    native, plain = spelled["deepseek_v4"], spelled["deepseek_v4 bf16"]
    assert _draft(native) == "PASS: 1 found, config.json promises 1"
    # vLLM cannot read it there, which is the dialect's limit and no fault of the checkpoint.
    assert _draft(made["deepseek_v4"]).startswith("PASS: 1 found, config.json promises 1; mtp.0.")
    assert "the nvidia dialect keeps it readable" in _draft(made["deepseek_v4"])
    assert _draft(made["deepseek_v4 bf16"]) == "PASS: 1 found, config.json promises 1"
    assert "is stored as plain: under NVIDIA's dialect vLLM reads the draft's linear layers as FP8" in _draft(plain)
    output = _copy(native, tmp_path / "out")
    _said(lambda said: said["ignore"].remove("mtp.*"))(output)
    assert _draft(output).startswith("WARN: mtp.0.ffn.experts.")
    assert "is stored as MXFP4, and quantization_config.ignore does not name it: vLLM would read NVFP4" in _draft(
        output
    )


def test_a_draft_head_that_is_there_to_speculate_is_unchecked_where_it_is_served(
    made: dict[str, Path], spelled: dict[str, Path]
) -> None:
    def checks(directory: Path) -> list[tuple[str, str]]:
        config = json.loads((directory / "config.json").read_text())
        return [(check.id, check.verdict) for check in draft_head_checks(directory, config)]

    assert checks(spelled["deepseek_v4"]) == [("serving.draft_head", "UNCHECKED")]
    assert checks(made["deepseek_v4"]) == checks(spelled["llama"]) == []


def test_a_list_of_a_hundred_thousand_patterns_ends_in_seconds(spelled: dict[str, Path], tmp_path: Path) -> None:
    for base, key in (("deepseek_v4", "ignore"), ("qwen3_moe", "ignore")):
        output = _copy(spelled[base], tmp_path / base)
        _said(lambda said, key=key: said.update({key: [f"*a*{n}*b*" for n in range(100_000)]}))(output)
        began = time.process_time()
        assert "take too long to match" in _verdicts(output)["structure.targets"]
        assert time.process_time() - began < 10


def test_the_draft_head_of_the_0731_release_is_readable(tmp_path: Path) -> None:
    """DSpark: Markov and confidence heads are built plain."""
    source = deepseek_v4.write(tmp_path / "source", "fp8_mxfp4", experts=8, draft_blocks=3)
    run(converting(source, tmp_path / "out", ROUTED, export={"dialect": "nvidia"}))
    assert _draft(tmp_path / "out").startswith("PASS: ")
