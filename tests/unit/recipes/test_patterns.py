"""Patterns of recipes and checkpoints: the meaning of `re.match`, and an end to those that take for ever."""

from __future__ import annotations

import re
import time

import pytest

from recipes import patterns
from recipes.patterns import Pattern, PatternError, TimeLimit

#: Backreferences keep `regex` from finding a shortcut.
SLOW = r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1[XY]"
NAME = "model.layers.0.self_attn.q_proj_and_more_letters"
NAMES = [NAME, "layers.3.ffn.experts.12.w1", "lm_head", "mtp.0.ffn.experts.0.w2", "LM_HEAD", "model.norm\n", "a{2}"]


@pytest.mark.parametrize(
    "text",
    [
        r"^layers\.\d+\.ffn\.experts\.\d+\.w[123]$",
        r".*mlp\.gate$",
        r"(?i)lm_head",
        r"layers",
        r".*(?<!\.gate)$",
        r"(?!mtp)",
        r"(?P<a>m).*(?P=a)",
        r"a\{2\}$",
        r"model\.norm$",
        r"(?>l)m_+head\Z",
        r"(?:.*\.)?layers\.(?:0|3)\.ffn\.experts\.\d+\.(?:gate_proj|w1)$",
    ],
)
def test_a_pattern_means_what_it_means_to_re(text: str) -> None:
    assert [Pattern(text).match(name) for name in NAMES] == [re.match(text, name) is not None for name in NAMES]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(", "does not compile"),
        (r"\p{L}+", "does not compile"),
        ("(?R)", "does not compile"),
        ("(?a)(?u)x", "does not compile"),
        ("(" * 5000 + ")" * 5000, "does not compile"),
        ("[[:alpha:]]", "does not compile"),
        ("(?:head){e<=1}", r"brace that is no repeat count; write \{"),
        ("a" * 20_001, "has 20,001 characters"),
    ],
    ids=range(8),
)
def test_what_re_and_regex_read_differently_is_refused(text: str, says: str) -> None:
    with pytest.raises(PatternError, match=re.escape(says)):
        Pattern(text)


def test_a_pattern_that_takes_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS_PER_MATCH", 0.02)
    started = time.process_time()
    with pytest.raises(PatternError, match=r"takes too long to match, more than 0.02 s for the name model\.layers"):
        Pattern(SLOW).match(NAME)
    assert time.process_time() - started < 5


def test_patterns_that_are_slow_together_are_stopped() -> None:
    limit = TimeLimit(0.01)
    slow = [Pattern(r"(.*)(.*)(.*)(.*)\1[XY]", limit) for _ in range(3)]
    with pytest.raises(PatternError, match="the patterns together"):
        for _ in range(100_000):
            for pattern in slow:
                pattern.match(NAME)
