"""DeepSeek-V4's chat format, for which its tokenizer has no template.

An independent implementation of the public format of `encoding/encoding_dsv4.py` in the hub repositories
DeepSeek-V4-Flash and -Pro, which vLLM contains as `vllm/tokenizers/deepseek_v4_encoding.py`. It equals that file's
`encode_messages` for the roles below, without a reasoning-effort preface. The copy in a checkpoint is never executed: a
source is data.

    BOS {system} <User> {content} <Assistant> </think> {content} EOS                         a plain answer
    BOS {system} <User> {content} <Assistant> <think> {reasoning} </think> {content} EOS     an answer with reasoning

(without the blanks). As in vLLM, reasoning before the last user message is dropped. Tool schemas, response formats,
images and internal tasks are not rendered, because a calibration set does not use them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from calibration.families.encoding import ROLES, Encoding

BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
THINK = "<think>"
END_THINK = "</think>"
SPECIAL_TOKENS = frozenset({BEGIN, END, USER, ASSISTANT, THINK, END_THINK})

DSML = "\uff5cDSML\uff5c"
"""Opens the tags of tool calls."""


def render(messages: Sequence[Mapping[str, Any]]) -> str:
    """The conversation as one string, beginning with BOS.

    A message is {role, content}, with a role in ROLES; an assistant's message may have `reasoning_content` (or
    `reasoning`) and `tool_calls` in OpenAI's form. The conversation is in thinking mode if its last answer has
    reasoning. Raises ValueError for another role, a key that is not rendered, and content that is not text.
    """
    turns = _turns(messages)
    last_user = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    thinking = any(turn["reasoning"] for turn in turns[last_user + 1 :])
    if thinking:  # the reference drops a developer's earlier instructions together with the earlier reasoning
        kept = [turn for i, turn in enumerate(turns) if i >= last_user or not turn["developer"]]
        last_user -= len(turns) - len(kept)
        turns = kept
    parts = [BEGIN]
    for index, turn in enumerate(turns):
        following = turns[index + 1]["role"] if index + 1 < len(turns) else None
        if turn["role"] == "assistant":
            reasoning = turn["reasoning"] + END_THINK if thinking and index > last_user else ""
            parts += [reasoning, turn["content"], turn["calls"], END]
            continue
        parts += [USER if turn["role"] == "user" else "", turn["content"]]
        if following in (None, "assistant"):
            parts += [ASSISTANT, THINK if thinking and index >= last_user else END_THINK]
    return "".join(parts)


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checks the messages; joins tool results and consecutive user messages into one user turn."""
    turns: list[dict[str, Any]] = []
    joinable = False
    order: dict[str, int] = {}
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"role {role!r} is none of {', '.join(sorted(ROLES))}")
        for key in ("tools", "response_format", "task"):
            if message.get(key):
                raise ValueError(f"key {key!r} of a {role} message is not rendered by chat: deepseek_v4")
        content = _text(message.get("content"))
        if role in ("user", "tool"):
            call = order.get(message.get("tool_call_id", ""), 0) if role == "tool" else None
            piece = (call, f"<tool_result>{content}</tool_result>" if role == "tool" else content)
            if joinable:
                turns[-1]["pieces"].append(piece)
            else:
                turns.append({"role": "user", "pieces": [piece], "reasoning": "", "calls": "", "developer": False})
            joinable = True
            continue
        joinable = False
        calls = message.get("tool_calls") or []
        if role == "assistant" and calls:
            order = {call["id"]: position for position, call in enumerate(calls) if call.get("id")}
        turns.append(
            {
                "role": "user" if role == "developer" else role,
                "content": content,
                "reasoning": _text(message.get("reasoning_content") or message.get("reasoning")),
                "calls": _tool_calls(calls),
                "developer": role == "developer",
            }
        )
    for turn in turns:
        if "pieces" in turn:
            turn["content"] = "\n\n".join(_in_call_order(turn.pop("pieces")))
    return turns


def _in_call_order(pieces: list[tuple[int | None, str]]) -> list[str]:
    """Sorts tool results in the order of the calls they answer; text keeps its place."""
    results = iter(sorted((piece for piece in pieces if piece[0] is not None), key=lambda piece: piece[0] or 0))
    return [text if call is None else next(results)[1] for call, text in pieces]


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(b, Mapping) and b.get("type") == "text" for b in content):
        return "\n\n".join(str(block.get("text", "")) for block in content)
    raise ValueError(f"content must be text or a list of text blocks, not {type(content).__name__}")


def _tool_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    if not calls:
        return ""
    return f"\n\n<{DSML}tool_calls>\n" + "\n".join(_invoke(call) for call in calls) + f"\n</{DSML}tool_calls>"


def _invoke(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    if not isinstance(function, Mapping) or "name" not in function:
        raise ValueError("a tool call must have a function with a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"arguments of tool call {function['name']!r} must be an object")
    lines = []
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        kind = "true" if isinstance(value, str) else "false"
        lines.append(f'<{DSML}parameter name="{key}" string="{kind}">{text}</{DSML}parameter>')
    return f'<{DSML}invoke name="{function["name"]}">\n' + "\n".join(lines) + f"\n</{DSML}invoke>"


ENCODING = Encoding("deepseek_v4", "DeepSeek-V4", SPECIAL_TOKENS, render, shipped="encoding/encoding_dsv4.py")
