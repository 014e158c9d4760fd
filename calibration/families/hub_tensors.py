"""Every tensor that the hub holds of a model of transformers, with its shape, part and the tensor that it fills.

What transformers does at loading has an inverse, which saving uses. Run on the empty model's meta tensors that inverse yields
every hub name with its shape, and the storage, offset and strides of each result say which parameter it is a view of, and so
which expert and which of its projections. No tensor is read. Sources: transformers/core_model_loading.py,
conversion_mapping.py (5.17).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, revert_weight_conversion

from calibration.checkpoint.stacks import Stack
from calibration.families import wrapped
from calibration.families.family import ROUTED, ROUTER, SHARED
from calibration.families.promised import Kind, Wanted
from calibration.families.stacked import UNDECLARED, UnknownLayout, projections, stack_of

#: Parts by the class of a module: the first that its name contains after the model's own (KimiLinear), of the module itself or
#: the nearest one above it.
_CLASSES = (
    (ROUTER, ("router",)),  # of experts that no module holds as stacks (dbrx)
    ("norm", ("norm",)),
    ("linear attention", ("deltanet", "deltaattention", "linearattention", "lightningattention")),
    ("mamba", ("mamba", "mixer2")),
    ("convolution", ("shortconv",)),
    ("attention", ("attention", "mla")),
)

#: The field that counts blocks if `num_hidden_layers` counts something else: LongCat-Flash has two attentions a block.
_BLOCKS = {"longcat_flash": "num_layers"}


@dataclass(frozen=True, slots=True)
class HubTensor:
    """A hub tensor: its shape, part and kind, and the tensor of transformers' tree with linearized experts that it fills."""

    wanted: Wanted
    part: str
    fills: str
    #: Its first row in a layer that transformers joins on load; None if it fills a tensor of its own.
    row: int | None = None


class Underivable(Exception):
    """Why a grammar cannot be derived."""


def empty_model(config: dict[str, Any]) -> PreTrainedModel:
    """transformers' model of the config on meta; no code of the checkpoint is run. Raises Underivable."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise Underivable("transformers has no such model")
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
        raise Underivable(
            f"transformers cannot build its causal language model: {type(error).__name__}: {first}"
        ) from error
    finally:
        logging.getLogger("transformers").setLevel(level)
    return model


class _Views(TorchFunctionMode):
    """`contiguous` keeps a view one: a copy would hide of which parameter it is a part."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def hub_tensors(
    model: PreTrainedModel, wrapper: wrapped.Wrapper | None, whole: bool
) -> tuple[dict[str, HubTensor], tuple[Stack, ...]]:
    """Every tensor of the hub checkpoint, by name, with stacks of experts taken apart, and those stacks; `whole`:
    all experts of a block are in the tensors that the model has for them. Raises Underivable."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    experts = expert_modules(model)
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
    for name, target in model.all_tied_weights_keys.items():
        if re.search(r"\.\d+\.", name) and (wrapper is None or wrapper.part(name.rpartition(".")[0]) is None):
            raise Underivable(f"{name} is {target}: blocks that share weights are not read yet")
    modules = dict(model.named_modules())
    found: dict[str, HubTensor] = {}
    stacks: list[Stack] = []
    turning = _turning(model)
    for name, tensor in hub.items():
        parameter = name if name in state else owners.get(tensor.untyped_storage()._cdata, "")
        if not parameter and wrapper is not None:  # joined or divided on load, as towers are: it is copied as it is
            target = wrapped.loaded_into(model, name)
            if (beside := wrapper.part(target.rpartition(".")[0])) is not None and target in state:
                found[name] = HubTensor(Wanted(tuple(tensor.shape), _kind(tensor)), beside, target)
                continue
        if not parameter:
            raise Underivable(
                f"{name} of the hub is no part of one parameter in transformers: such names are not read yet"
            )
        owner, _, leaf = parameter.rpartition(".")
        if wrapper is not None and (beside := wrapper.part(owner)) is not None:
            found[name] = HubTensor(Wanted(tuple(tensor.shape), _kind(tensor)), beside, parameter)
            continue
        if owner in experts and tensor.dim() == state[parameter].dim():
            stack = _stack(name, tensor, modules[owner], leaf)
            stacks.append(replace(stack, turns=any(re.search(pattern, name) for pattern in turning)))
            found |= _of_stack(stacks[-1], owner)
            continue
        if owner in experts:
            expert, projection = _slice(name, tensor, parameter, state[parameter])
            if expert >= _stored_experts(modules[owner]):
                continue
            fills = f"{owner}.{expert}.{projection}.weight"
            found[name] = HubTensor(Wanted(tuple(tensor.shape)), ROUTED, fills)
            continue
        if tensor.shape != state[parameter].shape and _is_rows(tensor, state[parameter], modules[owner]):
            fills = f"{owner}.{name.split('.')[-2]}.weight"
            wanted = Wanted(tuple(tensor.shape), "linear" if isinstance(modules[owner], nn.Linear) else _kind(tensor))
            found[name] = HubTensor(wanted, _part(model, modules, experts, owner), fills, _row(tensor))
            continue
        if tensor.shape != state[parameter].shape:
            raise Underivable(
                f"{name} of the hub is a part of {parameter} in transformers: such names are not read yet"
            )
        linear = isinstance(modules[owner], nn.Linear) and leaf == "weight" and tensor.dtype != torch.float32
        wanted = Wanted(tuple(tensor.shape), "linear" if linear else _kind(tensor), parameter in tied)
        found[name] = HubTensor(wanted, _part(model, modules, experts, owner), parameter)
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


def _stack(name: str, tensor: torch.Tensor, module: nn.Module, leaf: str) -> Stack:
    """The slices of a hub tensor that holds the parameter `leaf`, or a part of it, of all experts of a block."""
    try:
        views = {projection: view for parameter, projection, view in projections(module) if parameter == leaf}
        return stack_of(name, tensor, views)
    except UnknownLayout as problem:
        raise Underivable(f"{name} holds all experts of a block in one tensor: {problem}") from None


def _of_stack(stack: Stack, owner: str) -> dict[str, HubTensor]:
    """The tensors of single experts in a stack, whose module in transformers is `owner`."""
    found = {}
    for part in stack.slices:
        leaf = ".".join(part.name.split(".")[-2:])
        wanted = Wanted(part.layout.shape, "linear" if leaf.endswith(".weight") else "plain")
        for expert in range(stack.shape[0]):
            found[part.name.format(expert)] = HubTensor(wanted, ROUTED, f"{owner}.{expert}.{leaf}")
    return found


def _kind(tensor: torch.Tensor) -> Kind:
    """What a tensor that is no linear layer may be: transformers keeps some in float32 whatever the
    model's dtype, and the hub has them in either."""
    return "table" if not tensor.is_floating_point() else "float" if tensor.dtype == torch.float32 else "plain"


def expert_modules(model: PreTrainedModel) -> set[str]:
    """Modules that hold the weights of all routed experts of a block in tensors of three dimensions."""
    found = set()
    for name, module in model.named_modules():
        stacked = _stacked(module)
        if len(stacked) > 1 and (len({len(tensor) for tensor in stacked}) == 1 or type(module).__name__ in UNDECLARED):
            found.add(name)
    return found


def _stacked(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in module._parameters.values() if tensor is not None and tensor.dim() == 3]


def _stored_experts(module: nn.Module) -> int:
    """The number of experts with weights. LongCat-Flash's experts after them return their input: the hub has no tensor of
    them, and transformers makes rows of gate and up that nothing reads."""
    return min(map(len, _stacked(module)))


def block_count(config: PreTrainedConfig) -> int:
    """The number of decoder blocks of a language model's config."""
    return int(getattr(config, _BLOCKS.get(config.model_type, "num_hidden_layers")))


def _slice(name: str, tensor: torch.Tensor, parameter: str, stacked: torch.Tensor) -> tuple[int, str]:
    """Expert and projection of a hub tensor that is a view of the stacked weight `[E, M, K]`."""
    if tensor.dim() != 2 or stacked.dim() != 3 or tensor.stride() != stacked.stride()[1:]:
        raise Underivable(f"{name} is no part of {parameter} of one expert")
    expert, rest = divmod(int(tensor.storage_offset()), stacked.stride(0))
    first, leaf = rest // stacked.stride(1), parameter.rpartition(".")[2]
    if leaf == "gate_up_proj" and len(tensor) * 2 == stacked.shape[1] and first in (0, len(tensor)):
        return expert, "up_proj" if first else "gate_proj"
    if leaf in ("up_proj", "down_proj") and tensor.shape == stacked.shape[1:]:
        return expert, leaf
    raise Underivable(f"{name} is rows {first} on of {parameter}: such a projection is not known here")


def _part(model: PreTrainedModel, modules: dict[str, nn.Module], experts: set[str], owner: str) -> str:
    if isinstance(modules[owner], nn.Embedding):  # one of each block's (Gemma-3n) or of positions (OPT) too
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
    if owner.endswith("router"):  # a plain linear layer (Gemma-3n's modality_router, whose weight vLLM reads)
        return ROUTER
    blocks, called = block_count(model.config.get_text_config()), type(model).__name__.partition("For")[0]
    while owner:
        if _is_block(modules, owner, blocks):
            break  # a block's class is called after its attention (JambaMambaDecoderLayer), its MLP is not a part of that
        kind = type(modules[owner]).__name__.removeprefix(called).lower()
        for part, classes in _CLASSES:
            if any(text in kind for text in classes):
                return part
        owner = owner.rpartition(".")[0]
    return "mlp"


def _is_block(modules: dict[str, nn.Module], name: str, blocks: int) -> bool:
    """Whether a module is one of the decoder blocks, not of a list of as many inside one (LongCat-Flash's two attentions)."""
    above = name.rpartition(".")[0]
    parts = above.split(".")
    outer = (modules[".".join(parts[:length])] for length in range(1, len(parts)))
    listed = isinstance(found := modules[above], nn.ModuleList) and len(found) == blocks
    return listed and not any(isinstance(module, nn.ModuleList) for module in outer)


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module beside the routed experts is an expert itself: it goes to some width and back. A router, or a gate of
    one row, is one product."""
    return sum(isinstance(inner, nn.Linear) for inner in module.modules()) > 1
