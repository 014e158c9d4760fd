"""Layers that transformers joins on load, as the several that the hub stores."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from calibration.checkpoint.formats import Formats, logical_name
from calibration.families.family import Family


class _Linears(nn.Module):
    """A linear layer as several, whose outputs are joined in their order."""

    def __init__(self, layer: nn.Linear, rows: dict[str, int]) -> None:
        super().__init__()
        for leaf, count in rows.items():
            self.add_module(leaf, nn.Linear(layer.in_features, count, bias=False, dtype=layer.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., M]`."""
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


class _Convolutions(nn.Module):
    """A convolution of each channel alone as several. transformers never calls such a layer: it reads its weight and bias
    (`causal_conv1d_fn(..., weight=self.conv1d.weight.squeeze(1), bias=self.conv1d.bias)`)."""

    bias = None

    def __init__(self, layer: nn.Conv1d, rows: dict[str, int]) -> None:
        super().__init__()
        size = layer.kernel_size[0]
        for leaf, count in rows.items():
            self.add_module(leaf, nn.Conv1d(count, count, size, groups=count, bias=False, dtype=layer.weight.dtype))

    @property
    def weight(self) -> torch.Tensor:
        """The joined kernels `[M, 1, size]`."""
        return torch.cat([layer.get_parameter("weight") for layer in self.children()])


def divide(model: PreTrainedModel, family: Family, formats: Formats) -> None:
    """Builds every layer of `Family.joined` as the modules that the source stores, with the rows that it stores. One whose
    rows do not add up is left as it is: the match with the headers reports it."""
    rows = {
        family.model_name(logical_name(name)): formats.of(name).shape[0]
        for name in formats.checkpoint.tensors
        if family.joined and name not in formats.companions and len(formats.of(name).shape) > 1
    }
    for name, leaves in family.joined:
        layer = model.get_submodule(name)
        counts = {leaf: rows.get(f"{name}.{leaf}.weight", 0) for leaf in leaves}
        with torch.device("meta"):
            if isinstance(layer, nn.Linear) and sum(counts.values()) == layer.out_features:
                model.set_submodule(name, _Linears(layer, counts))
            elif isinstance(layer, nn.Conv1d) and sum(counts.values()) == layer.out_channels:
                model.set_submodule(name, _Convolutions(layer, counts))
