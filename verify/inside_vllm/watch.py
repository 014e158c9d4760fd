"""Describes the layers and kernels of vLLM's model, and watches the outputs of its modules for NaN, infinity and
logits, and the inputs of its NVFP4 layers for values beyond what their scales admit.

Runs inside vLLM's interpreter, loaded by `worker`.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

WEIGHT_ONLY = ("MARLIN", "W4A16", "HUMMING")
QUANTIZING = ("EMULATION", "CUTLASS", "FLASHINFER", "FBGEMM", "B12X", "TORCHNVFP4", "CPUNVFP4", "CUTEDSL", "TRTLLM")
"""Parts of kernel and backend names, in upper case: NVFP4 kernels that quantize only weights, and those that also
quantize activations."""
RANGE = 448.0 * 6.0
"""An input global scale `s`, a divisor as in compressed-tensors, admits values up to RANGE / s: the largest group scale
times the largest code."""
SLACK = 1 + 2.0**-10
"""A scale is RANGE / amax in float32, so that it admits amax within a rounding (as in verify/fidelity/forward.py)."""
WORST = 5
"""Layers of saturated inputs that the result names."""


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
    scheme, kernel = getattr(module, "scheme", None), kernel_of(module)
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
    return {
        "kind": kind, "cls": type(module).__name__, "method": classes[0], "scheme": classes[1], "kernel": kernel_name,
        "format": "nvfp4" if nvfp4 else ("fp8" if "fp8" in " ".join(classes).lower() else ""),
        "activations_quantized": quantizes(kernel_name, is_weight_only(module)) if nvfp4 else None,
    }  # fmt: skip


def kernel_of(module: Any) -> Any:
    """The kernel object of a linear layer, or None: compressed-tensors keeps it in the layer's scheme, modelopt and FP8
    in the method."""
    owners = (getattr(module, "scheme", None), getattr(module, "quant_method", None))
    found = (getattr(owner, key, None) for owner in owners for key in ("kernel", "fp8_linear"))
    return next((kernel for kernel in found if kernel is not None), None)


def is_weight_only(module: Any) -> bool:
    """Whether the checkpoint declares an NVFP4 layer as W4A16, so that it has no input scale."""
    owners = (getattr(module, "scheme", None), getattr(module, "quant_method", None), module)
    return any(getattr(owner, key, False) for owner in owners for key in ("use_a16", "is_w4a16_nvfp4"))


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


@dataclass
class GivenInputs:
    """What one W4A4 NVFP4 layer is given, against what its input scale admits.

    admits: float32 `[1]`, or `[E]` if the experts of a layer differ in theirs; None if it was not found. `seen` is the
    largest magnitude beside `admitted`, the limit of the same value where they are furthest apart; `values` counts
    values (of an expert: those routed to it, if the experts differ), `beyond` those larger than admitted. `missed`:
    why what came could not be looked at, "" if it could."""

    module: str
    admits: Any
    seen: float = 0.0
    admitted: float = math.nan
    values: int = 0
    beyond: int = 0
    missed: str = ""
    _ratio: float = field(default=-1.0, repr=False)

    def take(self, x: Any, experts: Any = None, weights: Any = None) -> None:
        """Count the values of `x [T, K]`; `experts [T, k]`: which experts each token is routed to, if it is known;
        `weights [T, k]`: factors of the input of each of them, if the layer has such."""
        import torch

        if self.admits is None or self.missed:
            return
        if not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.element_size() > 1):
            self.missed = "its input comes quantized"  # by a fused kernel before it
            return
        rows, limits = x.detach().reshape(-1, x.shape[-1]), self.admits.to(x.device)
        if len(limits) == 1 and weights is None:
            self._count(rows, limits)
        elif experts is None or len(experts) != len(rows):
            self.missed = "its experts' scales differ, and its kernel routes on its own"
        else:
            for slot, chosen in enumerate(experts.long().unbind(-1)):
                # vLLM marks tokens of no expert with -1.
                here = (chosen >= 0) & ((chosen < len(limits)) | (len(limits) == 1))
                given = rows[here] if weights is None else rows[here] * weights[here, slot, None].to(rows.dtype)
                self._count(given, limits[chosen[here]] if len(limits) > 1 else limits)

    def _count(self, rows: Any, limits: Any) -> None:
        """Count `rows [T, K]` under `limits`, `[1]` or `[T]`."""
        if not rows.numel():
            return
        # In float32: a BF16 tensor would round the limit that it is compared with to BF16.
        largest = rows.abs().amax(dim=-1).float()
        ratio = largest / limits
        at = int(ratio.argmax())
        if float(ratio[at]) > self._ratio:
            self._ratio, self.seen = float(ratio[at]), float(largest[at])
            self.admitted = float(limits[at if len(limits) > 1 else 0])
        self.values += rows.numel()
        over = ratio > SLACK
        if bool(over.any()):
            limit = (limits.expand_as(largest)[over] * SLACK)[:, None]
            self.beyond += int((rows[over].abs().float() > limit).sum())

    def why_not(self) -> str:
        """Why the layer was not looked at; "" if it was."""
        if self.admits is None:
            return "no input scale found"
        return self.missed or ("" if self.values else "given nothing")

    def facts(self) -> dict[str, Any]:
        """The layer's entry in the result."""
        return {"module": self.module, "admitted": self.admitted, "seen": self.seen, "share": self.beyond / self.values}


def admits(module: Any) -> Any:
    """The largest magnitude that the input scale of a W4A4 NVFP4 layer admits, float32, `[1]` or one per expert `[E]`
    (gate/up's); None if no attribute known here holds it.

    Where vLLM 0.32 keeps the divisor after `process_weights_after_loading`: linear layers of both dialects in
    `input_global_scale_inv` (`input_global_scale` is its inverse by then), on all kernels but Humming. Experts in the
    method's `moe_quant_config.a1_gscale`, which is what their kernel quantizes with; Marlin's, which do not quantize, in
    compressed-tensors' parameter `[E, 2]`; our emulation in `w13_input_divisor`.
    """
    import torch

    method = getattr(module, "quant_method", None)
    if getattr(method, "per_token_activation", False):
        return None  # the scale is computed from each token, and cannot saturate
    found = (
        getattr(module, "input_global_scale_inv", None),
        getattr(module, "w13_input_divisor", None),
        getattr(getattr(method, "moe_quant_config", None), "a1_gscale", None),
        getattr(module, "w13_input_global_scale", None),
    )
    divisor = next((tensor for tensor in found if isinstance(tensor, torch.Tensor) and tensor.numel()), None)
    if divisor is None:
        return None
    divisor = divisor.detach().float()
    # The smaller one of gate and up is used.
    divisor = divisor.amin(dim=1) if divisor.ndim == 2 else divisor.reshape(-1)
    if not bool((torch.isfinite(divisor) & (divisor > 0)).all()):
        return None
    return RANGE / (divisor[:1] if bool((divisor == divisor[0]).all()) else divisor)


class InputWatch:
    """Counts what every W4A4 NVFP4 layer of a model is given, in front of its kernel: behind rotations of the input, and
    also where a model calls the kernel past the module."""

    def __init__(self) -> None:
        self.counting = True
        self.layers: dict[int, GivenInputs] = {}

    def install(self, model: Any) -> None:
        """Wrap the kernels of linear layers and the methods of experts. Layers that the checkpoint declares W4A16 are left
        out, W4A4 layers that a weight-only kernel serves are not: their scales are the checkpoint's too."""
        wrapped: set[int] = set()
        for name, module in model.named_modules():
            described = describe_layer(module)
            if described is None or described["format"] != "nvfp4" or is_weight_only(module):
                continue
            self.layers[id(module)] = GivenInputs(name, admits(module))
            kernel = kernel_of(module)
            owner = module.quant_method if described["kind"] == "experts" or kernel is None else kernel
            if id(owner) not in wrapped:
                wrapped.add(id(owner))
                for entry in ("apply_weights",) if owner is kernel else ("apply", "apply_monolithic"):
                    self._wrap(owner, entry)

    def _wrap(self, owner: Any, entry: str) -> None:
        original = getattr(owner, entry, None)
        if original is None:
            return
        signature = inspect.signature(original)

        def call(*arguments: Any, **named: Any) -> Any:
            given = signature.bind(*arguments, **named).arguments
            layer = self.layers.get(id(given.get("layer")))
            if layer is not None and self.counting:
                # Llama-4's experts weigh their input, in front of the quantization; kernels that route on their own
                # (TRTLLM) quantize it before, and have no weights here.
                weighs = getattr(given["layer"], "apply_router_weight_on_input", False)
                weights = given.get("topk_weights") if weighs else None
                layer.take(given.get("x"), given.get("topk_ids"), weights)
            return original(*arguments, **named)

        setattr(owner, entry, call)

    def summary(self) -> dict[str, Any] | None:
        """The value of `given_inputs` in the result; None if the model has no such layer."""
        if not self.layers:
            return None
        not_looked_at: dict[str, int] = {}
        looked_at = []
        for layer in self.layers.values():
            if why := layer.why_not():
                not_looked_at[why] = not_looked_at.get(why, 0) + 1
            else:
                looked_at.append(layer)
        worst = sorted(looked_at, key=lambda layer: (-layer.beyond / layer.values, -layer.seen / layer.admitted))
        return {
            "layers": len(looked_at), "saturated": sum(layer.beyond > 0 for layer in looked_at),
            "not_looked_at": not_looked_at, "worst": [layer.facts() for layer in worst[:WORST]],
        }  # fmt: skip


class ForwardWatch:
    """Forward hooks on every module: the first output that is not finite, the logits of a prompt's positions, and
    what the NVFP4 layers are given."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result
        self.inputs = InputWatch()
        self.kind = ""
        self.tokens = 0
        self.capture = False
        self.logits: Any = None

    def begin(self, kind: str, tokens: int, capture: bool, inputs: bool = True) -> None:
        """Set the name of the next run; with `capture`, keep the logits of its first forward of `tokens` rows; with
        `inputs`, count what the NVFP4 layers are given."""
        self.kind, self.tokens, self.capture, self.logits = kind, tokens, capture, None
        self.inputs.counting = inputs

    def install(self, model: Any) -> None:
        """Hook every module of `model`; children run before their parents, so the innermost one is named."""
        for name, module in model.named_modules():
            module.register_forward_hook(self._finite(name or "the model"))
        model.register_forward_hook(self._keep_logits)
        self.inputs.install(model)

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
