"""Hub tensors that hold all routed experts of a block: every expert's weights are what llm-compressor's own linearization
takes out of them, and what cannot be taken apart is refused by tensor."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.header import Layout, TensorHeader
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.stacks import Slice, Stack
from calibration.families.registry import family_of, open_source, unstacked
from calibration.families.stacked import UnknownLayout, projections, stack_of, with_scales
from calibration.forecast.cost import block_costs
from calibration.model.skeleton import build_skeleton
from recipes.errors import RecipeError, SourceError
from tests.converted import converting, failing, run, tensors, undoing
from tests.exported import task_of
from tests.models import any_family

#: Rows of one matrix; the same in a block without a module around experts and router; columns, transposed; interleaved, with
#: biases.
FAMILIES = ("granitemoe", "gemma4_text", "llama4_text", "gpt_oss")
EXPERTS = ["part:routed expert"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("stacked")
    return {family: any_family.write(base / family, family) for family in FAMILIES}


def shards_with(source: Path, text: str) -> dict[Path, dict[str, torch.Tensor]]:
    shards = {path: load_file(path) for path in source.glob("*.safetensors")}
    return {path: tensors for path, tensors in shards.items() if any(text in name for name in tensors)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_what_llm_compressor_takes_out_of_the_stack(family: str, sources: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(sources[family], dtype=torch.bfloat16)
    if family == "llama4_text":  # llm-compressor expects the wrapper's config
        model.config.text_config = model.config
    linearize_moe(model)
    wanted = dict(model.state_dict())
    source = open_source(sources[family])
    grammar = family_of(source.config)
    taken = [name for name in source.tensors if ".experts." in name]
    there = Checkpoint.open(sources[family]).tensors
    assert len(taken) == sum(len(stack.slices) * stack.shape[0] for stack in grammar.stacks if stack.name in there) > 0
    for name in taken:
        found = grammar.model_name(name)
        assert found is not None and grammar.place(name).part == "routed expert"
        assert torch.equal(source.read(name), wanted[found]), name
    assert source.total_bytes == Checkpoint.open(sources[family]).total_bytes


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return any_family.write(tmp_path_factory.mktemp("mxfp4") / "source", "gpt_oss", mxfp4=True)


def test_mxfp4_of_gpt_oss_is_what_transformers_makes_of_it(mxfp4: Path) -> None:
    formats = Formats(source := open_source(mxfp4))
    stored = tensors(mxfp4)
    prefix = "model.layers.1.mlp.experts"
    gate_up, down = (  # [E, K, M]
        convert_moe_packed_tensors(*(stored[f"{prefix}.{leaf}_{kind}"] for kind in ("blocks", "scales")))
        for leaf in ("gate_up_proj", "down_proj")
    )
    for expert in range(len(gate_up)):
        parts = {"gate": gate_up[expert, :, 0::2], "up": gate_up[expert, :, 1::2], "down": down[expert]}
        for part, wanted in parts.items():
            name = f"{prefix}.{expert}.{part}_proj.weight"
            assert formats.of(name).kind == "mxfp4" and source.tensors[name].dtype == "U8"
            assert torch.equal(formats.read(name), wanted.t()), name


@pytest.mark.parametrize(
    "made_by", [undoing, partial(converting, targets=["part:attention"], export={"kept": "plain"})]
)
def test_mxfp4_experts_that_stay_become_the_stack_that_transformers_makes_of_them(
    made_by: Any, tmp_path: Path, mxfp4: Path
) -> None:
    made = made_by(mxfp4, tmp_path / "out")
    run(made)
    before, after = tensors(mxfp4), tensors(tmp_path / "out")
    for name in [name.removesuffix("_blocks") for name in before if name.endswith("_blocks")]:
        wanted = convert_moe_packed_tensors(before[f"{name}_blocks"], before[f"{name}_scales"])
        assert after[name].is_contiguous() and torch.equal(after[name], wanted)
    assert not [name for name in after if name.endswith(("_blocks", "_scales")) or ".experts.0." in name]
    assert not failing(made)
    assert torch.equal(Formats(open_source(mxfp4)).read(f"{name}_blocks"), after[name])


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_a_stack_is_converted_like_its_experts_alone(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = open_source(sources[family])
    apart = tmp_path / "apart"
    apart.mkdir()
    for file in sources[family].glob("*.json"):
        (apart / file.name).write_bytes(file.read_bytes())
    (apart / "model.safetensors.index.json").unlink()
    save_file({name: source.read(name) for name in source.tensors}, apart / "model.safetensors", {"format": "pt"})
    for name, path in (("stack", sources[family]), ("apart", apart)):
        run(converting(path, tmp_path / f"{name}-out", EXPERTS))
    stacked, single = (tensors(tmp_path / f"{name}-out") for name in ("stack", "apart"))
    assert stacked.keys() == single.keys() and any(name.endswith(".weight_packed") for name in stacked)
    for name in stacked:
        assert torch.equal(stacked[name].view(torch.uint8), single[name].view(torch.uint8)), name
    assert not failing(converting(sources[family], tmp_path / "stack-out", EXPERTS))


@pytest.mark.parametrize("targets", [EXPERTS, ["re:.*experts.3.up_proj$"]])
def test_experts_with_biases_are_no_targets_and_the_message_says_why(
    targets: list[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"mlp\.experts\.\d\.\w+_proj \(vLLM 0.32 has no biases in NVFP4 experts"):
        task_of(converting(sources["gpt_oss"], tmp_path / "out", targets))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_whose_experts_stay_is_copied_whole(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    made = converting(sources[family], tmp_path / "out", ["part:attention"])
    run(made)
    before, after = tensors(sources[family]), tensors(tmp_path / "out")
    stacks = [stack.name for stack in family_of(Checkpoint.open(sources[family]).config).stacks if stack.name in before]
    assert stacks and all(torch.equal(before[name], after[name]) for name in stacks)
    task = task_of(made)
    read = sum(sum(block.reads.values()) for block in block_costs(task.plan, task.formats))
    assert read == task.source.total_bytes
    assert not [name for name in after if ".experts.0." in name]
    assert not failing(made)


def test_a_stack_of_another_shape_is_refused_by_tensor(sources: dict[str, Path], tmp_path: Path) -> None:
    source = any_family.write(tmp_path / "source", "llama4_text")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
    message = r"experts\.gate_up_proj: BF16 \[8, 256, 256\], the model built from config.json needs \[4, 256, 256\]"
    with pytest.raises(SourceError, match=message):
        open_source(source)


def test_a_stack_that_transformers_transposes_at_loading_is_read_in_both_forms(tmp_path: Path) -> None:
    """Qwen3-VL-MoE: `[E, D, 2 I]` on the hub, `[E, 2 I, D]` as transformers saves it."""
    hub = any_family.write(tmp_path / "hub", "qwen3_vl_moe")
    saved = shutil.copytree(hub, tmp_path / "saved")
    for path in saved.glob("*.safetensors"):
        turned = {
            name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(turned, path, {"format": "pt"})
    one, other = open_source(saved), open_source(hub)
    whole = next(iter(one.whole))
    assert other.whole[whole].header.shape == tuple(one.whole[whole].header.shape[at] for at in (0, 2, 1))
    experts = [name for name in one.tensors if ".experts." in name]
    assert len(experts) == 2 * 8 * 3
    for name in experts:
        assert one.tensors[name].shape == other.tensors[name].shape and torch.equal(one.read(name), other.read(name)), (
            name
        )


def test_an_expert_beside_its_stack_is_refused(tmp_path: Path) -> None:
    source = any_family.write(tmp_path / "source", "granitemoe")
    name, stack = "model.layers.0.block_sparse_moe.experts.3.up_proj.weight", "layers.0.block_sparse_moe.input_linear"
    ((path, tensors),) = shards_with(source, stack).items()
    save_file(tensors | {name: torch.zeros(128, 256, dtype=torch.bfloat16)}, path, {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = path.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        SourceError, match=r"input_linear.weight holds .*experts.3.up_proj.weight, which the checkpoint"
    ):
        open_source(source)


def test_an_expert_is_read_without_the_rest_of_its_stack(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = list[int](), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: asked.append(len(into[0])) or read(file, into, at))
    source = open_source(sources["llama4_text"])
    source.read("model.layers.1.feed_forward.experts.5.up_proj.weight")
    assert asked == [256 * 256 * 2]  # [D, 2 I] of one of eight experts


def test_a_stack_that_its_projections_do_not_cover_is_no_stack() -> None:
    memory = torch.empty(4, 12, 16, device="meta")
    halves = {"gate_proj.weight": memory[0, :6], "up_proj.weight": memory[0, 6:]}
    assert [part.layout.begin for part in stack_of("mlp.experts.gate_up_proj", memory, halves).slices] == [0, 6]
    for wrong in ({"up_proj.weight": memory[0, 6:]}, halves | {"gate_proj.weight": memory[0, :7]}):
        with pytest.raises(UnknownLayout, match=r"do not cover mlp\.experts\.gate_up_proj"):
            stack_of("mlp.experts.gate_up_proj", memory, wrong)


def test_a_module_that_does_not_say_how_it_lays_out_experts_is_not_guessed() -> None:
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.empty(4, 12, 16, device="meta"))
    with pytest.raises(UnknownLayout, match="transformers does not say how Module lays out its experts"):
        list(projections(module))


def test_a_model_s_own_stacks_are_read_where_transformers_writes_single_experts(tmp_path: Path) -> None:
    single = open_source(any_family.write(tmp_path / "single", "qwen3_5_moe"))
    stacked = Checkpoint.open(any_family.write(tmp_path / "stacked", "qwen3_5_moe", form="stacked"))
    assert "model.language_model.layers.1.mlp.experts.gate_up_proj" in stacked.tensors
    read = unstacked(stacked)
    assert read.tensors.keys() == single.tensors.keys()
    assert all(torch.equal(read.read(name), single.read(name)) for name in single.tensors)


def test_tiles_of_a_stack_are_those_of_its_experts(tmp_path: Path) -> None:
    source = open_source(any_family.write(tmp_path / "source", "step3p7", form="fp8_stacks"))
    built = build_skeleton(Formats(source), tmp_path, False)
    experts = built.model.get_submodule("model.layers.2.mlp.experts")
    built.load([experts])
    stored = load_file(source.directory / "model.safetensors")
    for leaf in ("gate_proj", "down_proj"):
        name = f"model.layers.2.moe.{leaf}.weight"
        scales = stored[f"{name}_scale_inv"].repeat_interleave(128, 1).repeat_interleave(128, 2)
        values = (stored[name].float() * scales[:, : stored[name].shape[1], : stored[name].shape[2]]).bfloat16()
        assert torch.equal(torch.stack([experts[n].get_submodule(leaf).weight for n in range(8)]), values)


def test_a_tile_with_values_of_two_projections_is_no_scale_of_one() -> None:
    parts = tuple(
        Slice(f"experts.{{}}.{leaf}.weight", Layout(384, 256, begin, 192)) for leaf, begin in (("gate", 0), ("up", 192))
    )
    stack = Stack("experts.gate_up_proj", (2, 384, 256), parts)
    header = TensorHeader("experts.gate_up_proj", "F8_E4M3", (2, 384, 256), "s", 0, 196608)
    scales = {
        rows: TensorHeader("experts.gate_up_proj_scale_inv", "F32", (2, rows, 2), "s", 0, rows * 16) for rows in (3, 4)
    }
    (odd,) = with_scales([stack], {header.name: header, scales[3].name: scales[3]})
    assert odd.name == stack.name
    _, even = with_scales([stack], {header.name: header, scales[4].name: scales[4]})
    assert [(part.layout.begin, part.layout.count) for part in even.slices] == [(0, 2), (2, 2)]


def test_one_scale_of_a_stack_is_that_of_each_expert(tmp_path: Path) -> None:
    source = open_source(any_family.write(tmp_path / "source", "llama4_text", form="fp8_modelopt_stacks"))
    built = build_skeleton(Formats(source), tmp_path, False)
    experts = built.model.get_submodule("model.layers.1.feed_forward.experts")
    built.load([experts])
    stored = load_file(source.directory / "model.safetensors")
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    values = (stored[name].float() * stored[f"{name}_weight_scale"]).bfloat16().transpose(1, 2)
    for number in (0, 7):
        assert torch.equal(
            torch.cat([experts[number].gate_proj.weight, experts[number].up_proj.weight]), values[number]
        )
