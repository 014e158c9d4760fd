"""Interprets the columns of a data set, and reads its rows as token ids, text or messages in one normalized form."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.data.table import Table
from calibration.families.encoding import ROLES
from recipes.errors import SourceError, first_of
from recipes.schema import Calibration

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("text", "content")
ID_COLUMN, MASK_COLUMN, TOOLS_COLUMN = "input_ids", "attention_mask", "tools"
QUESTION_COLUMNS = ("prompt", "instruction", "question")
ANSWER_COLUMNS = ("response", "completion", "output", "answer")
CONTEXT_COLUMNS = ("input", "context")
"""Columns with further text of an instruction (Alpaca, Dolly)."""
SYSTEM_COLUMNS = ("system", "system_prompt")
ROLE_ALIASES = {
    alias: role
    for role, aliases in {
        "user": ("human", "input", "prompter"),
        "assistant": (
            "gpt", "chatgpt", "bing", "bard", "claude", "bot", "ai", "model", "function_call", "tool_call",
        ),
        "tool": ("observation", "tool_response", "ipython", "function"),
    }.items()
    for alias in aliases
}  # fmt: skip
CONTENT_KEYS = ("value", "text", "message")
"""Keys with the content of a message that has no `content`."""
TEXT_PARTS = ("text", "input_text", "output_text")
_COUNTED = 10_000
"""Rows that are scanned for the count in a message about roles."""


class UnknownRole(SourceError):
    """Raised if unknown roles are the only problem with the messages of a row."""


@dataclass(frozen=True)
class Columns:
    """The column for each use, or None. If there are both messages and text, text is used for rows without messages."""

    messages: str | None = None
    text: str | None = None
    ids: str | None = None
    mask: str | None = None
    question: str | None = None
    context: str | None = None
    answer: str | None = None
    system: str | None = None
    tools: str | None = None

    @property
    def uses(self) -> dict[str, str]:
        """Use -> column, for all uses that have a column."""
        return {use: column for use, column in vars(self).items() if column is not None}

    @property
    def description(self) -> str:
        words = {"ids": "token ids", "question": "user", "answer": "assistant", "mask": "mask of padding"}
        return "columns: " + ", ".join(f"{words.get(use, use)} from {column!r}" for use, column in self.uses.items())


def choose_columns(options: Calibration, table: Table) -> Columns:
    """The columns by their usual names, or the one that the recipe names. Raises SourceError if there is none."""
    there = table.columns

    def first(names: Iterable[str]) -> str | None:
        return next((name for name in names if name in there), None)

    if options.column is not None:
        return _named(options, table)
    messages = first(MESSAGE_COLUMNS) if options.format != "text" else None
    text = first(TEXT_COLUMNS) if options.format != "messages" else None
    if messages is not None or text is not None:
        return Columns(messages, text, tools=first([TOOLS_COLUMN]) if messages else None)
    if options.format == "auto" and ID_COLUMN in there:
        return Columns(ids=ID_COLUMN, mask=first([MASK_COLUMN]))
    question, answer = first(QUESTION_COLUMNS), first(ANSWER_COLUMNS)
    if question is not None and answer is not None:
        context, system = first(CONTEXT_COLUMNS), first(SYSTEM_COLUMNS)
        return Columns(question=question, context=context, answer=answer, system=system, tools=first([TOOLS_COLUMN]))
    usual = {"text": TEXT_COLUMNS, "messages": MESSAGE_COLUMNS, "auto": (*MESSAGE_COLUMNS, *TEXT_COLUMNS, ID_COLUMN)}
    raise SourceError(
        f"{table.place}: none of the columns {', '.join(usual[options.format])} is there, and no pair of "
        f"{'/'.join(QUESTION_COLUMNS)} with {'/'.join(ANSWER_COLUMNS)} (calibration.format: {options.format}); it has "
        f"{there!s:.500}. Name one with calibration.column"
    )


def known_columns(table: Table) -> bool:
    """Whether a column of the table has one of the usual names."""
    pair = QUESTION_COLUMNS + ANSWER_COLUMNS
    return any(name in table.columns for name in (*MESSAGE_COLUMNS, *TEXT_COLUMNS, ID_COLUMN, *pair))


def _named(options: Calibration, table: Table) -> Columns:
    name = options.column
    if name not in table.columns:
        raise SourceError(
            f"calibration.column {name!r}: data set {options.dataset!r} has no such column; it has {table.columns!s:.500}"
        )
    values = (row[name] for row in table.rows([name], range(len(table))))
    value = next((value for value in values if value is not None), None)
    if options.format == "messages" or (options.format == "auto" and isinstance(value, list)):
        if options.format == "auto" and value and isinstance(value[0], int):
            return Columns(ids=name, mask=MASK_COLUMN if MASK_COLUMN in table.columns else None)
        return Columns(messages=name, tools=TOOLS_COLUMN if TOOLS_COLUMN in table.columns else None)
    return Columns(text=name)


def token_ids(row: Mapping[str, Any], columns: Columns, place: str) -> list[int]:
    """The row's own token ids, without padding if a mask marks it."""
    ids, mask = row[columns.ids or ""], row[columns.mask] if columns.mask else None
    if ids is None:
        return []
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise SourceError(f"{place}: column {columns.ids!r} must be a list of token ids, whole numbers from 0")
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise SourceError(f"{place}: column {columns.mask!r} must have one entry per token of {columns.ids!r}")
    return [token for token, kept in zip(ids, mask, strict=True) if kept]


def plain_text(row: Mapping[str, Any], column: str, place: str) -> str:
    """The row's text; empty if there is none."""
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise SourceError(
            f"{place}: column {column!r} must be text, not {type(text).__name__}; name another with "
            "calibration.column, or set calibration.format: messages for lists of messages"
        )
    return text or ""


def pair_messages(row: Mapping[str, Any], columns: Columns, place: str) -> list[dict[str, Any]]:
    """System, user and assistant messages from the row's columns; those without text are skipped. A column may itself
    hold messages."""
    messages: list[dict[str, Any]] = []
    for role, names in (
        ("system", [columns.system]),
        ("user", [columns.question, columns.context]),
        ("assistant", [columns.answer]),
    ):
        texts = []
        for name in names:
            value = row[name] if name else None
            if isinstance(value, list):
                messages += normalise(value, f"{place}, column {name!r}")
            elif name and (text := plain_text(row, name, place)):
                texts.append(text)
        if texts:
            messages.append({"role": role, "content": "\n\n".join(texts)})
    return messages


def row_tools(row: Mapping[str, Any], column: str, place: str) -> list[dict[str, Any]] | None:
    """The row's tool schemas, given as a list or as JSON text; None if there are none."""
    tools = row[column]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{place}: column {column!r} is not JSON: {error!s:.100}; it must be a list of tools"
            ) from None
    tools = [tools] if isinstance(tools, Mapping) else tools
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise SourceError(f"{place}: column {column!r} must be a list of tools (objects), or JSON text of one")
    return [without_nulls(tool) for tool in tools] if tools else None


def normalise(messages: Any, place: str) -> list[dict[str, Any]]:
    """Messages as {role, content, ...}: content is text or a list of text parts, roles are spelled as templates expect,
    and nulls that a table fills in are removed. Raises SourceError with every problem of the row."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise SourceError(
            f"{place}: must be a list of {{role, content}}, is {type(messages).__name__}; set calibration.format: text "
            "or name another calibration.column"
        )
    normal, problems, roles = [], list[str](), 0
    for number, message in enumerate(messages, start=1):
        clean = without_nulls(message)
        if "role" not in clean and "from" in clean:
            clean["role"] = clean.pop("from")
        if "content" not in clean:
            key = next((key for key in CONTENT_KEYS if isinstance(clean.get(key), str | list)), None)
            clean["content"] = clean.pop(key) if key else ""
        clean["role"] = _role(clean.get("role"))
        content = clean["content"]
        if not _is_role(clean["role"]):
            problems.append(f"{place}: message {number} has role {clean['role']!r:.80}; roles are {_roles()}")
            roles += 1
        elif isinstance(content, list):
            clean["content"], strange = _text_parts(content)
            if strange:
                problems.append(
                    f"{place}: content of message {number} has parts that are not text ({', '.join(strange)}); remove "
                    "the row, or those parts of it"
                )
        elif not isinstance(content, str):
            kind = type(content).__name__
            problems.append(f"{place}: content of message {number} must be text or a list of parts, is {kind}")
        normal.append(clean)
    if problems:
        raise (UnknownRole if roles == len(problems) else SourceError)(first_of(problems, 5))
    return normal


def unknown_roles(table: Table, column: str, order: Sequence[int]) -> str | None:
    """A message that counts the rows with unknown roles; None if there are none."""
    rows, names, looked = 0, Counter[str](), order[:_COUNTED]
    for row in table.rows([column], looked):
        messages = row[column] if isinstance(row[column], list) else []
        roles = [m["role"] if m.get("role") is not None else m.get("from") for m in messages if isinstance(m, Mapping)]
        strange = {f"{role!r:.80}" for role in map(_role, roles) if not _is_role(role)}
        names.update(strange)
        rows += bool(strange)
    if not rows:
        return None
    most = ", ".join(f"{name} ({count})" for name, count in names.most_common(5))
    return f"{table.place}: {rows} of {len(looked)} rows have unknown roles: {most}; rename or remove them"


def without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _role(role: Any) -> Any:
    if not isinstance(role, str):
        return role
    plain = role.strip().casefold()
    return ROLE_ALIASES.get(plain, plain if plain in ROLES else role)


def _is_role(role: Any) -> bool:
    return isinstance(role, str) and role in ROLES


def _roles() -> str:
    return ", ".join(sorted(ROLES)) + " and their usual other names"


def _text_parts(parts: list[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The text parts as {type: text, text}, and the kinds of all other parts."""
    texts: list[dict[str, Any]] = []
    strange: dict[str, None] = {}
    for part in parts:
        if isinstance(part, str):
            texts.append({"type": "text", "text": part})
        elif isinstance(part, Mapping) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append({**part, "type": "text"})
        else:
            strange[f"{part.get('type', 'unnamed')!s:.40}" if isinstance(part, Mapping) else type(part).__name__] = None
    return texts, list(strange)[:5]
