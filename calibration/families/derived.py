"""A family that no table names, read from transformers' own model and conversion objects.

transformers knows which hub tensors fill a model: what it does at loading has an inverse, which saving uses. Run on the
empty model's meta tensors that inverse yields every hub name with its shape, and the storage, offset and strides of each
result say which parameter it is a view of, and so which expert and which of its projections. No tensor is read, no name
is guessed: what cannot be derived is refused. Sources: transformers/core_model_loading.py, conversion_mapping.py (5.17).
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, revert_weight_conversion

from calibration.checkpoint.formats import logical_name
from calibration.checkpoint.source_config import TEXT_CONFIG, without
from calibration.checkpoint.stacks import Stack
from calibration.families import wrapped
from calibration.families.family import BESIDE, ROUTED, ROUTER, SHARED, Family
from calibration.families.promised import ConfigReader, Kind, Promise, Wanted
from calibration.families.served import Served, rows
from calibration.families.stacked import UnknownLayout, experts_name, mxfp4_stacks, projections, stack_of
from recipes.errors import SourceError

#: Projections that vLLM runs as one matrix, by their leaves on the hub (`packed_modules_mapping` of its models, 0.32).
_FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"),
)  # fmt: skip
#: Parts by the class of a module: the first that its name contains after the model's own (KimiLinear), of the module itself or
#: the nearest one above it.
_CLASSES = (
    ("norm", ("norm",)),
    ("linear attention", ("deltanet", "deltaattention", "linearattention", "lightningattention")),
    ("mamba", ("mamba", "mixer2")),
    ("convolution", ("shortconv",)),
    ("attention", ("attention",)),
)
#: A number between the dots of a name: a block's, an expert's.
_NUMBER = r"(?<=\.)\d+(?=\.|$)"
#: Fields of a config that count the blocks of its draft head, which the hub numbers after the last block.
_DRAFT_BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


#: A module that multiplies by the weight of a child.
_MULTIPLIED = r"self\.(\w+)\.weight(?= @)"

#: Families that `tests/integration/test_serving_agreement.py` serves and compares with an independent reference.
TESTED = (
    "olmoe", "qwen2", "phi3", "gemma3_text", "glm4", "granite", "ministral3", "smollm3", "seed_oss", "starcoder2",
    "qwen2_moe", "ernie4_5_moe", "exaone_moe", "minimax_m2", "deepseek_v3", "mimo_v2_flash", "lfm2_moe",
    "lfm2", "afmoe",
)  # fmt: skip
#: Families whose stacked experts are released in MXFP4, under names of their own.
_MXFP4 = ("gpt_oss",)
#: CompressedTensorsW4A4Nvfp4MoEMethod.create_weights (vllm 0.32) makes no parameter for them, and the loader of the model
#: (models/gpt_oss.py, `_load_weights_other`) reads no global scale of an expert.
_NO_BIASES = "vLLM 0.32 has no biases in NVFP4 experts and could not load them"


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A hub tensor: its shape, part and kind, and the tensor of transformers' tree with linearized experts that it fills."""

    wanted: Wanted
    part: str
    fills: str
    #: Its first row in a layer that transformers joins on load; None if it fills a tensor of its own.
    row: int | None = None


class _Underivable(Exception):
    """Why a grammar cannot be derived."""


@dataclass(frozen=True, slots=True)
class _Grammar:
    """The empty model of a config, its wrapper if it is one, and every hub tensor by the name that transformers writes."""

    model: PreTrainedModel
    wrapper: wrapped.Wrapper | None
    tensors: dict[str, _Tensor]
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
    except (_Underivable, wrapped.UnknownPart) as problem:
        raise SourceError(
            f"{where}: model_type {config.get('model_type')!r} has no grammar here, and none can be derived: {problem}"
        ) from None


@lru_cache(maxsize=4)
def _read(text: str, whole: bool = False) -> _Grammar:
    """The grammar of a config; `whole`: with all experts of a block in the tensors that the model has for them."""
    model = _empty_model(json.loads(text))
    wrapper = wrapped.read_wrapper(model)
    return _Grammar(model, wrapper, *_tensors(model, wrapper, whole))


def _has_whole_experts(model: PreTrainedModel, names: set[str]) -> bool:
    """Whether a checkpoint stores the model's own tensors of all experts, where transformers writes single ones: it reads
    both, and releases differ (Qwen3.5: the FP8 one by expert, the BF16 one whole)."""
    for owner in _expert_modules(model):
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
        derived=True,
        tested=config["model_type"] in TESTED,
    )


def _empty_model(config: dict[str, Any]) -> PreTrainedModel:
    """transformers' model of the config on meta; no code of the checkpoint is run."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise _Underivable("transformers has no such model")
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        # transformers writes an infinity as an object of its own.
        built = CONFIG_MAPPING[model_type].from_dict(PreTrainedConfig._decode_special_floats(config))
        kind = wrapped.wrapper_class(built)
        build = AutoModelForCausalLM.from_config if kind is None else kind._from_config
        with torch.device("meta"):
            model: PreTrainedModel = build(built, dtype=torch.bfloat16, attn_implementation="eager")
    except Exception as error:  # transformers, its validators and torch raise what they like
        first = str(error).strip().partition("\n")[0] or "no message"
        raise _Underivable(
            f"transformers cannot build its causal language model: {type(error).__name__}: {first}"
        ) from error
    finally:
        logging.getLogger("transformers").setLevel(level)
    return model


class _Views(TorchFunctionMode):
    """`contiguous` keeps a view one: a copy would hide of which parameter it is a part."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _tensors(
    model: PreTrainedModel, wrapper: wrapped.Wrapper | None, whole: bool
) -> tuple[dict[str, _Tensor], tuple[Stack, ...]]:
    """Every tensor of the hub checkpoint, by name, with stacks of experts taken apart, and those stacks; `whole` as in
    `_read`."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    experts = _expert_modules(model)
    kept = {name for name in state if whole and name.rpartition(".")[0] in experts}
    with _Views(), torch.no_grad():
        hub: dict[str, torch.Tensor] = revert_weight_conversion(
            model, {name: tensor for name, tensor in state.items() if name not in kept}
        )
    hub |= {name: state[name] for name in kept}
    owners: dict[int, str] = {}
    for name, tensor in state.items():
        owners.setdefault(tensor.untyped_storage()._cdata, name)
    tied = set(model._tied_weights_keys or ()) if getattr(model.config, "tie_word_embeddings", False) else set()
    modules = dict(model.named_modules())
    found: dict[str, _Tensor] = {}
    stacks: list[Stack] = []
    turning = _turning(model)
    for name, tensor in hub.items():
        parameter = name if name in state else owners.get(tensor.untyped_storage()._cdata, "")
        if not parameter and wrapper is not None:  # joined or divided on load, as towers are: it is copied as it is
            target = wrapped.loaded_into(model, name)
            if (beside := wrapper.part(target.rpartition(".")[0])) is not None and target in state:
                found[name] = _Tensor(Wanted(tuple(tensor.shape), _kind(tensor)), beside, target)
                continue
        if not parameter:
            raise _Underivable(
                f"{name} of the hub is no part of one parameter in transformers: such names are not read yet"
            )
        owner, _, leaf = parameter.rpartition(".")
        if wrapper is not None and (beside := wrapper.part(owner)) is not None:
            found[name] = _Tensor(Wanted(tuple(tensor.shape), _kind(tensor)), beside, parameter)
            continue
        if owner in experts and tensor.dim() == state[parameter].dim():
            stack = _stack(name, tensor, modules[owner], leaf)
            stacks.append(replace(stack, turns=any(re.search(pattern, name) for pattern in turning)))
            found |= _of_stack(stacks[-1], owner)
            continue
        if owner in experts:
            expert, projection = _slice(name, tensor, parameter, state[parameter])
            fills = f"{owner}.{expert}.{projection}.weight"
            found[name] = _Tensor(Wanted(tuple(tensor.shape)), ROUTED, fills)
            continue
        if tensor.shape != state[parameter].shape and _is_rows(tensor, state[parameter], modules[owner]):
            fills = f"{owner}.{name.split('.')[-2]}.weight"
            wanted = Wanted(tuple(tensor.shape), "linear" if isinstance(modules[owner], nn.Linear) else _kind(tensor))
            found[name] = _Tensor(wanted, _part(model, modules, experts, owner), fills, _row(tensor))
            continue
        if tensor.shape != state[parameter].shape:
            raise _Underivable(
                f"{name} of the hub is a part of {parameter} in transformers: such names are not read yet"
            )
        linear = isinstance(modules[owner], nn.Linear) and leaf == "weight" and tensor.dtype != torch.float32
        wanted = Wanted(tuple(tensor.shape), "linear" if linear else _kind(tensor), parameter in tied)
        found[name] = _Tensor(wanted, _part(model, modules, experts, owner), parameter)
    return found, tuple(stacks)


def _turning(model: PreTrainedModel) -> list[str]:
    """Patterns of stacks that transformers transposes at loading if their shape asks for it (qwen3_vl_moe)."""
    converters = [found for found in get_model_conversion_mapping(model) if isinstance(found, WeightConverter)]
    return [
        pattern
        for converter in converters
        if any(isinstance(step, Transpose) and step.check_dims for step in converter.operations)
        for pattern in converter.target_patterns
    ]


def _is_rows(tensor: torch.Tensor, parameter: torch.Tensor, module: nn.Module) -> bool:
    """Whether a hub tensor is some rows of the weight of a linear layer, or of a convolution of each channel alone."""
    rows = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d) and module.groups == len(parameter))
    whole = rows and module.bias is None and tensor.dim() == parameter.dim()
    return whole and tensor.shape[1:] == parameter.shape[1:] and tensor.stride() == parameter.stride()


def _row(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) // tensor.stride(0)


def _joined(tensors: Mapping[str, _Tensor]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`Family.joined`. Raises _Underivable for rows that do not follow each other."""
    layers: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in tensors.values():
        if tensor.row is not None:
            layer, leaf, _ = tensor.fills.rsplit(".", 2)
            layers.setdefault(layer, []).append((tensor.row, tensor.wanted.shape[0], leaf))
    for layer, found in layers.items():
        ends = [0, *(first + count for first, count, _ in sorted(found))]
        if [first for first, _, _ in sorted(found)] != ends[:-1]:
            raise _Underivable(f"{layer} is not made of whole hub tensors one after the other")
    return tuple((layer, tuple(leaf for _, _, leaf in sorted(found))) for layer, found in layers.items())


def _stack(name: str, tensor: torch.Tensor, module: nn.Module, leaf: str) -> Stack:
    """The slices of a hub tensor that holds the parameter `leaf`, or a part of it, of all experts of a block."""
    try:
        views = {projection: view for parameter, projection, view in projections(module) if parameter == leaf}
        return stack_of(name, tensor, views)
    except UnknownLayout as problem:
        raise _Underivable(f"{name} holds all experts of a block in one tensor: {problem}") from None


def _of_stack(stack: Stack, owner: str) -> dict[str, _Tensor]:
    """The tensors of single experts in a stack, whose module in transformers is `owner`."""
    found = {}
    for part in stack.slices:
        leaf = ".".join(part.name.split(".")[-2:])
        wanted = Wanted(part.layout.shape, "linear" if leaf.endswith(".weight") else "plain")
        for expert in range(stack.shape[0]):
            found[part.name.format(expert)] = _Tensor(wanted, ROUTED, f"{owner}.{expert}.{leaf}")
    return found


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


def _kind(tensor: torch.Tensor) -> Kind:
    """What a tensor that is no linear layer may be: transformers keeps some in float32 whatever the
    model's dtype, and the hub has them in either."""
    return "table" if not tensor.is_floating_point() else "float" if tensor.dtype == torch.float32 else "plain"


def _expert_modules(model: PreTrainedModel) -> set[str]:
    """Modules that hold the weights of all routed experts of a block in tensors of three dimensions."""
    found = set()
    for name, module in model.named_modules():
        stacked = [tensor for tensor in module._parameters.values() if tensor is not None and tensor.dim() == 3]
        if len(stacked) > 1 and len({len(tensor) for tensor in stacked}) == 1:
            found.add(name)
    return found


def _slice(name: str, tensor: torch.Tensor, parameter: str, stacked: torch.Tensor) -> tuple[int, str]:
    """Expert and projection of a hub tensor that is a view of the stacked weight `[E, M, K]`."""
    if tensor.dim() != 2 or stacked.dim() != 3 or tensor.stride() != stacked.stride()[1:]:
        raise _Underivable(f"{name} is no part of {parameter} of one expert")
    expert, rest = divmod(int(tensor.storage_offset()), stacked.stride(0))
    first, leaf = rest // stacked.stride(1), parameter.rpartition(".")[2]
    if leaf == "gate_up_proj" and len(tensor) * 2 == stacked.shape[1] and first in (0, len(tensor)):
        return expert, "up_proj" if first else "gate_proj"
    if leaf in ("up_proj", "down_proj") and tensor.shape == stacked.shape[1:]:
        return expert, leaf
    raise _Underivable(f"{name} is rows {first} on of {parameter}: such a projection is not known here")


def _part(model: PreTrainedModel, modules: dict[str, nn.Module], experts: set[str], owner: str) -> str:
    if modules[owner] is model.get_input_embeddings():
        return "embedding"
    if modules[owner] is model.get_output_embeddings():
        return "head"
    moe = next((name.rpartition(".")[0] for name in experts if owner.startswith(name.rpartition(".")[0] + ".")), None)
    if moe is not None and isinstance(modules[moe.rpartition(".")[0]], nn.ModuleList):
        # The experts are a child of the block itself (gemma4): not all beside them belongs to them.
        if "router" in type(modules[f"{moe}.{owner[len(moe) + 1 :].partition('.')[0]}"]).__name__.lower():
            return ROUTER
    elif moe is not None:
        child = f"{moe}.{owner[len(moe) + 1 :].partition('.')[0]}"
        return SHARED if _is_mlp(modules[child]) else ROUTER
    blocks, called = model.config.get_text_config().num_hidden_layers, type(model).__name__.partition("For")[0]
    while owner:
        above = modules[owner.rpartition(".")[0]]
        if isinstance(above, nn.ModuleList) and len(above) == blocks:
            break  # a block's class is called after its attention (JambaMambaDecoderLayer), its MLP is not a part of that
        kind = type(modules[owner]).__name__.removeprefix(called).lower()
        for part, classes in _CLASSES:
            if any(text in kind for text in classes):
                return part
        owner = owner.rpartition(".")[0]
    return "mlp"


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module beside the routed experts is an expert itself: it goes to some width and back. A router, or a gate of
    one row, is one product."""
    return sum(isinstance(inner, nn.Linear) for inner in module.modules()) > 1


def _generalized(name: str) -> str:
    return "^" + r"\d+".join(re.escape(part) for part in re.split(_NUMBER, name))


def _parts(tensors: dict[str, _Tensor]) -> tuple[tuple[str, str], ...]:
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


def _renames(tensors: dict[str, _Tensor]) -> tuple[tuple[str, str], ...]:
    """Hub names -> transformers' tree, those that differ, as patterns of whole names."""
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name == tensor.fills or tensor.part in BESIDE:
            continue
        source, target = name.removesuffix(".weight"), tensor.fills.removesuffix(".weight")
        if re.findall(_NUMBER, source) != re.findall(_NUMBER, target):
            raise _Underivable(f"{name} fills {tensor.fills}: the numbers are in another order")
        pattern = "^" + r"(\d+)".join(re.escape(part) for part in re.split(_NUMBER, source)) + r"(?=\.|$)"
        parts = re.split(_NUMBER, target)
        replacement = parts[0] + "".join(rf"\{group}{part}" for group, part in enumerate(parts[1:], 1))
        if found.setdefault(pattern, replacement) != replacement:
            raise _Underivable(f"{name} fills {tensor.fills}, and others of its name fill {found[pattern]}")
    # They are applied one after the other: a module's would take a tensor of it that has a name of its own.
    return tuple(sorted(found.items(), key=lambda item: -item[0].count(".")))


def _block_pattern(model: PreTrainedModel, tensors: dict[str, _Tensor], wrapper: wrapped.Wrapper | None) -> str:
    """The pattern of a block's tensors on the hub."""
    number = model.config.get_text_config().num_hidden_layers
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
    raise _Underivable(f"no list of {number} decoder blocks is in transformers' {type(model).__name__}")


def _served_names(blocks: str) -> tuple[tuple[str, str], ...]:
    """The hub's names of a wrapper's language model -> those in vLLM's wrappers (`hf_to_vllm_mapper` of its models, 0.32)."""
    before = blocks.removeprefix("^").removesuffix(r"layers\.(\d+)\.")
    return (
        (rf"^{before}(?=\w)", f"{wrapped.LANGUAGE_MODEL}.model."),
        (r"^(?:language_model\.|model\.)*lm_head(?=\.|$)", f"{wrapped.LANGUAGE_MODEL}.lm_head"),
    )


def _fused_leaves(tensors: dict[str, _Tensor], kept: Served | None) -> tuple[tuple[str, ...], ...]:
    leaves = {name.split(".")[-2] for name in tensors if name.count(".") > 1}
    usual = tuple(group for group in _FUSED if len(leaves & set(group)) > 1)
    known = {frozenset(group) for group in usual}
    return usual + tuple(group for group in (kept.fused if kept else ()) if frozenset(group) not in known)


def _draft(model: PreTrainedModel, config: dict[str, Any], tensors: dict[str, _Tensor], blocks: str) -> str:
    """The pattern of the draft head: what transformers ignores of the hub's tensors, and blocks after the last one."""
    ignored = [
        pattern
        for pattern in model._keys_to_ignore_on_load_unexpected or ()
        if not any(re.search(pattern, name) for name in tensors)
    ]
    last = int(model.config.get_text_config().num_hidden_layers)
    fields = {**config, **(config.get(TEXT_CONFIG) or {})}
    count = max((value for key in _DRAFT_BLOCKS if isinstance(value := fields.get(key), int)), default=0)
    if count > 0:
        numbers = "|".join(str(last + number) for number in range(min(count, 1_000)))
        ignored.insert(0, blocks.replace(r"(\d+)", f"({numbers})"))
    return "|".join(ignored) or r"(?!)()"


def _never_quantized(tensors: dict[str, _Tensor]) -> tuple[tuple[str, str], ...]:
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
    return (
        *((pattern, "engines run a gate of one row as it is") for pattern in sorted(rows)),
        *((pattern, _NO_BIASES) for pattern in sorted(biased)),
    )


def _not_observed(model: PreTrainedModel, tensors: dict[str, _Tensor]) -> str:
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


def _promise(tensors: dict[str, _Tensor]) -> Promise:
    promised = {name: tensor.wanted for name, tensor in tensors.items()}

    def read(config: ConfigReader) -> Iterator[tuple[str, Wanted]]:
        yield from promised.items()

    return read
