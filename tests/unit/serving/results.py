"""A worker's result in which everything went well, and the verdicts of one."""

from __future__ import annotations

from typing import Any

from recipes.checks import Require, Serving
from verify.checks import Check
from verify.serving import verdicts as serving_verdicts

NVFP4_CONFIG = {
    "quantization_config": {
        "config_groups": {
            "experts": {
                "weights": {"num_bits": 4, "type": "float"},
                "input_activations": {"num_bits": 4, "type": "float"},
            }
        }
    }
}
#: The changes of a result that ended while the model was loaded.
UNREACHED: dict[str, Any] = {
    "layers": [], "given_inputs": None, "w4a4": None, "prompts": [], "windows": [], "perplexity": None,
}  # fmt: skip


def finished(**changes: Any) -> dict[str, Any]:
    """A worker's result in which everything went well."""
    layer = {
        "kind": "experts", "cls": "RoutedExperts", "method": "M", "scheme": "", "kernel": "MARLIN", "format": "nvfp4",
        "activations_quantized": True, "count": 2, "example": "e",
    }  # fmt: skip
    prompt = {
        "kind": "short", "tokens": 5, "nll": 2.0, "perplexity": 7.39, "text": "x", "sample_ids": [1], "sample": "y",
        "skipped": None, "token_ids": [1, 2, 3, 4, 5],
    }  # fmt: skip
    return {
        "ok": True, "stage": "done", "error": None, "exit_code": 0, "timed_out": False, "log": "L",
        "engine": {"version": "0.32.0", "platform": "cpu", "dtype": "bfloat16"},
        "load": {"seconds": 1.0, "tensors": 9, "missing": [], "missing_total": 0},
        "layers": [layer], "w4a4": True, "prompts": [prompt], "windows": [{**prompt, "kind": "window 1"}], "perplexity": 7.39,
        "input_scales": None, "agreement": None, "nonfinite": None, "source": None,
        "given_inputs": {
            "layers": 2, "saturated": 0, "not_looked_at": {},
            "worst": [{"module": "e", "admitted": 4.0, "seen": 3.0, "share": 0.0}],
        },
    } | changes  # fmt: skip


def judged(result: dict[str, Any], config: dict[str, Any] = NVFP4_CONFIG, **require: Any) -> dict[str, Check]:
    options = Serving(require=Require(**require))
    return {check.id.split(".")[1]: check for check in serving_verdicts.judge(result, options, config)}


def verdicts(result: dict[str, Any], config: dict[str, Any] = NVFP4_CONFIG, **require: Any) -> dict[str, str]:
    return {name: check.verdict for name, check in judged(result, config, **require).items()}
