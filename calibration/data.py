"""Calibration text: a data set and a tokenizer become batches of token ids, the same ones for the same recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calibration.bounded import Bounded, Exceeded
from calibration.chat import Chat, choose_chat, joined, transcript
from calibration.checkpoint.families import family_of
from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.checkpoint.permissions import refuse_outside
from calibration.dataset import Table, first_line, load_table
from calibration.padding import batches_of_one_length
from calibration.rows import (
    UnknownRole,
    choose_columns,
    known_columns,
    normalise,
    pair_messages,
    plain_text,
    row_tools,
    token_ids,
    unknown_roles,
)
from recipes.errors import RecipeError, SourceError
from recipes.schema import Calibration

MIN_TOKENS = 2
"""A sample of one token attends to nothing but itself."""
SLICE_CHARS = 1 << 20
"""Characters of a book tokenised at a time."""


@dataclass(frozen=True)
class CalibrationData:
    """Token batches of one calibration run.

    `batches` yields dicts of `input_ids` and `attention_mask`, both int64 [batch, T]: the samples of a batch all have T
    tokens, so that there is no padding (calibration.padding), and the mask is 1 everywhere. `digest` is the sha256 of the
    token rows in order, whatever the batch size: two runs with the same digest calibrate on the same tokens. `regrouped`
    says that batches of consecutive samples would have been padded.
    """

    batches: DataLoader[dict[str, torch.Tensor]]
    digest: str
    num_samples: int
    num_tokens: int
    description: str
    regrouped: bool
    warning: str | None = None


def embedding_rows(source: Checkpoint) -> dict[str, int]:
    """Rows of the source's embedding by where they are written: config.json, and the header of its tensor."""
    rows = {"vocab_size in config.json": source.config.get("vocab_size")}
    family = family_of(source.config, str(source.directory / CONFIG_NAME))
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
    try:
        return AutoTokenizer.from_pretrained(
            str(source_directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (
        BaseException
    ) as error:  # whatever a tokenizer's files or its own code raise; a panic of Rust is no Exception
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
    """`options.num_samples` samples of 2 to `options.max_seq_length` tokens each; fewer, with a warning, where the data
    set gives fewer and `options.exact` is false.

    Rows of a table are one sample each, cut at the end. Books (.txt) are cut into windows of max_seq_length, drawn from
    all windows. Rows of the bundled set are packed: joined in shuffled order, each closed by EOS, and cut into windows.
    Rows with fewer than 2 tokens are skipped and counted in the description.

    Raises SourceError for a data set that is missing, unreachable, damaged, without the column, or empty (with `exact`:
    too small), and for a token that has no row in the `embedding` (see `embedding_rows`);
    RecipeError for a chat format that the tokenizer does not have.
    """
    bundled = options.dataset == "bundled"
    table = load_table(options)
    if options.column is None and not known_columns(table):
        table = table.unfolded()
    with _Encoder(options, tokenizer, table, bundled) as encoder:
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
    chat = encoder.chat.name if encoder.chat is not None else ""
    if chat == "deepseek_v4" and (source_directory / "encoding" / "encoding_dsv4.py").is_file():
        notes.append("encoding/encoding_dsv4.py of the checkpoint not executed, rendered by this project")
    lengths, size = [len(sample) for sample in samples], options.batch_size
    return CalibrationData(
        batches=DataLoader(_Samples(samples), batch_sampler=batches_of_one_length(lengths, size), collate_fn=_collate),
        digest=_digest(samples),
        num_samples=len(samples),
        num_tokens=tokens,
        description="; ".join(notes),
        regrouped=any(len(set(lengths[begin : begin + size])) > 1 for begin in range(0, len(samples), size)),
        warning=warning,
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
    """Row numbers in drawing order: what datasets' own shuffle does, but errors can still name the original row."""
    order = np.random.default_rng(options.seed).permutation(count) if options.shuffle else np.arange(count)
    return [int(i) for i in order]


def _windows(tokens: Iterable[int], length: int, begin: int | None) -> Iterator[list[int]]:
    """Consecutive windows of `length` tokens, the last one shorter, each opened by `begin` where that is given."""
    stream = iter(tokens)
    for first in stream:
        head = [first] if begin in (None, first) or length < MIN_TOKENS else [begin, first]
        window = [*head, *islice(stream, length - len(head))]
        if len(window) >= MIN_TOKENS:
            yield window


class _Encoder:
    """Rows of a table -> token ids. `skipped` counts rows that gave fewer than 2 tokens. Use as a context manager."""

    def __init__(self, options: Calibration, tokenizer: PreTrainedTokenizerBase, table: Table, bundled: bool) -> None:
        self.tokenizer = tokenizer
        self.source = tokenizer.name_or_path
        self.table = table
        self.columns = choose_columns(options, table)
        self.skipped = 0
        self.chat: Chat | None = None
        if self.columns.messages or self.columns.question:
            self.chat = choose_chat(options, tokenizer) or (transcript() if bundled else None)
        if self.chat is None and self.columns.messages:
            raise RecipeError(
                f"{table.place} holds messages, and the tokenizer has neither a chat template nor DeepSeek-V4's special "
                "tokens; put the model's chat_template.jinja beside its tokenizer, or name a text column with "
                "calibration.format: text"
            )

        self._encode = Bounded(partial(_encode, tokenizer, self.chat))
        adds_begin = tokenizer.bos_token_id is not None and self._ids("x", True)[:1] == [tokenizer.bos_token_id]
        self.begin: int | None = tokenizer.bos_token_id if adds_begin else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._encode.__exit__(*exception)

    @property
    def notes(self) -> list[str]:
        """What the description says about columns, chat and skipped rows."""
        notes = [self.columns.description]
        if self.chat is not None:
            notes.append(f"chat: {self.chat.name}")
            if self.columns.tools and not self.chat.takes_tools:
                notes.append(f"tools left out: chat: {self.chat.name} writes none")
        elif self.columns.question:
            notes.append("joined as text: the tokenizer has no chat format")
        return notes + ([f"{self.skipped} rows skipped with fewer than {MIN_TOKENS} tokens"] if self.skipped else [])

    def rows(self, order: list[int]) -> Iterator[list[int]]:
        """Token ids of the rows in `order`, the skipped ones left out."""
        found = self.table.rows(list(self.columns.uses.values()), order)
        for index, row in zip(order, found, strict=True):
            place = f"{self.table.place}, row {index + 1}"
            try:
                ids = self._row(row, place)
            except UnknownRole as error:
                counted = unknown_roles(self.table, self.columns.messages or "", order)
                raise SourceError([*error.problems, *([counted] if counted else [])]) from None
            if len(ids) < MIN_TOKENS:
                self.skipped += 1
            else:
                yield ids

    def book(self, row: Mapping[str, Any]) -> Iterator[int]:
        """Token ids of a whole text without special tokens."""
        text, start = str(row[self.columns.text or "text"]), 0
        while start < len(text):
            newline = text.rfind("\n", start, start + SLICE_CHARS)
            last = start + SLICE_CHARS >= len(text) or newline < 0
            stop = start + SLICE_CHARS if last else newline + 1
            yield from self._ids(text[start:stop], False)
            start = stop

    def closed(self, ids: list[int]) -> list[int]:
        """`ids` with EOS at the end, where the tokenizer has one."""
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1] == end else [*ids, end]

    def _row(self, row: Mapping[str, Any], place: str) -> list[int]:
        columns = self.columns
        if columns.ids:
            return token_ids(row, columns, place)
        messages: list[dict[str, Any]] = []
        if columns.question:
            messages = pair_messages(row, columns, place)
        elif columns.messages and row[columns.messages] is not None:
            messages = normalise(row[columns.messages], f"{place}, column {columns.messages!r}")
            if not messages:
                return []
        if messages:
            return self._conversation(messages, row, place)
        return self._ids(plain_text(row, columns.text, place), True) if columns.text else []

    def _conversation(self, messages: list[dict[str, Any]], row: Mapping[str, Any], place: str) -> list[int]:
        if self.chat is None:
            return self._ids("\n\n".join(joined(message["content"]) for message in messages), True)
        tools = row_tools(row, self.columns.tools, place) if self.columns.tools and self.chat.takes_tools else None
        try:
            return _ids(self._encode(messages, tools, self.chat.name == "plain"))
        except (ValueError, Exceeded) as error:
            raise SourceError(
                f"{place}: chat: {self.chat.name} cannot render it: {error}. Roles are "
                f"{[message['role'] for message in messages]}; correct or remove the row, or name text with "
                "calibration.format: text"
            ) from None

    def _ids(self, text: str, special: bool) -> list[int]:
        try:
            return _ids(self._encode(text, None, special))
        except (ValueError, Exceeded) as error:
            raise SourceError(
                f"{self.tokenizer.name_or_path}: the tokenizer cannot encode a text of {self.table.place} "
                f"({text[:40]!r}): {error}; correct the tokenizer, or remove the row"
            ) from None


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat | None,
    text: str | list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    special: bool,
) -> bytes:
    """Token ids, int64, of a text or of messages; never a second BOS in front of one that the text already spells out.

    Runs bounded: a chat template is a program, and a tokenizer.json holds regexes, which can take for ever or make Rust
    code panic.
    """
    if not isinstance(text, str):
        assert chat is not None
        text = chat.render(text, tools)
    special = special and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return np.array(tokenizer(text, add_special_tokens=special, verbose=False).input_ids, dtype=np.int64).tobytes()


def _ids(encoded: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(encoded, dtype=np.int64).tolist()
    return ids
