"""The shapes that vLLM 0.32 serves in FP8 tiles, and of which weights it asks what: the one place of these rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from calibration.checkpoint.tiles import TILE
from calibration.families.family import ROUTED, Family

#: Of one weight, the rows of every part that must be whole tiles, by what a message calls them.
Heights = Mapping[str, int]


def stacked_heights(
    family: Family, shapes: Mapping[str, tuple[int, ...]], fused: Iterable[Sequence[str]]
) -> dict[str, Heights]:
    """Module -> the parts of its weight below which vLLM puts another one in the same matrix, with their rows. `shapes` are of
    every module's weight, `fused` the groups that are served as one matrix, in its order. The last part may end anywhere: of
    gate and up of routed experts both are asked (fp8_utils.validate_fp8_block_shape and its MoE twin, for tensor parallel
    size 1). A weight that the hub stores merged (Phi-3's `qkv_proj`) is several parts (`Family.merged`)."""
    followed = {
        module for group in fused for module in (group if family.place(group[0]).part == ROUTED else group[:-1])
    }
    found: dict[str, Heights] = {}
    for module, shape in shapes.items():
        parts = family.merged_rows(module, shape[0]) if len(shape) == 2 else {}
        if module not in followed:
            parts = dict(list(parts.items())[:-1])
        if parts:
            found[module] = parts
    return found


def tiled_input_problem(columns: int, side: int = TILE) -> str | None:
    """Why vLLM 0.32 does not run a weight with K `columns` in FP8 tiles that are `side` wide on a GPU, or None: it quantizes
    inputs in whole groups (fp8_utils.per_token_group_quant_fp8 asserts it; for block weights compilation does not replace it,
    vllm/config/vllm.py has_blocked_weights)."""
    return (
        f"needs K to be a multiple of {side}, K is {columns}: vLLM quantizes inputs in such groups"
        if columns % side
        else None
    )


def tiled_rows_problem(heights: Heights, side: int = TILE) -> str | None:
    """Why vLLM 0.32 does not load a weight whose parts have `heights` (`stacked_heights`) in FP8 tiles that are `side` high, or
    None: what lies below a part must begin a row of tiles."""
    torn = [(name, rows) for name, rows in heights.items() if rows % side]
    if not torn:
        return None
    name, rows = torn[0]
    return f"needs {name} to be a multiple of {side}, {name} is {rows}: vLLM stacks another weight below it"
