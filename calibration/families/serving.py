"""How the hub's chat models of a family are served: vLLM's names of their reasoning and tool parsers, further arguments.

Every name is one that vLLM 0.32 registers, which tests/integration/test_docs_serving.py asks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Bytes of a GPU that a suggestion reckons with, and the share of them that is left for weights: the rest is KV cache,
#: activations and CUDA graphs.
GPU_BYTES, _FOR_WEIGHTS = 80e9, 0.75
_GPUS = (1, 2, 4, 8, 16, 32, 64)
#: Tokens of context that a suggestion asks for at most.
_CONTEXT = 32_768


@dataclass(frozen=True)
class Serving:
    """vLLM's parsers of a chat model, None if the family has none, and further arguments."""

    reasoning: str | None = None
    tools: str | None = None
    arguments: tuple[str, ...] = ()


_V4 = ("--kv-cache-dtype", "fp8", "--block-size", "256")
#: model_type -> how its chat models are served. A type whose models speak different formats (llama, mixtral) has no line.
SERVING: dict[str, Serving] = {
    "deepseek_v4": Serving("deepseek_v4", "deepseek_v4", _V4),
    "deepseek_v41": Serving("deepseek_v41", "deepseek_v41", _V4),
    "qwen3": Serving("qwen3", "hermes"),
    "qwen3_moe": Serving("qwen3", "hermes"),
    "glm4_moe": Serving("glm45", "glm45"),
    "minimax_m2": Serving("minimax_m2", "minimax_m2"),
    "kimi_k2": Serving("kimi_k2", "kimi_k2"),
    "gpt_oss": Serving("openai_gptoss", "openai"),
    "seed_oss": Serving("seed_oss", "seed_oss"),
    "ernie4_5_moe": Serving("ernie45", "ernie45"),
    "llama4": Serving(None, "llama4_pythonic"),
}


def gpus(config: Mapping[str, Any], nbytes: int) -> int | None:
    """The fewest GPUs of 80 GB that hold `nbytes` of weights in a tensor parallel group that divides the attention heads; None
    if no group of at most 64 does. `config`: the language model's fields (`registry.language_config`)."""
    heads = config.get("num_attention_heads")
    fitting = (count for count in _GPUS if count * GPU_BYTES * _FOR_WEIGHTS >= nbytes)
    return next((count for count in fitting if isinstance(heads, int) and heads and heads % count == 0), None)


def serve_arguments(config: Mapping[str, Any], nbytes: int, chats: bool, experts: bool) -> list[str]:
    """Arguments of `vllm serve` after the model's name. `nbytes` are the weights', `chats` says whether the checkpoint knows how
    messages become text, `experts` whether it has routed experts."""
    serving = SERVING.get(str(config.get("model_type")), Serving())
    count, context = gpus(config, nbytes) or 1, config.get("max_position_embeddings")
    arguments = ["--tensor-parallel-size", str(count), *(["--enable-expert-parallel"] if experts and count > 1 else [])]
    arguments += serving.arguments or ("--kv-cache-dtype", "auto")
    arguments += ["--max-model-len", str(min(context, _CONTEXT))] if isinstance(context, int) else []
    if chats and serving.reasoning:
        arguments += ["--reasoning-parser", serving.reasoning]
    if chats and serving.tools:
        arguments += ["--tool-call-parser", serving.tools, "--enable-auto-tool-choice"]
    return arguments
