"""What NVFP4 layers are given in the engine, against what their input scales admit: the watch on small modules that keep
their scales where vLLM 0.32 does, and the verdict. The engine itself is in tests/integration/test_serving_defects.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.serving.results import finished, judged
from verify.inside_vllm.watch import RANGE, ForwardWatch, InputWatch, admits

X = torch.tensor([[0.5, -1.0, 1.0005, 3.0], [0.0, -2.0, 0.25, 0.75]])
"""Of eight values two are beyond 1; 1.0005 is a rounding of it."""


class CpuNvFp4LinearKernel:
    """Named as one that quantizes."""

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x * 2


class Scheme:
    """compressed-tensors' owner of the kernel."""

    def __init__(self, use_a16: bool) -> None:
        self.use_a16, self.kernel = use_a16, CpuNvFp4LinearKernel()


class Linear(torch.nn.Module):
    """As vLLM's: the input global scale is the inverse by then, the divisor lies beside it."""

    def __init__(self, admitted: float | None, use_a16: bool = False) -> None:
        super().__init__()
        self.quant_method, self.scheme = object(), Scheme(use_a16)
        if admitted is not None:
            self.input_global_scale = torch.tensor(admitted / RANGE)
            self.input_global_scale_inv = torch.tensor(RANGE / admitted)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scheme.kernel.apply_weights(layer=self, x=x)


class NvFp4Method:
    """Experts' method: `a1_gscale` is the divisor that the kernel quantizes with."""

    def __init__(self, divisors: Any, **attributes: Any) -> None:
        self.moe_quant_config = type("Config", (), {"a1_gscale": divisors})()
        vars(self).update(attributes)

    def apply(self, layer: Any, x: torch.Tensor, topk_weights: Any, topk_ids: torch.Tensor) -> torch.Tensor:
        return x

    def apply_monolithic(self, layer: Any, x: torch.Tensor, router_logits: Any) -> torch.Tensor:
        return x


class RoutedExperts(torch.nn.Module):
    """As vLLM's, whose `forward` is never called."""

    def __init__(self, admitted: list[float]) -> None:
        super().__init__()
        self.quant_method = NvFp4Method(RANGE / torch.tensor(admitted))


def summary(module: torch.nn.Module) -> dict[str, Any]:
    """Of a model that holds `module` alone, given X."""
    watch = InputWatch()
    watch.install(torch.nn.ModuleDict({"layer": module}))
    if isinstance(module, Linear):
        assert torch.equal(module(X), X * 2), "the kernel's own output comes back"
    found = watch.summary()
    assert found is not None
    return found


def test_values_beyond_what_a_linear_layer_admits_are_counted() -> None:
    assert summary(Linear(1.0)) == {
        "layers": 1, "saturated": 1, "not_looked_at": {},
        "worst": [{"module": "layer", "admitted": pytest.approx(1.0), "seen": 3.0, "share": 0.25}],
    }  # fmt: skip
    wide = summary(Linear(3.0))
    assert wide["saturated"] == 0 and wide["worst"][0]["share"] == 0.0 and wide["worst"][0]["seen"] == 3.0


def test_a_limit_is_compared_in_float32() -> None:
    """BF16 holds 1.0 and 1.0078: a limit of 1.003 rounds up to the second, and would hide it."""
    watch, layer = InputWatch(), Linear(1.003)
    watch.install(torch.nn.ModuleDict({"layer": layer}))
    layer(torch.tensor([[1.0, 1.0078125, -1.0078125, 0.0]], dtype=torch.bfloat16))
    assert (watch.summary() or {})["worst"][0]["share"] == 0.5


def test_a_layer_whose_scale_is_not_found_or_whose_kernel_gets_nothing_is_not_looked_at() -> None:
    assert summary(Linear(None)) == {
        "layers": 0, "saturated": 0, "not_looked_at": {"no input scale found": 1}, "worst": []
    }  # fmt: skip
    assert summary(Linear(float("inf")))["not_looked_at"] == {"no input scale found": 1}, "a divisor of 0"
    assert summary(RoutedExperts([1.0, 1.0]))["not_looked_at"] == {"given nothing": 1}
    watch, layer = InputWatch(), Linear(1.0)
    watch.install(
        torch.nn.ModuleDict({"layer": layer, "weight only": Linear(1.0, use_a16=True), "none": torch.nn.ReLU()})
    )
    layer(X.to(torch.float8_e4m3fn).view(torch.uint8))
    assert (watch.summary() or {})["not_looked_at"] == {"its input comes quantized": 1}
    only_weights = InputWatch()
    only_weights.install(torch.nn.ModuleDict({"layer": Linear(1.0, use_a16=True)}))
    assert only_weights.summary() is None


def test_experts_that_differ_are_counted_by_the_tokens_that_are_routed_to_them() -> None:
    watch, experts = InputWatch(), RoutedExperts([10.0, 1.0, 0.1])
    watch.install(torch.nn.ModuleDict({"experts": experts}))
    # Token 0 to experts 0 and 1, token 1 to 0 and to none: 3 rows of 4 values, of which 3.0 is beyond expert 1's 1.
    experts.quant_method.apply(experts, X, topk_weights=None, topk_ids=torch.tensor([[0, 1], [0, -1]]))
    (found,) = (watch.summary() or {})["worst"]
    assert found == {"module": "experts", "admitted": pytest.approx(1.0), "seen": 3.0, "share": pytest.approx(1 / 12)}
    experts.quant_method.apply_monolithic(layer=experts, x=X, router_logits=None)
    (why,) = (watch.summary() or {})["not_looked_at"]
    assert why == "its experts' scales differ, and its kernel routes on its own"


def test_experts_that_share_a_scale_need_no_routes() -> None:
    watch, experts = InputWatch(), RoutedExperts([1.0, 1.0])
    watch.install(torch.nn.ModuleDict({"experts": experts}))
    experts.quant_method.apply_monolithic(layer=experts, x=X, router_logits=None)
    assert (watch.summary() or {})["worst"][0]["share"] == 0.25


def test_experts_that_weigh_their_input_are_given_the_weighed_one() -> None:
    """Llama-4: 3.0 and -2.0 become 0.75 and -2.0, and one value of eight is left beyond."""
    watch, experts = InputWatch(), RoutedExperts([1.0, 1.0])
    experts.apply_router_weight_on_input = True
    watch.install(torch.nn.ModuleDict({"experts": experts}))
    weights, ids = torch.tensor([[0.25], [1.0]]), torch.tensor([[1], [0]])
    experts.quant_method.apply(experts, X, topk_weights=weights, topk_ids=ids)
    (found,) = (watch.summary() or {})["worst"]
    assert found == {"module": "experts", "admitted": pytest.approx(1.0), "seen": 2.0, "share": pytest.approx(1 / 8)}


def test_where_vllm_keeps_the_scale() -> None:
    class Layer(torch.nn.Module):
        def __init__(self, method: Any = None, **attributes: Any) -> None:
            super().__init__()
            self.quant_method = method
            vars(self).update(attributes)

    divisors = torch.tensor([[RANGE, RANGE / 2], [RANGE / 4, RANGE]])  # of gate and up: the smaller one is used
    of_experts = torch.tensor([2.0, 4.0])
    assert torch.equal(admits(Layer(input_global_scale_inv=torch.tensor(RANGE / 4))), torch.tensor([4.0]))
    assert torch.equal(admits(Layer(w13_input_divisor=RANGE / of_experts)), of_experts)
    assert torch.equal(admits(Layer(NvFp4Method(RANGE / of_experts))), of_experts)
    assert torch.equal(admits(Layer(NvFp4Method(None), w13_input_global_scale=divisors)), of_experts)
    assert admits(Layer(NvFp4Method(None), w13_input_scale=of_experts)) is None, "either meaning: not guessed"
    assert admits(Layer(NvFp4Method(RANGE / of_experts, per_token_activation=True))) is None


def test_only_what_the_text_gives_is_counted() -> None:
    result: dict[str, Any] = {"nonfinite": None}
    watch, layer = ForwardWatch(result), Linear(1.0)
    watch.install(torch.nn.Sequential(layer))
    watch.begin("accuracy", 0, capture=False, inputs=False)
    layer(X)
    assert (watch.inputs.summary() or {})["not_looked_at"] == {"given nothing": 1}
    watch.begin("short", 0, capture=False)
    layer(X)
    assert (watch.inputs.summary() or {})["layers"] == 1


def given(share: float, **changes: Any) -> dict[str, Any]:
    worst = [{"module": "a.b", "admitted": 1.0, "seen": 7.5, "share": share}]
    return {"layers": 4, "saturated": int(share > 0), "not_looked_at": {}, "worst": worst} | changes


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.0, "PASS"), (0.0009, "PASS"), (0.0011, "WARN"), (0.099, "WARN"), (0.101, "FAIL")]
)
def test_the_worst_layer_decides(share: float, verdict: str) -> None:
    found = judged(finished(given_inputs=given(share)))["saturated_inputs"]
    assert found.verdict == verdict
    assert ("a.b" in found.figure and "up to 7.5 where 1 is admitted" in found.figure) == (share > 0)


def test_what_was_not_looked_at_is_told_and_alone_it_is_unchecked() -> None:
    some = judged(finished(given_inputs=given(0.0, not_looked_at={"given nothing": 2})))["saturated_inputs"]
    assert some.verdict == "PASS" and some.figure.endswith("not looked at: 2 given nothing")
    none = given(0.0, layers=0, worst=[], not_looked_at={"no input scale found": 3})
    unknown = judged(finished(given_inputs=none))["saturated_inputs"]
    assert unknown.verdict == "UNCHECKED" and "3 no input scale found" in unknown.figure
    assert judged(finished(given_inputs=None))["saturated_inputs"].verdict == "UNCHECKED"
    assert "saturated_inputs" not in judged(finished(given_inputs=None), config={})
    not_finite = given(0.5, worst=[{"module": "a.b", "admitted": 1.0, "seen": "inf", "share": 0.5}])
    assert "up to inf" in judged(finished(given_inputs=not_finite))["saturated_inputs"].figure
