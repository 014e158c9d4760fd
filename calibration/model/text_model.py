"""The language model of a vision or audio model's checkpoint, built alone."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from calibration.checkpoint.source_config import without
from calibration.families.family import Family
from calibration.families.wrapped import known_model_type


def language_model_config(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """The config of the language model to build. Of a derived family it names transformers' own class, whose tree the grammar
    describes, and no code of the checkpoint; one that is nested in a wrapper's config becomes a file of its own, with the
    defaults that the wrapper's class fills in."""
    if not family.derived:
        return config
    config = _as_the_hub_means(known_model_type(without(config, "auto_map")))
    if not family.language:
        return config
    whole = AutoConfig.for_model(**config)
    text = whole.get_text_config()
    made: dict[str, Any] = text.to_dict() | {"tie_word_embeddings": bool(whole.tie_word_embeddings)}
    for key in ("dtype", "torch_dtype"):
        made.pop(key, None)
    return made


def _as_the_hub_means(config: dict[str, Any]) -> dict[str, Any]:
    """The config with what the hub's fields say of rotary embeddings under the names that transformers reads.

    MiniMax-M2 says the rotated share of a head as `rotary_dim`. transformers 5.17 ignores that and rotates whole heads, which is
    another model (github.com/huggingface/transformers/issues/48241); its original code and vLLM divide by `head_dim`, as here.
    MiMo-V2-Flash says base and share beside `swa_rope_theta`; transformers 5.17 has those of the release as defaults, whatever
    config.json says, and vLLM reads it (models/mimo_v2.py).
    """
    rotary, head = config.get("rotary_dim"), config.get("head_dim")
    if config.get("model_type") == "minimax_m2" and isinstance(rotary, int) and isinstance(head, int) and head > 0:
        return {"partial_rotary_factor": rotary / head} | config
    if config.get("model_type") == "mimo_v2_flash" and "rope_theta" in config:
        alike = {"rope_type": "default", "partial_rotary_factor": config.get("partial_rotary_factor", 1.0)}
        whole, sliding = config["rope_theta"], config.get("swa_rope_theta", config["rope_theta"])
        bases = {"full_attention": whole, "sliding_attention": sliding}
        return {"rope_parameters": {kind: alike | {"rope_theta": base} for kind, base in bases.items()}} | config
    return config


def build_language_model(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """transformers' causal language model of a config; of one that has none (the language model of Qwen3-VL), its decoder
    under a head."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None) is not None:
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
        return made
    return _Headed(config)


def _decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class of the decoder of `config`: that of its table, or the one beside it that is built from it."""
    if (listed := MODEL_MAPPING.get(type(config), None)) is not None:
        return cast(type[PreTrainedModel], listed)
    beside = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    kinds = [kind for kind in vars(beside).values() if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
    return next(
        cast(type[PreTrainedModel], kind) for kind in kinds if getattr(kind, "config_class", None) is type(config)
    )


class _Headed(PreTrainedModel):  # type: ignore[misc]
    """A decoder that transformers uses in wrappers only, and the head that they put on it."""

    base_model_prefix = "model"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = _decoder_class(config)._from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=torch.bfloat16)
        self._no_split_modules = self.model._no_split_modules

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutput:
        """Logits of text."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
        return CausalLMOutput(logits=self.lm_head(hidden))
