"""Counts what a run must compute, move and hold, from headers and the recipe: operations and bytes, no seconds.

docs/cost-model.md has the formulas; `tests/benchmarks/cost_model.py` applies them to DeepSeek-V4-Flash and -Pro.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from calibration.checkpoint.formats import Formats
from calibration.families.family import NOT_LINEAR, ROUTED, Family
from calibration.families.registry import language_config
from calibration.plan.plan import Plan
from calibration.plan.task import Task
from calibration.runs.sharing import assign_owners
from recipes.schema import Recipe

#: `(samples, tokens each)` of every batch.
Shapes = Sequence[tuple[int, int]]
#: Bytes per value of activations and of dequantized weights: BF16.
BF16 = 2
#: Bytes per token of values besides the hidden states: ids, mask and positions (int64), without rotary tables.
_BESIDE = 24


@dataclass(frozen=True, order=True)
class Product:
    """A matrix product of a block: `[tokens * share, columns] x [columns, rows]`. `share` is below 1 if only routed
    tokens enter (the mean over the experts). `use`: gate or up of a routed expert, all of which read one input; its
    down; any other layer. `observed` is the share of the tokens whose input is observed."""

    rows: int
    columns: int
    share: float = 1.0
    use: Literal["expert gate", "expert down", "layer"] = "layer"
    observed: float = 1.0

    @property
    def operations(self) -> float:
        """Operations per token of the batch."""
        return 2.0 * self.rows * self.columns * self.share


@dataclass(frozen=True)
class BlockCost:
    """The cost of one block; with `number` None, of everything outside the blocks. `products` counts equal matrix
    products; `values` is the number of logical weights, `quantized` of those that become NVFP4 or FP8 tiles, in
    `modules` modules; `reads` maps stored formats to source bytes."""

    number: int | None
    products: Counter[Product] = field(default_factory=Counter)
    attention: tuple[int, int] = (0, 0)
    values: int = 0
    quantized: int = 0
    modules: int = 0
    reads: Counter[str] = field(default_factory=Counter)
    written: int = 0

    @property
    def source_bytes(self) -> int:
        return sum(self.reads.values())

    def operations(self, length: int) -> float:
        """Operations per token of samples of `length` tokens: 2 per weight and product, and eager attention over the
        whole sample (scores and values, `4 heads head_dim length`)."""
        heads, dim = self.attention
        return sum(p.operations * count for p, count in self.products.items()) + 4.0 * heads * dim * length

    def outside_experts(self, length: int) -> float:
        """The fraction of `operations` outside routed experts."""
        inside = sum(p.operations * count for p, count in self.products.items() if p.use != "layer")
        return 1 - inside / self.operations(length) if inside else 1.0


def products(
    family: Family,
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
    everything: bool = False,
    shown: float = 1.0,
) -> dict[int, Counter[Product]]:
    """Block number -> its matrix products, from weight shapes by source tensor name.

    `shown` is the share of the tokens that gate and up of every routed expert see at least: 1 with `experts: all`. Down
    sees only the tokens that are routed to its expert, or all with `everything` (stock llm-compressor). Routers and
    modules that are not linear layers are not counted.
    """
    layers: dict[int, Counter[Product]] = {}
    gated = {leaf for group in family.fused_leaves for leaf in group}
    routed: dict[int, Counter[tuple[int, int, bool]]] = {}
    for name, shape in shapes.items():
        place = family.place(name)
        if place.block is None or place.part in NOT_LINEAR or len(shape) != 2 or ".weight" not in name:
            continue
        if place.part == ROUTED:
            size = (shape[0], shape[1], name.split(".")[-2] in gated)
            routed.setdefault(place.block, Counter())[size] += 1
        else:
            layers.setdefault(place.block, Counter())[Product(shape[0], shape[1])] += 1
    chosen = int(language_config(config).get("num_experts_per_tok") or 1)
    for block, sizes in routed.items():
        experts = sum(count for (_, _, gate), count in sizes.items() if not gate)
        share = min(chosen / max(experts, 1), 1.0)
        seen = 1.0 if everything else max(share, shown)
        for (rows, columns, gate), count in sizes.items():
            product = (
                Product(rows, columns, seen, "expert gate", seen)
                if gate
                else Product(rows, columns, 1.0 if everything else share, "expert down", seen)
            )
            layers.setdefault(block, Counter())[product] += count
    return layers


def attention(config: Mapping[str, Any]) -> tuple[int, int]:
    """The number of attention heads and their dimension."""
    config = language_config(config)
    heads = int(config.get("num_attention_heads") or 0)
    return heads, int(config.get("head_dim") or (int(config.get("hidden_size") or 0) // heads if heads else 0))


def block_costs(plan: Plan, formats: Formats, shown: float = 1.0) -> list[BlockCost]:
    """The cost of every block of a plan in order, then (number None) of the rest; `shown` as in `products`."""
    checkpoint, family = formats.checkpoint, plan.family
    weights = {name: formats.of(name).shape for name in checkpoint.tensors if name not in formats.companions}
    per_block = products(family, weights, checkpoint.config, shown=shown)
    costs: dict[int | None, dict[str, Any]] = {
        number: {"reads": Counter(), "values": 0, "quantized": 0, "modules": 0, "written": 0}
        for number in (*plan.block_numbers, None)
    }
    for name, step in plan.steps.items():
        facts = costs[family.place(name).block]
        owner = "scale" if name in formats.companions else formats.of(name).kind
        facts["reads"][owner] += checkpoint.header(name).nbytes
        facts["written"] += sum(output.nbytes for output in step.outputs)
        values = 0 if name in formats.companions else math.prod(formats.of(name).shape)
        facts["values"] += values
        if step.action == "quantize":
            facts["quantized"] += values
            facts["modules"] += 1
    heads = attention(checkpoint.config)
    return [
        BlockCost(number, per_block.get(number, Counter()) if number is not None else Counter(),
                  (0, 0) if number is None else heads, **facts)
        for number, facts in costs.items()
    ]  # fmt: skip


def hidden_width(config: Mapping[str, Any]) -> int:
    """Values per token between two blocks; DeepSeek-V4 keeps `hc_mult` hidden states."""
    config = language_config(config)
    return int(config.get("hidden_size") or 0) * int(config.get("hc_mult") or 1)


def boundary_bytes(width: int, batches: Sequence[tuple[int, int]]) -> int:
    """Bytes of the activations between two blocks for batches `(samples, tokens each)`: hidden states and the causal
    mask in BF16, ids and positions."""
    return sum(n * t * (BF16 * width + _BESIDE) + n * t * t * BF16 for n, t in batches)


def scratch_bytes(boundary: int, blocks: int, max_host_memory: int | None) -> int:
    """Maximum bytes of activations on disk at any time: those that enter and those that leave a block. Those that enter
    the first block are only on disk as far as they exceed `max_host_memory`; none leave the last."""
    first = max(boundary - (max_host_memory or 0), 0)
    return max(first + (boundary if blocks > 1 else 0), boundary * min(2, max(blocks - 1, 0)))


def nominal_shapes(recipe: Recipe) -> list[tuple[int, int]]:
    """`(samples, tokens each)` of every batch if all samples are as long as the recipe allows: an upper bound."""
    data = recipe.calibration
    if data is None:
        return []
    full, rest = divmod(data.num_samples, data.batch_size)
    return [(data.batch_size, data.max_seq_length)] * full + ([(rest, data.max_seq_length)] if rest else [])


def shown_share(recipe: Recipe, tokens: int) -> float:
    """The share of a calibration's `tokens` that every routed expert is shown at least."""
    data = recipe.calibration
    if data is None or data.experts == "all":
        return 1.0
    return min(data.topped_up / max(tokens, 1), 1.0) if data.topped_up else 0.0


def needs(task: Task) -> dict[str, int]:
    """Disk and memory that a run needs, in bytes, from headers: its output, what it reads, the largest block in BF16,
    and the activations between two blocks."""
    block_bytes: dict[int, int] = {}
    for name in task.source.tensors:
        place = task.family.place(name)
        # Tensors copied in their stored format are never in memory as a whole.
        native = place.part in task.family.native_parts
        if place.block is not None and name not in task.formats.companions and not native:
            block_bytes[place.block] = block_bytes.get(place.block, 0) + BF16 * math.prod(task.formats.of(name).shape)
    return {
        "output_bytes": task.plan.output_bytes,
        "source_bytes_read": task.source.total_bytes,
        "largest_block_bf16_bytes": max(block_bytes.values(), default=0),
        "activation_bytes_at_a_boundary": boundary_bytes(hidden_width(task.source.config), nominal_shapes(task.recipe)),
    }


def hessian_bytes(task: Task, ranks: int = 1) -> int:
    """Memory that GPTQ's Hessians take in the block that has most of them, in bytes, on the rank that has most: float32 `[K, K]`
    for every quantized layer, or with `quantized_inputs` for every input that layers share. Of several ranks each keeps those
    of its layers, that of all gates, and what the layers were given in one batch, in BF16. 0 without GPTQ."""
    recipe, plan, formats = task.recipe, task.plan, task.formats
    if recipe.calibration is None or "GPTQModifier" not in [entry.name for entry in recipe.modifiers]:
        return 0
    shared = bool(recipe.quantization_modifier.arguments.get("quantized_inputs"))
    leader = {module: group[0] for group in plan.fused for module in group}
    owners = assign_owners(plan, ranks)
    of_all = recipe.calibration.experts == "all"
    widths: dict[int | None, dict[str, int]] = {}
    of_rank: dict[tuple[int | None, int], dict[str, int]] = {}
    for module, step in plan.quantized.items():
        place, name = task.family.place(step.source), module
        if shared and module in leader:
            # Gate and up of all experts see the same tokens if every expert is shown all of them.
            name = "gate and up of all experts" if place.part == ROUTED and of_all else leader[module]
        width = formats.of(step.source).shape[1]
        widths.setdefault(place.block, {})[name] = width
        of_rank.setdefault((place.block, owners[module]), {})[name] = width
    kept = max((sum(4 * width**2 for width in found.values()) for found in of_rank.values()), default=0)
    if ranks == 1:
        return kept
    tokens = max(samples * length for samples, length in nominal_shapes(recipe))
    given = (
        sum(_given_tokens(task, name, tokens) * width for name, width in found.items()) for found in widths.values()
    )
    return kept + int(BF16 * max(given, default=0))


def _given_tokens(task: Task, module: str, tokens: int) -> float:
    """How many of a batch's `tokens` enter a quantized module: those routed to an expert, on average; else all."""
    step, config = task.plan.quantized.get(module), language_config(task.source.config)
    if step is None or task.family.place(step.source).part != ROUTED or shown_share(task.recipe, tokens) == 1:
        return tokens
    experts = next(
        (int(config[key]) for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)), 1
    )
    return tokens * min(int(config.get("num_experts_per_tok") or 1) / experts, 1.0)
