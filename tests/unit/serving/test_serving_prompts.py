"""Prompts inside vLLM's interpreter: the chat template of a stranger, bounded in time, memory and length."""

from __future__ import annotations

import resource
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from verify.inside_vllm import prompts as vllm_prompts


class _Tokenizer:
    """What the worker needs of a tokenizer; templates are rendered as transformers does it."""

    def __init__(self, template: str) -> None:
        self.template = template

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(render_jinja_template([messages], chat_template=self.template)[0][0])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("template", "skipped"),
    [
        ("{{ messages[0].content }}", None),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 1 seconds",
        ),
        ("{{ 'x' * 10**10 }}", "takes more than 1024 MiB of memory"),
        ("{{ 'x' * 10**7 }}", "writes more than 4,194,304 characters"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ raise_exception('') }}", "no chat template: TemplateError"),
    ],
)
def test_a_hostile_chat_template_skips_its_prompt_and_the_engine_goes_on(
    template: str, skipped: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_prompts, "TEMPLATE_SECONDS", 1)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    llm = SimpleNamespace(get_tokenizer=lambda: _Tokenizer(template))
    config = SimpleNamespace(skip_tokenizer_init=False, get_vocab_size=lambda: 256)
    prompts = [{"kind": "chat", "messages": [{"role": "user", "content": "hi"}]}, {"kind": "short", "text": "yes"}]
    request = {"max_model_len": 64, "max_tokens": 8, "seed": 1, "prompts": prompts}
    chat, short = vllm_prompts.tokenize(llm, request, config)
    assert short["token_ids"] == [121, 101, 115]
    if skipped is None:
        assert chat["token_ids"] == [104, 105] and chat["skipped"] is None
    else:
        assert skipped in chat["skipped"] and chat["token_ids"] == []
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_prompt_of_the_recipe_is_skipped_with_its_length_rather_than_cut() -> None:
    llm = SimpleNamespace(get_tokenizer=lambda: _Tokenizer(""))
    config = SimpleNamespace(skip_tokenizer_init=False, get_vocab_size=lambda: 256)
    prompts = [{"kind": kind, "text": "x" * 57} for kind in ("long", "recipe 1", "recipe 2")]
    prompts[2]["text"] = "y" * 56
    request = {"max_model_len": 64, "max_tokens": 8, "seed": 1, "prompts": prompts}
    built_in, long, fits = vllm_prompts.tokenize(llm, request, config)
    assert len(built_in["token_ids"]) == len(fits["token_ids"]) == 56
    assert long["token_ids"] == [] and long["skipped"] == "57 tokens, verify.serving.max_model_len leaves 56"
