"""A family's own chat format, for tokenizers that bring no template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Who may speak in a conversation.
ROLES = frozenset({"system", "developer", "user", "tool", "assistant"})


@dataclass(frozen=True)
class Encoding:
    """How a family writes a conversation. `name` is what a recipe calls it, `title` what a message calls it. `render` makes
    the text of messages {role, content: text or text parts, ...} and raises ValueError for what it has no form for.
    `shipped` is the code that the family's checkpoints bring for it, which is never executed."""

    name: str
    title: str
    special_tokens: frozenset[str]
    render: Callable[[Sequence[Mapping[str, Any]]], str]
    shipped: str
