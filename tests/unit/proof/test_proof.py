"""A proof derives every byte of an output again, finds every edit, and says of what it could not derive."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint import nvfp4
from calibration.checkpoint.header import TensorHeader
from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.plan.task import Task
from recipes.errors import SourceError
from recipes.loader import dump_recipe
from recipes.schema import Recipe
from tests.converted import converting, run, undoing
from tests.exported import export, recipe, task_of
from tests.models import any_family, deepseek_v4, standard
from tests.smoothed import export_smoothed
from tests.unit.structure.keys import write_keys
from verify.__main__ import main, prove_checkpoint
from verify.checks import Check, level_verdicts
from verify.fidelity.fidelity import verify_fidelity
from verify.proof.prove import prove
from verify.proof.statistics import PROVENANCE_NAME, input_scale_statistics, recorded_statistics
from workflows.publish.signing import sign

LLAMA = [r"re:^model\.layers\.\d+\..*proj$"]
ROUTED = [r"re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$"]
MLP = [r"re:^model\.layers\.\d+\.mlp\..*proj$"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standard.write(tmp_path_factory.mktemp("llama") / "source", "llama")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = converting(source, tmp_path_factory.mktemp("converted") / "output", LLAMA)
    run(made)
    return made


@pytest.fixture
def copied(converted: Recipe, tmp_path: Path) -> Path:
    """A copy of the converted output, to be edited."""
    return Path(shutil.copytree(converted.output, tmp_path / "output"))


def proof_of(output: Path, made: Recipe, **given: Any) -> dict[str, Check]:
    return {check.id: check for check in prove(output, task_of(made), **given).checks}


def verdicts(checks: dict[str, Check]) -> dict[str, str]:
    return {id.removeprefix("proof."): check.verdict for id, check in checks.items()}


def edit(output: Path, tensor: str, byte: int, change: Any) -> None:
    """Replaces one byte of a tensor by `change(byte)`."""
    edit_stored(output, Checkpoint.open(output).tensors[tensor], byte, change)


def edit_stored(output: Path, header: TensorHeader, byte: int, change: Any) -> None:
    with (output / header.shard).open("r+b") as file:
        file.seek(header.begin + byte)
        old = file.read(1)[0]
        file.seek(header.begin + byte)
        file.write(bytes([change(old) & 0xFF]))


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepseek_v4.write(tmp_path_factory.mktemp("v4") / "source", "fp8_mxfp4")


@pytest.mark.parametrize("export", [{"mxfp4": "requantize", "kept": "plain"}, {"dialect": "nvidia"}], ids=str)
def test_every_byte_of_a_conversion_is_derived(export: dict[str, Any], mxfp4: Path, tmp_path: Path) -> None:
    made = converting(mxfp4, tmp_path / "output", ROUTED, export=export)
    run(made)
    checks = proof_of(tmp_path / "output", made)
    assert verdicts(checks) == {"tensors": "PASS", "files": "PASS"}
    total = Checkpoint.open(tmp_path / "output").total_bytes
    assert f"{total:,} of {total:,} bytes derived" in checks["proof.tensors"].figure


def test_every_byte_of_plain_and_tiled_outputs_is_derived(source: Path, mxfp4: Path, tmp_path: Path) -> None:
    for name, made in {
        "plain": undoing(mxfp4, tmp_path / "plain"),
        "tiles": converting(source, tmp_path / "tiles", [r"re:.*(o_proj|down_proj)$"], "FP8_BLOCK"),
    }.items():
        run(made)
        assert verdicts(proof_of(tmp_path / name, made)) == {"tensors": "PASS", "files": "PASS"}, name


def test_experts_in_a_transposed_stack_are_derived_and_named(tmp_path: Path) -> None:
    made = converting(any_family.write(tmp_path / "source", "llama4_text"), tmp_path / "output", "part:routed expert")
    run(made)
    assert verdicts(proof_of(tmp_path / "output", made)) == {"tensors": "PASS", "files": "PASS"}
    name = next(step.outputs[0].name for step in task_of(made).plan.quantized.values())
    edit(tmp_path / "output", name, 0, lambda byte: byte ^ 1)
    assert f"{name}: 1 elements differ" in proof_of(tmp_path / "output", made)["proof.tensors"].figure


def test_stacks_that_are_undone_are_derived_as_a_whole(tmp_path: Path) -> None:
    source = any_family.write(tmp_path / "source", "gpt_oss", mxfp4=True)
    made = converting(source, tmp_path / "output", "part:attention", export={"kept": "plain"})
    run(made)
    steps = task_of(made).plan.steps.values()
    stacks = [step for step in steps if step.action == "cast" and len(step.outputs[0].shape) == 3]
    assert stacks and verdicts(proof_of(tmp_path / "output", made)) == {"tensors": "PASS", "files": "PASS"}
    edit(tmp_path / "output", stacks[0].outputs[0].name, 2, lambda byte: byte ^ 1)
    assert "1 elements differ, the first at [0, 0, 1]" in proof_of(tmp_path / "output", made)["proof.tensors"].figure


def test_a_thousand_edits_within_half_a_rounding_step_are_all_found(converted: Recipe, copied: Path) -> None:
    """Each moves one code to the other neighbor of a value that lies almost between two codes."""
    task, output = task_of(converted), Checkpoint.open(copied)
    generator, wanted, edits = np.random.default_rng(7), Counter[str](), list[tuple[TensorHeader, int, Any]]()
    values = torch.tensor(nvfp4.E2M1[:8])
    for step in task.plan.quantized.values():
        packed, group, single = step.outputs[:3]
        weight = task.formats.read(step.source, torch.float32)
        scale = output.read(group.name).float() / output.read(single.name)
        exact = (weight / scale.repeat_interleave(nvfp4.GROUP, 1)).flatten()
        bytes_ = output.read(packed.name).flatten()
        codes = torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten()
        magnitude, up = (codes & 7).long(), exact.abs() > values[(codes & 7).long()]
        other = torch.where(up, magnitude + 1, magnitude - 1)
        inside = (other >= 0) & (other <= 7)
        step_size = (values[other.clamp(0, 7)] - values[magnitude]).abs()
        added = (exact.abs() - values[other.clamp(0, 7)]).abs() - (exact.abs() - values[magnitude]).abs()
        near = torch.nonzero(inside & (added < step_size / 2)).flatten().numpy()
        chosen = generator.choice(near, 1000 // len(task.plan.quantized) + 1, replace=False)
        for at in chosen:
            code, low = int(codes[at]) & 8 | int(other[at]), at % 2 == 0
            change = (lambda b, c=code: b & 0xF0 | c) if low else (lambda b, c=code: b & 15 | c << 4)
            edits.append((output.tensors[packed.name], at // 2, change))
        wanted[packed.name] += len(chosen)
    assert wanted.total() >= 1000
    for one in edits:
        edit_stored(copied, *one)

    failed = {check.id for check in verify_fidelity(copied, task.plan, task.formats) if check.verdict == "FAIL"}
    assert failed <= {"fidelity.rounding"}, "an error bound that sees them needs no proof"
    statement = prove(copied, task).statement["predicate"]
    assert statement["verdict"] == "FAIL" and len(statement["differences"]) == len(wanted)
    found = {line.partition(":")[0]: int(line.split()[1].replace(",", "")) for line in statement["differences"]}
    assert found == dict(wanted)


def test_one_edit_is_named_with_its_first_element(converted: Recipe, copied: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight_packed"
    width = Checkpoint.open(copied).tensors[name].shape[1]
    edit(copied, name, 3 * width + 5, lambda byte: byte ^ 0x10)
    check = proof_of(copied, converted)["proof.tensors"]
    assert check.verdict == "FAIL" and f"{name}: 1 elements differ, the first at [3, 11]: stored 0x" in check.figure


@pytest.mark.parametrize(
    "leaf",
    ["model.norm.weight", "model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.up_proj.weight_global_scale",
     "model.layers.0.mlp.up_proj.input_global_scale"],
)  # fmt: skip
def test_a_change_of_the_last_bit_is_found_in_every_kind_of_tensor(leaf: str, converted: Recipe, copied: Path) -> None:
    edit(copied, leaf, 0, lambda byte: byte ^ 1)
    check = proof_of(copied, converted)["proof.tensors"]
    assert check.verdict == "FAIL" and f"{leaf}: 1 elements differ, the first at [0" in check.figure


def test_files_beside_the_tensors_are_derived_too(converted: Recipe, copied: Path) -> None:
    config = json.loads((copied / CONFIG_NAME).read_text())
    (copied / CONFIG_NAME).write_text(json.dumps(config | {"rope_theta": 1.0}, indent=2) + "\n")
    (copied / "generation_config.json").unlink()
    (copied / "notes.txt").write_text("whose?")
    check = proof_of(copied, converted)["proof.files"]
    assert check.verdict == "FAIL" and "config.json: is not what the plan says" in check.figure
    assert "generation_config.json: missing" in check.figure
    shutil.copy(Path(converted.output) / CONFIG_NAME, copied)
    shutil.copy(Path(converted.output) / "generation_config.json", copied)
    check = proof_of(copied, converted)["proof.files"]
    assert (check.verdict, check.figure) == ("WARN", "notes.txt: follows from nothing")


def test_metadata_in_a_header_is_no_place_to_hide(converted: Recipe, copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    shard = next(copied.glob("*.safetensors"))
    save_file(load_file(shard), shard, metadata={"format": "pt", "more": "x"})
    check = proof_of(copied, converted)["proof.files"]
    assert check.verdict == "FAIL" and "other metadata" in check.figure


def test_what_a_hessian_decided_is_unchecked_by_name_and_count(source: Path, tmp_path: Path) -> None:
    made = recipe(source, tmp_path / "output", MLP)
    export(source, tmp_path / "output", made)
    groups = {"experts": {"targets": MLP, "scheme": "NVFP4"}}
    modifiers = [{"GPTQModifier": {"config_groups": groups}}]
    tuned = Recipe.model_validate(made.model_dump(mode="json") | {"modifiers": modifiers})
    checks = proof_of(tmp_path / "output", tuned)
    assert verdicts(checks) == {"tensors": "PASS", "tuned": "UNCHECKED", "input_scales": "UNCHECKED", "files": "PASS"}
    count = 3 * len(task_of(made).plan.quantized)
    said = f"GPTQModifier: {count:,} tensors not derived (model.layers.0.mlp."
    assert said in checks["proof.tuned"].figure
    assert level_verdicts(list(checks.values()))["proof"] == "UNCHECKED"


SMOOTH = [
    {"SmoothQuantModifier": {}},
    {"QuantizationModifier": {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "NVFP4"}},
]
NORM, GATE = "model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    base = tmp_path_factory.mktemp("smoothed")
    return export_smoothed(standard.write(base / "source", "qwen3_moe"), base / "output", SMOOTH)


def test_what_smoothing_scaled_is_derived_with_the_factors_that_the_output_tells(smoothed: tuple[Task, Path]) -> None:
    task, output = smoothed
    checks = proof_of(output, task.recipe)
    assert verdicts(checks) == {"tensors": "PASS", "scales": "UNCHECKED", "input_scales": "UNCHECKED", "files": "PASS"}
    sites, tensors = len(task.plan.smoothed), len(task.plan.outputs)
    assert f"SmoothQuantModifier: factors that the output tells, and all that read them have: {sites} tensors" in (
        checks["proof.scales"].figure
    )
    calibrated = len(task.plan.quantized)  # input scales
    assert checks["proof.tensors"].figure.startswith(f"{tensors - sites - calibrated:,} tensors, ")


@pytest.mark.parametrize(
    ("tensor", "change", "found"),
    [
        (NORM, lambda value: value * 2, "up_proj.weight_packed"),
        (NORM, lambda value: value * 1.25, NORM),
        (GATE, lambda value: value * 2, GATE),
        ("model.layers.1.mlp.experts.3.down_proj.weight_packed", lambda code: code ^ 1, "down_proj.weight_packed: 1 "),
    ],
)
def test_an_edit_that_smoothing_does_not_explain_is_a_difference(
    tensor: str, change: Any, found: str, smoothed: tuple[Task, Path], tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(smoothed[1], tmp_path / "broken"))
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        if tensor in tensors:
            flat = tensors[tensor].view(-1)
            flat[7] = change(flat[7])
            save_file(tensors, path, metadata={"format": "pt"})
    check = proof_of(broken, smoothed[0].recipe)["proof.tensors"]
    assert check.verdict == "FAIL" and found in check.figure


def test_factors_of_channels_that_are_zero_are_not_guessed(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "qwen3_moe")
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if NORM in tensors:
            tensors[NORM][3] = 0
            save_file(tensors, path, metadata={"format": "pt"})
    task, output = export_smoothed(source, tmp_path / "output", SMOOTH)
    checks = proof_of(output, task.recipe)
    assert checks["proof.tensors"].verdict == "PASS" and checks["proof.tuned"].verdict == "UNCHECKED"
    assert "smoothing factors of channels that are zero" in checks["proof.tuned"].figure


def test_searched_scales_are_taken_as_recorded_and_the_codes_derived_from_them(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    made = recipe(source, output, MLP)
    body = made.model_dump(mode="json")
    body["modifiers"][0]["QuantizationModifier"]["weight_observer"] = "memoryless_mse"
    made = Recipe.model_validate(body)
    export(source, output, made)
    checks = proof_of(output, made)
    assert checks["proof.tensors"].verdict == "PASS" and checks["proof.scales"].verdict == "UNCHECKED"
    count = 2 * len(task_of(made).plan.quantized)
    assert f"weight observer memoryless-mse: {count:,} tensors" in checks["proof.scales"].figure
    edit(output, "model.layers.0.mlp.up_proj.weight_packed", 40, lambda byte: byte ^ 1)
    check = proof_of(output, made)["proof.tensors"]
    assert check.verdict == "FAIL" and "up_proj.weight_packed: 1 elements differ" in check.figure


def test_calibrated_input_scales_are_held_to_what_the_run_recorded(source: Path, tmp_path: Path) -> None:
    output, made = tmp_path / "output", recipe(source, tmp_path / "output", MLP)
    export(source, output, made)
    assert "no provenance.json" in proof_of(output, made)["proof.input_scales"].figure

    checkpoint = Checkpoint.open(output)
    names = [name for name in checkpoint.tensors if name.endswith("input_global_scale")]
    written = json.dumps({"statistics": input_scale_statistics(checkpoint, names).model_dump()})
    (output / PROVENANCE_NAME).write_text(written)
    inside = proof_of(output, made, recorded=recorded_statistics(output))["proof.input_scales"]
    assert inside.verdict == "UNCHECKED" and "proves nothing" in inside.figure
    (tmp_path / "output.run").mkdir()
    (tmp_path / "output.run" / PROVENANCE_NAME).write_text(written)
    assert proof_of(output, made, recorded=recorded_statistics(output))["proof.input_scales"].verdict == "PASS"
    edit(output, names[0], 0, lambda byte: byte ^ 1)
    changed = proof_of(output, made, recorded=recorded_statistics(output))["proof.input_scales"]
    assert changed.verdict == "FAIL" and "the run recorded" in changed.figure


def test_a_signed_provenance_vouches_for_the_input_scales(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, made = tmp_path / "output", recipe(source, tmp_path / "output", MLP)
    export(source, output, made)
    checkpoint = Checkpoint.open(output)
    names = [name for name in checkpoint.tensors if name.endswith("input_global_scale")]
    written = {"statistics": input_scale_statistics(checkpoint, names).model_dump()}
    (output / PROVENANCE_NAME).write_text(json.dumps(written))
    private, public = write_keys(tmp_path)
    sign(output, private)
    arguments = [str(output), "--source", str(source), "--prove", "--json"]

    def verdict(*more: str) -> str:
        main([*arguments, *more])
        checks = {check["id"]: check["verdict"] for check in json.loads(capsys.readouterr().out)["checks"]}
        return checks["proof.input_scales"]

    assert verdict() == "UNCHECKED" and verdict("--public-key", str(public)) == "PASS"
    edit(output, names[0], 0, lambda byte: byte ^ 1)
    (output / PROVENANCE_NAME).write_text(json.dumps(written))
    assert verdict("--public-key", str(public)) == "FAIL"


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"statistics": {"input_scales": -1, "sha256": "x"}}', "[" * 5000, "fifo"]
)
def test_a_strangers_provenance_is_none_and_no_traceback(content: str, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    path = tmp_path / "output" / PROVENANCE_NAME
    os.mkfifo(path) if content == "fifo" else path.write_text(content)
    assert recorded_statistics(tmp_path / "output") is None
    with pytest.raises(SourceError):
        recorded_statistics(tmp_path / "output", path)


def test_an_output_of_another_source_or_recipe_fails_by_name(converted: Recipe, source: Path, tmp_path: Path) -> None:
    other = converting(source, tmp_path / "output", [r"re:^model\.layers\.0\.mlp\..*proj$"])
    checks = proof_of(Path(converted.output), other)
    assert checks["proof.tensors"].verdict == "FAIL" and "k_proj.weight: missing" in checks["proof.tensors"].figure
    (tmp_path / "empty").mkdir()
    assert verdicts(proof_of(tmp_path / "empty", converted)) == {"tensors": "FAIL"}


def test_the_statement_names_what_was_compared_and_no_path(converted: Recipe, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "statement.json"
    arguments = [converted.output, "--source", str(source), "--prove", "--statement", str(target), "--json"]
    assert main(arguments) == 0
    statement = json.loads(target.read_text())
    named = {entry["name"] for entry in statement["subject"]}
    assert {CONFIG_NAME, *Checkpoint.open(Path(converted.output)).shards} <= named
    assert statement["predicate"]["verdict"] == "PASS" and statement["predicate"]["source"]["name"] == "source"
    assert str(source.parent) not in target.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--prove"], 2, "--prove: needs --source"),
        (["--statement", "x.json"], 2, "--statement: belongs to --prove"),
        (["--prove", "--source", "SOURCE"], 2, "holds no recipe.yaml"),
        (["--prove", "--source", "SOURCE", "--recipe", "RECIPE", "--provenance", "none.json"], 3, "none.json"),
        (["--prove", "--source", "SOURCE", "--recipe", "RECIPE", "--statement", "OUTPUT/s.json"], 2, "inside the checkpoint"),
    ],
)  # fmt: skip
def test_a_proof_without_what_it_needs_ends_in_one_message(
    arguments: list[str], code: int, said: str, converted: Recipe, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "recipe.yaml").unlink()
    named = copied.parent / "recipe.yaml"
    named.write_text(dump_recipe(converted))
    places = {"SOURCE": converted.source.checkpoint, "RECIPE": str(named)}
    given = [places.get(text, text).replace("OUTPUT", str(copied)) for text in arguments]
    assert main([str(copied), *given]) == code
    assert said in capsys.readouterr().err


def test_a_recipe_of_llm_compressor_inside_is_none_to_prove_by(converted: Recipe, copied: Path) -> None:
    from recipes.errors import RecipeError

    (copied / "recipe.yaml").write_text("quant_stage: {quant_modifiers: {QuantizationModifier: {targets: Linear}}}\n")
    with pytest.raises(RecipeError, match="is no recipe of this project"):
        prove_checkpoint(copied, Path(converted.source.checkpoint), None)
