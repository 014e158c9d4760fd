"""Calibration text: a data set and a tokenizer become batches of token ids, the same ones for the same recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calibration import deepseek_v4_encoding
from calibration.checkpoint.permissions import refuse_outside
from calibration.dataset import first_line, load_table
from recipes.errors import RecipeError, SourceError
from recipes.schema import Calibration

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("text", "content")
ROLE_ALIASES = {"human": "user", "gpt": "assistant"}
MIN_TOKENS = 2
"""A sample of one token attends to nothing but itself."""
SLICE_CHARS = 1 << 20
"""Characters of a book tokenised at a time."""

Render = Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True)
class CalibrationData:
    """Token batches of one calibration run.

    `batches` yields dicts of `input_ids` and `attention_mask`, both int64 [batch, T] with T the longest sample of the
    batch, padded on the right, mask 0 on padding. `num_tokens` counts no padding. `digest` is the sha256 of the token
    rows in order, whatever the batch size: two runs with the same digest calibrate on the same tokens.
    """

    batches: DataLoader[dict[str, torch.Tensor]]
    digest: str
    num_samples: int
    num_tokens: int
    description: str


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
    except Exception as error:  # whatever a tokenizer's files or its own code raise
        raise SourceError(
            f"{source_directory}: the tokenizer cannot be loaded: {first_line(error)}. Copy tokenizer.json and "
            "tokenizer_config.json of the model there; a tokenizer with code of its own needs "
            "source.trust_remote_code: true"
        ) from error


def load_batches(
    options: Calibration, tokenizer: PreTrainedTokenizerBase, *, source_directory: Path
) -> CalibrationData:
    """Exactly `options.num_samples` samples of 2 to `options.max_seq_length` tokens each.

    Rows of a table are one sample each, cut at the end. Books (.txt) are cut into windows of max_seq_length, drawn from
    all windows. Rows of the bundled set are packed: joined in shuffled order, each closed by EOS, and cut into windows.
    Rows with fewer than 2 tokens are skipped and counted in the description.

    Raises SourceError for a data set that is missing, unreachable, damaged, without the column, or too small;
    RecipeError for a chat format that the tokenizer does not have, and batches that it cannot pad.
    """
    bundled = options.dataset == "bundled"
    table, books = load_table(options)
    encoder = _Encoder(options, tokenizer, table, bundled)
    if books:
        windows = [w for row in table for w in _windows(encoder.book(row), options.max_seq_length, encoder.begin)]
        samples = [windows[i] for i in _order(options, len(windows))][: options.num_samples]
        available = len(windows)
    else:
        rows = encoder.rows(table, _order(options, len(table)))
        if bundled:
            closed = (token for row in rows for token in encoder.closed(row))
            found: Iterable[list[int]] = _windows(closed, options.max_seq_length, encoder.begin)
        else:
            found = (row[: options.max_seq_length] for row in rows)
        usable = (sample for sample in found if len(sample) >= MIN_TOKENS)
        samples = list(islice(usable, options.num_samples))
        available = len(samples)
    if available < options.num_samples:
        remedies = ["name a larger data set"]
        remedies += [f"set calibration.num_samples: {available}"] if available else []
        remedies += ["lower calibration.max_seq_length"] if bundled or books else []
        raise SourceError(
            f"calibration.dataset {options.dataset!r}: {options.num_samples} samples of at most "
            f"{options.max_seq_length} tokens wanted (calibration.num_samples), {available} there, {encoder.skipped} rows "
            f"skipped with fewer than {MIN_TOKENS} tokens. Remedy: {', or '.join(remedies)}"
        )
    tokens = sum(map(len, samples))
    notes = [
        f"{options.dataset} ({options.split}, {f'shuffled with seed {options.seed}' if options.shuffle else 'in order'})",
        f"{len(samples)} samples, {tokens} tokens, at most {options.max_seq_length} each",
        *(["windows over joined rows"] if bundled else ["windows of whole files"] if books else []),
        *([f"chat: {encoder.chat_name}"] if encoder.chat_name else []),
        *([f"{encoder.skipped} rows skipped with fewer than {MIN_TOKENS} tokens"] if encoder.skipped else []),
    ]
    if encoder.chat_name == "deepseek_v4" and (source_directory / "encoding" / "encoding_dsv4.py").is_file():
        notes.append("encoding/encoding_dsv4.py of the checkpoint not executed, rendered by this project")
    collate = partial(_collate, pad=_pad_token(tokenizer, options))
    return CalibrationData(
        batches=DataLoader(_Samples(samples), batch_size=options.batch_size, shuffle=False, collate_fn=collate),
        digest=_digest(samples),
        num_samples=len(samples),
        num_tokens=tokens,
        description="; ".join(notes),
    )


class _Samples(Dataset[Any]):
    def __init__(self, samples: list[list[int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> list[int]:
        return self.samples[index]


def _collate(samples: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, samples))
    input_ids = torch.full((len(samples), longest), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample)] = torch.tensor(sample, dtype=torch.int64)
        attention_mask[row, : len(sample)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _pad_token(tokenizer: PreTrainedTokenizerBase, options: Calibration) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    if options.batch_size == 1:
        return 0  # never written: a batch of one has no padding
    raise RecipeError(
        f"calibration.batch_size: {options.batch_size} needs padding, and the tokenizer has neither a pad nor an eos "
        "token; set calibration.batch_size: 1"
    )


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
    """Rows of a table -> token ids. `skipped` counts rows that gave fewer than 2 tokens."""

    def __init__(
        self, options: Calibration, tokenizer: PreTrainedTokenizerBase, table: datasets.Dataset, bundled: bool
    ) -> None:
        self.dataset = options.dataset
        self.tokenizer = tokenizer
        self.messages_column, self.text_column = _columns(options, table)
        self.skipped = 0
        adds_begin = tokenizer.bos_token_id is not None and self._ids("x", True)[:1] == [tokenizer.bos_token_id]
        self.begin: int | None = tokenizer.bos_token_id if adds_begin else None
        self.chat_name = ""
        self.render: Render = _render_plain
        if self.messages_column:
            self.chat_name, self.render = _chat(options, tokenizer, plain=bundled)

    def rows(self, table: datasets.Dataset, order: list[int]) -> Iterator[list[int]]:
        """Token ids of the rows in `order`, the skipped ones left out."""
        wanted = table.select_columns([name for name in (self.messages_column, self.text_column) if name])
        for index in order:
            ids = self._row(wanted[index], index)
            if len(ids) < MIN_TOKENS:
                self.skipped += 1
            else:
                yield ids

    def book(self, row: Mapping[str, Any]) -> Iterator[int]:
        """Token ids of a whole text without special tokens."""
        text, start = str(row[self.text_column or "text"]), 0
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

    def _row(self, row: Mapping[str, Any], index: int) -> list[int]:
        place = f"calibration.dataset {self.dataset!r}, row {index + 1}"
        messages = row.get(self.messages_column) if self.messages_column else None
        if messages is not None:
            if not messages:
                return []
            normal = _normalise(messages, f"{place}, column {self.messages_column!r}")
            try:
                rendered = self.render(normal)
            except Exception as error:  # a chat template is a program of its own and raises what it likes
                raise SourceError(
                    f"{place}: chat: {self.chat_name} cannot render it: {first_line(error)}. Roles are "
                    f"{[message['role'] for message in normal]}; correct or remove the row"
                ) from error
            return self._ids(rendered, self.chat_name == "plain")
        text = row.get(self.text_column) if self.text_column else None
        if text is None:
            return []
        if not isinstance(text, str):
            raise SourceError(
                f"{place}: column {self.text_column!r} must be text, not {type(text).__name__}; name another with "
                "calibration.column, or set calibration.format: messages for lists of messages"
            )
        return self._ids(text, True)

    def _ids(self, text: str, special: bool) -> list[int]:
        """Token ids; never a second BOS in front of one that the text already spells out."""
        begin = self.tokenizer.bos_token
        special = special and not (begin and text.startswith(begin))
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _columns(options: Calibration, table: datasets.Dataset) -> tuple[str | None, str | None]:
    """The columns with messages and with text; one of them may be None. With both, text serves rows without messages."""
    there = table.column_names
    if options.column is not None:
        if options.column not in there:
            raise SourceError(
                f"calibration.column {options.column!r}: data set {options.dataset!r} has no such column; it has {there}"
            )
        values = (row[options.column] for row in table.select_columns([options.column]))
        first = next((value for value in values if value is not None), None)
        if options.format == "messages" or (options.format == "auto" and isinstance(first, list)):
            return options.column, None
        return None, options.column
    messages = next((name for name in MESSAGE_COLUMNS if name in there), None) if options.format != "text" else None
    text = next((name for name in TEXT_COLUMNS if name in there), None) if options.format != "messages" else None
    if messages is None and text is None:
        usual = {"text": TEXT_COLUMNS, "messages": MESSAGE_COLUMNS, "auto": MESSAGE_COLUMNS + TEXT_COLUMNS}
        raise SourceError(
            f"calibration.dataset {options.dataset!r}: none of the columns {', '.join(usual[options.format])} is there "
            f"(calibration.format: {options.format}); it has {there}. Name one with calibration.column"
        )
    return messages, text


def _normalise(messages: Any, place: str) -> list[dict[str, Any]]:
    """Messages as {role, content, ...} without the nulls that a table fills in; ShareGPT's from/value are renamed."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise SourceError(
            f"{place}: must be a list of {{role, content}}, is {type(messages).__name__}; set calibration.format: text "
            "or name another calibration.column"
        )
    normal, problems = [], []
    for number, message in enumerate(messages, start=1):
        clean = _without_nulls(message)
        if "role" not in clean and "from" in clean:
            clean["role"], clean["content"] = clean.pop("from"), clean.pop("value", "")
        clean["role"] = ROLE_ALIASES.get(str(clean.get("role")), clean.get("role"))
        if clean["role"] not in deepseek_v4_encoding.ROLES:
            allowed = ", ".join(sorted(deepseek_v4_encoding.ROLES))
            problems.append(f"{place}: message {number} has role {clean['role']!r}; roles are {allowed}")
        elif not isinstance(clean.setdefault("content", ""), str | list):
            kind = type(clean["content"]).__name__
            problems.append(f"{place}: content of message {number} must be text or a list of parts, is {kind}")
        normal.append(clean)
    if problems:
        raise SourceError(problems)
    return normal


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _chat(options: Calibration, tokenizer: PreTrainedTokenizerBase, plain: bool) -> tuple[str, Render]:
    """Name and function of the rendering; `plain` allows a transcript for tokenizers that know no chat format."""
    template = bool(tokenizer.chat_template)
    missing = sorted(deepseek_v4_encoding.SPECIAL_TOKENS - set(tokenizer.get_vocab()))
    if options.chat == "template" and not template:
        raise RecipeError(
            "calibration.chat: template: the tokenizer has no chat template; set calibration.chat: auto, or put the "
            "model's chat_template.jinja beside its tokenizer"
        )
    if options.chat == "deepseek_v4" and missing:
        raise RecipeError(
            f"calibration.chat: deepseek_v4: the tokenizer lacks the tokens {', '.join(missing)}; "
            "set calibration.chat: auto"
        )
    if options.chat == "template" or (options.chat == "auto" and template):
        return "template", lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False))
    if not missing:
        return "deepseek_v4", deepseek_v4_encoding.render
    if plain:
        return "plain", _render_plain
    raise RecipeError(
        f"calibration.dataset {options.dataset!r} holds messages, and the tokenizer has neither a chat template nor "
        "DeepSeek-V4's special tokens; put the model's chat_template.jinja beside its tokenizer, or name a text column "
        "with calibration.format: text"
    )


def _render_plain(messages: list[dict[str, Any]]) -> str:
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages) + "\n"
