"""Tokenizers of the three kinds that calibration meets, and a cache of datasets that belongs to one test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models.tokenizer import BEGIN, USER, write_tokenizer

VOCAB = 1024


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets  # type: ignore[import-untyped]

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def v4(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """DeepSeek-V4's special tokens, no chat template, no BOS of its own."""
    directory = tmp_path_factory.mktemp("v4")
    write_tokenizer(directory, VOCAB, chat_template=False)
    return _loaded(directory)


@pytest.fixture(scope="session")
def templated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A chat template that spells out BOS, and a post-processor that adds BOS too (as Llama 3 has it)."""
    directory = tmp_path_factory.mktemp("templated")
    write_tokenizer(directory, VOCAB, chat_template=True)
    from tokenizers import Tokenizer, processors

    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 0)]
    )
    raw.save(str(directory / "tokenizer.json"))
    return _loaded(directory)


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Neither a chat template nor DeepSeek-V4's user token."""
    directory = tmp_path_factory.mktemp("bare")
    write_tokenizer(directory, VOCAB, chat_template=False)
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    (directory / "tokenizer.json").write_text(text.replace(USER, "<human>"), encoding="utf-8")
    return _loaded(directory)


def _loaded(directory: Path) -> Any:
    # Seconds to import, and most unit tests need none of it.
    from calibration.data.batches import load_tokenizer

    return load_tokenizer(directory, False)
