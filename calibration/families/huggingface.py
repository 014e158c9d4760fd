"""Families with the hub's most common module names, `model.layers.N.self_attn.q_proj`: Llama, Mistral, Qwen3,
Qwen3-MoE, GLM-4.5 to 4.7, Mixtral. The promised tensors follow transformers/models/*/modeling_*.py (5.17)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from calibration.families.family import EXPERT_LEAVES, Family
from calibration.families.promised import ConfigReader, Wanted, linear, norm

_PARTS = (
    ("norm", r"norm\.weight$"),
    ("routed expert", r"\.experts\.\d+\."),
    ("shared expert", r"\.shared_experts?\."),
    ("router", r"\.(mlp|block_sparse_moe)\.gate(\.|$)"),
    ("attention", r"\.self_attn\."),
    ("mlp", r"\.mlp\."),
    ("embedding", r"^model\.embed_tokens(\.|$)"),
    ("head", r"^lm_head(\.|$)"),
    ("norm", r"norm(\.weight)?$"),
)
_MTP_PARTS = (
    ("MTP projection", r"\.eh_proj(\.|$)"),
    ("embedding", r"\.embed_tokens(\.|$)"),
    ("head", r"\.shared_head\.head(\.|$)"),
)
_BLOCK = r"^model\.layers\.(\d+)\."
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Experts:
    """How a family names its routed experts: their module in a block, the projections of each, and the config's fields
    for their number (the first one present) and their width (None: that of a dense MLP)."""

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    number: tuple[str, ...] = ("num_experts",)
    width: str | None = "moe_intermediate_size"
    #: The field with the number of shared experts, which form one MLP of that many times the width; None: there are
    #: none.
    shared: str | None = None
    #: The field with the number of dense blocks before the first one with experts; None: there are none.
    dense_before: str | None = None
    #: Whether the router has DeepSeek-V3's bias on its scores.
    scores_bias: bool = False


@dataclass(frozen=True)
class _Sizes:
    """The numbers of a config, each read once, so that a missing one is only one problem."""

    hidden: int
    heads: int
    head_dim: int
    kv_heads: int
    vocab: int
    dense_width: int
    experts: int
    width: int
    shared: int
    dense_before: int
    step: int
    dense_blocks: list[int]
    attention_bias: bool
    mlp_bias: bool
    head_norms: bool


@dataclass(frozen=True)
class Decoder:
    """Generates the tensors that the config of such a model promises. `head_norms`: whether q and k have norms, or the
    field with that flag. `usual_head_dim` replaces hidden width / heads if the config names no head_dim. `output_bias`:
    whether attention_bias includes o_proj."""

    experts: Experts | None = None
    head_norms: bool | str = False
    usual_head_dim: int | None = None
    output_bias: bool = True
    #: Whether MTP blocks follow the others, numbered like them.
    mtp: bool = False

    def __call__(self, c: ConfigReader) -> Iterator[tuple[str, Wanted]]:
        s = self._sizes(c)
        yield "model.embed_tokens.weight", Wanted((s.vocab, s.hidden), "plain")
        blocks = c.number("num_hidden_layers")
        for block in range(blocks + (c.number("num_nextn_predict_layers", 0) if self.mtp else 0)):
            prefix = f"model.layers.{block}"
            sparse = bool(s.experts) and block not in s.dense_blocks and (block + 1) % max(s.step, 1) == 0
            yield from self._attention(s, prefix)
            yield from self._moe(s, prefix) if sparse and block >= s.dense_before else _mlp(s, prefix)
            if (
                block >= blocks
            ):  # vllm's models/glm4_moe_mtp.py; GLM-4.6 has not the last two (vllm-project/vllm pull 27597)
                yield from (norm(f"{prefix}.{name}", s.hidden) for name in ("enorm", "hnorm", "shared_head.norm"))
                yield from linear(f"{prefix}.eh_proj", s.hidden, 2 * s.hidden)
                yield f"{prefix}.embed_tokens.weight", Wanted((s.vocab, s.hidden), "plain", optional=True)
                yield f"{prefix}.shared_head.head.weight", Wanted((s.vocab, s.hidden), optional=True)
        yield norm("model.norm", s.hidden)
        yield "lm_head.weight", Wanted((s.vocab, s.hidden), "linear", c.flag("tie_word_embeddings"))

    def _sizes(self, c: ConfigReader) -> _Sizes:
        d, heads = c.number("hidden_size"), c.number("num_attention_heads")
        given = c.values.get("head_dim")
        head_dim = given if isinstance(given, int) else self.usual_head_dim or d // max(heads, 1)
        kv, vocab, dense_width = (
            c.number("num_key_value_heads", heads), c.number("vocab_size"), c.number("intermediate_size"),
        )  # fmt: skip
        number = width = shared = dense_before = 0
        if (e := self.experts) is not None:
            number = c.number(next((key for key in e.number if key in c.values), e.number[-1]))
            width = dense_width if e.width is None else c.number(e.width)
            shared = c.number(e.shared, 0) * width if e.shared else 0
            dense_before = c.number(e.dense_before, 0) if e.dense_before else 0
        norms = c.flag(self.head_norms) if isinstance(self.head_norms, str) else self.head_norms
        return _Sizes(
            d, heads, head_dim, kv, vocab, dense_width, number, width, shared, dense_before,
            c.number("decoder_sparse_step", 1), c.values.get("mlp_only_layers") or [], c.flag("attention_bias"),
            c.flag("mlp_bias"), norms,
        )  # fmt: skip

    def _attention(self, s: _Sizes, prefix: str) -> Iterator[tuple[str, Wanted]]:
        attn, kv, bias = f"{prefix}.self_attn", s.kv_heads * s.head_dim, s.attention_bias
        yield norm(f"{prefix}.input_layernorm", s.hidden)
        yield norm(f"{prefix}.post_attention_layernorm", s.hidden)
        yield from linear(f"{attn}.q_proj", s.heads * s.head_dim, s.hidden, bias)
        yield from linear(f"{attn}.k_proj", kv, s.hidden, bias)
        yield from linear(f"{attn}.v_proj", kv, s.hidden, bias)
        yield from linear(f"{attn}.o_proj", s.hidden, s.heads * s.head_dim, bias and self.output_bias)
        if s.head_norms:
            yield norm(f"{attn}.q_norm", s.head_dim)
            yield norm(f"{attn}.k_norm", s.head_dim)

    def _moe(self, s: _Sizes, prefix: str) -> Iterator[tuple[str, Wanted]]:
        assert self.experts is not None
        e, moe = self.experts, f"{prefix}.{self.experts.module}"
        yield f"{moe}.gate.weight", Wanted((s.experts, s.hidden), "plain")
        if e.scores_bias:
            yield f"{moe}.gate.e_score_correction_bias", Wanted((s.experts,), "float32")
        mlps = [(f"experts.{expert}", s.width) for expert in range(s.experts)]
        for name, width in [*mlps, *([("shared_experts", s.shared)] if s.shared else [])]:
            yield from linear(f"{moe}.{name}.{e.gate}", width, s.hidden)
            yield from linear(f"{moe}.{name}.{e.up}", width, s.hidden)
            yield from linear(f"{moe}.{name}.{e.down}", s.hidden, width)


def _mlp(s: _Sizes, prefix: str) -> Iterator[tuple[str, Wanted]]:
    yield from linear(f"{prefix}.mlp.gate_proj", s.dense_width, s.hidden, s.mlp_bias)
    yield from linear(f"{prefix}.mlp.up_proj", s.dense_width, s.hidden, s.mlp_bias)
    yield from linear(f"{prefix}.mlp.down_proj", s.hidden, s.dense_width, s.mlp_bias)


FAMILIES = (
    Family("dense", ("llama", "mistral"), _BLOCK, _PARTS, _FUSED, Decoder()),
    Family("dense", ("qwen3",), _BLOCK, _PARTS, _FUSED, Decoder(head_norms=True, usual_head_dim=128)),
    Family(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        block=_BLOCK,
        parts=_PARTS,
        fused_leaves=_FUSED,
        # transformers 5 writes num_experts as num_local_experts, and its config class reads both.
        promised=Decoder(Experts(number=("num_local_experts", "num_experts")), head_norms=True, usual_head_dim=128),
        serving_quantizes=("router",),
    ),
    Family(
        name="glm4_moe",
        model_types=("glm4_moe",),
        block=_BLOCK,
        parts=(*_MTP_PARTS, *_PARTS),
        fused_leaves=_FUSED,
        promised=Decoder(
            Experts(
                number=("n_routed_experts",),
                shared="n_shared_experts",
                dense_before="first_k_dense_replace",
                scores_bias=True,
            ),
            head_norms="use_qk_norm",
            output_bias=False,
            mtp=True,
        ),
        mtp_follows=True,
    ),
    Family(
        name="mixtral",
        model_types=("mixtral",),
        block=_BLOCK,
        parts=_PARTS,
        fused_leaves=(*_FUSED, ("w1", "w3")),
        promised=Decoder(Experts("block_sparse_moe", "w1", "w3", "w2", ("num_local_experts",), width=None)),
        renames=(
            (r"\.block_sparse_moe\.", ".mlp."),
            *((rf"(\.experts\.\d+)\.{hub}\b", rf"\1.{hf}") for hub, hf in EXPERT_LEAVES),
        ),
    ),
)
