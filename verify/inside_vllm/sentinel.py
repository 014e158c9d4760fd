"""Proves that a checkpoint wrote every parameter of vLLM's model, and reads what it wrote into the experts' input
scales.

Runs inside vLLM's interpreter, loaded by `worker`.
"""

from __future__ import annotations

from typing import Any

NOT_LOADED = ("k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point", "q_zero_point")
"""Parameters vLLM creates for every attention and fills itself when a checkpoint has none."""
MAX_REPORTED = 50
DIVISOR = "input_global_scale"
INPUT_SCALES = tuple(f"{projection}_{leaf}" for projection in ("w13", "w2") for leaf in (DIVISOR, "input_scale"))
"""Input scales of NVFP4 experts: divisors in compressed-tensors' dialect, factors in modelopt's."""


def watch_loading(load: dict[str, Any]) -> None:
    """Fill every parameter with a sentinel before vLLM loads weights, and list what still holds it afterwards.

    vLLM allocates quantized parameters uninitialized and accepts a checkpoint that lacks some of them. Sentinels: NaN
    for floats (0x7f bytes in E4M3), 0x5a bytes for integers. In byte tensors 0x5a can be data, so a whole row must hold
    it. Rotary tables and other buffers are computed, not loaded, and are not changed.
    """
    import torch
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    original = DefaultModelLoader.load_weights

    def watched(model: Any) -> dict[str, Any]:
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if not parameter.is_meta and parameter.numel() and name.rsplit(".", 1)[-1] not in NOT_LOADED
            and not name.endswith("attn_sink")  # padded with -inf on purpose
            and not unused_input_scale(model, name)
        }  # fmt: skip

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        with torch.no_grad():
            for parameter in watched(model).values():
                if parameter.dtype.is_floating_point and parameter.element_size() > 1:
                    parameter.data.fill_(float("nan"))
                else:
                    fill = 0x7F if parameter.dtype.is_floating_point else 0x5A
                    parameter.data.contiguous().view(torch.uint8).fill_(fill)
        original(self, model, model_config)
        after = watched(model)
        load["tensors"] = len(after)
        problems = [p for name, parameter in after.items() if (p := unwritten(name, parameter.data)) is not None]
        problems += [
            {"name": name, "share": 1.0, "where": ""}
            for name, parameter in model.named_parameters()
            if name.endswith("attn_sink") and bool(torch.isneginf(parameter).all())
        ]
        load["missing"] = sorted(problems, key=lambda p: str(p["name"]))[:MAX_REPORTED]
        load["missing_total"] = len(problems)
        load["input_scales"] = input_scales(model)

    DefaultModelLoader.load_weights = load_weights


def input_scales(model: Any) -> dict[str, int] | None:
    """The number of layers with W4A4 experts, the number of experts, and the number of layers in which all experts have
    the same input global scale for gate/up and the same for down, as loaded and before any kernel changes them; None
    without such layers. The `input_scale` of FP8 experts is not counted.

    vLLM uses the smaller of an expert's gate and up. FlashInfer and vLLM's emulation use one per layer, CUTLASS each
    expert's own (compressed_tensors_moe_w4a4_nvfp4.py, vLLM 0.32).
    """
    found: dict[str, list[bool]] = {}
    experts = 0
    for name, parameter in model.named_parameters():
        layer, _, last = name.rpartition(".")
        if last in INPUT_SCALES and not unused_input_scale(model, name):
            scales = parameter.data.reshape(parameter.shape[0], -1)
            used = scales.amin(dim=1) if last.endswith(DIVISOR) else scales.amax(dim=1)
            found.setdefault(layer, []).append(bool((used == used[0]).all()))
            experts += len(used) if last.startswith("w2") else 0
    if not found:
        return None
    return {"layers": len(found), "experts": experts, "shared": sum(all(equal) for equal in found.values())}


def unused_input_scale(model: Any, name: str) -> bool:
    """Whether the parameter is an input scale of weight-only experts, or of a weight-only layer in modelopt's dialect:
    vLLM allocates it, but no checkpoint has it."""
    module, _, leaf = name.rpartition(".")
    method = getattr(model.get_submodule(module), "quant_method", None)
    if leaf == "input_scale":
        spec = getattr(method, "spec", None)
        return spec is not None and spec.activation is None
    return leaf in INPUT_SCALES and bool(getattr(method, "use_a16", False))


def unwritten(name: str, data: Any) -> dict[str, Any] | None:
    """None if all of `data` was written, else `{name, share, where}`; `where` names the first unwritten indices."""
    import torch

    if data.dtype.is_floating_point and data.element_size() > 1:
        left = torch.isnan(data)
    elif data.dtype.is_floating_point:
        left = data.contiguous().view(torch.uint8) & 0x7F == 0x7F
    elif data.element_size() > 1:
        left = data == int.from_bytes(b"\x5a" * data.element_size(), "little")
    else:
        same = data.contiguous().view(torch.uint8) == 0x5A
        left = same.all(dim=-1, keepdim=True).expand_as(same) if same.shape[-1] >= 8 else same.all().expand_as(same)
    count = int(left.sum())
    if count == 0:
        return None
    share = count / data.numel()
    where = ""
    if share < 1.0 and data.ndim:
        rows = left.reshape(data.shape[0], -1).any(dim=1).nonzero().flatten().tolist()
        where = f"index {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''} of dimension 0"
    return {"name": name, "share": share, "where": where}
