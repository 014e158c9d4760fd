"""Finds the experts in hub tensors that hold all routed experts of a block.

transformers declares how its experts' parameters are laid out (`use_experts_implementation`: transposed, gate and up
interleaved, biases), so that one expert's projection is a strided view of a parameter. The hub tensor is a view of the same
memory (`calibration.families.derived`). Where the one lies in the other follows from offsets and strides; the slices of a
stack must cover it, each of its rows or columns once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from calibration.checkpoint.header import Layout, TensorHeader
from calibration.checkpoint.index import Undone
from calibration.checkpoint.stacks import Slice, Stack

#: Experts that transformers does not decorate, by class: whether they are transposed, and whether gate and up are the
#: halves of one parameter (`forward` in models/llama4, models/step3p7 and models/longcat_flash, 5.17).
UNDECLARED = {"Llama4TextExperts": (True, True), "Step3p7Experts": (False, True), "LongcatFlashExperts": (False, True)}
#: Values of a group with one scale in MXFP4 (transformers/integrations/mxfp4.py, 5.17).
_MXFP4_GROUP = 32


class UnknownLayout(Exception):
    """Why the experts of a module cannot be found in a hub tensor."""


def projections(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yields (parameter, projection, view) of the first expert of a module with stacked experts: the parameter's leaf, the
    tensor of the expert that it fills (`gate_proj.weight`), and that tensor `[M, K]` or `[M]` as a view of the parameter.
    Raises UnknownLayout for a class whose layout is not declared."""
    kind = type(module).__name__
    transposed, halves = UNDECLARED.get(
        kind, (getattr(module, "is_transposed", None), getattr(module, "is_concatenated", None))
    )
    if transposed is None or halves is None:
        raise UnknownLayout(f"transformers does not say how {kind} lays out its experts")
    for leaf, parameter in module._parameters.items():
        if parameter is None:
            continue
        name, kept = leaf.removesuffix("_bias"), "bias" if leaf.endswith("_bias") else "weight"
        if name not in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
            raise UnknownLayout(f"{leaf} of {kind} is not known here")
        first = parameter.detach()[0]
        first = first.transpose(0, 1) if transposed and first.dim() == 2 else first
        if name != "gate_up_proj":
            yield leaf, f"{name}.{kept}", first
            continue
        width = len(first) // 2
        parts = (first[:width], first[width:]) if halves else (first[::2], first[1::2])
        for projection, view in zip(("gate_proj", "up_proj"), parts, strict=True):
            yield leaf, f"{projection}.{kept}", view


def stack_of(name: str, tensor: torch.Tensor, views: dict[str, torch.Tensor]) -> Stack:
    """The stack `name` of the hub, a view of a parameter's memory like `views` (projection -> the first expert's tensor):
    those of them that lie in it. Raises UnknownLayout if they do not cover it."""
    slices = []
    for projection, view in views.items():
        if (layout := _layout(view, tensor)) is not None:
            slices.append(Slice(f"{experts_name(name)}.{{}}.{projection}", layout))
    lines = sorted(line for part in slices for line in _lines(part.layout))
    if not slices or lines != list(range(tensor.shape[2 if slices[0].layout.transposed else 1])):
        raise UnknownLayout(f"the projections of its experts do not cover {name}")
    return Stack(name, tuple(tensor.shape), tuple(slices))


def experts_name(stack: str) -> str:
    """What contains the experts of a stack, in the hub's spelling: `mlp.experts` of `mlp.experts.gate_up_proj`, and
    `moe.experts` of `moe.input_linear.weight`, where the hub has no such module."""
    parent = stack.removesuffix(".weight").rpartition(".")[0]
    return parent if parent.endswith(".experts") else f"{parent}.experts"


def mxfp4_stacks(stack: Stack) -> tuple[Stack, ...]:
    """The two stacks that hold the weights of `stack` in MXFP4: codes uint8 `[E, M, K/32, 16]` and E8M0 scales `[E, M,
    K/32]`, with the columns of `stack` `[E, K, M]` as rows; none for biases and for K that 32 does not divide."""
    first = stack.slices[0].layout
    width, rows = first.rows, first.columns
    if not first.transposed or width % _MXFP4_GROUP:
        return ()
    made = []
    for suffix, tail, leaf, dtype in (
        ("_blocks", (width // _MXFP4_GROUP, _MXFP4_GROUP // 2), "weight", None),
        ("_scales", (width // _MXFP4_GROUP,), "scale", "F8_E8M0"),
    ):
        columns = torch.Size(tail).numel()
        slices = tuple(
            Slice(
                f"{part.name.removesuffix('.weight')}.{leaf}",
                replace(part.layout, rows=rows, columns=columns, transposed=False),
            )
            for part in stack.slices
        )
        undone = Undone(stack.name, stack.shape, f"{stack.name}_scales") if dtype is None else None
        made.append(Stack(stack.name + suffix, (stack.shape[0], rows, *tail), slices, dtype, ("U8",), undone))
    return tuple(made)


def with_scales(stacks: Iterable[Stack], tensors: Mapping[str, TensorHeader]) -> tuple[Stack, ...]:
    """`stacks`, and for each that a checkpoint with these `tensors` stores in FP8 the stack of its tiles' scales `[E, R, C]`
    (`moe.gate_proj.weight_scale_inv` of Step-3.7's FP8 release, `experts.gate_up_proj_scale_inv` of transformers), or the
    one scale of all its experts (`experts.gate_up_proj_weight_scale` of NVIDIA's FP8 releases of Llama-4). A stack whose
    scales do not belong to one projection each gets none, and is refused as FP8 without a scale."""
    found: list[Stack] = []
    for stack in stacks:
        header = tensors.get(stack.name)
        if header is None or header.dtype != "F8_E4M3" or len(header.shape) != 3:
            found.append(stack)
            continue
        stored = replace(stack.turned() if stack.turns and header.shape != stack.shape else stack, single=True)
        found.append(stored)
        scales = next((tensors[name] for name in _scale_names(stack.name) if name in tensors), None)
        slices = [] if scales is None or len(scales.shape) != 3 else [_scaled(s, scales.shape) for s in stored.slices]
        if scales is not None and slices and None not in slices:
            found.append(Stack(scales.name, scales.shape, tuple(s for s in slices if s is not None), single=True))
        for leaf in ("weight_scale", "input_scale"):
            scale = tensors.get(f"{stack.name}_{leaf}")
            if scale is not None and scale.numel == 1:
                names = (f"{part.name.removesuffix('.weight')}.{leaf}" for part in stack.slices)
                shared = tuple(name.format(expert) for name in names for expert in range(stack.shape[0]))
                found.append(Stack(scale.name, scale.shape, (), single=True, shared=shared))
    return tuple(found)


def _scale_names(stack: str) -> tuple[str, str]:
    return f"{stack.removesuffix('.weight')}.weight_scale_inv", f"{stack}_scale_inv"


def _scaled(part: Slice, scales: tuple[int, ...]) -> Slice | None:
    """The slice of a stack of scales that belongs to a slice of their codes; None if a tile holds values of another one."""
    layout = part.layout
    lines, tiles = (layout.columns, scales[2]) if layout.transposed else (layout.rows, scales[1])
    begin, rest = divmod(layout.begin * tiles, lines)
    count, further = divmod(layout.count * tiles, lines)
    if rest or further or layout.step != 1:
        return None
    made = replace(layout, rows=scales[1], columns=scales[2], begin=begin, count=count)
    return Slice(f"{part.name.removesuffix('.weight')}.weight_scale_inv", made)


def _layout(view: torch.Tensor, stack: torch.Tensor) -> Layout | None:
    """Where `view`, of the first expert, lies in that expert's part of `stack`; None if it is not in it."""
    if view.dim() != stack.dim() - 1:
        return None
    vector = view.dim() == 1
    rows, columns = stack.shape[1], 1 if vector else stack.shape[2]
    strides = (stack.stride(1), 1) if vector else stack.stride()[1:]
    offset = int(view.storage_offset() - stack.storage_offset())
    for transposed in (False,) if vector else (False, True):
        (line, lines), (across, width) = (strides[0], rows), (strides[1], columns)
        if transposed:
            (line, lines), (across, width) = (across, width), (line, lines)
        if not vector and (view.shape[1] != width or view.stride(1) != across):
            continue
        begin, step = offset // line, view.stride(0) // line
        layout = Layout(rows, columns, begin, len(view), step, transposed, vector)
        if offset >= 0 and not offset % line and not view.stride(0) % line and _lines(layout)[-1] < lines:
            return layout
    return None


def _lines(layout: Layout) -> range:
    return range(layout.begin, layout.begin + layout.count * layout.step, layout.step)
