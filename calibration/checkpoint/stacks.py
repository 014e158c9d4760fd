"""Presents tensors that hold all routed experts of a block as one tensor per expert and projection.

Hub checkpoints store such stacks as `[E, 2 I, D]` (granitemoe), transposed `[E, D, 2 I]` (llama4), with gate and up
interleaved (gpt-oss) or apart (step3p7). A slice is read by itself: one expert's matrix of the stack at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from calibration.checkpoint.header import Layout, TensorHeader
from calibration.checkpoint.index import Checkpoint, Undone, Whole
from recipes.errors import SourceError, collapsed


@dataclass(frozen=True, slots=True)
class Slice:
    """The tensor of one expert in a stack: `name` with `{}` for the expert's number, and the place of its values in the
    expert's part of the stack."""

    name: str
    layout: Layout


@dataclass(frozen=True, slots=True)
class Stack:
    """One tensor of the hub with all experts of a block: its name, its shape, and its slices, which cover it. `dtype`
    is the one that its slices have if it differs from the stored one (E8M0 scales stored as integers), and `stored`
    are the dtypes that it may have on disk; empty: any. `undone`, if it holds codes: the stack of their values.
    `turns`: the matrix of each expert may also be stored transposed, which loading tells by the shape. `single`: its experts
    are written as single ones, whatever becomes of them. `shared`: a tensor of any shape that is each of these, without
    slices (one scale for all experts)."""

    name: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    dtype: str | None = None
    stored: tuple[str, ...] = ()
    undone: Undone | None = None
    turns: bool = False
    single: bool = False
    shared: tuple[str, ...] = ()

    def turned(self) -> Stack:
        """The same stack with the matrix of each expert transposed."""
        experts, rows, columns = self.shape
        slices = tuple(Slice(part.name, part.layout.turned()) for part in self.slices)
        return replace(self, shape=(experts, columns, rows), slices=slices)


def by_expert(checkpoint: Checkpoint, stacks: Iterable[Stack]) -> Checkpoint:
    """`checkpoint` with every slice of `stacks` as a tensor of its own, in the stack's place; the same object if it has
    none of them. Files, config and every other tensor are unchanged. Raises SourceError, all at once, for a stack of
    another shape or dtype, and for a slice whose name is taken."""
    known = {stack.name: stack for stack in stacks}
    if not known.keys() & checkpoint.tensors.keys():
        return checkpoint
    tensors, whole, problems = dict[str, TensorHeader](), dict[str, Whole](), list[str]()
    for name, header in checkpoint.tensors.items():
        if name not in known:
            tensors[name] = header
            continue
        stack, path = known[name], checkpoint.path(name)
        if stack.turns and header.shape != stack.shape:
            stack = stack.turned()
        if header.shape != stack.shape or (stack.stored and header.dtype not in stack.stored):
            wanted = f"{' or '.join(stack.stored)} {list(stack.shape)}".strip()
            problems.append(
                f"{path}: {name}: {header.dtype} {list(header.shape)}, the model built from config.json needs {wanted}"
            )
            continue
        parts = [replace(header, name=part) for part in stack.shared] or list(_slices(stack, header))
        if not stack.single:
            whole[name] = Whole(header, tuple(part.name for part in parts), stack.undone)
        for tensor in parts:
            if tensor.name in checkpoint.tensors or tensor.name in tensors:
                problems.append(f"{path}: {name} holds {tensor.name}, which the checkpoint has beside it; remove one")
            tensors[tensor.name] = tensor
    if problems:
        raise SourceError(collapsed(problems))
    made = Checkpoint(checkpoint.directory, checkpoint.config, tensors, checkpoint.shards, checkpoint.state)
    made.whole = whole
    return made


def _slices(stack: Stack, header: TensorHeader) -> Iterator[TensorHeader]:
    size = header.nbytes // header.shape[0]
    for expert in range(header.shape[0]):
        first = header.begin + expert * size
        whole = replace(header, dtype=stack.dtype or header.dtype, begin=first, end=first + size)
        for part in stack.slices:
            layout, row = part.layout, size // part.layout.rows
            made = replace(whole, name=part.name.format(expert), shape=layout.shape)
            if layout.contiguous:
                begin = first + layout.begin * row
                yield replace(made, begin=begin, end=begin + layout.count * row)
            else:
                yield replace(made, layout=layout)
