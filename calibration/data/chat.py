"""Turns messages into the text of a conversation: by the tokenizer's chat template, a family's own encoding, or as a
transcript."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from calibration.families.encoding import Encoding
from calibration.families.registry import ENCODINGS
from recipes.errors import RecipeError
from recipes.schema import Calibration

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]
_PROBE = "a text to be found"


class Chat:
    """One way to write a conversation. `name` is its name in recipes and descriptions; `takes_parts` says whether it
    accepts content as a list of text parts (None: not yet tried).

    A chat template is a stranger's program: transformers runs it in jinja2's immutable sandbox, without access to files
    and attributes, but with unlimited time and memory. The caller of `render` must bound those
    (calibration.data.bounded).
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Messages, Tools | None], str],
        takes_tools: bool = False,
        takes_parts: bool | None = False,
    ) -> None:
        self.name = name
        self.takes_tools = takes_tools
        self._write = write
        self._takes_parts = takes_parts

    def render(self, messages: Messages, tools: Tools | None = None) -> str:
        """The conversation as text. Content is text or a list of text parts; parts are joined by a newline, as in vLLM,
        unless the template accepts them itself. Raises whatever the template raises."""
        parted = any(isinstance(message["content"], list) for message in messages)
        if parted and not self._parts_are_taken():
            messages = [message | {"content": joined(message["content"])} for message in messages]
        return self._write(messages, tools)

    def _parts_are_taken(self) -> bool:
        """Whether the template writes a list of one text part like the text itself, not as Python's repr."""
        if self._takes_parts is None:
            try:
                text, parts = (
                    self._write([{"role": "user", "content": content}], None)
                    for content in (_PROBE, [{"type": "text", "text": _PROBE}])
                )
                self._takes_parts = text == parts and _PROBE in text
            except Exception:  # a template can raise anything; rendering the row reports it
                self._takes_parts = False
        return self._takes_parts


def joined(content: str | list[dict[str, Any]]) -> str:
    """`content` as one text: text parts are joined by newlines."""
    return content if isinstance(content, str) else "\n".join(str(part["text"]) for part in content)


def choose_chat(options: Calibration, tokenizer: PreTrainedTokenizerBase) -> Chat | None:
    """The chat format that the recipe names or the tokenizer has; None for `auto` if the tokenizer has none. Raises
    RecipeError if the tokenizer lacks the format that the recipe names."""
    template = bool(tokenizer.chat_template)
    if options.chat == "template" and not template:
        raise RecipeError(
            "calibration.chat: template: the tokenizer has no chat template; set calibration.chat: auto, or put the "
            "model's chat_template.jinja beside its tokenizer"
        )
    if options.chat == "template" or (options.chat == "auto" and template):

        def apply(messages: Messages, tools: Tools | None) -> str:
            return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))

        return Chat("template", apply, takes_tools=True, takes_parts=None)
    vocabulary = set(tokenizer.get_vocab())
    for encoding in ENCODINGS:
        missing = sorted(encoding.special_tokens - vocabulary)
        if missing and options.chat == encoding.name:
            raise RecipeError(
                f"calibration.chat: {encoding.name}: the tokenizer lacks the tokens {', '.join(missing)}; "
                "set calibration.chat: auto"
            )
        if not missing and options.chat in ("auto", encoding.name):
            return Chat(encoding.name, partial(_encoded, encoding), takes_parts=True)
    return None


def _encoded(encoding: Encoding, messages: Messages, _: Tools | None) -> str:
    return encoding.render(messages)


def transcript() -> Chat:
    """The format `User: ...`, `Assistant: ...` on lines of their own, for tokenizers without a chat format."""

    def write(messages: Messages, _: Tools | None) -> str:
        return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages) + "\n"

    return Chat("plain", write)
