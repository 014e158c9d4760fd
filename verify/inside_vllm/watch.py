"""Describes the layers and kernels of vLLM's model, and watches the outputs of its modules for NaN, infinity and
logits.

Runs inside vLLM's interpreter, loaded by `worker`.
"""

from __future__ import annotations

from typing import Any

WEIGHT_ONLY = ("MARLIN", "W4A16", "HUMMING")
QUANTIZING = ("EMULATION", "CUTLASS", "FLASHINFER", "FBGEMM", "B12X", "TORCHNVFP4", "CPUNVFP4", "CUTEDSL", "TRTLLM")
"""Parts of kernel and backend names, in upper case: NVFP4 kernels that quantize only weights, and those that also
quantize activations."""


def describe_layers(model: Any) -> list[dict[str, Any]]:
    """One entry per kind of linear, expert and attention layer: the classes that run, the number of layers, one
    name."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, module in model.named_modules():
        described = describe_layer(module)
        if described is not None:
            entry = found.setdefault(tuple(described.values()), described | {"count": 0, "example": name})
            entry["count"] += 1
    return list(found.values())


def describe_layer(module: Any) -> dict[str, Any] | None:
    """The classes that run a linear, expert or attention layer, and the format in which it keeps its weights; None for
    other modules."""
    method = getattr(module, "quant_method", None)
    backend = getattr(module, "attn_backend", None) or getattr(module, "backend_cls", None)
    if method is None and backend is None:
        return None
    scheme = getattr(module, "scheme", None)
    # compressed-tensors keeps its kernel in the layer's scheme, modelopt and FP8 in the method.
    found_kernels = (getattr(owner, key, None) for owner in (scheme, method) for key in ("kernel", "fp8_linear"))
    kernel = next((found for found in found_kernels if found is not None), None)
    if backend is not None:
        # the attention of vision towers names its backend by a member of an enumeration
        named = getattr(backend, "get_name", None)
        kind, kernel_name = "attention", named() if named is not None else str(getattr(backend, "name", backend))
    elif any(
        cls.__name__ == "RoutedExperts" for cls in type(module).__mro__
    ):  # the transformers backend has a subclass
        kind = "experts"
        gpu_backend = getattr(method, "nvfp4_backend", None) or getattr(method, "unquantized_backend", None)
        experts = getattr(method, "experts_cls", None)
        names = (getattr(method, "backend_name", None), getattr(gpu_backend, "name", None))
        kernel_name = " ".join(filter(None, (*names, getattr(experts, "__name__", None))))
    else:
        kind = "embedding" if "Embedding" in type(module).__name__ else "linear"
        kernel_name = type(kernel).__name__ if kernel is not None else ""
    classes = [type(found).__name__ if found is not None else "" for found in (method, scheme)]
    nvfp4 = "nvfp4" in " ".join([*classes, kernel_name]).lower().replace("w4a4fp4", "nvfp4")
    use_a16 = any(
        getattr(owner, key, False) for owner in (scheme, method, module) for key in ("use_a16", "is_w4a16_nvfp4")
    )
    return {
        "kind": kind, "cls": type(module).__name__, "method": classes[0], "scheme": classes[1], "kernel": kernel_name,
        "format": "nvfp4" if nvfp4 else ("fp8" if "fp8" in " ".join(classes).lower() else ""),
        "activations_quantized": quantizes(kernel_name, use_a16) if nvfp4 else None,
    }  # fmt: skip


def quantizes(kernel: str, use_a16: bool) -> bool | None:
    """Whether an NVFP4 kernel quantizes activations, by its name; None for an unknown name."""
    name = kernel.upper()
    if use_a16 or any(mark in name for mark in WEIGHT_ONLY):
        return False
    return True if any(mark in name for mark in QUANTIZING) else None


def all_activations_quantized(layers: list[dict[str, Any]]) -> bool | None:
    """The value of `w4a4` in the result."""
    states = {entry["activations_quantized"] for entry in layers if entry["format"] == "nvfp4"}
    if not states:
        return None
    return False if False in states else (None if None in states else True)


class ForwardWatch:
    """Forward hooks on every module: the first output that is not finite, and the logits of a prompt's positions."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.kind = ""
        self.tokens = 0
        self.capture = False
        self.logits: Any = None

    def begin(self, kind: str, tokens: int, capture: bool) -> None:
        """Set the name of the next run; with `capture`, keep the logits of its first forward of `tokens` rows."""
        self.kind, self.tokens, self.capture, self.logits = kind, tokens, capture, None

    def install(self, model: Any) -> None:
        """Hook every module of `model`; children run before their parents, so the innermost one is named."""
        for name, module in model.named_modules():
            module.register_forward_hook(self._finite(name or "the model"))
        model.register_forward_hook(self._keep_logits)

    def _finite(self, name: str) -> Any:
        import torch

        def hook(module: Any, _inputs: Any, output: Any) -> None:
            if self.result["nonfinite"] is not None:
                return
            for tensor in output if isinstance(output, list | tuple) else (output,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.element_size() > 1:
                    bad = int((~torch.isfinite(tensor)).sum())
                    if bad:
                        self.result["nonfinite"] = {
                            "module": name, "cls": type(module).__name__, "kind": self.kind, "values": bad,
                        }  # fmt: skip
                        return

        return hook

    def _keep_logits(self, model: Any, _inputs: Any, output: Any) -> None:
        if self.capture and self.logits is None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.logits = model.compute_logits(hidden[: self.tokens]).float().cpu().contiguous()
