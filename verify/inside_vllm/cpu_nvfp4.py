"""NVFP4 (W4A4) and block-FP8 layers for vLLM on a machine without a GPU, as plain torch emulations.

vLLM has no NVFP4 kernel for the CPU platform, so a quantized checkpoint cannot be tried there. `register` adds
emulations that keep vLLM's own weight creation, loading and scale handling and only replace the arithmetic: quantize
and dequantize the activations, dequantize the weights, multiply in the model's dtype. On every other platform
`register` does nothing and the native kernels run.

Runs inside vLLM's interpreter: imports the standard library, torch and vLLM only. Written against vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_FP8_BLOCK_KERNELS,
    NvFp4LinearLayerConfig,
    register_linear_kernel,
)
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization import fp8, modelopt, register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as nvfp4_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as fp8_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w4a4_nvfp4 as nvfp4_linear,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
    ref_nvfp4_quant_dequant,
)
from vllm.platforms import PlatformEnum, current_platform

GROUP = 16  # weights per group scale

MOE_INPUT_SCALES = ("stored", "collapsed")


def fp8_block_dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Float32 weight `[M, K]` from E4M3 codes `[M, K]` and tile scales `[ceil(M/bm), ceil(K/bk)]` (F32 or E8M0)."""
    rows = scale.float().repeat_interleave(block[0], 0)[: weight.shape[0]]
    return weight.float() * rows.repeat_interleave(block[1], 1)[:, : weight.shape[1]]


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x [..., K]`, `weight [M, K]` -> `[..., M]` in x's dtype; float32 is accumulated in float64.

    A float32 run is compared with a reference, and an activation that rounds to another code because of the order of a
    sum changes every later token: less rounding noise means fewer of those.
    """
    wide = accumulator(x.dtype)
    bias = None if bias is None else bias.to(wide)
    return torch.nn.functional.linear(x.to(wide), weight.to(wide), bias).to(x.dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `multiply` works, and in which dense weights are therefore kept."""
    return torch.float64 if dtype == torch.float32 else dtype


class CpuNvFp4LinearKernel(EmulationNvFp4LinearKernel):  # type: ignore[misc]
    """vLLM's own NVFP4 emulation with the weight dequantized once at load instead of at every call."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Keep the dense weight `[M, K]`, in the dtype `multiply` works in, next to the packed one."""
        super().process_weights_after_loading(layer)
        layer.dense_weight = dequantize_to_dtype(
            layer.weight.data,
            layer.weight_scale.data,
            layer.weight_global_scale,
            accumulator(layer.params_dtype),
            GROUP,
            False,
        )

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x [..., K] -> [..., M]`: the input is quantized to NVFP4 and back, then multiplied."""
        flat = x.reshape(-1, x.shape[-1])
        quantized = ref_nvfp4_quant_dequant(flat, layer.input_global_scale_inv, GROUP)
        out = multiply(quantized, layer.dense_weight, bias)
        return out.reshape(*x.shape[:-1], -1)


class CpuNvFp4WeightOnlyLinearKernel(CpuNvFp4LinearKernel):
    """NVFP4A16: the same dense weight, activations unchanged. vLLM's own weight-only kernels are GPU code."""

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x [..., K] -> [..., M]`."""
        return multiply(x, layer.dense_weight, bias)


class CpuFp8BlockLinearKernel(Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
    """Block-FP8 linear in float32, or if the CPU has no AMX: dequantized weights, activations unchanged.

    Weight-only like vLLM's own AMX kernel (CPUFp8BlockScaledMMKernel); GPU kernels quantize the activations to FP8.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Always true: this is the fallback, the last in the list."""
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Keep the dense weight `[M, K]`, in the dtype `multiply` works in, next to the codes."""
        params = self._get_layer_params(layer)
        group = self.weight_group_shape
        dense = fp8_block_dequantize(params.weight.data, params.block_scale.data, (group.row, group.col))
        layer.dense_weight = dense.to(accumulator(layer.params_dtype))

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """`x [..., K] -> [..., M]`."""
        return multiply(x, layer.dense_weight, bias)

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor:
        """Not used: `apply_weights` is overridden."""
        raise NotImplementedError


class CpuExperts:
    """The common base of routed experts of every format on the CPU: dense weights `w13_dense [E, 2I, D]`, `w2_dense [E,
    D, I]` of the layer, computed one expert at a time."""

    backend_name = "CPU_EMULATION"

    @property
    def is_monolithic(self) -> bool:
        """False: the router runs outside and `apply` gets its choice."""
        return False

    @property
    def supports_eplb(self) -> bool:
        """False."""
        return False

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        """An empty configuration: no modular kernel uses it here."""
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """`x [T, D]`, `topk_weights`/`topk_ids [T, k]` -> the weighted sum of the chosen experts, `[T, D]`.

        The shared expert is left to vLLM's runner, which calls it when no modular kernel claims it.
        """
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            token, slot = torch.where(topk_ids == expert)
            weight = topk_weights[token, slot].unsqueeze(-1)
            rows = x[token] * weight.to(x.dtype) if layer.apply_router_weight_on_input else x[token]
            hidden = multiply(self.quantize_input(layer, "w13", expert, rows), layer.w13_dense[expert])
            hidden = activate(layer, hidden)
            result = multiply(self.quantize_input(layer, "w2", expert, hidden), layer.w2_dense[expert]).float()
            out.index_add_(0, token, result if layer.apply_router_weight_on_input else result * weight.float())
        return out.to(x.dtype)

    def quantize_input(self, layer: Any, projection: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """The input `[T, K]` of an expert's "w13" or "w2" as its kernel sees it: here unchanged."""
        return x


class CpuNvFp4Experts(CpuExperts):
    """The common base of NVFP4 routed experts in both dialects: `input_divisors` returns those of gate/up and down as
    loaded, `[E]` each; `input_scales` is one of MOE_INPUT_SCALES."""

    use_a16: bool
    input_scales: str

    def input_divisors(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Of w13 and w2."""
        raise NotImplementedError

    def use_input_scales(self, layer: Any, mode: str) -> None:
        """Use the input divisors `[E]` of `mode` from now on; the loaded ones are kept."""
        w13_input, w2_input = self.input_divisors(layer)
        if mode == "collapsed":
            w13_input = w13_input.min().expand_as(w13_input)
            w2_input = w2_input.min().expand_as(w2_input)
        layer.w13_input_divisor, layer.w2_input_divisor = w13_input.clone(), w2_input.clone()

    def quantize_input(self, layer: Any, projection: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """The input, quantized with the expert's divisor and dequantized, unless the experts are weight-only."""
        divisor = getattr(layer, f"{projection}_input_divisor")
        return x if self.use_a16 else ref_nvfp4_quant_dequant(x, divisor[expert], GROUP)


class CompressedTensorsCpuNvFp4MoEMethod(CpuNvFp4Experts, nvfp4_moe.CompressedTensorsW4A4Nvfp4MoEMethod):  # type: ignore[misc]
    """NVFP4 routed experts on the CPU.

    The prefix "CompressedTensors" in the class name is needed: vLLM's expert weight loader looks for it.
    """

    def __init__(self, moe: Any, layer_name: str | None, use_a16: bool, input_scales: str) -> None:
        """Skips the parent's choice of a GPU backend; everything the parent's `create_weights` needs is set."""
        FusedMoEMethodBase.__init__(self, moe)
        self.group_size = GROUP
        self.use_a16 = use_a16
        self.use_global_sf = False
        self.input_scales = input_scales

    def process_weights_after_loading(self, layer: Any) -> None:
        """Dequantize once and reduce the input global scales as the GPU kernels do.

        Dense weights: `w13 [E, 2I, D]`, `w2 [E, D, I]`. vLLM uses the gate projection's weight global scale for gate
        and up (a checkpoint with different ones is served wrongly on GPUs, and here too). Input global scales are
        divisors; the smaller one of gate and up is used, which is the larger scale. They are stored and used per expert
        `[E]` (VLLM_CUTLASS), or one for the whole layer in "collapsed" mode (FlashInfer and vLLM's emulation).
        """
        dtype = accumulator(layer.params_dtype)
        w13_divisor = layer.w13_weight_global_scale[:, 0]
        layer.w13_dense = dequantize_to_dtype(
            layer.w13_weight_packed.data, layer.w13_weight_scale.data, 1.0 / w13_divisor, dtype, GROUP, False
        )
        layer.w2_dense = dequantize_to_dtype(
            layer.w2_weight_packed.data,
            layer.w2_weight_scale.data,
            1.0 / layer.w2_weight_global_scale,
            dtype,
            GROUP,
            False,
        )
        self.use_input_scales(layer, self.input_scales)

    def input_divisors(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The smaller divisor of gate and up, and down's."""
        return layer.w13_input_global_scale.data.amin(dim=1), layer.w2_input_global_scale.data


class ModelOptCpuNvFp4MoEMethod(CpuNvFp4Experts, modelopt.ModelOptNvFp4FusedMoE):  # type: ignore[misc]
    """NVFP4 routed experts in modelopt's spelling, which DeepSeek-V4 has under `moe_quant_algo` too.

    The "ModelOpt" in the class name is needed: vLLM's expert weight loader looks for it.
    """

    default_input_scales = MOE_INPUT_SCALES[0]

    def __init__(self, quant_config: Any, moe_config: Any) -> None:
        """Skips the parent's choice of a GPU backend; everything the parent's `create_weights` needs is set."""
        FusedMoEMethodBase.__init__(self, moe_config)
        self.quant_config = quant_config
        self.use_a16 = quant_config.quant_method == "W4A16_NVFP4"
        self.use_global_sf = False
        self.input_scales = self.default_input_scales

    def process_weights_after_loading(self, layer: Any) -> None:
        """Dequantize once, `w13 [E, 2I, D]` and `w2 [E, D, I]`; as vLLM, with the gate projection's weight scale for gate
        and up. Scales multiply here, and their inverses are the input divisors."""
        dtype = accumulator(layer.params_dtype)
        layer.w13_dense = dequantize_to_dtype(
            layer.w13_weight.data, layer.w13_weight_scale.data, layer.w13_weight_scale_2[:, 0], dtype, GROUP, False
        )
        layer.w2_dense = dequantize_to_dtype(
            layer.w2_weight.data, layer.w2_weight_scale.data, layer.w2_weight_scale_2, dtype, GROUP, False
        )
        if not self.use_a16:
            self.use_input_scales(layer, self.input_scales)

    def input_divisors(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of the larger scale of gate and up, and of down's."""
        return 1.0 / layer.w13_input_scale.data.amax(dim=1), 1.0 / layer.w2_input_scale.data


class CompressedTensorsCpuFp8MoEMethod(CpuExperts, fp8_moe.CompressedTensorsW8A8Fp8MoEMethod):  # type: ignore[misc]
    """Block-FP8 routed experts if vLLM has no kernel for them: in float32, or without AMX. Weight-only like vLLM's own
    (CPUExpertsFp8)."""

    def __init__(self, moe: Any, weights: Any, inputs: Any) -> None:
        """Skips the parent's choice of a backend, which finds none."""
        FusedMoEMethodBase.__init__(self, moe)
        self.weight_quant, self.input_quant = weights, inputs
        self.weight_block_size, self.block_quant, self.static_input_scales = weights.block_structure, True, False

    def process_weights_after_loading(self, layer: Any) -> None:
        """Dequantize once, in the dtype `multiply` works in."""
        dtype = accumulator(layer.orig_dtype)
        rows, columns = self.weight_block_size
        for name in ("w13", "w2"):
            codes, scales = getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale").data
            dense = [fp8_block_dequantize(*one, (rows, columns)).to(dtype) for one in zip(codes, scales, strict=True)]
            setattr(layer, f"{name}_dense", torch.stack(dense))


def use_input_scales(model: torch.nn.Module, mode: str) -> None:
    """Switch every layer of NVFP4 experts in `model` to a mode of MOE_INPUT_SCALES."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, CpuNvFp4Experts):
            method.use_input_scales(module, mode)


def activate(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """SwiGLU of one expert, `[T, 2I] -> [T, I]`, clamped first if the model has a `swiglu_limit` (DeepSeek-V4), or GELU's
    tanh form in its place (Gemma-4).

    Raises NotImplementedError for any other activation.
    """
    gate, up = hidden.chunk(2, dim=-1)
    if layer.activation == MoEActivation.GELU_TANH:
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    if layer.activation != MoEActivation.SILU:
        raise NotImplementedError(f"{layer.layer_name}: the CPU emulation knows no {layer.activation}")
    if layer.swiglu_limit is not None:
        limit = float(layer.swiglu_limit)
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return torch.nn.functional.silu(gate) * up


def register(moe_input_scales: str = "stored") -> list[str]:
    """Make vLLM load NVFP4 and block-FP8 compressed-tensors checkpoints on the CPU; call before the engine is built.

    moe_input_scales: "stored" uses every expert's own input global scale, "collapsed" one per layer, as FlashInfer
    does; both agree if a checkpoint shares them. Returns what is emulated; empty if the platform is not the CPU.
    """
    if not current_platform.is_cpu():
        return []
    if moe_input_scales not in MOE_INPUT_SCALES:
        raise ValueError(f"moe_input_scales: expected one of {MOE_INPUT_SCALES}, got {moe_input_scales!r}")
    register_linear_kernel(CpuNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    kernel_for = nvfp4_linear.init_nvfp4_linear_kernel

    def kernel(use_a16: bool = False) -> Any:
        # vLLM forces a GPU kernel on weight-only layers without checking the platform's list.
        return CpuNvFp4WeightOnlyLinearKernel(NvFp4LinearLayerConfig()) if use_a16 else kernel_for(use_a16)

    nvfp4_linear.init_nvfp4_linear_kernel = modelopt.init_nvfp4_linear_kernel = kernel
    _POSSIBLE_FP8_BLOCK_KERNELS.setdefault(PlatformEnum.CPU, []).append(CpuFp8BlockLinearKernel)
    _register_modelopt(moe_input_scales)

    @register_quantization_config("compressed-tensors")
    class CompressedTensorsCpuConfig(CompressedTensorsConfig):  # type: ignore[misc]
        """compressed-tensors with NVFP4 and FP8 routed experts on the CPU; every other layer is vLLM's own."""

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            if isinstance(layer, RoutedExperts) and (scheme := self._experts_scheme(layer, prefix)) is not None:
                weights, inputs = scheme["weights"], scheme["input_activations"]
                if self._is_nvfp4_format(weights):
                    return CompressedTensorsCpuNvFp4MoEMethod(
                        layer.moe_config, prefix, inputs is None, moe_input_scales
                    )
                block_fp8 = (weights.num_bits, weights.type, weights.strategy) == (8, "float", "block")
                if block_fp8 and inputs is not None and not torch.cpu._is_amx_tile_supported():
                    return CompressedTensorsCpuFp8MoEMethod(layer.moe_config, weights, inputs)
            return super().get_quant_method(layer, prefix)

        def _experts_scheme(self, layer: Any, prefix: str) -> dict[str, Any] | None:
            """The scheme that all projections of expert 0 match; None lets vLLM decide."""
            self._add_fused_moe_to_target_scheme_map()
            names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
            schemes = [self.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names]
            return schemes[0] if all(scheme == schemes[0] for scheme in schemes) else None

    return [
        "NVFP4 linear layers: activations quantized and dequantized, dense weights, torch",
        f"NVFP4 routed experts: the same, one expert at a time, input global scales {moe_input_scales}",
        "block-FP8 layers and experts in float32 and where there is no AMX: weights only, like vLLM's AMX kernel, torch",
    ]


def _register_modelopt(moe_input_scales: str) -> None:
    """The same for NVIDIA's dialect: modelopt's own configs, and DeepSeek-V4's FP8 config with NVFP4 experts."""
    ModelOptCpuNvFp4MoEMethod.default_input_scales = moe_input_scales
    modelopt.ModelOptNvFp4FusedMoE = ModelOptCpuNvFp4MoEMethod
    modelopt.ModelOptNvFp4Config.FusedMoEMethodCls = ModelOptCpuNvFp4MoEMethod
    # Their kernels do not support float32, but the emulations do; vLLM's compressed-tensors config declares the same
    # for its own.
    dtypes = [torch.bfloat16, torch.half, torch.float8_e4m3fn, torch.float32]
    for config in (fp8.Fp8Config, modelopt.ModelOptNvFp4Config):
        config.get_supported_act_dtypes = staticmethod(lambda *_: dtypes)
