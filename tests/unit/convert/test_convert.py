"""convert and plain on tiny checkpoints: bytes against compressed-tensors, resume, refusals, what a run reports."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint import native
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.header import read_header
from calibration.checkpoint.index import INDEX_NAME, Checkpoint
from calibration.convert import layout
from calibration.convert import pipeline as module
from calibration.convert.pipeline import convert
from calibration.plan.quantization_config import output_config
from calibration.runs.journal import RunDirectory
from recipes.errors import EnvironmentProblem, RecipeError, SourceError
from recipes.schema import Recipe
from tests.converted import LINEAR, converting, digests, edited, failing, run, tensors, undoing
from tests.exported import EXPERTS, plan_of, task_of
from tests.integration.interrupted_runs import run_command
from tests.models import deepseek_v4, deepseek_v41, standard
from tests.reference.compressed_tensors import of_compressed_tensors

#: All tensors of a V4 with few experts: no test here serves it.
FEW = 8


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sources")
    made = {stored: deepseek_v4.write(base / stored, stored, experts=FEW) for stored in ("bf16", "fp8", "fp8_mxfp4")}
    return made | {family: standard.write(base / family, family) for family in ("llama", "qwen3_moe", "mixtral")}


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("source", ["bf16", "fp8", "fp8_mxfp4", "llama", "qwen3_moe", "mixtral"])
def test_output_equals_compressed_tensors_and_passes_structure(
    sources: dict[str, Path], tmp_path: Path, source: str, scheme: str
) -> None:
    targets = EXPERTS if source in ("bf16", "fp8", "fp8_mxfp4") else LINEAR
    made = converting(sources[source], tmp_path / "out", targets, scheme, export={"mxfp4": "requantize"})
    done = run(made)
    assert failing(made) == set()
    plan, formats = plan_of(sources[source], made)
    assert done.quantized == len(plan.quantized) and done.lossless == 0
    found = tensors(made.output)
    for name, step in plan.quantized.items():
        weight = formats.read(step.source, torch.float32)
        packed, scales, _ = of_compressed_tensors(weight, found[f"{name}.weight_global_scale"])
        assert torch.equal(found[f"{name}.weight_packed"], packed), name
        assert torch.equal(found[f"{name}.weight_scale"].view(torch.uint8), scales), name
        assert (f"{name}.input_global_scale" in found) == (scheme == "NVFP4")
        if scheme == "NVFP4":
            assert found[f"{name}.input_global_scale"].tolist() == [1.0], "2688 / the default input_amax"
    in_groups = {module for group in plan.fused for module in group}
    for name in plan.quantized.keys() - in_groups:
        weight = formats.read(plan.quantized[name].source, torch.float32)
        assert torch.equal(found[f"{name}.weight_global_scale"], of_compressed_tensors(weight)[2])
    for group in plan.fused:
        members = [m for m in group if m in plan.quantized]
        if members:
            largest = max(float(formats.read(plan.quantized[m].source, torch.float32).abs().max()) for m in members)
            wanted = of_compressed_tensors(torch.full((1, 16), largest))[2]
            assert all(torch.equal(found[f"{m}.weight_global_scale"], wanted) for m in members), members
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert (groups["experts"]["input_activations"] is None) == (scheme == "NVFP4A16")


def test_every_level_and_number_of_workers_gives_the_same_files(sources: dict[str, Path], tmp_path: Path) -> None:
    made = {}
    for level in native.levels():
        with native.use(level):
            assert run(converting(sources["fp8"], tmp_path / level)).level == level
        made[level] = digests(tmp_path / level)
    with native.use("cuda", device="cpu"):
        run(converting(sources["fp8"], tmp_path / "cuda path"))
    made["cuda path"] = digests(tmp_path / "cuda path")
    for workers in (1, 2, 7):
        done = run(converting(sources["fp8"], tmp_path / str(workers), convert={"workers": workers}))
        assert done.workers == workers
        made[str(workers)] = digests(tmp_path / str(workers))
    assert len({json.dumps(files) for files in made.values()}) == 1


@pytest.mark.parametrize("stored", ["bf16", "fp8", "fp8_mxfp4"])
@pytest.mark.parametrize("job", [1 << 12, 1 << 15])
def test_weights_cut_into_stripes_give_the_same_files(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, job: int
) -> None:
    for method in (converting, undoing):
        whole, cut = (
            method(sources[stored], tmp_path / f"{method.__name__}-whole"),
            method(sources[stored], tmp_path / f"{method.__name__}-cut"),
        )
        run(whole)
        with monkeypatch.context() as small:
            small.setattr(layout, "JOB", job)
            small.setattr(layout, "FUSED", 0)
            run(cut)
        assert digests(whole.output) == digests(cut.output)


@pytest.mark.parametrize("stored", ["fp8", "fp8_mxfp4"])
def test_a_fused_group_parted_between_shards_shares_its_scale(
    sources: dict[str, Path], tmp_path: Path, stored: str
) -> None:
    small = converting(sources[stored], tmp_path / "small", export={"max_shard_size": 65_536})
    run(small)
    run(converting(sources[stored], tmp_path / "large"))
    plan, _ = plan_of(sources[stored], small)
    parted = [
        g for g in plan.fused if len({plan.weight_map[f"{m}.weight_packed"] for m in g if m in plan.quantized}) > 1
    ]
    assert len(parted) >= 3
    assert failing(small) == set()
    one, two = tensors(small.output), tensors(tmp_path / "large")
    assert one.keys() == two.keys()
    assert all(
        torch.equal(one[n].view(torch.uint8).flatten(), two[n].view(torch.uint8).flatten())
        for n in one
        if one[n].numel()
    )


def test_mxfp4_experts_are_kept_bit_for_bit(sources: dict[str, Path], tmp_path: Path) -> None:
    made = converting(sources["fp8_mxfp4"], tmp_path / "out")
    done = run(made)
    assert (done.lossless, done.requantized) == (72, 0)
    source, output = Formats(Checkpoint.open(sources["fp8_mxfp4"])), Formats(Checkpoint.open(tmp_path / "out"))
    for block in range(3):
        for expert in (0, 3, 7):
            for leaf in ("w1", "w2", "w3"):
                name = f"layers.{block}.ffn.experts.{expert}.{leaf}"
                before = source.read(f"{name}.weight", torch.float32)
                after = output.read(f"{name}.weight_packed", torch.float32)
                assert torch.equal(before.view(torch.int32), after.view(torch.int32)), name
    again = converting(sources["fp8_mxfp4"], tmp_path / "again", export={"mxfp4": "requantize"})
    assert (run(again).lossless, failing(again)) == (0, set())


def test_mxfp4_scales_too_far_apart_are_requantized_and_counted(sources: dict[str, Path], tmp_path: Path) -> None:
    name = "layers.1.ffn.experts.5.w3"

    def widen(scales: torch.Tensor) -> None:
        scales.view(torch.uint8)[3, 0] -= 40

    source = edited(sources["fp8_mxfp4"], tmp_path / "source", f"{name}.scale", widen)
    made = converting(source, tmp_path / "out")
    done = run(made)
    assert (done.lossless, done.requantized) == (70, 2), "w1 and w3 share a global scale"
    assert failing(made) == set()


POISON = {
    "fp8": ("layers.1.ffn.experts.7.w2.weight", lambda t: t.view(torch.uint8)[3].fill_(0x7F)),
    "fp8 scale": ("layers.1.ffn.experts.7.w2.scale", lambda t: t.fill_(float("inf"))),
    "kept fp8": ("layers.1.attn.wq_a.weight", lambda t: t.view(torch.uint8)[3, 3].fill_(0xFF)),
    "copied bf16": ("layers.2.ffn.gate.weight", lambda t: t[1, 1].fill_(float("nan"))),
    "copied f32": ("layers.2.attn.attn_sink", lambda t: t[0].fill_(float("-inf"))),
}


@pytest.mark.parametrize("case", POISON)
@pytest.mark.parametrize("method", [converting, undoing])
def test_nan_and_inf_name_the_tensor_and_leave_no_shard(
    sources: dict[str, Path], tmp_path: Path, case: str, method: Any
) -> None:
    name, poison = POISON[case]
    source = edited(sources["fp8"], tmp_path / "source", name, poison)
    with pytest.raises(SourceError, match=re.escape(name.removesuffix(".scale"))):
        run(method(source, tmp_path / "out"))
    plan, _ = plan_of(source, method(source, tmp_path / "out"))
    where = next(
        o.name for o in plan.steps[name if plan.steps[name].outputs else name.replace("scale", "weight")].outputs
    )
    assert not (tmp_path / "out" / plan.weight_map[where]).exists()
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.parametrize(
    ("shape", "message"), [((64, 24), "multiple of 16"), ((64,), "none of them"), ((2, 64, 32), "none of them")]
)
def test_shapes_without_groups_of_16_are_refused_before_a_byte_is_written(
    tmp_path: Path, shape: tuple[int, ...], message: str
) -> None:
    source = standard.write(tmp_path / "source", "llama")
    headers = {name: shard for shard in source.glob("*.safetensors") for name in read_header(shard)}
    name, shard = next((n, shard) for n, shard in headers.items() if n.endswith("down_proj.weight"))
    changed = load_file(shard) | {name: torch.ones(shape, dtype=torch.bfloat16)}
    save_file(changed, shard, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=message):
        run(converting(source, tmp_path / "out", [name.removesuffix(".weight")], "NVFP4A16"))
    assert not (tmp_path / "out").exists()


def test_input_amax_sets_the_constant_input_scale(sources: dict[str, Path], tmp_path: Path) -> None:
    run(converting(sources["llama"], tmp_path / "out", LINEAR, convert={"input_amax": 10.5}))
    scales = [t for n, t in tensors(tmp_path / "out").items() if n.endswith("input_global_scale")]
    assert scales and all(scale.tolist() == [256.0] for scale in scales)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["bf16", "fp8", "fp8_mxfp4"])
def test_plain_undoes_every_format(sources: dict[str, Path], tmp_path: Path, stored: str, dtype: str) -> None:
    made = undoing(sources[stored], tmp_path / "out", export={"plain_dtype": dtype})
    done = run(made)
    assert failing(made) == set()
    formats = Formats(Checkpoint.open(sources[stored]))
    found = tensors(made.output)
    assert found.keys() == formats.checkpoint.tensors.keys() - formats.companions
    assert done.consumed == len(formats.companions)
    assert done.cast == sum(formats.of(name).kind != "plain" for name in found) and done.cast + done.copied == len(
        found
    )
    for name, tensor in found.items():
        wanted = formats.read(name, None if formats.of(name).kind == "plain" else getattr(torch, dtype))
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and "expert_dtype" not in config


def test_plain_undoes_nvfp4_of_this_project(sources: dict[str, Path], tmp_path: Path) -> None:
    run(converting(sources["llama"], tmp_path / "packed", LINEAR))
    made = undoing(tmp_path / "packed", tmp_path / "out", export={"plain_dtype": "float32"})
    run(made)
    packed = Formats(Checkpoint.open(tmp_path / "packed"))
    found = tensors(made.output)
    assert found.keys() == Checkpoint.open(sources["llama"]).tensors.keys()
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(found[f"{name}.weight"], packed.read(f"{name}.weight_packed", torch.float32))


def test_values_beyond_float16_are_refused_by_name(sources: dict[str, Path], tmp_path: Path) -> None:
    name = "layers.1.ffn.experts.5.w2"
    source = edited(sources["fp8"], tmp_path / "source", f"{name}.scale", lambda scale: scale.fill_(1e4))
    with pytest.raises(SourceError, match=rf"{re.escape(name)}\.weight: .*overflow torch\.float16"):
        run(undoing(source, tmp_path / "out", export={"plain_dtype": "float16"}))
    run(undoing(source, tmp_path / "wider", export={"plain_dtype": "bfloat16"}))


@pytest.mark.parametrize("method", [converting, undoing])
def test_scales_named_weight_scale_inv_give_the_same_files(
    sources: dict[str, Path], tmp_path: Path, method: Any
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    weight_map = {}
    for shard in sorted(sources["fp8"].glob("*.safetensors")):
        held = {re.sub(r"\.scale$", ".weight_scale_inv", name): tensor for name, tensor in load_file(shard).items()}
        save_file(held, source / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, shard.name)
    assert any(name.endswith("w1.weight_scale_inv") for name in weight_map)
    (source / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "config.json").write_bytes((sources["fp8"] / "config.json").read_bytes())
    run(method(source, tmp_path / "renamed"))
    run(method(sources["fp8"], tmp_path / "out"))
    # mtp.* is copied with its names.
    one = {re.sub(r"\.weight_scale_inv$", ".scale", name): t for name, t in tensors(tmp_path / "renamed").items()}
    two = tensors(tmp_path / "out")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)) for name in one if one[name].dim())


@pytest.mark.parametrize("kept", ["native", "plain"])
def test_kept_fp8_tensors_keep_their_codes_or_are_cast(sources: dict[str, Path], tmp_path: Path, kept: str) -> None:
    made = converting(sources["fp8_mxfp4"], tmp_path / "out", export={"kept": kept})
    run(made)
    assert failing(made) == set()
    found, formats = tensors(made.output), Formats(Checkpoint.open(sources["fp8_mxfp4"]))
    weight = found["layers.0.attn.wq_b.weight"]
    if kept == "plain":
        assert torch.equal(weight, formats.read("layers.0.attn.wq_b.weight"))
        return
    assert weight.view(torch.uint8).equal(formats.checkpoint.read("layers.0.attn.wq_b.weight").view(torch.uint8))
    scale = formats.checkpoint.read("layers.0.attn.wq_b.scale").to(torch.float32)
    assert torch.equal(found["layers.0.attn.wq_b.weight_scale"], scale)
    plan, _ = plan_of(sources["fp8_mxfp4"], made)
    assert output_config(plan, formats.checkpoint.config)["quantization_config"]["format"] == "mixed-precision"


def test_fp8_block_from_bf16_equals_compressed_tensors(sources: dict[str, Path], tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize

    from calibration.plan.schemes import FP8_BLOCK

    made = converting(sources["bf16"], tmp_path / "out", [r"re:^layers\.\d+\.attn\.wq_b$"], "FP8_BLOCK")
    run(made)
    assert failing(made) == set()
    found, formats = tensors(made.output), Formats(Checkpoint.open(sources["bf16"]))
    name = "layers.0.attn.wq_b"
    weight, scale = formats.read(f"{name}.weight", torch.float32), found[f"{name}.weight_scale"]
    assert scale[0, 0] == weight[:128, :128].abs().max() / 448
    arguments = QuantizationArgs(**FP8_BLOCK.weights)
    codes = quantize(weight, scale, None, arguments, dtype=torch.float8_e4m3fn)
    assert torch.equal(found[f"{name}.weight"].view(torch.uint8), codes.view(torch.uint8))


# Resume, change underneath, refusals of the environment, progress


def test_a_second_run_keeps_whole_shards_and_remakes_the_others(sources: dict[str, Path], tmp_path: Path) -> None:
    made = converting(sources["fp8"], tmp_path / "out", export={"max_shard_size": 400_000})
    first = run(made)
    before = digests(made.output)
    assert first.resumed == 0 and len(before) > 8
    names = sorted(before)
    (tmp_path / "out" / names[1]).unlink()
    flipped = bytearray((tmp_path / "out" / names[4]).read_bytes())
    flipped[-3] ^= 1
    (tmp_path / "out" / names[4]).write_bytes(flipped)
    (tmp_path / "out" / f"{names[2]}.partial").write_bytes(b"half")
    second = run(made)
    assert second.resumed == len(before) - 2 and digests(made.output) == before
    assert second.bytes_written < first.bytes_written / 2
    assert not list((tmp_path / "out").glob("*.partial"))
    assert run(made).bytes_written == 0


def test_other_settings_begin_anew(sources: dict[str, Path], tmp_path: Path) -> None:
    run(converting(sources["llama"], tmp_path / "out", LINEAR))
    again = run(converting(sources["llama"], tmp_path / "out", LINEAR, convert={"input_amax": 100.0}))
    assert again.resumed == 0
    same = run(converting(sources["llama"], tmp_path / "out", LINEAR, convert={"input_amax": 100.0, "workers": 1}))
    assert same.resumed == same.shards, "the number of workers changes no byte"


def test_a_source_that_changed_since_the_run_began_is_refused(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "llama")
    made = converting(source, tmp_path / "out", LINEAR)
    run(made)
    shard = sorted(source.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(SourceError, match=r"changed since this run began \(1 of"):
        run(made)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = standard.write(tmp_path / "source", "llama")
    made = converting(source, tmp_path / "out", LINEAR)
    task = task_of(made)
    shard = sorted(source.glob("*.safetensors"))[0]
    do = module.Work.do

    def touch(self: Any, *arguments: Any) -> Any:
        os.utime(shard, ns=(1, 1))
        return do(self, *arguments)

    monkeypatch.setattr(module.Work, "do", touch)
    directory = RunDirectory(tmp_path / "out").open()
    with pytest.raises(SourceError, match="changed while it was converted"):
        convert(task, directory)
    directory.close()
    assert not directory.facts("shards") and not list((tmp_path / "out").glob("*.safetensors*"))


def test_too_little_disk_is_refused_before_the_first_shard(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPARE", 1 << 60)
    with pytest.raises(EnvironmentProblem, match=r"bytes free, the run needs .*output"):
        run(converting(sources["llama"], tmp_path / "out", LINEAR))
    assert not (tmp_path / "out").exists()


def test_progress_is_in_bytes_and_ends_at_the_total(sources: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = converting(sources["fp8"], tmp_path / "out", export={"max_shard_size": 400_000})
    run(made, lambda done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert seen[-1] == (size, size) and seen == sorted(seen)
    (tmp_path / "out" / sorted(digests(made.output))[0]).unlink()
    seen.clear()
    run(made, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (size, size), "shards that were there count as done"


def test_recipes_that_these_methods_cannot_follow_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    source = sources["llama"]
    with pytest.raises(ValueError, match="which quantizes nothing"):
        undoing(source, tmp_path, modifiers=[{"QuantizationModifier": {"targets": "Linear", "scheme": "NVFP4"}}])
    with pytest.raises(ValueError, match="need method 'calibrate'"):
        Recipe.model_validate(
            {"source": {"checkpoint": str(source)}, "output": str(tmp_path), "method": "convert",
             "modifiers": [{"GPTQModifier": {"targets": "Linear", "scheme": "NVFP4"}}]}
        )  # fmt: skip


def killed(source: Path, directory: Path, kills: int, kept: str = "native") -> dict[str, Any]:
    done = run_command("tests.kill_loop", [str(source), str(directory / "killed"), str(kills), "0", kept])
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))  # llm-compressor may log before it


@pytest.mark.parametrize("form", ["dspark", "v41"])
def test_killed_conversions_of_the_released_forms_resume_to_the_same_bytes(tmp_path: Path, form: str) -> None:
    """Draft heads, Engram tables and 32x32 tiles are copied by the same jobs."""
    source = tmp_path / "source"
    if form == "dspark":
        deepseek_v4.write(source, "fp8_mxfp4", experts=8, draft_blocks=3)
    else:
        deepseek_v41.write(source)
    kept = "native" if form == "dspark" else "plain"  # compressed-tensors has no tiles of 32x32
    result = killed(source, tmp_path, 4, kept)
    run(converting(source, tmp_path / "whole", export={"max_shard_size": 200_000, "kept": kept}))
    assert result["digests"] == digests(tmp_path / "whole") and result["hit"] > 0


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(
    sources: dict[str, Path], tmp_path: Path, kills: int
) -> None:
    source = sources["fp8_mxfp4"] if kills < 10 else deepseek_v4.write(tmp_path / "source", "fp8_mxfp4")
    result = killed(source, tmp_path, kills)
    run(converting(source, tmp_path / "whole", export={"max_shard_size": 200_000}))
    assert result["digests"] == digests(tmp_path / "whole")
    assert result["hit"] > kills / 4 and result["partly"] > 0
