"""Sources in the stored forms of other libraries: found from headers, undone as their library does, converted, cast."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from calibration.checkpoint import kernels, native
from calibration.checkpoint.dequantize import StoredFormat
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.kernels import Stripe
from calibration.convert import layout
from recipes.errors import RecipeError, SourceError
from tests.converted import LINEAR, converting, digests, failing, run, tensors, undoing
from tests.exported import plan_of, recipe
from tests.models import stored_forms
from tests.models.storage import to_int4, to_tiles
from tests.reference.compressed_tensors import of_compressed_tensors

LABELS = {
    "fp8_tensor": "FP8 per tensor", "fp8_channel": "FP8 per channel", "fp8_modelopt": "FP8 per tensor", "int4": "INT4",
    "int4_asymmetric": "INT4", "int4_ordered": "INT4", "fp8_tiles_64": "FP8 tiles 64x64", "nvfp4_modelopt": "NVFP4 (modelopt)",
}  # fmt: skip
QUANTIZED = [form for form in LABELS if form != "nvfp4_modelopt"]
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sources")
    return {form: stored_forms.write(base / form, "llama", form) for form in LABELS}


def theirs(source: Path, form: str, module: str) -> torch.Tensor:
    """What the library that made the form makes of it; compressed-tensors is asked, modelopt's formula is written out."""
    stored = load_file(source / "model.safetensors")
    own = {n.removeprefix(f"{module}."): t for n, t in stored.items() if n.startswith(f"{module}.")}
    if form in ("fp8_modelopt", "fp8_tiles_64"):
        scale = own["weight_scale" if form == "fp8_modelopt" else "weight_scale_inv"]
        if scale.ndim:
            scale = scale.repeat_interleave(64, 0).repeat_interleave(64, 1)
        return own["weight"].float() * scale
    if form == "nvfp4_modelopt":
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
        unpacked = torch.empty(own["weight"].shape[0], own["weight"].shape[1] * 2)
        unpacked[:, 1::2], unpacked[:, 0::2] = values[(own["weight"] >> 4).long()], values[(own["weight"] & 15).long()]
        scale = own["weight_scale"].float() * own["weight_scale_2"]
        return (unpacked.reshape(*scale.shape, 16) * scale.unsqueeze(-1)).reshape(unpacked.shape)
    declared = stored_forms.FORMS[form][1]
    weights = declared["config_groups"]["group_0"]["weights"]
    order = own.pop("weight_g_idx", None)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(declared["format"])
    if order is None:
        return compressor.decompress(own, scheme)["weight"]
    # This release knows no order: columns of one group beside each other, as its older ones and vLLM do.
    sorted_columns = torch.argsort(order, stable=True)
    unpacked = compressor.decompress(own | {"weight_scale": torch.ones_like(own["weight_scale"])} | {
        "weight_zero_point": torch.zeros_like(own["weight_zero_point"]) + 0x88888888 - 2**32}, scheme)["weight"]  # fmt: skip
    repacked = to_packed(unpacked[:, sorted_columns].int())
    return compressor.decompress(own | {"weight_packed": repacked}, scheme)["weight"][:, torch.argsort(sorted_columns)]


def to_packed(codes: torch.Tensor) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(codes.to(torch.int8), 4)


@pytest.mark.parametrize("form", LABELS)
def test_a_form_is_found_from_headers_and_undone_as_its_library_does(sources: dict[str, Path], form: str) -> None:
    formats = Formats(Checkpoint.open(sources[form]))
    name = next(n for n in (f"{MODULE}.weight", f"{MODULE}.weight_packed") if n in formats.checkpoint.tensors)
    assert (formats.of(name).label, formats.of(name).shape) == (LABELS[form], (128, 256))
    wanted = theirs(sources[form], form, MODULE)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(formats.read(name, dtype), wanted.to(dtype)), dtype
    assert formats.companions == {n for n in formats.checkpoint.tensors if n.rpartition(".")[2] not in
                                  ("weight", "weight_packed")}  # fmt: skip


@pytest.mark.parametrize(("side", "width"), [(1, 32), (1, 64), (32, 32), (128, 128)])
@pytest.mark.parametrize("declared", [None, [32, 32], [128, 128]])
def test_tiles_of_one_row_are_found_by_their_scales_beside_any_declared_tile(
    tmp_path: Path, side: int, width: int, declared: list[int] | None
) -> None:
    """DeepSeek-V4.1 declares 32x32, and the rows of its Engram tables have a scale for each 32 columns. Tiles that are
    higher must be the declared ones: an engine would apply those."""
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(1))
    codes, scale = to_tiles(weight, torch.float8_e8m0fnu, side, width)
    save_file(
        {"layers.0.engram.embed.weight": codes, "layers.0.engram.embed.scale": scale}, tmp_path / "model.safetensors"
    )
    quantization = {"quantization_config": {"quant_method": "fp8", "weight_block_size": declared}} if declared else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"} | quantization))
    source = Checkpoint.open(tmp_path)
    if declared not in (None, [side, width]) and side > 1:
        with pytest.raises(SourceError, match=r"check weight_block_size in config\.json"):
            Formats(source)
        return
    formats = Formats(source)
    assert formats.of("layers.0.engram.embed.weight").tile == (side, width)
    spread = scale.float().repeat_interleave(side, 0)[:300].repeat_interleave(width, 1)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(formats.read("layers.0.engram.embed.weight", dtype), (codes.float() * spread).to(dtype))


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize(("level", "device"), [("torch", "cpu"), (native.levels()[-1], "cuda"), ("cuda", "cpu")])
def test_convert_quantizes_what_the_form_holds(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, level: str, device: str
) -> None:
    made = converting(sources[form], tmp_path / "out", LINEAR, "NVFP4A16")
    with native.use(level, device):
        run(made)
    assert failing(made) == set()
    plan, formats = plan_of(sources[form], made)
    found = tensors(made.output)
    for name, step in plan.quantized.items():
        packed, scales, _ = of_compressed_tensors(
            formats.read(step.source, torch.float32), found[f"{name}.weight_global_scale"]
        )
        assert torch.equal(found[f"{name}.weight_packed"], packed), name
        assert torch.equal(found[f"{name}.weight_scale"].view(torch.uint8), scales), name
    cut = converting(sources[form], tmp_path / "cut", LINEAR, "NVFP4A16")
    monkeypatch.setattr(layout, "JOB", 1 << 12)
    monkeypatch.setattr(layout, "FUSED", 0)
    with native.use(level, device):
        run(cut)
    assert digests(cut.output) == digests(made.output)


@pytest.mark.parametrize("form", LABELS)
def test_plain_undoes_the_form(sources: dict[str, Path], tmp_path: Path, form: str) -> None:
    made = undoing(sources[form], tmp_path / "out", export={"plain_dtype": "float32"})
    run(made)
    assert failing(made) == set()
    assert torch.equal(tensors(made.output)[f"{MODULE}.weight"], theirs(sources[form], form, MODULE).float())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("form", ["fp8_tensor", "fp8_channel", "fp8_modelopt", "int4"])
def test_what_is_no_target_is_written_plain_with_a_warning(sources: dict[str, Path], form: str) -> None:
    made = recipe(sources[form], Path("/nowhere/out"), [r"re:.*\.mlp\..*_proj$"])
    plan, formats = plan_of(sources[form], made)
    assert len(plan.quantized) == 6
    module = "model.layers.0.self_attn.q_proj"
    assert plan.outputs[f"{module}.weight"].dtype == "BF16"
    assert any(
        f"8 weights stored as {LABELS[form]} are no targets and are written in bfloat16" in w for w in plan.warnings
    )
    assert {plan.steps[name].action for name in formats.companions} == {"consume"}


def test_kept_tiles_that_vllm_refuses_in_a_fused_matrix_are_told_by_the_plan(tmp_path: Path) -> None:
    targets = [r"re:.*\.mlp\..*_proj$"]
    source = stored_forms.write(tmp_path / "source", "llama", "fp8_tiles")
    with pytest.raises(RecipeError) as caught:
        plan_of(source, recipe(source, Path("/nowhere/out"), targets))
    assert caught.value.problems == [
        "model.layers.0.self_attn.k_proj.weight: keeps its FP8 tiles, and FP8_BLOCK needs M to be a multiple of 128, M is 64: "
        "vLLM stacks another weight below it; set export.kept: plain, or quantize it otherwise (and 1 more like this)"
    ], "q has 128 rows, v comes last"
    with pytest.raises(RecipeError, match=r"k_proj\.weight: keeps its FP8 tiles"):
        plan_of(source, recipe(source, Path("/nowhere/out"), [r"re:.*self_attn\.[qkv]_proj$"], "FP8_BLOCK"))
    made = recipe(source, Path("/nowhere/out"), targets, export={"kept": "plain"})
    assert len(plan_of(source, made)[0].quantized) == 6
    assert len(plan_of(source, recipe(source, Path("/nowhere/out"), LINEAR))[0].quantized) == 14


def test_tiles_of_another_size_need_kept_plain(sources: dict[str, Path]) -> None:
    targets = [r"re:.*\.mlp\..*_proj$"]
    with pytest.raises(RecipeError, match=r"stored as FP8 tiles 64x64 and is no target.*export\.kept: plain"):
        plan_of(sources["fp8_tiles_64"], recipe(sources["fp8_tiles_64"], Path("/nowhere/out"), targets))
    made = recipe(sources["fp8_tiles_64"], Path("/nowhere/out"), targets, export={"kept": "plain"})
    assert len(plan_of(sources["fp8_tiles_64"], made)[0].quantized) == 6


@pytest.mark.parametrize("job", [1 << 12, 1 << 24])
def test_tiles_of_one_size_become_tiles_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: int) -> None:
    """96 rows a tile in, 128 out: pieces of a weight begin where both do."""
    source = stored_forms.write(tmp_path / "source", "llama", "fp8_tiles_96")
    made = converting(source, tmp_path / "out", [r"re:.*\.mlp\..*_proj$"], "FP8_BLOCK", export={"kept": "plain"})
    monkeypatch.setattr(layout, "JOB", job)
    run(made)
    assert failing(made) == set()
    found, formats = tensors(made.output), Formats(Checkpoint.open(source))
    weight = formats.read("model.layers.0.mlp.up_proj.weight", torch.float32)
    maxima = weight.reshape(2, 128, 1, 128).abs().amax((1, 3))
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight_scale"], maxima / 448)


@pytest.mark.parametrize("tile", [(64, 64), (32, 256), (96, 48), (1, 128), (512, 512)])
def test_kernels_take_tiles_of_any_size(tile: tuple[int, int]) -> None:
    rows, columns = 200, 320
    generator = torch.Generator().manual_seed(7)
    codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    grid = torch.rand(-(-rows // tile[0]), -(-columns // tile[1]), generator=generator) + 0.01
    tiles = grid.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)[:, :columns]
    weight = codes.float() * tiles
    stored = StoredFormat("fp8_tiles", (rows, columns), {"tile_scale": "s"}, tile)
    for level in native.levels():
        with native.use(level):
            stripe = Stripe(stored, "F8_E4M3", codes.view(torch.uint8).numpy(), grid.numpy())
            packed, scales = np.zeros((rows, columns // 2), np.uint8), np.zeros((rows, columns // 16), np.uint8)
            scale = kernels.global_scale(kernels.amax(stripe))
            kernels.quantize(stripe, scale, packed, scales)
            wanted = of_compressed_tensors(weight)
            assert np.array_equal(packed, wanted[0].numpy()) and np.array_equal(scales, wanted[1].numpy()), level


def edited(source: Path, copy: Path, edit: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    shutil.copytree(source, copy)
    stored = load_file(copy / "model.safetensors")
    edit(stored)
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(written | config))
    return copy


@pytest.mark.parametrize("side", [64, 256])
def test_a_tile_that_no_config_names_is_told_by_the_shapes(sources: dict[str, Path], tmp_path: Path, side: int) -> None:
    def retile(stored: dict[str, torch.Tensor]) -> None:
        for name in [name for name in stored if name.endswith("_proj.weight")]:
            weight = torch.randn(512, 768)
            stored[name], stored[name + "_scale_inv"] = to_tiles(weight, torch.float32, side)

    copy = edited(sources["fp8_tiles_64"], tmp_path / "copy", retile, quantization_config={"quant_method": "fp8"})
    formats = Formats(Checkpoint.open(copy))
    assert formats.of(f"{MODULE}.weight").tile == (side, side)


WRONG: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "FP8 scales of a third of the rows": (
        "fp8_channel", lambda t: t.update({f"{MODULE}.weight_scale": torch.ones(43, 1)}), r"per channel \[128, 1\]"),
    "FP8 scales of integers": (
        "fp8_channel", lambda t: t.update({f"{MODULE}.weight_scale": torch.ones(128, 1).int()}), r"I32 \[128, 1\]"),
    "INT4 without scales": ("int4", lambda t: t.pop(f"{MODULE}.weight_scale"), "low-bit weight without weight_scale"),
    "INT4 in groups that do not divide": (
        "int4", lambda t: t.update({f"{MODULE}.weight_scale": torch.ones(128, 7)}), r"scales \[128, groups\] that divide"),
    "INT4 zero points not packed": (
        "int4_asymmetric", lambda t: t.update({f"{MODULE}.weight_zero_point": torch.ones(128, 8).int()}), r"\[128/8, groups\]"),
    "modelopt scales of another shape": (
        "nvfp4_modelopt", lambda t: t.update({f"{MODULE}.weight_scale": torch.ones(128, 8)}), r"F8_E4M3 \[128, 256/16\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_companions_that_do_not_fit_are_named(sources: dict[str, Path], tmp_path: Path, case: str) -> None:
    form, edit, message = WRONG[case]
    copy = edited(sources[form], tmp_path / "copy", edit)
    with pytest.raises(SourceError, match=message) as caught:
        Formats(Checkpoint.open(copy))
    assert MODULE in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "no config group of integers"),
        ({"group_0": {"weights": {"type": "int", "num_bits": 8}}}, "num_bits 8; only num_bits 4"),
    ],
)
def test_packed_integers_of_other_or_untold_bits_are_refused(
    sources: dict[str, Path], tmp_path: Path, groups: dict[str, Any], message: str
) -> None:
    declared = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    copy = edited(sources["int4"], tmp_path / "copy", lambda tensors: None, quantization_config=declared)
    with pytest.raises(SourceError, match=message):
        Formats(Checkpoint.open(copy))


def test_an_int4_column_of_no_group_and_a_scale_that_is_nan_are_refused_by_name(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    def misplace(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{MODULE}.weight_g_idx"][5] = 1000

    def poison(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{MODULE}.weight_scale"][3, 0] = torch.nan

    for number, (form, edit) in enumerate((("int4_ordered", misplace), ("int4", poison), ("fp8_channel", poison))):
        copy = edited(sources[form], tmp_path / str(number), edit)
        formats = Formats(Checkpoint.open(copy))
        name = f"{MODULE}.weight" if form == "fp8_channel" else f"{MODULE}.weight_packed"
        with pytest.raises(SourceError, match=f"{name}: .* NaN or Inf"):
            formats.read(name)
        for method in (converting, undoing):
            arguments = (LINEAR, "NVFP4A16") if method is converting else ()
            with pytest.raises(SourceError, match=name):
                run(method(copy, tmp_path / f"out{number}{method.__name__}", *arguments))


def test_an_order_that_was_never_set_is_none(sources: dict[str, Path], tmp_path: Path) -> None:
    def unset(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{MODULE}.weight_g_idx"] = torch.full((256,), -1, dtype=torch.int32)

    unordered = edited(sources["int4"], tmp_path / "copy", unset)
    name = f"{MODULE}.weight_packed"
    one, two = (Formats(Checkpoint.open(source)).read(name) for source in (sources["int4"], unordered))
    assert torch.equal(one, two)


def test_the_int4_generator_agrees_with_the_library() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    made = to_int4(weight, 32, asymmetric=True)
    codes = unpack_from_int32(made["weight_packed"], 4, weight.shape)
    zero = unpack_from_int32(made["weight_zero_point"].contiguous(), 4, (24, 2), packed_dim=0)
    restored = (codes - zero.repeat_interleave(32, 1)).float() * made["weight_scale"].float().repeat_interleave(32, 1)
    assert float((restored - weight).abs().max()) < 0.3


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_modelopts_nvfp4_is_respelled_without_loss(tmp_path: Path, family: Any, scheme: str) -> None:
    source = stored_forms.write(tmp_path / "source", family, "nvfp4_modelopt")
    stored = load_file(source / "model.safetensors")
    for number, name in enumerate(name for name in stored if name.endswith("input_scale")):
        stored[name] = torch.tensor(0.01 + 0.001 * number)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    made = converting(source, tmp_path / "out", LINEAR, scheme)
    done = run(made)
    assert failing(made) == set()
    plan, found = plan_of(source, made)[0], tensors(made.output)
    modules = [name.removesuffix(".weight_scale_2") for name in stored if name.endswith(".weight_scale_2")]
    assert set(plan.modules("experts")) == set(modules) and not plan.quantized and done.quantized == 0
    for module in modules:
        assert torch.equal(found[f"{module}.weight_packed"], stored[f"{module}.weight"])
        for_bytes = (found[f"{module}.weight_scale"], stored[f"{module}.weight_scale"])
        assert torch.equal(*(scale.view(torch.uint8) for scale in for_bytes))
        assert torch.equal(found[f"{module}.weight_global_scale"][0], 1 / stored[f"{module}.weight_scale_2"])
        assert (f"{module}.input_global_scale" in found) == (scheme == "NVFP4")
    if scheme == "NVFP4":
        assert done.inverted == 2 * len(modules) and done.widened > 0
        for group in plan.shared_input_scales():
            largest = max(stored[f"{module}.input_scale"] for module in group)
            assert all(torch.equal(found[f"{module}.input_global_scale"][0], 1 / largest) for module in group)
    else:
        assert done.inverted == len(modules) and done.widened == 0
    products = [float(found[f"{m}.weight_global_scale"]) * float(stored[f"{m}.weight_scale_2"]) for m in modules]
    if scheme == "NVFP4A16":
        assert done.inexact == sum(product != 1 for product in products)
        assert done.worst == max(abs(1 / product - 1) for product in products) < 2.0**-23
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "nvfp4-pack-quantized"


def test_a_power_of_two_is_inverted_exactly(sources: dict[str, Path], tmp_path: Path) -> None:
    def powers(stored: dict[str, torch.Tensor]) -> None:
        for name in stored:
            if name.endswith(("weight_scale_2", "input_scale")):
                stored[name] = torch.tensor(2.0**-11)

    done = run(converting(edited(sources["nvfp4_modelopt"], tmp_path / "copy", powers), tmp_path / "out", LINEAR))
    assert (done.inverted, done.inexact, done.worst, done.widened) == (28, 0, 0.0, 0)
    scales = [t for n, t in tensors(tmp_path / "out").items() if n.endswith("global_scale")]
    assert len(scales) == 28 and all(scale.tolist() == [2048.0] for scale in scales)


RESPELLING: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "two scales in one matrix": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_2": torch.tensor(0.5)}),
        "served as one matrix have different global scales"),
    "a scale of zero": (lambda t: t.update({f"{MODULE}.weight_scale_2": torch.tensor(0.0)}), "0.0 is not a finite positive"),
    "a scale that is NaN": (lambda t: t.update({f"{MODULE}.input_scale": torch.tensor(torch.nan)}), "nan is not a finite"),
    "a reciprocal beyond float32": (
        lambda t: t.update({f"{MODULE}.input_scale": torch.tensor(1e-40)}), "is not a finite positive scale"),
    "no input scale": (lambda t: t.pop(f"{MODULE}.input_scale"), "has no input_scale, NVFP4 of experts needs one"),
    "half a matrix": (
        lambda t: [t.pop(f"model.layers.0.mlp.up_proj.{leaf}") for leaf in ("weight_scale", "weight_scale_2", "input_scale")]
        and t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(256, 128).bfloat16()}), "must be stored alike"),
}  # fmt: skip


@pytest.mark.parametrize("case", RESPELLING)
def test_what_cannot_be_respelled_is_refused_before_a_byte_is_written(
    sources: dict[str, Path], tmp_path: Path, case: str
) -> None:
    edit, message = RESPELLING[case]
    with pytest.raises((SourceError, RecipeError), match=message):
        run(converting(edited(sources["nvfp4_modelopt"], tmp_path / "copy", edit), tmp_path / "out", LINEAR))
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_nvfp4_is_not_calibrated_again(sources: dict[str, Path]) -> None:
    source = sources["nvfp4_modelopt"]
    with pytest.raises(RecipeError, match=r"already quantized \(NVFP4 \(modelopt\)\).*method: convert respell it"):
        plan_of(source, recipe(source, Path("/nowhere/out"), LINEAR))
