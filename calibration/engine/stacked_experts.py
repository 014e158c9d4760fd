"""Matrix products over all experts of a block at once, for accelerators. The weights of a block are in one weight
buffer (`model.weight_buffer`), so that the experts' weights already form two stacks and no weight is copied.

One batched product computes gate and up of many experts for all tokens, one grouped product the down projection of only
the routed tokens. Expert by expert it would take about ten launches and a synchronization each, 384 times per block and
batch for V4-Pro. The CPU does not use this: there, products are faster expert by expert, and bit-identical to stock
llm-compressor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from llmcompressor.modeling.moe.linear_experts import ExpertMLPWithGate, LinearExperts2D
from torch import nn

#: Called with the number of an expert and a tensor of its inputs.
Observe = Callable[[int, torch.Tensor], None]
#: Bytes of gate and up outputs at a time, on the accelerator; their activation takes the same amount.
CHUNK = 2**30
#: Grouped products need rows that start at a multiple of 16 bytes.
ALIGNMENT = 16


@dataclass(frozen=True)
class Routing:
    """The tokens of each expert, sorted by expert: R = T * k rows.

    `rows` [R] token numbers, `weights` [R, 1], `counts` the rows of each expert with weights (on the host), `order` [R] the
    position of each row in `top_k_index.t().reshape(-1)`. Rows after those that are counted are of experts that return
    their input.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    counts: list[int]
    order: torch.Tensor

    @classmethod
    def of(cls, tokens: int, experts: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Routing:
        """`top_k_index` and `top_k_weights` [T, k]. Rows of an expert are sorted by position among the top k, then by
        token: the order of stock's torch.where, so that sums accumulate in the same order. Takes one device
        synchronization instead of one per expert."""
        flat = top_k_index.t().reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts).tolist()[:experts]
        return cls(order % tokens, top_k_weights.t().reshape(-1)[order, None], counts, order)

    def summed(self, made: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Adds up the k rows of each token: `made` by experts with weights, [sum(counts), D], from `hidden` [T, D] -> [T, D],
        of the dtype of `hidden`.

        The order is that of index_add_ expert by expert, and the same in every run: index_add_ of all rows at once uses
        atomic additions in arbitrary order.
        """
        if len(returned := self.rows[len(made) :]):
            made = torch.cat([made, hidden[returned]])
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=self.order.device)
        output, weighted = torch.zeros_like(hidden), (made * self.weights).to(hidden.dtype)
        for rows in place.view(-1, hidden.shape[0]).sort(dim=0).values:
            output += weighted[rows]
        return output


@dataclass(frozen=True)
class Stack:
    """The weights of E experts as views: `gate_up` [E, 2 I, D] and `down` [E, D, I]."""

    gate_up: torch.Tensor
    down: torch.Tensor
    apply_gate: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, experts: LinearExperts2D) -> Stack | None:
        """None if the weights are not adjacent in memory (they were replaced), or if the experts compute more than
        plain products: another expert class, biases, enabled quantization, hooks of others."""
        mlps = [experts[number] for number in range(experts.num_experts)]
        if any(type(mlp) is not ExpertMLPWithGate for mlp in mlps):
            return None
        linears = [linear for mlp in mlps for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        if not all(is_plain(linear) and linear.bias is None and not _watched(linear) for linear in linears):
            return None
        weights = [linear.weight.data for linear in linears]
        width, hidden = weights[0].shape
        if any(size * weights[0].element_size() % ALIGNMENT for size in (width, hidden)):
            return None
        places = [(weight.untyped_storage().data_ptr(), weight.storage_offset()) for weight in weights]
        stride = places[3][1] - places[0][1] if len(mlps) > 1 else 3 * width * hidden
        for number, (weight, (storage, offset)) in enumerate(zip(weights, places, strict=True)):
            expert, leaf = divmod(number, 3)
            expected = (places[0][0], places[0][1] + expert * stride + leaf * width * hidden)
            if (storage, offset) != expected or weight.dtype != weights[0].dtype or not weight.is_contiguous():
                return None
        count = len(mlps)
        return cls(
            weights[0].as_strided((count, 2 * width, hidden), (stride, hidden, 1)),
            weights[2].as_strided((count, hidden, width), (stride, width, 1)),
            mlps[0]._apply_gate,
        )

    def all_tokens(self, hidden: torch.Tensor, routing: Routing, observe: Observe) -> torch.Tensor:
        """hidden [T, D] -> [T, D]. Calls `observe(expert, input of its down projection [T, I])` for every expert."""
        made = hidden.new_empty(sum(routing.counts), hidden.shape[1])
        number_of_row = torch.repeat_interleave(
            torch.arange(len(routing.counts), device=hidden.device),
            torch.tensor(routing.counts, device=hidden.device),
            output_size=len(made),
        )
        step = max(1, CHUNK // (hidden.shape[0] * self.gate_up.shape[1] * hidden.element_size()))
        begin = 0
        for first in range(0, len(routing.counts), step):
            counts = routing.counts[first : first + step]
            part = slice(begin, begin := begin + sum(counts))
            activated = self.apply_gate(torch.matmul(hidden, self.gate_up[first : first + step].transpose(1, 2)))
            for number, value in enumerate(activated):
                observe(first + number, value)
            chosen = activated[number_of_row[part] - first, routing.rows[part]]
            made[part] = _grouped(chosen, self.down[first : first + step], counts)
        return routing.summed(made, hidden)

    def routed_tokens(self, hidden: torch.Tensor, routing: Routing, inputs: Observe, observe: Observe) -> torch.Tensor:
        """hidden [T, D] -> [T, D], every expert on its own tokens alone. Calls `inputs` and `observe` with each expert
        that has tokens and the inputs of its gate and up [n, D], and of its down projection [n, I]."""
        chosen = hidden[routing.rows[: sum(routing.counts)]]
        activated = self.apply_gate(_grouped(chosen, self.gate_up, routing.counts))
        for call, rows in ((inputs, chosen), (observe, activated)):
            for number, value in enumerate(torch.split(rows, routing.counts)):
                if len(value):
                    call(number, value)
        return routing.summed(_grouped(activated, self.down, routing.counts), hidden)


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer is one plain matrix product: no subclass, and compressed-tensors' wrapper absent or disabled."""
    return type(linear) is nn.Linear and (
        "forward" not in vars(linear) or not getattr(linear, "quantization_enabled", True)
    )


def _watched(linear: nn.Linear) -> bool:
    """Whether the layer has a forward hook that is not llm-compressor's (those are disabled, or checked elsewhere)."""
    return any(not hasattr(hook, "__wrapped__") for hook in linear._forward_hooks.values())


def _grouped(rows: torch.Tensor, weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """rows [R, K], sorted by expert, weights [E, M, K], counts the rows of each expert -> [R, M]."""
    if not len(rows):
        return rows.new_empty(0, weights.shape[1])
    ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
