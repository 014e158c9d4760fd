"""An empty transformers model of a source checkpoint, which loads its weights block by block straight from the shards.

Nothing is expanded to BF16 on disk and nothing is offloaded: parameters and persistent buffers are on the meta device
until `SourceModel.load` reads them; `SourceModel.unload` puts them back there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from compressed_tensors.utils import match_named_modules
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import nn
from transformers import PreTrainedModel

from calibration.checkpoint.dequantize import check_finite, dequantize
from calibration.checkpoint.formats import Formats, logical_name
from calibration.families.family import Family
from calibration.model.heap import trim_memory
from calibration.model.weight_buffer import Prefetch, WeightBuffer

WEIGHT = ".weight"


class SourceModel:
    """A model skeleton and the source tensors that fill it.

    `model` is the transformers model with one nn.Linear per routed expert and projection, in eval mode; `blocks` its
    decoder blocks in order, by module name; `sources` maps each parameter and persistent buffer to a source tensor.
    Between `load` and `unload` the modules are ordinary modules on `device`.
    """

    def __init__(
        self, model: PreTrainedModel, formats: Formats, family: Family, sources: dict[str, str], device: torch.device
    ) -> None:
        self.model = model
        self.formats = formats
        self.family = family
        self.sources = sources
        self.device = device
        self.sequential_targets = list(infer_sequential_targets(model))
        self.blocks: dict[str, nn.Module] = dict(match_named_modules(model, self.sequential_targets))
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = {
            name.rpartition(".")[0]: logical_name(source).removesuffix(WEIGHT)
            for name, source in sources.items()
            if name.endswith(WEIGHT)
        }
        self._versions: dict[str, int] = {}
        #: Whether prefetching the next block gains time: on the CPU it competes with the forward pass and needs the
        #: memory of one more block.
        self.prefetches = device.type != "cpu"
        self._prefetch: Prefetch | None = None

    def module_name(self, module: nn.Module) -> str:
        """The transformers name of a module of the skeleton."""
        name: str = self._names[module]
        return name

    def source_module(self, name: str) -> str:
        """The source checkpoint's name of the module (with a weight) that transformers calls `name`."""
        return self._modules[name]

    def model_modules(self) -> dict[str, str]:
        """Source module name -> transformers module name, for every module with a weight."""
        return {source: name for name, source in self._modules.items()}

    def modules_of(self, source_modules: Iterable[str]) -> dict[str, nn.Module]:
        """Those of these source modules that have a weight -> their modules of the skeleton. `nn.Module.get_submodule` walks
        the tree for each: a CPU-second for the 70,000 of a DeepSeek-V4-Pro."""
        names, modules = self.model_modules(), dict(self.model.named_modules(remove_duplicate=False))
        return {source: modules[names[source]] for source in source_modules if source in names}

    def source_block(self, name: str) -> str:
        """The source's spelling of a block: `model.layers.3` -> `layers.3` for DeepSeek-V4."""
        split = [source.split(".") for tensor, source in self.sources.items() if tensor.startswith(name + ".")]
        common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
        return ".".join(parts[0] for parts in common)

    def outside_blocks(self) -> list[nn.Module]:
        """The modules outside the blocks that have tensors of their own: embedding, final norm, head, ..."""
        prefixes = tuple(f"{block}." for block in self.blocks)
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self.sources if not name.startswith(prefixes))
        return [self.model.get_submodule(owner) for owner in owners]

    def load(self, roots: Iterable[nn.Module]) -> None:
        """Reads every tensor below `roots` from the source onto `device`; loaded ones are kept.

        Tensors that the source does not know (scales and zero points that modifiers allocated on meta) become NaN, or
        zero if integer, so that nothing uninitialized can reach the output. Raises SourceError for NaN or Inf.
        """
        prefetched = {} if self._prefetch is None else self._prefetch.take()
        self._prefetch = None
        missing = [found for found in self._tensors(roots) if found[-1].is_meta]
        reads = self._reads((full, tensor) for _, _, full, tensor in missing if full not in prefetched)
        for module, leaf, full, tensor in missing:
            read, value = reads.get(full), prefetched.pop(full, None)
            if value is None:
                value = self._empty(leaf, tensor) if read is None else read()
            place(module, leaf, value)
            if full in self.sources:
                self._versions[full] = _tensor(module, leaf)._version

    def prefetch(self, roots: Iterable[nn.Module]) -> None:
        """Starts a thread that reads what `load` of the same roots will need; it takes the memory of one more block.
        Tensors that cannot be read are left to `load`, which raises the error."""
        self.stop_prefetch()
        reads = self._reads((full, tensor) for _, _, full, tensor in self._tensors(roots) if tensor.is_meta)
        self._prefetch = Prefetch(self.device, reads)
        self._prefetch.start()

    def stop_prefetch(self) -> None:
        """Stops the prefetch and drops what it has read."""
        if self._prefetch is not None:
            self._prefetch.stopped = True
            self._prefetch.take()
            self._prefetch = None

    def unload(self, roots: Iterable[nn.Module]) -> None:
        """Puts every tensor below `roots` back on meta and returns the freed memory to the system."""
        for module, leaf, full, tensor in self._tensors(roots):
            if not tensor.is_meta:
                place(module, leaf, torch.empty_like(tensor, device="meta"))
                self._versions.pop(full, None)
        trim_memory()

    def loaded(self) -> set[str]:
        """Names of the source-backed tensors that are in memory now."""
        everything = self._tensors([self.model])
        return {full for _, _, full, tensor in everything if full in self.sources and not tensor.is_meta}

    def edited(self, roots: Iterable[nn.Module]) -> dict[str, torch.Tensor]:
        """Source tensors below `roots` that were modified after `load` (GPTQ, AWQ, SmoothQuant)."""
        return {
            self.sources[full]: tensor.data
            for _, _, full, tensor in self._tensors(roots)
            if full in self._versions and tensor._version != self._versions[full]
        }

    def _tensors(self, roots: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
        seen = set[nn.Module]()  # a root may lie in another: a block with a parameter of its own, and its children
        for root in roots:
            for name, module in root.named_modules(prefix=self._names[root], memo=seen):
                prefix = f"{name}." if name else ""
                for leaf, tensor in own_tensors(module):
                    yield module, leaf, prefix + leaf, tensor

    def _reads(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Callable[[], torch.Tensor]]:
        """A read function for each of the named tensors that the source has; all of them read into one weight buffer,
        in this order."""
        wanted = [(full, tensor) for full, tensor in tensors if full in self.sources]
        # Formats.read returns integers in memory of their own.
        fitting = {full: tensor for full, tensor in wanted if tensor.is_floating_point() and tensor.numel()}
        buffer = WeightBuffer(self.device, fitting.values())
        return {
            full: partial(
                self._read, self.sources[full], tensor.dtype, buffer.take(tensor) if full in fitting else None
            )
            for full, tensor in wanted
        }

    def _read(self, source: str, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
        if self.device.type == "cpu":
            return self.formats.read(source, dtype, out)
        # The raw bytes are transferred: they are a half to a quarter of the BF16 values, and the accelerator
        # dequantizes faster.
        checkpoint, stored = self.formats.checkpoint, self.formats.of(source)
        raw = checkpoint.read(source).to(self.device)
        if not raw.is_floating_point() and stored.kind == "plain":
            return raw
        scales = {role: checkpoint.read(name).to(self.device) for role, name in stored.scales.items()}
        value = dequantize(stored, raw, scales, dtype, out)
        check_finite(value, f"{checkpoint.path(source)}: {source}")
        return value

    def _empty(self, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
        if leaf.endswith("zero_point") or not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)
        return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device=self.device)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the parameters and persistent buffers of this module, without its children's."""
    yield from ((leaf, tensor) for leaf, tensor in list(module._parameters.items()) if tensor is not None)
    for leaf, tensor in list(module._buffers.items()):
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, tensor


def place(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
    """Makes `value` the parameter or buffer `leaf` of this module."""
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _tensor(module: nn.Module, leaf: str) -> torch.Tensor:
    tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    assert tensor is not None
    return tensor
