"""A family's own chat format, for tokenizers without a template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: The roles of messages in a conversation.
ROLES = frozenset({"system", "developer", "user", "tool", "assistant"})


@dataclass(frozen=True)
class Encoding:
    """A family's chat format. `name` is its name in recipes, `title` in messages. `render` turns messages {role,
    content: text or text parts, ...} into text and raises ValueError for anything it cannot express. `shipped` is the
    code for it in the family's checkpoints, which is never executed."""

    name: str
    title: str
    special_tokens: frozenset[str]
    render: Callable[[Sequence[Mapping[str, Any]]], str]
    shipped: str
