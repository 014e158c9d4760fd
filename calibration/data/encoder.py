"""Encodes rows of a data set as token ids, in a process with bounds on time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from calibration.data.bounded import Bounded, Exceeded
from calibration.data.chat import Chat, choose_chat, joined, transcript
from calibration.data.rows import (
    UnknownRole,
    choose_columns,
    normalise,
    pair_messages,
    plain_text,
    row_tools,
    token_ids,
    unknown_roles,
)
from calibration.data.table import Table
from calibration.families.registry import ENCODINGS
from recipes.errors import RecipeError, SourceError
from recipes.schema import Calibration

MIN_TOKENS = 2
"""Minimum tokens of a sample: a single token would attend only to itself."""
SLICE_CHARS = 1 << 20
"""Characters of a book that are tokenized at a time."""


class Encoder:
    """Encodes rows of a table as token ids. `skipped` counts rows with fewer than 2 tokens. Use as a context
    manager."""

    def __init__(self, options: Calibration, tokenizer: PreTrainedTokenizerBase, table: Table, bundled: bool) -> None:
        self.tokenizer = tokenizer
        self.source = tokenizer.name_or_path
        self.table = table
        self.columns = choose_columns(options, table)
        self.skipped = 0
        self.chat: Chat | None = None
        if self.columns.messages or (self.columns.question and options.format != "text"):
            self.chat = choose_chat(options, tokenizer) or (transcript() if bundled else None)
        if self.chat is None and (self.columns.messages or options.format == "messages"):
            raise RecipeError(
                f"{table.place} holds messages, and the tokenizer has neither a chat template nor "
                f"{' nor '.join(encoding.title for encoding in ENCODINGS)}'s special tokens; put the model's "
                "chat_template.jinja beside its tokenizer, or name a text column with calibration.format: text"
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
        """The parts of the description about columns, chat format and skipped rows."""
        notes = [self.columns.description]
        if self.chat is not None:
            notes.append(f"chat: {self.chat.name}")
            if self.columns.tools and not self.chat.takes_tools:
                notes.append(f"tools left out: chat: {self.chat.name} writes none")
        elif self.columns.question:
            notes.append("joined as text, without a chat format")
        return notes + ([f"{self.skipped} rows skipped with fewer than {MIN_TOKENS} tokens"] if self.skipped else [])

    def rows(self, order: list[int]) -> Iterator[list[int]]:
        """Yields the token ids of the rows in `order`, without the skipped ones."""
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
        """Yields the token ids of a whole text, without special tokens."""
        text, start = str(row[self.columns.text or "text"]), 0
        while start < len(text):
            newline = text.rfind("\n", start, start + SLICE_CHARS)
            last = start + SLICE_CHARS >= len(text) or newline < 0
            stop = start + SLICE_CHARS if last else newline + 1
            yield from self._ids(text[start:stop], False)
            start = stop

    def closed(self, ids: list[int]) -> list[int]:
        """`ids` with EOS at the end, if the tokenizer has an EOS token."""
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
                f"{[message['role'] for message in messages[:20]]}; correct or remove the row, or name text with "
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
    """Token ids (int64 bytes) of a text or of messages; does not add a BOS if the text already starts with one.

    Runs in the bounded process: a chat template is a program, and the regexes of a tokenizer.json can take forever or
    make Rust code panic.
    """
    if not isinstance(text, str):
        assert chat is not None
        text = chat.render(text, tools)
    special = special and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return np.array(tokenizer(text, add_special_tokens=special, verbose=False).input_ids, dtype=np.int64).tobytes()


def _ids(encoded: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(encoded, dtype=np.int64).tolist()
    return ids
