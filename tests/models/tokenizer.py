"""A small byte-level BPE tokenizer with DeepSeek's special tokens, and the sidecar files of a hub repository."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
SPECIAL_TOKENS = (BEGIN, END, USER, ASSISTANT, "<think>", "</think>")
"""Their ids are their positions: begin 0, end 1, and so on."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    + USER
    + "{{ message['content'] }}{% elif message['role'] == 'assistant' %}"
    + ASSISTANT
    + "{{ message['content'] }}{{ eos_token }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}"
    + ASSISTANT
    + "{% endif %}"
)


@cache
def trained(vocab: int) -> str:
    """tokenizer.json of a byte-level BPE with exactly `vocab` tokens, trained on the help texts of the Python library.

    Deterministic for one version of Python. Raises ValueError when the text does not yield `vocab` tokens.
    """
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)], trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"the training text yields {tokenizer.get_vocab_size()} tokens, not {vocab}: ask for fewer")
    return tokenizer.to_str(pretty=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as the hub does: two spaces of indent, keys in their given order, a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(directory: Path, vocab: int, *, chat_template: bool) -> None:
    """Write tokenizer.json and tokenizer_config.json (begin is bos, end is eos and pad) that AutoTokenizer loads."""
    (directory / "tokenizer.json").write_text(trained(vocab), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }
    if chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    write_json(directory / "tokenizer_config.json", config)


def write_sidecars(directory: Path, *, eos_token_id: int = 1, bos_token_id: int = 0) -> None:
    """Write generation_config.json and LICENSE, as every hub repository ships them."""
    write_json(
        directory / "generation_config.json",
        {
            "_from_model_config": True,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
        },
    )
    (directory / "LICENSE").write_text(
        "MIT License\n\nRandom weights made by a test fixture. No rights are reserved.\n", encoding="utf-8"
    )
