"""Attaches scales, observers and hooks to quantized modules, only while their block is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from compressed_tensors.quantization import QuantizationMetadata, QuantizationScheme
from compressed_tensors.quantization.lifecycle import initialize
from compressed_tensors.utils import patch_attr
from llmcompressor.core import Event, State
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.calibration import apply_calibration_status, freeze_module_quantization
from llmcompressor.observers import Observer
from llmcompressor.observers.fusion import FusionHandler
from llmcompressor.observers.helpers import fuse_weight_observers
from pydantic import PrivateAttr
from torch import nn
from torch.utils.hooks import RemovableHandle

_SCALES = frozenset(QuantizationMetadata.all_qparam_names())


class BlockQuantizationModifier(QuantizationModifier):  # type: ignore[misc]
    """llm-compressor's QuantizationModifier, but a block's modules are initialized when the block is loaded.

    The original gives every module of the model scales (on meta), two observers and a hook before the first forward
    pass: 8 kB each. The modules get what llm-compressor gives them, except that their forward is unchanged, because
    calibration never emulates quantization.
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
        """Chooses the modules to quantize. `groups` maps each to its config group; `fused` are groups of modules of one
        block that share a weight global scale. `keeps_weight` says whether a module keeps its weight's stored values
        and gets no weight scale: it is called when the module's block is loaded, and must answer the same for all
        modules that share a scale."""
        self._keeps_weight = keeps_weight
        config_groups = self.resolved_config.config_groups
        self._schemes = {module: config_groups[group] for module, group in groups.items()}
        self._fused = {modules[0]: modules for modules in fused if modules}

    def quantizes(self, module: nn.Module) -> bool:
        """Whether the module is to be quantized."""
        return module in self._schemes

    def attach(self, roots: Iterable[nn.Module]) -> None:
        """Initializes the modules below `roots` as llm-compressor initializes all modules at its start: scales on the
        weight's device, observers and hooks. Only asymmetric schemes get zero points, which the output does not
        have."""
        for root in roots:
            modules = [module for module in root.modules() if module in self._schemes]
            for module in modules:
                scheme = self._schemes[module]
                if self._keeps_weight is not None and self._keeps_weight(module):
                    scheme = scheme.model_copy(update={"weights": None})
                initialize_scales(module, scheme)
                self._initialize_observers(module)
                self._attached[module] = self._initialize_hooks(module)
                apply_calibration_status(module)
            fuse_weight_observers(root)
            link_fused(self._fused[module] for module in modules if module in self._fused)

    def detach(self) -> None:
        """Removes everything that `attach` added."""
        for module, hooks in self._attached.items():
            self.remove_hooks(hooks)
            # Observers and handlers refer to each other, and the garbage collector would run many blocks later.
            for observer in [child for child in module.children() if isinstance(child, Observer)]:
                observer.fusion_handler._group.clear()
                del observer.fusion_handler
            freeze_module_quantization(module)
            clear_scales(module)
            del module.quantization_scheme, module.quantization_status
        self._attached.clear()

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Nothing yet."""
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Nothing yet."""

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Does nothing: `detach` has done it block by block."""


def initialize_scales(module: nn.Module, scheme: QuantizationScheme) -> None:
    """Gives a module its scheme and empty scales, and zero points if the scheme is asymmetric."""
    with (
        patch_attr(initialize, "set_forward_quantized", lambda module: None),
        patch_attr(QuantizationMetadata, "clear_all_qparams", clear_scales),
    ):
        initialize.initialize_module_for_quantization(module, scheme, force_zero_point=False)


def clear_scales(module: nn.Module) -> None:
    """Removes a module's scales and zero points. compressed-tensors' own function enters two contexts of offloading for each
    name that it looks for: 60 us for every module of a block, twice."""
    for name in _SCALES & module._parameters.keys():
        delattr(module, name)


def link_fused(groups: Iterable[Sequence[nn.Module]]) -> None:
    """Links the weight observers of each group, so that they compute one global scale for it if the scheme has one."""
    for modules in groups:
        found = [(getattr(module, "weight_observer", None), module) for module in modules]
        pairs = [(observer, module) for observer, module in found if isinstance(observer, Observer)]
        if len(pairs) > 1 and all(observer.args.strategy == "tensor_group" for observer, _ in pairs):
            FusionHandler.fuse(pairs)
