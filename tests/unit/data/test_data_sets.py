"""Data sets as people have them: files, columns, roles and contents that mean the same give the same tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from calibration.data.rows import ROLE_ALIASES
from calibration.families.deepseek_v4_encoding import BEGIN
from recipes.errors import RecipeError, SourceError
from tests.calibration_sets import decoded, load, token_rows, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = [f"Line {number} of a text, with a comma." for number in range(3)]
ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "number,text\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate(TEXTS))
BOM = b"\xef\xbb\xbf"
PAIR = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

FILES: dict[str, tuple[str, bytes]] = {
    "lines": ("x.jsonl", LINES.encode()),
    "ndjson": ("x.ndjson", LINES.encode()),
    "upper_case": ("x.JSONL", LINES.encode()),
    "mark": ("x.jsonl", BOM + LINES.encode()),
    "lines_gz": ("x.jsonl.gz", gzip.compress(LINES.encode())),
    "array": ("x.json", json.dumps(ROWS).encode()),
    "array_gz": ("x.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "array_mark": ("x.json", BOM + json.dumps(ROWS, indent=1).encode()),
    "data_key": ("x.json", json.dumps({"version": "1.0", "data": ROWS}).encode()),
    "other_key": ("x.json", json.dumps({"examples": ROWS}, indent=2).encode()),
    "key_of_texts": ("x.json", json.dumps({"texts": TEXTS}).encode()),
    "texts": ("x.json", json.dumps(TEXTS, indent=1).encode()),
    "text_lines": ("x.jsonl", "".join(json.dumps(text) + "\n" for text in TEXTS).encode()),
    "mixed_lines": ("x.jsonl", (json.dumps(TEXTS[0]) + "\n" + "".join(map(json.dumps, ROWS[1:2])) + "\n"
                                + json.dumps(TEXTS[2])).encode()),
    "csv": ("x.csv", CSV.encode()),
    "csv_mark": ("x.csv", BOM + CSV.encode()),
    "csv_gz": ("x.csv.gz", gzip.compress(CSV.encode())),
    "tsv": ("x.tsv", ("id\ttext\n" + "".join(f"1\t{text}\n" for text in TEXTS)).encode()),
    "traces": ("x.jsonl", "".join(
        json.dumps({"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": None} | row) + "\n"
        for row in ROWS).encode()),
}  # fmt: skip


@pytest.mark.parametrize("form", FILES)
def test_every_form_of_a_file_gives_the_same_texts(form: str, v4: Any, tmp_path: Path) -> None:
    name, content = FILES[form]
    (tmp_path / name).write_bytes(content)
    assert decoded(v4, load(v4, str(tmp_path / name), num_samples=3, shuffle=False)) == TEXTS


def test_a_directory_of_compressed_lines(v4: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    assert decoded(v4, load(v4, str(tmp_path / "set"), num_samples=3, shuffle=False)) == TEXTS


PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    **{
        f"{question}_{answer}": ({question: "Why?", answer: "Because."}, PAIR)
        for question, answer in (
            ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"),
            ("instruction", "response"),
        )
    },
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}],
    ),
    "alpaca_without_input": ({"instruction": "Why?", "input": "", "output": "Because."}, PAIR),
    "orca": (
        {"system_prompt": "Be short.", "question": "Why?", "response": "Because."},
        [{"role": "system", "content": "Be short."}, *PAIR],
    ),
    "trl": ({"prompt": PAIR[:1], "completion": PAIR[1:]}, PAIR),
    "lines_of_messages": ({"messages": PAIR}, PAIR),
    "value": ({"conversations": [{"from": m["role"], "value": m["content"]} for m in PAIR]}, PAIR),
    "text": ({"messages": [{"role": m["role"], "text": m["content"]} for m in PAIR]}, PAIR),
    "upper_case": ({"messages": [{"role": m["role"].upper(), "content": m["content"]} for m in PAIR]}, PAIR),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}]},
        [{"role": "user", "content": "A\nB"}],
    ),
    "parts_of_both_kinds": (
        {"messages": [{"role": "user", "content": ["Why?"]}, {"role": "assistant", "content": "Because."}]}, PAIR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", PAIRS)
def test_every_form_of_a_conversation_gives_the_same_tokens(form: str, templated: Any, tmp_path: Path) -> None:
    row, messages = PAIRS[form]
    path = write_rows(tmp_path / "row.jsonl", [row])
    expected = write_rows(tmp_path / "expected.jsonl", [{"messages": messages}])
    assert load(templated, path).digest == load(templated, expected).digest


def test_a_list_of_messages_on_every_line(templated: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(PAIR) + "\n" for _ in range(3)))
    (tmp_path / "x.json").write_text(json.dumps([PAIR] * 3))
    (tmp_path / "one.json").write_text(json.dumps(PAIR))
    expected = load(templated, write_rows(tmp_path / "expected.jsonl", [{"messages": PAIR}] * 3), num_samples=3)
    for name in ("x.jsonl", "x.json"):
        assert load(templated, str(tmp_path / name), num_samples=3).digest == expected.digest


def test_a_text_and_a_list_of_parts_in_one_column(templated: Any, tmp_path: Path) -> None:
    """Arrow has no column of both; datasets keeps such values as JSON."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, PAIR[1]]
    path = write_rows(tmp_path / "x.jsonl", [{"messages": PAIR}, {"messages": parts}])
    first, second = token_rows(load(templated, path, num_samples=2, shuffle=False))
    assert first == second


def test_a_template_that_takes_parts_gets_them(templated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %}{% endfor %}"
    )
    path = write_rows(tmp_path / "x.jsonl", [PAIRS["parts"][0]])
    monkeypatch.setattr(templated, "chat_template", template.replace("|", ""))
    assert decoded(templated, load(templated, path)) == ["AB"]
    # This one writes a part otherwise than a text: nothing says that it means to.
    monkeypatch.setattr(templated, "chat_template", template)
    assert decoded(templated, load(templated, path)) == ["A\nB"]


@pytest.mark.parametrize("alias", [*ROLE_ALIASES, "User", " Assistant ", "SYSTEM"])
def test_a_role_of_another_name_is_the_role(alias: str, templated: Any, tmp_path: Path) -> None:
    role = ROLE_ALIASES.get(alias, alias.strip().lower())
    rows = [[*PAIR, {"role": name, "content": "More."}] for name in (alias, role)]
    path = write_rows(tmp_path / "x.jsonl", [{"messages": row} for row in rows])
    first, second = token_rows(load(templated, path, num_samples=2, shuffle=False))
    assert first == second


def test_unknown_roles_are_counted_over_the_rows(v4: Any, tmp_path: Path) -> None:
    rows = [[{"role": role, "content": "a"}] for role in ("user", "wizard", "wizard", "judge", "user")]
    path = write_rows(tmp_path / "x.jsonl", [{"messages": row} for row in rows])
    with pytest.raises(SourceError, match=r"3 of 5 rows have unknown roles: 'wizard' \(2\), 'judge' \(1\)"):
        load(v4, path, num_samples=5)


@pytest.mark.parametrize("form", ["list", "text", "one"])
def test_tools_reach_the_template(form: str, templated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templated, "chat_template", "{{ tools | tojson }}")
    tools: Any = {"list": [TOOL], "text": json.dumps([TOOL]), "one": TOOL}[form]
    rows = [{"messages": PAIR, "tools": tools}, {"messages": PAIR, "tools": None}]
    data = load(templated, write_rows(tmp_path / "x.jsonl", rows), num_samples=2, shuffle=False)
    assert [json.loads(text) for text in decoded(templated, data)] == [[TOOL], None]
    assert "tools from 'tools'" in data.description


def test_tools_that_the_chat_does_not_write_are_said(v4: Any, tmp_path: Path) -> None:
    row = {"messages": PAIR}
    without = load(v4, write_rows(tmp_path / "without.jsonl", [row]))
    data = load(v4, write_rows(tmp_path / "with.jsonl", [row | {"tools": [TOOL]}]))
    assert data.digest == without.digest and "tools left out: chat: deepseek_v4 writes none" in data.description


def test_pairs_are_joined_without_a_chat_format_or_by_word_of_the_recipe(
    bare: Any, templated: Any, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "Why?", "response": "Because."}])
    data = load(bare, path)
    assert decoded(bare, data) == ["Why?\n\nBecause."] and "joined as text" in data.description
    assert decoded(templated, load(templated, path, format="text")) == [BEGIN + "Why?\n\nBecause."]
    with pytest.raises(RecipeError, match="holds messages, and the tokenizer has neither a chat template"):
        load(bare, path, format="messages")


def test_token_ids_are_used_as_they_are(v4: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(5, 60))}, {"input_ids": [7, 8, 9, 2, 2], "attention_mask": [1, 1, 1, 0, 0]}]
    data = load(v4, write_rows(tmp_path / "x.jsonl", rows), num_samples=2, max_seq_length=20, shuffle=False)
    assert token_rows(data) == [list(range(5, 25)), [7, 8, 9]]
    assert "token ids from 'input_ids'" in data.description
    (tmp_path / "x.json").write_text("[[5, 6, 7], [8, 9]]")
    assert token_rows(load(v4, str(tmp_path / "x.json"), num_samples=2, shuffle=False)) == [[5, 6, 7], [8, 9]]
    path = write_rows(tmp_path / "named.jsonl", [{"tokens": [3, 4, 5]}])
    assert token_rows(load(v4, path, column="tokens")) == [[3, 4, 5]]


def test_the_description_names_columns_and_uses(templated: Any, tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    data = load(templated, write_rows(tmp_path / "x.jsonl", [row]))
    assert "columns: user from 'instruction', context from 'input', assistant from 'output'" in data.description


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "image": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "audio"}]}
            ]
        },
        r"row 1, .*content of message 1 has parts that are not text \(image, audio\)",
    ),
    "content": ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content of message 1 must be text or a list"),
    "pair": ({"prompt": 5, "response": "a"}, "row 1: column 'prompt' must be text, not int"),
    "ids": ({"input_ids": [1, -1]}, "column 'input_ids' must be a list of token ids"),
    "float_ids": ({"input_ids": [1.5, 2]}, "column 'input_ids' must be a list of token ids"),
    "mask": ({"input_ids": [1, 2], "attention_mask": [1]}, "one entry per token"),
    "tools": ({"messages": PAIR, "tools": "[{"}, "row 1: column 'tools' is not JSON"),
    "tools_of_numbers": ({"messages": PAIR, "tools": [1]}, "column 'tools' must be a list of tools"),
    "dict": ({"text": {"en": "a", "de": "b"}}, "column 'text' must be text, not dict"),
    "unknown": ({"body": "a", "title": "b"}, r"no pair of prompt/.* with response/.*it has \['body', 'title'\]"),
    "two_lists": ({"train": [{"text": "a"}], "test": [{"text": "b"}]}, r"it has \['train', 'test'\]"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_message(name: str, templated: Any, tmp_path: Path) -> None:
    row, message = BAD_ROWS[name]
    path = write_rows(tmp_path / "x.jsonl", [row])
    with pytest.raises(SourceError, match=message) as raised:
        load(templated, path)
    assert len(raised.value.problems) == 1


@pytest.mark.parametrize("role", [["user"], {"a": 1}, 5])
def test_a_role_that_is_no_text_is_named(role: Any, templated: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"messages": [{"role": role, "content": "a"}]}])
    with pytest.raises(SourceError, match=r"message 1 has role .*; roles are"):
        load(templated, path)


def test_a_message_about_a_row_is_short_whatever_the_row_holds(templated: Any, tmp_path: Path) -> None:
    long = "z" * 100_000
    for row in (
        {"messages": [{"role": long, "content": ""}] * 50},
        {"messages": [{"role": "user", "content": [{"type": long}]}] * 50},
        {long: "a"},
        {"messages": PAIR, "tools": "[" + long},
    ):
        path = write_rows(tmp_path / "x.jsonl", [row])
        with pytest.raises(SourceError) as raised:
            load(templated, path)
        assert len(str(raised.value)) < 4000 and len(raised.value.problems) <= 7


def test_a_token_without_a_row_of_the_embedding_is_named(v4: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"input_ids": [5, 511]}])
    rows = {"vocab_size in config.json": 512, "embed.weight in a.safetensors": 512}
    assert load(v4, path, embedding=rows).num_samples == 1
    with pytest.raises(
        SourceError, match=r"token 511 .* has no row .*: embed\.weight in a\.safetensors has 511 rows; .*1,024 tokens"
    ):
        load(v4, path, embedding=rows | {"embed.weight in a.safetensors": 511})
