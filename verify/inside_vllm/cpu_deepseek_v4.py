"""DeepSeek-V4 on the CPU: replaces what vLLM's CPU model still takes from triton by a torch path.

Two parts, both plain torch:

- `register` always replaces the small metadata kernels that only exist in triton, and completes `build_tile_scheduler`.
  With them vLLM's own CPU model runs in bfloat16, with its own kernels and FP8 KV cache, if the processor has AVX-512
  with BF16: vLLM 0.32 builds those kernels for no other (not for Ice Lake or Zen 3).
- In float32, and in any dtype without those kernels, it also replaces the parts that compute or store in bfloat16 or
  FP8: router, hyper-connections, query/KV preparation, KV cache, compressor, sparse attention and the grouped output
  projection. Slots, block tables and masks stay vLLM's; only the arithmetic and the rows of the slots change: float32
  values, sums in float64. A float32 run is then really computed in float32 and can be compared with a reference.
  Contexts in which the indexer must choose (more than 4 * index_topk tokens) raise NotImplementedError, because vLLM's
  indexer scores in FP8.

Runs inside vLLM's interpreter: imports the standard library, torch and vLLM only. Written against vLLM 0.32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.platforms import current_platform

NATIVE_KERNEL = "flash_mla_with_kvcache_cpu"  # vLLM has all of its DeepSeek-V4 kernels for a processor, or none
QUERY_CHUNK = 32  # queries attended to at once; bounds the gathered KV to 32 * (window + compressed) * 512 floats


def register(dtype: str) -> list[str]:
    """Install the replacements; call before the engine is built. Returns what was replaced, for the report.

    dtype: of the request. Does nothing on another platform.
    """
    if not current_platform.is_cpu():
        return []
    _replace_metadata_kernels()
    _keep_input_scale_names()
    replaced = ["DeepSeek-V4 metadata kernels (triton has no CPU build here): torch"]
    if dtype == "float32" or not hasattr(torch.ops._C, NATIVE_KERNEL):
        cpu_router._sqrtsoftplus_bias_topk = route
        _replace_hyper_connections()
        _replace_attention()
        replaced.append(
            "DeepSeek-V4 router, hyper-connections, KV cache, compressor, sparse attention, output projection: float32"
            " torch instead of bfloat16 and FP8 kernels"
        )
    return replaced


def _keep_input_scale_names() -> None:
    """vLLM 0.32's CPU model renames `.input_scale` to `.input_scale_2`, which no layer has, and so cannot load NVFP4 experts in
    modelopt's spelling; its CUDA model does not rename."""
    from vllm.models.deepseek_v4.cpu import model

    make_mapper = model._make_deepseek_v4_weights_mapper

    def without(*args: Any, **kwargs: Any) -> Any:
        mapper = make_mapper(*args, **kwargs)
        suffixes = {old: new for old, new in mapper.orig_to_new_suffix.items() if old != ".input_scale"}
        return dataclasses.replace(mapper, orig_to_new_suffix=suffixes)

    model._make_deepseek_v4_weights_mapper = without
    model.DeepseekV4ForCausalLM.hf_to_vllm_mapper = without("fp4")


# ---- metadata -------------------------------------------------------------------------------------------------------


def _replace_metadata_kernels() -> None:
    import vllm.v1.attention.backends.mla.compressor_utils as compressor_utils
    import vllm.v1.attention.backends.mla.indexer as indexer
    import vllm.v1.attention.backends.mla.sparse_swa as sparse_swa
    import vllm.v1.attention.ops.metadata as metadata
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder

    metadata.compute_token_to_req_indices = compute_token_to_req_indices
    sparse_swa.compute_token_to_req_indices = compute_token_to_req_indices
    sparse_swa._COMPUTE_PREFILL_METADATA_KERNEL = compute_prefill_gather_lens
    # The CPU attention derives its window from the positions and never reads these two.
    sparse_swa._COMPUTE_SWA_INDICES_AND_LENS_KERNEL = _nothing
    compressor_utils._COMPRESSED_SLOT_MAPPING_KERNEL = compressed_slot_mapping
    indexer._BUILD_PREFILL_CHUNK_METADATA_KERNEL = build_prefill_chunk_metadata

    layer_types = {v for k, v in vars(sparse_swa).items() if k.startswith("_LAYER_TYPE_")}
    DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler = lambda self, tokens: dict.fromkeys(layer_types)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Replaces a kernel whose output is not read on the CPU."""


def compute_token_to_req_indices(
    query_start_loc: torch.Tensor, out: torch.Tensor, num_mapped_tokens: int, num_tokens: int
) -> torch.Tensor:
    """Request of each token: `out[t]` for `t < num_tokens`, 0 from `num_mapped_tokens` on; returns that slice."""
    token = torch.arange(num_tokens, dtype=query_start_loc.dtype)
    request = torch.searchsorted(query_start_loc[1:].contiguous(), token, right=True)
    request = request.clamp(max=max(query_start_loc.numel() - 2, 0))
    out[:num_tokens] = torch.where(token < num_mapped_tokens, request, 0).to(out.dtype)
    return out[:num_tokens]


def compute_prefill_gather_lens(
    prefill_gather_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    replay_start: torch.Tensor,
    num_prefills: int,
    num_decodes: int,
    window_size: int,
) -> None:
    """The rows that a prefill reads: its own tokens and up to `window_size - 1` before them."""
    here = slice(num_decodes, num_decodes + num_prefills)
    query = query_start_loc[num_decodes + 1 : num_decodes + num_prefills + 1] - query_start_loc[here]
    prefix = (seq_lens[here] - query - replay_start[here]).clamp(min=0)
    prefill_gather_lens.copy_(query + prefix.clamp(max=window_size - 1))


def compressed_slot_mapping(
    out: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    compress_ratio: int,
    dcp_world_size: int,
    cp_interleave: int,
) -> None:
    """Slot of the compressed row that a token closes, -1 for every other token; `out [T]` int64."""
    assert dcp_world_size == 1, "context parallelism does not exist on the CPU"
    for request in range(block_table.shape[0]):
        begin, end = int(query_start_loc[request]), int(query_start_loc[request + 1])
        position = torch.arange(begin, end) - end + int(seq_lens[request])
        state = position.clamp(min=0) // compress_ratio
        slot = block_table[request][state // block_size].long() * block_size + state % block_size
        closes = ((position + 1) % compress_ratio == 0) & (slot_mapping[begin:end] != -1)
        out[begin:end] = torch.where(closes, slot, -1)


def build_prefill_chunk_metadata(
    query_start_loc: torch.Tensor,
    uncompressed_seq_lens: torch.Tensor,
    cu_compressed_seq_lens: torch.Tensor,
    row_start: torch.Tensor,
    token_to_seq: torch.Tensor,
    first_key: torch.Tensor,
    end_key: torch.Tensor,
    query_slice_start: int,
    query_slice_stop: int,
    dcp_rank: int,
    dcp_world: int,
    dcp_interleave: int,
    *,
    num_reqs: int,
    COMPRESS_RATIO: int,
) -> None:
    """First and end compressed key of every query token, and the request of every compressed key (all int32)."""
    assert dcp_world == 1, "context parallelism does not exist on the CPU"
    for request in range(num_reqs):
        begin, end = int(query_start_loc[request]), int(query_start_loc[request + 1])
        token = torch.arange(max(begin, query_slice_start), min(end, query_slice_stop))
        context = token - end + int(uncompressed_seq_lens[request]) + 1
        rows = token - query_slice_start
        first_key[rows] = row_start[request]
        end_key[rows] = (row_start[request] + context // COMPRESS_RATIO).to(end_key.dtype)
        token_to_seq[int(cu_compressed_seq_lens[request]) : int(cu_compressed_seq_lens[request + 1])] = request


# ---- torch instead of vLLM's kernels --------------------------------------------------------------------------------


def route(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    e_score_correction_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    input_ids: torch.Tensor | None,
    hash_indices_table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[T, E]` -> weights `[T, k]` float32 and experts `[T, k]` int32: by score and bias, or as the table says.

    Weights are sqrt(softplus(logit)) without the bias, and sum to `routed_scaling_factor`.
    """
    assert renormalize, "DeepSeek-V4 always renormalizes"
    scores = F.softplus(router_logits.double()).sqrt()
    if hash_indices_table is not None:
        chosen = hash_indices_table[input_ids].long()
    else:
        assert e_score_correction_bias is not None
        chosen = (scores + e_score_correction_bias.double()).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) * routed_scaling_factor
    return weights.float(), chosen.to(torch.int32)


def _replace_hyper_connections() -> None:
    from vllm.model_executor.layers.mhc import HCHeadOp, MHCPostOp, MHCPreOp

    MHCPreOp.forward_cpu = hyper_connection_pre
    MHCPostOp.forward_cpu = hyper_connection_post
    HCHeadOp.forward_cpu = hyper_connection_head


def _mixes(x: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    """`x [T, n, D]` flattened, RMS-normalized without weight and projected: `[T, outputs]`, float64."""
    flat = x.flatten(-2).double()
    return F.linear(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps), fn.double())


def hyper_connection_pre(
    self: Any,
    residual: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_eps: float,
    hc_pre_eps: float,
    hc_sinkhorn_eps: float,
    hc_post_mult_value: float,
    sinkhorn_repeat: int,
    *_unused: Any,
    **_also_unused: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mHC before a sublayer: residual streams `[T, n, D]` -> post `[T, n, 1]`, comb `[T, n, n]`, input `[T, D]`."""
    n = residual.shape[-2]
    pre, post, comb = _mixes(residual, fn, rms_eps).split([n, n, n * n], dim=-1)
    pre = torch.sigmoid(pre * hc_scale[0] + hc_base[:n]) + hc_pre_eps
    post = torch.sigmoid(post * hc_scale[1] + hc_base[n : 2 * n]) * hc_post_mult_value
    comb = (comb * hc_scale[2] + hc_base[2 * n :]).unflatten(-1, (n, n)).softmax(-1) + hc_sinkhorn_eps
    comb = comb / (comb.sum(-2, keepdim=True) + hc_sinkhorn_eps)
    for _ in range(sinkhorn_repeat - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hc_sinkhorn_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc_sinkhorn_eps)
    collapsed = (pre.unsqueeze(-1) * residual.double()).sum(-2)
    return post.unsqueeze(-1), comb, collapsed.to(residual.dtype)


def hyper_connection_post(
    self: Any, x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    """mHC after a sublayer: `post * x + comb^T @ residual`, `[T, n, D]`."""
    mixed = torch.matmul(comb.double().transpose(-1, -2), residual.double())
    return (mixed + post.double() * x.unsqueeze(-2).double()).to(residual.dtype)


def hyper_connection_head(
    self: Any,
    hidden_states: torch.Tensor,
    hc_fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    rms_norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """The final reduction of the streams, `[T, n, D] -> [T, D]`."""
    pre = torch.sigmoid(_mixes(hidden_states, hc_fn, rms_norm_eps) * hc_scale + hc_base) + hc_eps
    return (pre.unsqueeze(-1) * hidden_states.double()).sum(-2).to(hidden_states.dtype)


def _replace_attention() -> None:
    from vllm.models.deepseek_v4.cpu import cpu_sparse

    attention = cpu_sparse.DeepseekV4CPUAttention
    attention._wrap_wo_a_process_weights_after_loading = _keep_output_projection
    attention._fused_qnorm_rope_kv_insert = _prepare_query_and_store
    attention.forward_mqa = _attend
    attention._o_proj = _project_output
    cpu_sparse.DeepseekV4CPUCompressor.forward = _compress
    short_context = cpu_sparse.DeepseekV4CPUIndexer.forward

    def index(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            longest = int(metadata[self.k_cache.prefix].max_seq_len)
            if longest // self.compress_ratio > self.topk_tokens:
                raise NotImplementedError(
                    f"{self.prefix}: {longest} tokens need the indexer to choose, which vLLM does in FP8; in float32"
                    f" use prompts of at most {self.topk_tokens * self.compress_ratio} tokens"
                )
        return short_context(self, *args, **kwargs)

    cpu_sparse.DeepseekV4CPUIndexer.forward = index


def rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Rotate neighboring pairs of the last features of `x [T, ..., head_dim]`; `cos_sin [P, rope_dim]` = cos | sin."""
    cos, sin = cos_sin[positions].float().chunk(2, dim=-1)
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (cos.shape[-1],)
    cos, sin = cos.view(shape), sin.view(shape) * (-1.0 if inverse else 1.0)
    plain, turned = x.split([x.shape[-1] - cos_sin.shape[-1], cos_sin.shape[-1]], dim=-1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((plain, rotated), dim=-1)


def _rows(layer: Any, block_size: int, width: int) -> torch.Tensor:
    """Float32 rows `[slots, width]` for the slots of a cache layer, kept beside vLLM's FP8 pages."""
    slots = layer.kv_cache.shape[0] * block_size
    rows: torch.Tensor | None = getattr(layer, "float32_rows", None)
    if rows is None or rows.shape[0] != slots:
        rows = torch.empty(slots, width)
        object.__setattr__(layer, "float32_rows", rows)
    return rows


def _keep_output_projection(self: Any) -> None:
    from vllm.models.deepseek_v4.cpu.cpu_sparse import _dequant_linear_weight

    method = self.wo_a.quant_method
    original = method.process_weights_after_loading

    def keep(layer: torch.nn.Module) -> None:
        self.wo_a_float32 = _dequant_linear_weight(layer).view(self.n_local_groups, self.o_lora_rank, -1).clone()
        original(layer)

    method.process_weights_after_loading = keep


def _prepare_query_and_store(
    self: Any, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, attn_metadata: Any
) -> torch.Tensor:
    """Normalize and rotate `q [T, H, 512]`, rotate `kv [T, 512]` and store it in the sliding-window cache."""
    if not isinstance(attn_metadata, dict):
        return q
    metadata = attn_metadata[self.swa_cache_layer.prefix]
    cos_sin = self.rotary_emb.cos_sin_cache
    slots = metadata.slot_mapping
    stored = slots >= 0
    rows = _rows(self.swa_cache_layer, metadata.block_size, self.head_dim)
    rows[slots[stored]] = rope(kv, positions, cos_sin)[: slots.shape[0]][stored]
    q = q.double()
    return rope(q * torch.rsqrt(q.square().mean(-1, keepdim=True) + self.eps), positions, cos_sin).float()


def _compress(self: Any, kv_score: torch.Tensor, positions: torch.Tensor, rotary_emb: Any) -> None:
    """Store each token's KV and gate, and the compressed row if the token completes a window of `compress_ratio`.

    With overlap (ratio 4) a window of 2 * ratio tokens is read: the older half from the first series, the newer from
    the second. Softmax of the gates over the window, RMSNorm, RoPE at the first position of the newer half.
    """
    from vllm.models.deepseek_v4.cpu.cpu_utils import map_local_to_global_slots_cpu

    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict):
        return
    state, keys = metadata[self.state_cache.prefix], metadata[self.k_cache_prefix]
    count = state.slot_mapping.shape[0]
    position = positions[:count]
    kv, gate = kv_score[:count].float().chunk(2, dim=-1)
    pages = self.state_cache.kv_cache
    written = state.slot_mapping >= 0
    slot = state.slot_mapping[written]
    entry = torch.cat((kv, gate + self.ape[position % self.compress_ratio]), dim=-1)[written]
    pages[slot // state.block_size, slot % state.block_size] = entry

    target = keys.slot_mapping[:count]
    closes = target >= 0
    if not bool(closes.any()):
        return
    window = (1 + self.overlap) * self.compress_ratio
    local = position[closes].unsqueeze(-1) - window + 1 + torch.arange(window)
    slots = map_local_to_global_slots_cpu(
        local, state.token_to_req_indices[:count][closes], state.block_table, state.block_size
    )
    gathered = pages[slots.clamp(min=0) // state.block_size, slots.clamp(min=0) % state.block_size]
    kv, gate = gathered.double().chunk(2, dim=-1)
    if self.overlap:
        half = self.compress_ratio
        kv = torch.cat((kv[:, :half, : self.head_dim], kv[:, half:, self.head_dim :]), dim=1)
        gate = torch.cat((gate[:, :half, : self.head_dim], gate[:, half:, self.head_dim :]), dim=1)
    absent = (slots < 0).unsqueeze(-1)
    weights = gate.masked_fill(absent, float("-inf")).softmax(dim=1)
    pooled = (weights * kv.masked_fill(absent, 0.0)).sum(dim=1)
    pooled = (
        pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + self.rms_norm_eps) * self.norm.weight.double()
    )
    layer = self._static_forward_context[self.k_cache_prefix]
    rows = _rows(layer, layer.kv_cache.shape[1], self.head_dim)
    rows[target[closes]] = rope(pooled, position[closes] - self.compress_ratio + 1, rotary_emb.cos_sin_cache).float()


def _attend(self: Any, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, output: torch.Tensor) -> None:
    """Attention of `q [T, H, 512]` over the sliding window and the compressed rows, with the sink, into `output`."""
    from vllm.models.deepseek_v4.cpu.cpu_utils import map_local_to_global_slots_cpu

    metadata = get_forward_context().attn_metadata
    if metadata is None:
        output.zero_()
        return
    window = metadata[self.swa_cache_layer.prefix]
    request = window.token_to_req_indices
    positions = positions[: request.shape[0]]
    local = positions.unsqueeze(-1) - torch.arange(self.window_size)
    tables = [
        (_rows(self.swa_cache_layer, window.block_size, self.head_dim), local, window.block_table, window.block_size)
    ]
    if self.compress_ratio > 1:
        compressed = metadata[self.prefix]
        ready = (positions + 1).unsqueeze(-1) // self.compress_ratio
        if self.compress_ratio == 4:
            chosen = self.topk_indices_buffer[: positions.shape[0]].long()
            chosen = chosen[:, : max(int(ready.max()), 1)]
        else:
            chosen = torch.arange(max(int(ready.max()), 1)).expand(positions.shape[0], -1)
            chosen = torch.where(chosen < ready, chosen, -1)
        size = compressed.block_size // self.compress_ratio
        tables.append((_rows(self, size, self.head_dim), chosen, compressed.block_table, size))
    for begin in range(0, positions.shape[0], QUERY_CHUNK):
        part = slice(begin, begin + QUERY_CHUNK)
        gathered, present = [], []
        for rows, index, block_table, size in tables:
            slots = map_local_to_global_slots_cpu(index[part], request[part], block_table, size)
            present.append(slots >= 0)
            gathered.append(rows[slots.clamp(min=0)].masked_fill(~present[-1].unsqueeze(-1), 0.0))
        keys, valid = torch.cat(gathered, dim=1).double(), torch.cat(present, dim=1)
        scores = torch.einsum("thd,tkd->thk", q[part].double(), keys) * self.scale
        scores = scores.masked_fill(~valid.unsqueeze(1), float("-inf"))
        sink = self.attn_sink[: q.shape[1]].double().view(1, -1, 1).expand(scores.shape[0], -1, 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
        output[part] = torch.einsum("thk,tkd->thd", weights, keys).to(output.dtype)


def _project_output(self: Any, o: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Undo the rotation of `o [T, H, 512]`, project the groups of heads with wo_a, then wo_b."""
    if get_forward_context().attn_metadata is None:
        return torch.zeros((o.shape[0], self.hidden_size), dtype=o.dtype)
    turned = rope(o.double(), positions, self.rotary_emb.cos_sin_cache, inverse=True)
    grouped = turned.reshape(o.shape[0], self.n_local_groups, -1)
    return self.wo_b(torch.einsum("tgk,grk->tgr", grouped, self.wo_a_float32.double()).flatten(1).to(o.dtype))
