"""Scales, observers and hooks of quantized modules, which are there only while their block is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from compressed_tensors.quantization import QuantizationMetadata, QuantizationScheme, initialize_module_for_quantization
from llmcompressor.core import Event, State
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.calibration import apply_calibration_status, freeze_module_quantization
from llmcompressor.observers import Observer
from llmcompressor.observers.fusion import FusionHandler
from llmcompressor.observers.helpers import fuse_weight_observers
from pydantic import PrivateAttr
from torch import nn
from torch.utils.hooks import RemovableHandle


class BlockQuantizationModifier(QuantizationModifier):  # type: ignore[misc]
    """llm-compressor's QuantizationModifier, which takes up the modules of a block when the block comes.

    Its own way gives every module of the model scales (on meta), two observers and a hook before the first forward pass:
    8 kB each. `schemes` maps the modules to quantize to one of `resolved_config`'s schemes. What the modules get is
    llm-compressor's; their forward stays what it is, as calibration never emulates quantization.
    """

    _schemes: dict[nn.Module, QuantizationScheme] = PrivateAttr(default_factory=dict)
    _fused: dict[nn.Module, Sequence[nn.Module]] = PrivateAttr(default_factory=dict)
    _attached: dict[nn.Module, set[RemovableHandle]] = PrivateAttr(default_factory=dict)
    _keeps_weight: Callable[[nn.Module], bool] | None = PrivateAttr(default=None)

    def __str__(self) -> str:
        return type(self).__name__  # llm-compressor formats the modifier, all targets included, for every hook

    def choose(
        self,
        groups: dict[nn.Module, str],
        fused: Iterable[Sequence[nn.Module]],
        keeps_weight: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        """Says which config group each module to quantize belongs to, which of one block share a weight global scale, and
        which keep their weight's stored values: those get no weight scale. It is asked when the module's block comes,
        and says the same of all modules that share a scale."""
        self._keeps_weight = keeps_weight
        config_groups = self.resolved_config.config_groups
        self._schemes = {module: config_groups[group] for module, group in groups.items()}
        self._fused = {modules[0]: modules for modules in fused if modules}

    def quantizes(self, module: nn.Module) -> bool:
        """Whether the module is to be quantized."""
        return module in self._schemes

    def attach(self, roots: Iterable[nn.Module]) -> None:
        """What llm-compressor does at its start for all modules, for those below `roots`: scales on the weight's device,
        observers and hooks. Zero points only where the scheme is not symmetric: the output has none."""
        for root in roots:
            modules = [module for module in root.modules() if module in self._schemes]
            for module in modules:
                forward = vars(module).pop("forward", None)
                scheme = self._schemes[module]
                if self._keeps_weight is not None and self._keeps_weight(module):
                    scheme = scheme.model_copy(update={"weights": None})
                initialize_module_for_quantization(module, scheme, force_zero_point=False)
                del module.forward
                if forward is not None:
                    module.forward = forward
                self._initialize_observers(module)
                self._attached[module] = self._initialize_hooks(module)
                apply_calibration_status(module)
            fuse_weight_observers(root)
            link_fused(self._fused[module] for module in modules if module in self._fused)

    def detach(self) -> None:
        """Takes everything off again."""
        for module, hooks in self._attached.items():
            self.remove_hooks(hooks)
            # Observers and handlers hold each other, and the garbage collector would come many blocks later.
            for observer in [child for child in module.children() if isinstance(child, Observer)]:
                observer.fusion_handler._group.clear()
                del observer.fusion_handler
            freeze_module_quantization(module)
            QuantizationMetadata.clear_all_qparams(module)
            del module.quantization_scheme, module.quantization_status
        self._attached.clear()

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Nothing yet."""
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Nothing yet."""

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Nothing any more."""


def link_fused(groups: Iterable[Sequence[nn.Module]]) -> None:
    """Lets the weight observers of each group find one global scale for all of it, where the scheme has one."""
    for modules in groups:
        found = [(getattr(module, "weight_observer", None), module) for module in modules]
        pairs = [(observer, module) for observer, module in found if isinstance(observer, Observer)]
        if len(pairs) > 1 and all(observer.args.strategy == "tensor_group" for observer, _ in pairs):
            FusionHandler.fuse(pairs)
