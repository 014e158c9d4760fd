"""A family that no table names: what `hub_tensors` reads from transformers' own model, as a grammar.

The proof is a bijection: every hub tensor has one place, and every tensor of the model is filled. No name is guessed: what cannot
be derived is refused.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from calibration.checkpoint.formats import logical_name
from calibration.checkpoint.source_config import TEXT_CONFIG, without
from calibration.checkpoint.stacks import Stack
from calibration.families import wrapped
from calibration.families.family import BESIDE, NOT_LINEAR, ROUTED, Family, draft_blocks
from calibration.families.hub_tensors import (
    HubTensor,
    Underivable,
    block_count,
    empty_model,
    expert_modules,
    hub_tensors,
)
from calibration.families.promised import ConfigReader, Promise, Wanted
from calibration.families.served import Served, rows
from calibration.families.stacked import experts_name, mxfp4_stacks
from recipes.errors import SourceError

#: Projections that vLLM runs as one matrix, by their leaves on the hub (`packed_modules_mapping` of its models, 0.32).
_FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"),
)  # fmt: skip
_GATE_UP, _GATES, _LINEAR = ("gate", "up"), ("B", "C", "x"), ("linear q", "linear k", "linear v")
_MAMBA = tuple(f"mamba {part}" for part in ("z", "x", "B", "C", "dt"))  # mamba_mixer2.py
#: Weights that the hub stores merged and that are several parts of one matrix in vLLM's class (0.32), by the type of the language
#: model and their leaves. `tests/integration/test_wants.py` holds them against the class.
_MERGED: dict[str, dict[str, tuple[str, ...]]] = {
    "phi3": {"qkv_proj": ("q", "k", "v"), "gate_up_proj": _GATE_UP},
    "glm": {"gate_up_proj": _GATE_UP},
    "glm4": {"gate_up_proj": _GATE_UP},
    "glm4v_text": {"gate_up_proj": _GATE_UP},
    "glm_ocr_text": {"gate_up_proj": _GATE_UP},
    "dbrx": {"Wqkv": ("q", "k", "v")},
    "granitemoeshared": {"input_linear": _GATE_UP},
    "granitemoe_swa": {"input_linear": _GATE_UP},
    "granitemoehybrid": {"in_proj": _MAMBA, "input_linear": _GATE_UP},
    "nemotron_h": {"in_proj": _MAMBA},
    "mamba2": {"in_proj": _MAMBA},
    "lfm2": {"in_proj": _GATES},
    "lfm2_moe": {"in_proj": _GATES},
    "qwen3_5_text": {"in_proj_qkv": _LINEAR},
    "qwen3_5_moe_text": {"in_proj_qkv": _LINEAR},
}
_MAMBA_HEADS = "mamba_num_heads|mamba_n_heads|num_heads"
_MAMBA_STATES = ("mamba_n_groups|n_groups", "mamba_d_state|ssm_state_size|state_size")
#: The fields whose product is the height of a part, up to a factor that all parts of its weight share; `a|b`: the first that the
#: config has.
_HEIGHTS: dict[str, tuple[str, ...]] = {
    "q": ("num_attention_heads",),
    **dict.fromkeys(("k", "v"), ("num_key_value_heads",)),
    **dict.fromkeys(("linear q", "linear k"), ("linear_num_key_heads", "linear_key_head_dim")),
    "linear v": ("linear_num_value_heads", "linear_value_head_dim"),
    **dict.fromkeys(("mamba z", "mamba x"), (_MAMBA_HEADS, "mamba_head_dim|mamba_d_head|head_dim")),
    **dict.fromkeys(("mamba B", "mamba C"), _MAMBA_STATES),
    "mamba dt": (_MAMBA_HEADS,),
}
#: A number between the dots of a name: a block's, an expert's.
_NUMBER = r"(?<=\.)\d+(?=\.|$)"
#: A module that multiplies by the weight of a child.
_MULTIPLIED = r"self\.(\w+)\.weight(?= @)"

#: Families that `tests/integration/test_serving_agreement.py` serves and compares with an independent reference.
TESTED = (
    "olmoe", "qwen2", "phi3", "gemma3_text", "glm4", "granite", "ministral3", "smollm3", "seed_oss", "starcoder2",
    "qwen2_moe", "ernie4_5_moe", "exaone_moe", "minimax_m2", "deepseek_v3", "glm4_moe_lite", "mimo_v2_flash", "lfm2_moe",
    "lfm2", "afmoe", "longcat_flash",
)  # fmt: skip
#: Families whose stacked experts are released in MXFP4, under names of their own.
_MXFP4 = ("gpt_oss",)
#: CompressedTensorsW4A4Nvfp4MoEMethod.create_weights (vllm 0.32) makes no parameter for them, and the loader of the model
#: (models/gpt_oss.py, `_load_weights_other`) reads no global scale of an expert.
_NO_BIASES = "vLLM 0.32 has no biases in NVFP4 experts and could not load them"


@dataclass(frozen=True, slots=True)
class _Grammar:
    """The empty model of a config, its wrapper if it is one, and every hub tensor by the name that transformers writes."""

    model: PreTrainedModel
    wrapper: wrapped.Wrapper | None
    tensors: dict[str, HubTensor]
    stacks: tuple[Stack, ...]

    @property
    def fills(self) -> dict[str, str]:
        """Hub name -> the tensor that it fills; of a stack, its own name."""
        return {stack.name: stack.name for stack in self.stacks} | {name: t.fills for name, t in self.tensors.items()}


def derive(config: dict[str, Any], where: str, names: Iterable[str] = ()) -> Family:
    """The family of a config that transformers can build a model of, spelled as the `names` of a checkpoint's tensors are.
    Raises SourceError, naming what cannot be derived."""
    try:
        # Neither how weights are stored nor what code a checkpoint brings says anything of its names.
        plain = wrapped.known_model_type(without(config, "quantization_config", "auto_map"))
        text = json.dumps(plain, sort_keys=True)
        known = set(map(logical_name, names))
        whole = not _read(text).stacks and _has_whole_experts(_read(text).model, known)
        read = _read(text, whole)
        spelled = wrapped.own_spelling(read.model, read.fills, known)
        return _derived(text, tuple(sorted(_with_stacks(read.stacks, spelled).items())), whole)
    except (Underivable, wrapped.UnknownPart) as problem:
        raise SourceError(
            f"{where}: model_type {config.get('model_type')!r} has no grammar here, and none can be derived: {problem}"
        ) from None


@lru_cache(maxsize=4)
def _read(text: str, whole: bool = False) -> _Grammar:
    """The grammar of a config; `whole`: with all experts of a block in the tensors that the model has for them."""
    model = empty_model(json.loads(text))
    wrapper = wrapped.read_wrapper(model)
    return _Grammar(model, wrapper, *hub_tensors(model, wrapper, whole))


def _has_whole_experts(model: PreTrainedModel, names: set[str]) -> bool:
    """Whether a checkpoint stores the model's own tensors of all experts, where transformers writes single ones: it reads
    both, and releases differ (Qwen3.5: the FP8 one by expert, the BF16 one whole)."""
    for owner in expert_modules(model):
        ends = tuple(f"{owner.rpartition('layers.')[2]}.{leaf}" for leaf in model.get_submodule(owner)._parameters)
        return any(name.endswith(ends) for name in names)
    return False


@lru_cache(maxsize=8)
def _derived(text: str, spelled: tuple[tuple[str, str], ...], whole: bool) -> Family:
    config, read, own = json.loads(text), _read(text, whole), dict(spelled)
    model, wrapper, kept = read.model, read.wrapper, rows().get(str(config["model_type"]))
    stacks = tuple(_spelled_stack(stack, own) for stack in read.stacks)
    tensors = {own.get(name, name): tensor for name, tensor in read.tensors.items()}
    blocks, not_observed = _block_pattern(model, tensors, wrapper), _not_observed(model, tensors)
    if wrapper is not None:
        tensors = {name: replace(tensor, fills=wrapper.in_text_model(tensor.fills)) for name, tensor in tensors.items()}
    return Family(
        name=str(config["model_type"]),
        model_types=(str(config["model_type"]),),
        block=blocks,
        parts=_parts(tensors),
        fused_leaves=_fused_leaves(tensors, kept),
        promised=_promise(tensors),
        renames=_renames(tensors),
        mtp=_draft(model, config, tensors, blocks),
        never_quantized=_never_quantized(tensors) + (kept.never_quantized if kept else ()),
        not_observed=not_observed,
        serving_parents=kept.serving_parents if kept else (),
        stacks=stacks if model.config.model_type not in _MXFP4 else stacks + sum(map(mxfp4_stacks, stacks), ()),
        serving_renames=() if wrapper is None else _served_names(blocks),
        served_in="" if wrapper is None else wrapped.LANGUAGE_MODEL,
        language="" if wrapper is None else TEXT_CONFIG,
        joined=_joined(tensors),
        merged=_merged(model.config.get_text_config()),
        derived=True,
        tested=config["model_type"] in TESTED,
    )


def _joined(tensors: Mapping[str, HubTensor]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`Family.joined`. Raises Underivable for rows that do not follow each other."""
    layers: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in tensors.values():
        if tensor.row is not None:
            layer, leaf, _ = tensor.fills.rsplit(".", 2)
            layers.setdefault(layer, []).append((tensor.row, tensor.wanted.shape[0], leaf))
    for layer, found in layers.items():
        ends = [0, *(first + count for first, count, _ in sorted(found))]
        if [first for first, _, _ in sorted(found)] != ends[:-1]:
            raise Underivable(f"{layer} is not made of whole hub tensors one after the other")
    return tuple((layer, tuple(leaf for _, _, leaf in sorted(found))) for layer, found in layers.items())


def _merged(config: PreTrainedConfig) -> tuple[tuple[str, tuple[tuple[str, int], ...]], ...]:
    """`Family.merged`."""

    def height(part: str) -> int:
        fields = (next(f for f in names.split("|") if hasattr(config, f)) for names in _HEIGHTS.get(part, ()))
        return math.prod(getattr(config, field) for field in fields)

    merged = _MERGED.get(config.model_type, {})
    return tuple((leaf, tuple((part, height(part)) for part in parts)) for leaf, parts in merged.items())


def _experts(stack: Stack) -> list[str]:
    return [part.name.format(expert) for part in stack.slices for expert in range(stack.shape[0])]


def _with_stacks(stacks: tuple[Stack, ...], own: dict[str, str]) -> dict[str, str]:
    """The spelling `own` of some names of stacks, or of experts in them, as that of all of their names."""
    found = dict(own)
    for stack in stacks:
        name = next((name for name in (stack.name, *_experts(stack)) if name in own), None)
        if name is None:
            continue
        module = stack.name.rpartition(".")[0]
        spelled = own[name].removesuffix(name.removeprefix(module))
        found |= {other: spelled + other.removeprefix(module) for other in (stack.name, *_experts(stack))}
    return found


def _spelled_stack(stack: Stack, own: Mapping[str, str]) -> Stack:
    if stack.name not in own:
        return stack
    old, new = experts_name(stack.name), experts_name(own[stack.name])
    slices = tuple(replace(part, name=new + part.name.removeprefix(old)) for part in stack.slices)
    return replace(stack, name=own[stack.name], slices=slices)


def _generalized(name: str) -> str:
    return "^" + r"\d+".join(re.escape(part) for part in re.split(_NUMBER, name))


def _parts(tensors: dict[str, HubTensor]) -> tuple[tuple[str, str], ...]:
    """Patterns of module names, the longer ones before those that they begin with. Of a name that is one part in some blocks
    and another in others (`self_attn` of kimi_linear) a pattern lists the modules."""
    modules: dict[str, dict[str, dict[str, None]]] = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        modules.setdefault(_generalized(module), {}).setdefault(tensor.part, {})[module] = None
    return tuple(
        (part, rf"{pattern if len(parts) == 1 else f'^(?:{_any_of(names)})'}(?:\.|$)")
        for pattern, parts in sorted(modules.items(), key=lambda item: (-item[0].count("."), item[0]))
        for part, names in parts.items()
    )


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


def _renames(tensors: dict[str, HubTensor]) -> tuple[tuple[str, str], ...]:
    """Hub names -> transformers' tree, those that differ, as patterns of whole names."""
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name == tensor.fills or tensor.part in BESIDE:
            continue
        source, target = name.removesuffix(".weight"), tensor.fills.removesuffix(".weight")
        if re.findall(_NUMBER, source) != re.findall(_NUMBER, target):
            raise Underivable(f"{name} fills {tensor.fills}: the numbers are in another order")
        pattern = "^" + r"(\d+)".join(re.escape(part) for part in re.split(_NUMBER, source)) + r"(?=\.|$)"
        parts = re.split(_NUMBER, target)
        replacement = parts[0] + "".join(rf"\{group}{part}" for group, part in enumerate(parts[1:], 1))
        if found.setdefault(pattern, replacement) != replacement:
            raise Underivable(f"{name} fills {tensor.fills}, and others of its name fill {found[pattern]}")
    # They are applied one after the other: a module's would take a tensor of it that has a name of its own.
    return tuple(sorted(found.items(), key=lambda item: -item[0].count(".")))


def _block_pattern(model: PreTrainedModel, tensors: dict[str, HubTensor], wrapper: wrapped.Wrapper | None) -> str:
    """The pattern of a block's tensors on the hub."""
    number = block_count(model.config.get_text_config())
    inner = "" if wrapper is None else f"{wrapper.language}."
    stacks = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number and name.startswith(inner)
    ]  # fmt: skip
    for stack in stacks:
        inside = [name for name, tensor in tensors.items() if tensor.fills.startswith(f"{stack}.0.")]
        prefixes = {name.partition(".0.")[0] for name in inside}
        if len(prefixes) == 1 and all(".0." in name for name in inside):
            return rf"^{re.escape(prefixes.pop())}\.(\d+)\."
    raise Underivable(f"no list of {number} decoder blocks is in transformers' {type(model).__name__}")


def _served_names(blocks: str) -> tuple[tuple[str, str], ...]:
    """The hub's names of a wrapper's language model -> those in vLLM's wrappers (`hf_to_vllm_mapper` of its models, 0.32)."""
    before = blocks.removeprefix("^").removesuffix(r"layers\.(\d+)\.")
    return (
        (rf"^{before}(?=\w)", f"{wrapped.LANGUAGE_MODEL}.model."),
        (r"^(?:language_model\.|model\.)*lm_head(?=\.|$)", f"{wrapped.LANGUAGE_MODEL}.lm_head"),
    )


def _fused_leaves(tensors: dict[str, HubTensor], kept: Served | None) -> tuple[tuple[str, ...], ...]:
    leaves = {name.split(".")[-2] for name in tensors if name.count(".") > 1}
    usual = tuple(group for group in _FUSED if len(leaves & set(group)) > 1)
    known = {frozenset(group) for group in usual}
    return usual + tuple(group for group in (kept.fused if kept else ()) if frozenset(group) not in known)


def _draft(model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, HubTensor], blocks: str) -> str:
    """The pattern of the draft head: what transformers ignores of the hub's tensors, and blocks after the last one."""
    ignored = [
        pattern
        for pattern in model._keys_to_ignore_on_load_unexpected or ()
        if not any(re.search(pattern, name) for name in tensors)
    ]
    last = block_count(model.config.get_text_config())
    fields = {**config, **(config.get(TEXT_CONFIG) or {})}
    if (count := draft_blocks(fields)) > 0:
        numbers = "|".join(str(last + number) for number in range(min(count, 1_000)))
        ignored.insert(0, blocks.replace(r"(\d+)", f"({numbers})"))
    return "|".join(ignored) or r"(?!)()"


def _never_quantized(tensors: dict[str, HubTensor]) -> tuple[tuple[str, str], ...]:
    rows = {
        _generalized(name.removesuffix(".weight")) + "$"
        for name, tensor in tensors.items()
        if tensor.wanted.kind == "linear" and tensor.wanted.shape[0] == 1
    }
    biased = {
        _generalized(name.removesuffix(".bias")) + "$"
        for name, tensor in tensors.items()
        if tensor.part == ROUTED and name.endswith(".bias")
    }
    others = {
        _generalized(name.removesuffix(".weight")) + "$"
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.wanted.shape) == 2 and tensor.wanted.kind != "linear"
        and tensor.part not in NOT_LINEAR | BESIDE
    }  # fmt: skip
    return (
        *((pattern, "engines run a gate of one row as it is") for pattern in sorted(rows)),
        *((pattern, _NO_BIASES) for pattern in sorted(biased)),
        *((pattern, "transformers has no linear layer for it") for pattern in sorted(others)),
    )


def _not_observed(model: PreTrainedModel, tensors: dict[str, HubTensor]) -> str:
    """The pattern of linear layers by whose weight another module multiplies, so that they are never called (Mamba's
    `self.dt_proj.weight @ time_step`)."""
    found: set[str] = set()
    for owner, module in model.named_modules():
        linear = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
        if linear and type(module).__module__.startswith("transformers."):
            multiplied = set(re.findall(_MULTIPLIED, inspect.getsource(type(module))))
            found |= {f"{owner}.{name}.weight" for name in linear if name in multiplied}
    hub = {_generalized(name.removesuffix(".weight")) for name, tensor in tensors.items() if tensor.fills in found}
    return "|".join(f"{pattern}$" for pattern in sorted(hub)) or r"(?!)"


def _promise(tensors: dict[str, HubTensor]) -> Promise:
    promised = {name: tensor.wanted for name, tensor in tensors.items()}

    def read(config: ConfigReader) -> Iterator[tuple[str, Wanted]]:
        yield from promised.items()

    return read
