"""Structure: what a good output says of itself, how the bytes are read, and that nothing in a checkpoint makes it raise.
Each way of breaking one is in tests/faults."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from calibration.checkpoint.direct import Buffer, digest
from calibration.checkpoint.files import file_digest
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint
from calibration.families import hub_tensors, registry
from calibration.families.registry import FAMILIES, expected_tensors, family_of
from calibration.plan.planner import make_plan
from recipes.errors import SourceError
from tests.converted import run
from tests.exported import export, plan_of, recipe
from tests.faults.editing import config, drop, rename, values
from tests.models import deepseek_v4, standard
from tests.models.tokenizer import write_json
from verify.checks import Check, level_verdicts
from verify.fidelity.fidelity import verify_fidelity
from verify.known import Known
from verify.structure import stream
from verify.structure.served_config import config_check
from verify.structure.stream import Progress
from verify.structure.structure import verify_structure
from verify.structure.tokenizer import tokenizer_check


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    base = tmp_path_factory.mktemp("structure")
    source = deepseek_v4.write(base / "source", "fp8_mxfp4")
    plan, formats = export(source, base / "output", recipe(source, base / "output"))
    return base / "output", plan, formats


@pytest.fixture
def output(good: tuple, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good[0], tmp_path / "output"))


def check(
    good: tuple, directory: Path, digests: dict[str, str] | None = None, progress: Progress | None = None
) -> list[Check]:
    return verify_structure(directory, Known(good[1], good[2], digests or {}), progress)


def by_id(checks: list[Check]) -> dict[str, Check]:
    return {found.id.split(".", 1)[1]: found for found in checks}


def test_a_good_output_passes_with_and_without_its_source(good: tuple) -> None:
    assert {found.verdict for found in check(good, good[0])} == {"PASS"}
    alone = {found.id: found.verdict for found in verify_structure(good[0])}
    assert {key for key, verdict in alone.items() if verdict != "PASS"} == {"structure.copies"}


def test_a_source_without_a_plan_still_tells_what_is_lost(good: tuple, output: Path) -> None:
    known = Known(source=good[2])
    assert level_verdicts(verify_structure(output, known))["structure"] == "WARN"  # another quantization_config
    drop(r"^mtp\.")(output)
    found = by_id(verify_structure(output, known))
    assert (found["mtp"].verdict, found["tensors"].verdict) == ("FAIL", "FAIL")
    assert by_id(verify_structure(output))["mtp"].verdict == "WARN"


def test_a_misnamed_tensor_is_recognized(output: Path) -> None:
    rename(r"^layers\.0\.attn\.kv_norm", "layers.0.attn.kv_nrm")(output)
    assert "did it become layers.0.attn.kv_nrm.weight?" in by_id(verify_structure(output))["tensors"].figure


def test_an_unknown_family_is_unchecked_not_broken(output: Path) -> None:
    config(lambda c: c.update(model_type="deepseek_v9"))(output)
    found = by_id(verify_structure(output))
    assert found["tensors"].verdict == "UNCHECKED" and "deepseek_v9" in found["tensors"].figure
    assert found["companions"].verdict == found["finite"].verdict == found["scales"].verdict == "PASS"


def test_digests_of_both_spellings_are_those_of_the_files(
    good: tuple, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs so small that tensors are cut and shards take many turns of several threads."""
    monkeypatch.setattr(stream, "JOB", 4096)
    monkeypatch.setattr(stream, "_THREADS", 3)
    shards = sorted(output.glob("*.safetensors"))
    digests = {path.name: digest(path, Buffer(2**20)) if i % 2 else file_digest(path) for i, path in enumerate(shards)}
    seen: list[tuple[int, int]] = []
    checks = check(good, output, digests=digests, progress=lambda done, total: seen.append((done, total)))
    assert {found.verdict for found in checks} == {"PASS"} and by_id(checks)[
        "digests"
    ].figure == f"{len(shards)} shards"
    total = Checkpoint.open(output).total_bytes
    assert max(seen) == (total, total)
    swapped = dict(zip(digests, reversed(digests.values()), strict=True))
    assert by_id(check(good, output, digests=swapped))["digests"].verdict == "FAIL"


def test_values_are_found_wherever_the_tensor_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN, an Inf or a scale with a sign as the last element of tensors that begin at odd bytes and span jobs."""
    monkeypatch.setattr(stream, "JOB", 4096)
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"model_type": "none"}))
    broken = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn):
        tensor = torch.ones(5000, dtype=torch.float32)
        tensor[-1] = float("nan") if dtype == torch.float8_e4m3fn else float("-inf")
        broken[str(dtype).removeprefix("torch.")] = tensor.to(dtype)
    broken["float8_e8m0fnu"] = torch.full((5001,), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    fine = {f"fine_{name}": torch.ones(77).to(tensor.dtype) for name, tensor in broken.items()}
    save_file({"pad": torch.ones(3, dtype=torch.uint8)} | broken | fine, tmp_path / "model.safetensors")
    finite = by_id(verify_structure(tmp_path))["finite"]
    assert finite.verdict == "FAIL" and "fine" not in finite.figure
    save_file({"pad": torch.ones(3, dtype=torch.uint8)} | fine, tmp_path / "model.safetensors")
    assert by_id(verify_structure(tmp_path))["finite"].verdict == "PASS"


def test_a_model_type_of_no_family_is_unchecked(good: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not measured by the tensors of another family."""
    monkeypatch.setattr(registry, "FAMILIES", FAMILIES[1:])
    monkeypatch.setattr(hub_tensors, "CONFIG_MAPPING", {})
    tensors = by_id(verify_structure(good[0]))["tensors"]
    assert tensors.verdict == "UNCHECKED"
    assert "model_type 'deepseek_v4' is not known here" in tensors.figure
    with pytest.raises(SourceError, match="model_type 'deepseek_v4' has no grammar here"):
        make_plan(good[2].checkpoint, good[2], recipe(good[2].checkpoint.directory, Path("out")))


def test_a_hub_cache_may_link_to_its_blobs(output: Path) -> None:
    shard = sorted(output.glob("*.safetensors"))[0]
    (output.parent / "blobs").mkdir()
    shard.rename(output.parent / "blobs" / "0abc")
    shard.symlink_to(os.path.join("..", "blobs", "0abc"))
    assert by_id(verify_structure(output))["files"].verdict == "PASS"


MALFORMED: list[Callable[[dict], object]] = [
    lambda c: c.update(quantization_config=[1]),
    lambda c: c.update(quantization_config="fp8"),
    lambda c: c["quantization_config"].update(config_groups=None),
    lambda c: c["quantization_config"].update(config_groups={"a": 3}),
    lambda c: c["quantization_config"].update(config_groups={"a": {"weights": 4, "targets": ["Linear"]}}),
    lambda c: c["quantization_config"].update(config_groups={"a": {"weights": {}, "targets": "Linear"}}),
    lambda c: c["quantization_config"].update(ignore=[3]),
    lambda c: c["quantization_config"].update(ignore=["re:("]),
    lambda c: c["quantization_config"]["config_groups"]["experts"].update(targets=["re:["]),
    lambda c: c["quantization_config"]["config_groups"]["experts"].update(input_activations="none"),
    lambda c: c.update(num_hidden_layers="3"),
    lambda c: c.update(hidden_size=-64),
    lambda c: c.update(n_routed_experts=None),
    lambda c: c.update(compress_ratios=[0, "4", 128]),
    lambda c: c.update(compress_ratios=[0]),
]


@pytest.mark.parametrize("edit", MALFORMED)
def test_a_malformed_config_is_a_verdict(good: tuple, output: Path, edit: Callable[[dict], object]) -> None:
    config(edit)(output)
    for checks in (verify_structure(output), check(good, output)):
        assert level_verdicts(checks)["structure"] == "FAIL"


@pytest.mark.parametrize("place", ["ignore", "config_groups.experts.targets"])
def test_a_pattern_that_takes_for_ever_is_a_verdict(output: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.patterns.SECONDS_PER_MATCH", 0.02)
    slow = r"re:(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1[XY]"

    def edit(config: dict[str, Any]) -> None:
        *parents, last = place.split(".")
        for key in ("quantization_config", *parents):
            config = config[key]
        config[last] = [*config[last], slow]

    config(edit)(output)
    targets = by_id(verify_structure(output))["targets"]
    assert targets.verdict == "FAIL"
    assert f"quantization_config.{place}: {slow!r} takes too long to match" in targets.figure


@pytest.mark.parametrize("family", get_args(standard.Family))
def test_a_config_that_transformers_wrote_again_is_the_source_s(tmp_path: Path, family: standard.Family) -> None:
    source = standard.config(family)
    write_json(tmp_path / CONFIG_NAME, source)
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / CONFIG_NAME).read_text())
    assert again != source

    def judged(config: dict) -> Check:
        output, original = (Checkpoint(tmp_path, dict(found), {}, []) for found in (config, source))
        return config_check(output, family_of(source), None, original, expected_tensors(config)[1])

    assert judged(again).verdict == "WARN", judged(again)
    for name, value in {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}.items():
        assert judged(again | {"rope_parameters": again["rope_parameters"] | {name: value}}).verdict == "FAIL", name
    assert judged(again | {"dtype": "float16"}).verdict == "FAIL"


@pytest.mark.parametrize("older", [False, True], ids=["transformers 5", "transformers 4"])
def test_side_files_that_a_library_wrote_again_mean_the_source_s(tmp_path: Path, older: bool) -> None:
    source, output = standard.write(tmp_path / "source", "llama"), tmp_path / "output"
    AutoTokenizer.from_pretrained(source).save_pretrained(output)
    GenerationConfig.from_pretrained(source).save_pretrained(output)
    written = json.loads((output / "tokenizer.json").read_text())
    if older:  # which wrote the vocabulary once more, attributes of added tokens, and merges as text
        model, config = written["model"], json.loads((source / "tokenizer_config.json").read_text())
        model["merges"] = [" ".join(merge) for merge in model["merges"]]
        write_json(output / "tokenizer.json", written)
        write_json(output / "vocab.json", model["vocab"])
        (output / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]), encoding="utf-8")
        tokens = {token["content"]: token for token in written["added_tokens"]}
        write_json(output / "added_tokens.json", {text: token["id"] for text, token in tokens.items()})
        named = {key: config[key] for key in ("bos_token", "eos_token", "pad_token")}
        attributes = {
            key: {k: v for k, v in tokens[text].items() if k not in ("id", "special")} for key, text in named.items()
        }
        write_json(output / "special_tokens_map.json", attributes)
        decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokens.values()}
        write_json(output / "tokenizer_config.json", config | attributes | {"added_tokens_decoder": decoder})
    found = tokenizer_check(output, standard.config("llama"), source)
    assert found.verdict == "WARN" and "means the same" in found.figure, found.figure
    assert tokenizer_check(source, standard.config("llama"), source).verdict == "PASS"


def test_files_that_run_code_are_named_without_a_source(output: Path) -> None:
    assert (output / "encoding").is_dir()  # DeepSeek's own script, which nothing imports
    for name in ("modeling.py", "encoding/state.pt"):
        (output / name).write_text("")
        found = by_id(verify_structure(output))["files"]
        assert found.verdict == "WARN" and name in found.figure


def test_a_source_that_is_not_what_its_config_promises_does_not_excuse_the_output(tmp_path: Path) -> None:
    """vLLM cannot load names that the family does not have, whoever wrote them first."""
    source = standard.write(tmp_path / "source", "llama")
    rename(r"^model\.", "model.language_model.")(source)
    found = by_id(verify_structure(source, Known(source=Formats(Checkpoint.open(source)))))["tensors"]
    assert found.verdict == "FAIL" and "did it become model.language_model" in found.figure


@pytest.mark.parametrize("known", ["plan", "source", "nothing"])
def test_an_expert_of_zeros_is_no_fault_where_the_source_s_is(tmp_path: Path, known: str) -> None:
    source, output = standard.write(tmp_path / "source", "qwen3_moe"), tmp_path / "output"
    values(r"layers\.1\.mlp\.experts\.3\.", torch.zeros_like)(source)
    made = recipe(source, output, r"re:.*mlp\.experts\.\d+\..*_proj$", "NVFP4A16", method="convert", calibration=None)
    run(made)
    plan, formats = plan_of(source, made)
    given = Known(plan if known == "plan" else None, None if known == "nothing" else formats)
    found = by_id(verify_structure(output, given))["zeros"]
    assert found.verdict == ("WARN" if known == "nothing" else "PASS"), found.figure
    if known != "nothing":
        assert not [
            c for c in verify_fidelity(output, plan if known == "plan" else None, formats) if c.verdict == "FAIL"
        ]


def test_a_kv_cache_in_fp8_is_told_where_its_scales_are_stored(output: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config(lambda c: c["quantization_config"].update(kv_cache_scheme=scheme))(output)
    opened = Checkpoint.open(output)
    assert config_check(opened, family_of(opened.config), None, None, []).verdict == "FAIL"
    for kind in "kv":
        opened.tensors[f"layers.0.attn.{kind}_scale"] = opened.tensors["layers.0.attn.attn_sink"]
    assert config_check(opened, family_of(opened.config), None, None, []).verdict == "WARN"


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {"x": ["y"]}}', '{"weight_map": {"x": 3}}', "\udcff"])
def test_a_malformed_index_is_a_verdict(output: Path, content: str) -> None:
    (output / INDEX_NAME).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert level_verdicts(verify_structure(output))["structure"] == "FAIL"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"model": 3, "added_tokens": 4}', "\udcff"])
def test_a_malformed_tokenizer_is_a_verdict(good: tuple, output: Path, name: str, content: str) -> None:
    (output / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert by_id(check(good, output))["tokenizer"].verdict == "FAIL"


def test_output_is_byte_identical_where_the_plan_copies(good: tuple) -> None:
    output, source = Checkpoint.open(good[0]), good[2].checkpoint
    copied = [step for step in good[1].steps.values() if step.action == "copy"]
    assert len(copied) > 400
    for step in copied:
        assert output.read_bytes(step.outputs[0].name) == source.read_bytes(step.source)


def test_sidecars_travel_and_caches_do_not(good: tuple, tmp_path: Path) -> None:
    source = Path(shutil.copytree(good[2].checkpoint.directory, tmp_path / "source"))
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("x")
    (source / "old.bin").write_text("x")
    export(source, tmp_path / "out")
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    expected = {str(p.relative_to(good[0])) for p in good[0].rglob("*") if p.is_file()}
    assert (
        names == expected
        and {"tokenizer.json", "generation_config.json", "recipe.yaml", CONFIG_NAME, INDEX_NAME} <= names
    )
    assert any("encoding" in name for name in names)
