"""Turns a data set into batches of token ids with the source's tokenizer; the same recipe always gives the same
batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.checkpoint.permissions import refuse_outside
from calibration.checkpoint.token_ids import check_token_ids
from calibration.data.encoder import MIN_TOKENS, Encoder
from calibration.data.padding import batches_of_one_length
from calibration.data.rows import known_columns
from calibration.data.table import Table, first_line, load_table, text_table
from calibration.families.registry import ENCODINGS, family_of, language_config
from recipes.errors import SourceError
from recipes.schema import Calibration


@dataclass(frozen=True)
class CalibrationData:
    """Token batches of one calibration run.

    `batches` yields dicts of `input_ids` and `attention_mask`, both int64 [batch, T]: all samples of a batch have T
    tokens, so that there is no padding (calibration.data.padding) and the mask is all 1. `digest` is the sha256 of the
    token rows in order, whatever the batch size: two runs with the same digest calibrate on the same tokens.
    `regrouped` says that batches of consecutive samples would have needed padding. `rows` are the first 16 hexadecimal digits of
    the sha256 of each row; `revision` is the commit of a data set from the hub, if its files name one.
    """

    batches: DataLoader[dict[str, torch.Tensor]]
    digest: str
    num_samples: int
    num_tokens: int
    description: str
    regrouped: bool
    warning: str | None = None
    rows: tuple[str, ...] = ()
    revision: str | None = None


def embedding_rows(source: Checkpoint) -> dict[str, int]:
    """Where the source states the rows of its embedding (config.json, the tensor's header) -> the number of rows."""
    rows = {"vocab_size in config.json": language_config(source.config).get("vocab_size")}
    family = family_of(source.config, str(source.directory / CONFIG_NAME), source.tensors)
    for name, tensor in source.tensors.items():
        if len(tensor.shape) == 2 and family.place(name).part == "embedding" and name.endswith(".weight"):
            rows[f"{name} in {tensor.shard}"] = tensor.shape[0]
    return {where: number for where, number in rows.items() if isinstance(number, int)}


def load_tokenizer(source_directory: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises SourceError if there is none, it cannot be loaded, or its files name a path
    outside the checkpoint."""
    if not source_directory.is_dir():
        raise SourceError(f"{source_directory}: no such directory; source.checkpoint must hold a tokenizer")
    refuse_outside(source_directory)
    check_token_ids(source_directory)
    try:
        return AutoTokenizer.from_pretrained(
            str(source_directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except BaseException as error:  # a tokenizer's files or code can raise anything; a Rust panic is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise SourceError(
            f"{source_directory}: the tokenizer cannot be loaded: {first_line(error)}. Copy tokenizer.json and "
            "tokenizer_config.json of the model there; a tokenizer with code of its own needs "
            "source.trust_remote_code: true"
        ) from error


def load_batches(
    options: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source_directory: Path,
    embedding: Mapping[str, int] | None = None,
) -> CalibrationData:
    """Loads `options.num_samples` samples of 2 to `options.max_seq_length` tokens each; fewer, with a warning, if the
    data set yields fewer and `options.exact` is false.

    Each row of a table is one sample, truncated at the end. Books (.txt) are cut into windows of max_seq_length, and
    samples are drawn from all windows. Rows of the bundled set are packed: joined in shuffled order, each with EOS at
    its end, and cut into windows. Rows with fewer than 2 tokens are skipped and counted in the description.

    Raises SourceError for a data set that is missing, unreachable, damaged, without the column, or empty (with `exact`:
    too small), and for a token without a row in the `embedding` (see `embedding_rows`); RecipeError for a chat format
    that the tokenizer does not have.
    """
    return _batches(load_table(options), options, tokenizer, source_directory, embedding)


def text_batches(
    text: str,
    options: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source_directory: Path,
    embedding: Mapping[str, int] | None = None,
) -> CalibrationData:
    """`options.num_samples` windows of `options.max_seq_length` tokens from the beginning of a text, instead of the data set
    of `options`. Raises as `load_batches`."""
    as_text = {"dataset": "text", "format": "text", "column": None, "shuffle": False, "exact": False}
    wanted = options.model_copy(update=as_text)
    return _batches(text_table(text), wanted, tokenizer, source_directory, embedding)


def _batches(
    table: Table,
    options: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    source_directory: Path,
    embedding: Mapping[str, int] | None,
) -> CalibrationData:
    bundled = options.dataset == "bundled"
    if options.column is None and not known_columns(table):
        table = table.unfolded()
    with Encoder(options, tokenizer, table, bundled) as encoder:
        if table.books:
            texts = table.rows([encoder.columns.text or "text"], range(len(table)))
            windows = [w for row in texts for w in _windows(encoder.book(row), options.max_seq_length, encoder.begin)]
            samples = [windows[i] for i in _order(options, len(windows))][: options.num_samples]
            available = len(windows)
        else:
            rows = encoder.rows(_order(options, len(table)))
            if bundled:
                closed = (token for row in rows for token in encoder.closed(row))
                found: Iterable[list[int]] = _windows(closed, options.max_seq_length, encoder.begin)
            else:
                found = (row[: options.max_seq_length] for row in rows)
            usable = (sample for sample in found if len(sample) >= MIN_TOKENS)
            samples = list(islice(usable, options.num_samples))
            available = len(samples)
    _require_rows(samples, embedding or {}, tokenizer, source_directory)
    warning = None
    if available < options.num_samples:
        warning = (
            f"{table.place}: {options.num_samples} samples of at most {options.max_seq_length} tokens wanted "
            f"(calibration.num_samples), {available} there, {encoder.skipped} rows skipped with fewer than {MIN_TOKENS} "
            "tokens"
        )
        if options.exact or not available:
            remedies = ["name a larger data set"]
            remedies += [f"set calibration.num_samples: {available}, or calibration.exact: false"] if available else []
            remedies += ["lower calibration.max_seq_length"] if bundled or table.books else []
            raise SourceError(f"{warning}. Remedy: {', or '.join(remedies)}")
    tokens = sum(map(len, samples))
    notes = [
        f"{options.dataset} ({options.split}, {f'shuffled with seed {options.seed}' if options.shuffle else 'in order'})",
        f"{len(samples)} samples, {tokens} tokens, at most {options.max_seq_length} each",
        *(["windows over joined rows"] if bundled else ["windows of whole files"] if table.books else []),
        *encoder.notes,
    ]
    shipped = [e.shipped for e in ENCODINGS if encoder.chat is not None and encoder.chat.name == e.name]
    notes += [
        f"{file} of the checkpoint not executed, rendered by this project"
        for file in shipped
        if (source_directory / file).is_file()
    ]
    lengths, size = [len(sample) for sample in samples], options.batch_size
    return CalibrationData(
        batches=DataLoader(_Samples(samples), batch_sampler=batches_of_one_length(lengths, size), collate_fn=_collate),
        digest=_digest(samples),
        num_samples=len(samples),
        num_tokens=tokens,
        description="; ".join(notes),
        regrouped=any(len(set(lengths[begin : begin + size])) > 1 for begin in range(0, len(samples), size)),
        warning=warning,
        rows=tuple(_digest([sample])[:16] for sample in samples),
        revision=table.revision,
    )


def _require_rows(
    samples: list[list[int]], embedding: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, source: Path
) -> None:
    largest = max((max(sample) for sample in samples), default=-1)
    short = [f"{where} has {rows:,} rows" for where, rows in embedding.items() if rows <= largest]
    if short:
        raise SourceError(
            f"{source}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r:.40}) of the calibration data has no "
            f"row in the embedding: {', '.join(short)}; the tokenizer has {len(tokenizer):,} tokens. Copy the tokenizer of "
            "this model there, or name the data set that belongs to it"
        )


class _Samples(Dataset[Any]):
    def __init__(self, samples: list[list[int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> list[int]:
        return self.samples[index]


def _collate(samples: list[list[int]]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor(samples, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _digest(samples: list[list[int]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.array([len(sample), *sample], dtype="<i8").tobytes())
    return digest.hexdigest()


def _order(options: Calibration, count: int) -> list[int]:
    """Row numbers in drawing order: the order of datasets' own shuffle, but errors can still name the original row."""
    order = np.random.default_rng(options.seed).permutation(count) if options.shuffle else np.arange(count)
    return [int(i) for i in order]


def _windows(tokens: Iterable[int], length: int, begin: int | None) -> Iterator[list[int]]:
    """Yields consecutive windows of `length` tokens, the last one maybe shorter, each starting with `begin` if it is
    given."""
    stream = iter(tokens)
    for first in stream:
        head = [first] if begin in (None, first) or length < MIN_TOKENS else [begin, first]
        window = [*head, *islice(stream, length - len(head))]
        if len(window) >= MIN_TOKENS:
            yield window
