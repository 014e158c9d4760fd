"""Fidelity: good outputs pass every check, and each corruption turns the check red that must see it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.checkpoint import nvfp4
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import INDEX_NAME, Checkpoint
from recipes.checks import Fidelity, Verify
from tests.exported import export, recipe
from tests.models import deepseek_v4, standard
from verify.fidelity.fidelity import COLUMNS, measure_fidelity, verify_fidelity

BLOCK = "model.layers.0"
W1, W2, W3 = (f"{BLOCK}.block_sparse_moe.experts.3.w{n}" for n in (1, 2, 3))
LINEAR = r"re:^model\.layers\.\d+\..*(proj|w[123])$"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    base = tmp_path_factory.mktemp("fidelity")
    source = standard.write(base / "source", "mixtral")
    plan, formats = export(source, base / "output", recipe(source, base / "output", LINEAR))
    return base / "output", plan, formats


def spoiled(good: tuple, directory: Path, edit: Callable[[Tensors], None]) -> Path:
    """A copy of the good output whose tensors were edited, all shards seen as one."""
    output = Path(shutil.copytree(good[0], directory / "output"))
    index = json.loads((output / INDEX_NAME).read_text())
    shards = {path.name: load_file(path) for path in sorted(output.glob("*.safetensors"))}
    before = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    after = dict(before)
    edit(after)
    for shard, tensors in shards.items():
        if any(after.get(name) is not tensor for name, tensor in tensors.items()):
            save_file({name: after[name].contiguous() for name in tensors if name in after}, output / shard)
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if name in after}
    (output / INDEX_NAME).write_text(json.dumps(index))
    return output


def group(name: str, factor: float) -> Callable[[Tensors], None]:
    """Multiplies one group scale, an ordinary one that E4M3 holds doubled as well."""

    def edit(tensors: Tensors) -> None:
        scales = tensors[f"{name}.weight_scale"].to(torch.float32)
        row, column = ((scales > 160) & (scales <= 224)).nonzero()[0]
        scales[row, column] *= factor
        tensors[f"{name}.weight_scale"] = scales.to(torch.float8_e4m3fn)

    return edit


def value(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def exchange(one: str, other: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for suffix in ("weight_packed", "weight_scale", "weight_global_scale"):
            a, b = f"{one}.{suffix}", f"{other}.{suffix}"
            tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()

    return edit


def flip(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[7, 9] ^= 0x20
    return changed


def requantized(factor: float, name: str = W1) -> Callable[[Tensors], None]:
    """All group scales multiplied and the codes made to fit them: what a wrong observer would write."""

    def edit(tensors: Tensors) -> None:
        packed, scale, glob = (tensors[f"{name}.{s}"] for s in ("weight_packed", "weight_scale", "weight_global_scale"))
        weight = nvfp4.dequantize(packed, scale, glob)
        scale = (scale.to(torch.float32) * factor).to(torch.float8_e4m3fn)
        tensors |= {f"{name}.weight_packed": nvfp4.pack(weight, scale, glob)[0], f"{name}.weight_scale": scale}

    return edit


def zero_rows(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[:2] = 0
    return changed


FAULTS: dict[str, tuple[Callable[[Tensors], None], set[str]]] = {
    "one group scale doubled": (group(W1, 2), {"group_scales", "rounding"}),
    "one group scale halved": (group(W2, 0.5), {"group_scales", "rounding"}),
    "one group scale a quarter up": (group(W2, 1.25), {"rounding"}),
    "one bit of one code flipped": (value(f"{W3}.weight_packed", flip), {"rounding"}),
    "nibbles in the wrong order": (value(f"{W1}.weight_packed", lambda t: (t << 4) | (t >> 4)),
                                   {"weights", "cosine", "rounding"}),
    "two experts exchanged": (exchange(W1, W1.replace(".3.", ".2.")), {"weights", "cosine", "sqnr"}),
    "w1 and w3 exchanged": (exchange(W1, W3), {"weights", "cosine"}),
    "blocks exchanged": (exchange(W2, W2.replace("layers.0", "layers.1")), {"weights", "cosine"}),
    "an expert zeroed": (value(f"{W2}.weight_packed", torch.zeros_like), {"weights", "zero_groups"}),
    "two rows zeroed": (value(f"{W2}.weight_packed", zero_rows), {"zero_groups", "rounding"}),
    "global scale inverted": (value(f"{W2}.weight_global_scale", lambda t: 1 / t), {"weights", "global_scales"}),
    "scales too small for the weights": (requantized(0.5), {"saturation"}),
    "router rounded to FP8": (
        value(f"{BLOCK}.block_sparse_moe.gate.weight", lambda t: t.to(torch.float8_e4m3fn).to(t.dtype)), {"kept"}),
    "a norm dropped": (lambda tensors: tensors.pop(f"{BLOCK}.input_layernorm.weight") is None, {"coverage"}),
}  # fmt: skip


def failing(checks: list) -> set[str]:
    return {found.id.removeprefix("fidelity.") for found in checks if found.verdict == "FAIL"}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught_by_their_checks(good: tuple, tmp_path: Path, fault: str) -> None:
    edit, expected = FAULTS[fault]
    output = spoiled(good, tmp_path, edit)
    with_plan = verify_fidelity(output, *good[1:])
    assert failing(with_plan) >= expected, [c for c in with_plan if c.verdict == "FAIL"]


def test_a_module_worse_than_its_peers_is_named(good: tuple, tmp_path: Path) -> None:
    found = {c.id: c for c in verify_fidelity(spoiled(good, tmp_path, requantized(0.6)), *good[1:])}
    assert found["fidelity.outliers"].verdict == "WARN" and W1 in found["fidelity.outliers"].figure


@pytest.mark.parametrize("source_format", ["fp8_mxfp4", "mixtral"])
def test_good_outputs_pass_and_their_figures_are_right(good: tuple, tmp_path: Path, source_format: str) -> None:
    output, plan, formats = good
    if source_format == "fp8_mxfp4":
        source, output = deepseek_v4.write(tmp_path / "source", "fp8_mxfp4"), tmp_path / "output"
        plan, formats = export(source, output, recipe(source, output))
    report = measure_fidelity(output, plan, formats)
    assert {found.verdict for found in report.checks} == {"PASS"}
    assert measure_fidelity(output, None, formats).checks == report.checks
    assert json.loads(json.dumps(report.data)) == report.data and report.data["columns"] == list(COLUMNS)
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in report.data["rows"]}
    assert rows.keys() == plan.quantized.keys()
    written = Formats(Checkpoint.open(output))
    for module, row in list(rows.items())[::37]:
        x = formats.read(plan.quantized[module].source, torch.float32)
        y = written.read(f"{module}.weight_packed", torch.float32)
        assert row["relative_error"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-3)
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(x.flatten(), y.flatten(), 0)), abs=1e-4)
        place = plan.family.place(module)
        assert (row["part"], row["block"], row["expert"]) == (place.part, place.block, place.expert)
    scales = sum(h.numel for n, h in written.checkpoint.tensors.items() if n.removesuffix(".weight_scale") in rows)
    assert sum(map(sum, report.data["group_scales"]["counts"].values())) == scales


def test_kept_fp8_and_mtp_must_keep_codes_and_scales(tmp_path: Path) -> None:
    source = deepseek_v4.write(tmp_path / "source", "fp8_mxfp4")
    good = tmp_path / "good", *export(source, tmp_path / "good", recipe(source, tmp_path / "good"))
    names = [f"{module}.{suffix}" for module, suffix in (("layers.1.attn.wq_b", "weight_scale"),
             ("layers.1.attn.wq_b", "weight"), ("mtp.0.ffn.experts.0.w1", "weight"))]  # fmt: skip

    def edit(tensors: Tensors) -> None:
        for name in names:
            tensors[name] = tensors[name].clone()
            tensors[name].view(torch.uint8)[0, -1] ^= 1

    checks = {c.id: c for c in verify_fidelity(spoiled(good, tmp_path, edit), *good[1:])}
    assert checks["fidelity.kept"].verdict == "FAIL"
    assert all(name.rpartition(".")[0] in checks["fidelity.kept"].figure for name in names[1:])


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_fp8_tiles_have_their_own_threshold(tmp_path: Path, factor: float) -> None:
    name, weight = "model.layers.0.mlp.up_proj", torch.randn(200, 272, generator=torch.Generator().manual_seed(0))
    tiles = torch.full((2, 3), 4.0 / 448)
    grid = tiles.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :272]
    stored = {f"{name}.weight": (weight / grid).to(torch.float8_e4m3fn), f"{name}.weight_scale": tiles * factor}
    for directory, tensors in (("source", {f"{name}.weight": weight}), ("output", stored)):
        (tmp_path / directory).mkdir()
        save_file(tensors, tmp_path / directory / "model.safetensors")
        (tmp_path / directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    checks = verify_fidelity(tmp_path / "output", None, Formats(Checkpoint.open(tmp_path / "source")))
    assert failing(checks) == ({"fp8_weights"} if factor > 1 else set()), checks


def test_thresholds_come_from_the_recipe(good: tuple) -> None:
    strict = Fidelity(worst_error=0.01, min_cosine=0.999, min_sqnr=40.0, max_saturated=0.01, max_group_gain=1.01)
    assert failing(verify_fidelity(*good, strict)) == {"weights", "cosine", "sqnr", "saturation", "group_scales"}
    assert Verify.model_validate({"fidelity": True}).fidelity == Verify().fidelity == Fidelity()
    assert Verify.model_validate({"fidelity": False}).fidelity is None
    assert Verify.model_validate({"fidelity": {"worst_error": 0.2}}).fidelity == Fidelity(worst_error=0.2)


@pytest.mark.parametrize("fault", [None, "a norm of its own", "experts exchanged"])
def test_awq_like_factors_are_accepted_where_norm_and_weights_agree(tmp_path: Path, fault: str | None) -> None:
    """Plain llm-compressor's AWQ: norm / s, q/k/v and gate/up columns * s; up rows / t, down columns * t."""
    source = standard.write(tmp_path / "source", "llama")
    scaled, generator = Path(shutil.copytree(source, tmp_path / "scaled")), torch.Generator().manual_seed(0)
    shards = {path: load_file(path) for path in sorted(scaled.glob("*.safetensors"))}
    tensors = {name: tensor.float() for shard in shards.values() for name, tensor in shard.items()}
    for block in ("model.layers.0", "model.layers.1"):
        s, t = (2 ** torch.randn(size, generator=generator) for size in (128, 256))
        for norm, fed in (
            ("input", ("self_attn.q", "self_attn.k", "self_attn.v")),
            ("post_attention", ("mlp.gate", "mlp.up")),
        ):
            tensors[f"{block}.{norm}_layernorm.weight"] /= s
            for leaf in fed:
                tensors[f"{block}.{leaf}_proj.weight"] *= s
        tensors[f"{block}.mlp.up_proj.weight"] /= t[:, None]
        tensors[f"{block}.mlp.down_proj.weight"] *= t
    if fault == "a norm of its own":
        tensors["model.layers.1.input_layernorm.weight"] *= 2 ** torch.randn(128, generator=generator)
    elif fault == "experts exchanged":
        one, other = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj.weight"
        tensors[one], tensors[other] = tensors[other], tensors[one]
    for path, shard in shards.items():
        save_file({name: tensors[name].to(torch.bfloat16) for name in shard}, path)
    export(scaled, tmp_path / "output", recipe(scaled, tmp_path / "output", LINEAR))
    checks = verify_fidelity(tmp_path / "output", None, Formats(Checkpoint.open(source)))
    if fault is None:
        assert {c.id for c in checks if c.verdict != "PASS"} == {"fidelity.rescaled"}
    else:
        assert ({"kept"} if "norm" in fault else {"weights", "cosine"}) <= failing(checks)
