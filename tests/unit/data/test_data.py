"""Calibration data: the same recipe gives the same tokens, every format is read, every bad input is one clear message."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest
import torch

from calibration.data.batches import load_tokenizer
from calibration.data.table import BUNDLED, Table
from calibration.families.deepseek_v4_encoding import ASSISTANT, BEGIN, END, USER, render
from recipes.errors import RecipeError, SourceError
from tests.calibration_sets import decoded, load, token_rows, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
DIALOGUE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]
TEXTS = [f"Line {number} of a text that is long enough to be told apart." for number in range(40)]


def test_the_seed_decides_which_samples(v4: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    first = load(v4, path, num_samples=8, seed=1)
    again = load(v4, path, num_samples=8, seed=1, batch_size=3)
    other = load(v4, path, num_samples=8, seed=2)
    assert first.digest == again.digest != other.digest
    assert token_rows(first) == token_rows(again) == token_rows(first)
    unshuffled = load(v4, path, num_samples=8, shuffle=False)
    assert decoded(v4, unshuffled) == TEXTS[:8]
    assert set(decoded(v4, first)) < set(TEXTS) and decoded(v4, first) != TEXTS[:8]


def test_batches_hold_rows_of_one_length_and_no_padding(v4: Any, tmp_path: Path) -> None:
    texts = ["short", "a much longer text " * 20, "of middle length", "another longer text " * 20, "short"]
    path = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    data = load(v4, path, num_samples=5, max_seq_length=12, batch_size=2, shuffle=False)
    short, long, middle, longer, brief = expected = [v4(text).input_ids[:12] for text in texts]
    assert len(short) == len(brief) < len(middle) < len(long) == len(longer) == 12
    assert [batch["input_ids"].tolist() for batch in data.batches] == [[short, brief], [long, longer], [middle]]
    assert len(data.batches) == 3 and data.regrouped
    assert all(tensor.dtype == torch.int64 for batch in data.batches for tensor in batch.values())
    assert all(batch["attention_mask"].all() for batch in data.batches)
    assert data.num_samples == 5 and data.num_tokens == sum(map(len, expected))
    one = load(v4, path, num_samples=5, max_seq_length=12, batch_size=1, shuffle=False)
    assert token_rows(one) == expected and not one.regrouped and one.digest == data.digest


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "directory", "saved"])
def test_every_container_gives_the_same_tokens(kind: str, v4: Any, tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    path = tmp_path / f"texts.{kind}"
    if kind == "jsonl":
        write_rows(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        path.mkdir()
        write_rows(path / "train.jsonl", rows)
    data = load(v4, str(path), num_samples=len(TEXTS), shuffle=False)
    assert decoded(v4, data) == TEXTS


def test_a_book_is_cut_into_windows_that_join_to_the_whole(v4: Any, templated: Any, tmp_path: Path) -> None:
    book = "\n\n".join(TEXTS) + "\n"
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    tokens = v4(book).input_ids
    assert len(tokens) > 320
    data = load(v4, str(tmp_path / "book.txt"), num_samples=10, max_seq_length=32, shuffle=False)
    assert [token for row in token_rows(data) for token in row] == tokens[:320]
    opened = token_rows(load(templated, str(tmp_path / "book.txt"), num_samples=10, max_seq_length=32, shuffle=False))
    assert all(len(row) == 32 and row[0] == 0 for row in opened)
    assert [token for row in opened for token in row[1:]] == tokens[:310]
    one = load(v4, str(tmp_path / "book.txt"), num_samples=3, max_seq_length=32)
    assert not any(row in token_rows(data)[:3] for row in token_rows(one)[:1])


def test_a_long_book_loses_nothing_between_slices(v4: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.data.encoder.SLICE_CHARS", 100)
    book = "\n".join(TEXTS) + "x" * 250
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    data = load(v4, str(tmp_path / "book.txt"), num_samples=1, max_seq_length=10_000)
    assert decoded(v4, data) == [book]


def test_a_directory_of_books(v4: Any, tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for name in ("b", "a"):
        (tmp_path / "books" / f"{name}.txt").write_text(f"Book {name}. " + TEXTS[0], encoding="utf-8")
    data = load(v4, str(tmp_path / "books"), num_samples=2, shuffle=False)
    assert [text[:7] for text in decoded(v4, data)] == ["Book a.", "Book b."]


def test_messages_through_the_template_carry_one_bos(
    templated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": [SYSTEM, *DIALOGUE]}])
    data = load(templated, path)
    expected = f"{BEGIN}You are a helpful assistant.{USER}Hello{ASSISTANT}Hi there.{END}"
    assert decoded(templated, data) == [expected] and "chat: template" in data.description
    assert token_rows(data)[0].count(0) == 1
    with monkeypatch.context() as patch:
        patch.setattr(templated, "chat_template", templated.chat_template.replace("{{ bos_token }}", ""))
        assert decoded(templated, load(templated, path)) == [expected.removeprefix(BEGIN)]
    forced = load(templated, path, chat="deepseek_v4")
    assert decoded(templated, forced) == [expected.replace(ASSISTANT, ASSISTANT + "</think>")]


def test_text_that_spells_out_bos_carries_one(templated: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "texts.jsonl", [{"text": BEGIN + TEXTS[0]}, {"text": TEXTS[0]}])
    first, second = token_rows(load(templated, path, num_samples=2, shuffle=False))
    assert first == second and first.count(0) == 1


def test_messages_in_deepseek_v4_form(v4: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chat.jsonl", [{"conversations": DIALOGUE, "id": 7}])
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv4.py").write_text("raise SystemExit('executed')\n", encoding="utf-8")
    data = load(v4, path, source=tmp_path)
    assert decoded(v4, data) == [f"{BEGIN}{USER}Hello{ASSISTANT}</think>Hi there.{END}"]
    assert "chat: deepseek_v4" in data.description and "not executed" in data.description


def test_sharegpt_names_and_nulls_of_a_table(v4: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi there."}]},
        {"conversations": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]},
    ]
    path = tmp_path / "chat.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    first, second = decoded(v4, load(v4, str(path), num_samples=2, shuffle=False))
    assert first == second == f"{BEGIN}{USER}Hello{ASSISTANT}</think>Hi there.{END}"


def test_format_and_column_choose(v4: Any, tmp_path: Path) -> None:
    row = {"text": "From text.", "messages": DIALOGUE, "body": "From body.", "talk": DIALOGUE[:1]}
    path = write_rows(tmp_path / "both.jsonl", [row])

    def shown(**options: Any) -> str:
        return decoded(v4, load(v4, path, **options))[0]

    assert "Hi there." in shown()
    assert "Hi there." in shown(format="messages")
    assert shown(format="text") == "From text."
    assert shown(column="body") == "From body."
    assert shown(column="talk") == f"{BEGIN}{USER}Hello{ASSISTANT}</think>"


# The first expectation is the published golden output encoding/tests/test_output_2.txt of DeepSeek-V4-Flash; the others
# were rendered by vLLM 0.32's copy of the reference encoder.
RENDERED: list[tuple[list[dict[str, Any]], str]] = [
    (
        [
            SYSTEM,
            {"role": "user", "content": "Hello"},
            {
                "role": "assistant",
                "content": "Hi there! How can I help you?",
                "reasoning_content": "The user said hello, I should greet back.",
            },
            {"role": "user", "content": "What is the capital of France?"},
            {
                "role": "assistant",
                "content": "The capital of France is Paris.",
                "reasoning_content": "The user asks about the capital of France. It is Paris.",
            },
        ],
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>You are a helpful assistant.<\uff5cUser\uff5c>Hello"
        "<\uff5cAssistant\uff5c></think>Hi there! How can I help you?"
        "<\uff5cend\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>What is the capital of France?"
        "<\uff5cAssistant\uff5c><think>The user asks about the capital of France. It is Paris.</think>"
        "The capital of France is Paris.<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    (
        [{"role": "user", "content": "One"}, {"role": "user", "content": [{"type": "text", "text": "Two"}]}],
        "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>One\n\nTwo<\uff5cAssistant\uff5c></think>",
    ),
    (
        [
            SYSTEM,
            {"role": "developer", "content": "Answer in one word."},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Again?"},
            {"role": "assistant", "content": "Yes.", "reasoning": "Asked again."},
        ],
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>You are a helpful assistant.<\uff5cAssistant\uff5c></think>Yes."
        "<\uff5cend\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Again?<\uff5cAssistant\uff5c><think>Asked again.</think>Yes."
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    (
        [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "a", "function": {"name": "look", "arguments": '{"city": "Rome", "days": 2}'}},
                    {"id": "b", "function": {"name": "now", "arguments": {}}},
                ],
            },
            {"role": "tool", "tool_call_id": "b", "content": "noon"},
            {"role": "tool", "tool_call_id": "a", "content": "sun"},
        ],
        "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Weather?<\uff5cAssistant\uff5c></think>\n\n<\uff5cDSML\uff5ctool_calls>\n"
        '<\uff5cDSML\uff5cinvoke name="look">\n<\uff5cDSML\uff5cparameter name="city" string="true">Rome'
        "</\uff5cDSML\uff5cparameter>\n"
        '<\uff5cDSML\uff5cparameter name="days" string="false">2</\uff5cDSML\uff5cparameter>\n</\uff5cDSML\uff5cinvoke>\n'
        '<\uff5cDSML\uff5cinvoke name="now">\n\n</\uff5cDSML\uff5cinvoke>\n</\uff5cDSML\uff5ctool_calls>'
        "<\uff5cend\u2581of\u2581sentence\uff5c>"
        "<\uff5cUser\uff5c><tool_result>sun</tool_result>\n\n<tool_result>noon</tool_result><\uff5cAssistant\uff5c></think>",
    ),
]


@pytest.mark.parametrize(("messages", "expected"), RENDERED)
def test_deepseek_v4_rendering(messages: list[dict[str, Any]], expected: str) -> None:
    assert render(messages) == expected


def bundled_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]


def test_the_bundled_set_is_small_mixed_and_has_its_notice() -> None:
    rows = bundled_rows()
    kinds = Counter(row["kind"] for row in rows)
    assert BUNDLED.stat().st_size <= 600_000
    assert set(kinds) == {"prose", "code", "chat"} and min(kinds.values()) >= 20
    assert all(("messages" in row) == (row["kind"] == "chat") != ("text" in row) for row in rows)
    notice = (BUNDLED.parent / "NOTICE").read_text(encoding="utf-8")
    assert all(
        name in notice for name in ("brotli", "chatterbot-corpus", "Permission is hereby granted", "Redistribution")
    )
    everything = BUNDLED.read_text(encoding="utf-8")
    assert not any(kept_out in everything for kept_out in ("Bennet", "Netherfield", "Gutenberg"))


def test_the_bundled_set_gives_64_full_samples(v4: Any) -> None:
    data = load(v4, "bundled", num_samples=64, max_seq_length=2048)
    assert [len(row) for row in token_rows(data)] == [2048] * 64 and data.num_tokens == 64 * 2048


def test_every_bundled_row_is_closed_by_eos(v4: Any) -> None:
    rows = bundled_rows()
    whole = load(v4, "bundled", num_samples=1, max_seq_length=1_000_000, shuffle=False)
    parts = decoded(v4, whole)[0].split(END)
    answers = sum(m["role"] == "assistant" for row in rows for m in row.get("messages", []))
    assert parts[-1] == "" and len(parts) - 1 == answers + sum("text" in row for row in rows)
    assert parts[0] == rows[0]["text"]


def test_the_bundled_set_serves_a_tokenizer_without_chat(bare: Any) -> None:
    data = load(bare, "bundled", num_samples=4, max_seq_length=2048)
    assert "chat: plain" in data.description and any("Assistant: " in text for text in decoded(bare, data))


def test_rows_without_tokens_are_skipped_and_counted(v4: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "texts.jsonl", [{"text": ""}, {"text": "a"}, {"text": TEXTS[0]}, {"text": None}])
    data = load(v4, path, shuffle=False)
    assert decoded(v4, data) == [TEXTS[0]] and "2 rows skipped" in data.description
    fewer = load(v4, path, num_samples=2)
    assert fewer.digest == data.digest and fewer.num_samples == 1 and data.warning is None
    assert "2 samples of at most 128 tokens wanted (calibration.num_samples), 1 there, 3 rows" in fewer.warning
    with pytest.raises(SourceError, match=r"2 samples .* wanted .*, 1 there, 3 rows skipped.*num_samples: 1"):
        load(v4, path, num_samples=2, exact=True)
    empty = write_rows(tmp_path / "empty.jsonl", [{"text": ""}, {"text": None}])
    with pytest.raises(SourceError, match=r"1 samples .* wanted .*, 0 there, 2 rows skipped.*name a larger data set"):
        load(v4, empty)


BAD_FILES: list[tuple[str, str, dict[str, Any], str]] = [
    ("x.jsonl", '{"text": "one"}\n\n{"text": oops}\n', {}, r"x\.jsonl, line 3 is not JSON"),
    ("x.json", '[{"text": "one"},\n {"text": }]', {}, r"x\.json, line 2 is not JSON"),
    ("x.jsonl", "", {}, "is empty"),
    ("x.txt", "", {}, "is empty"),
    ("x.parquet", "no parquet", {}, "cannot be read: ArrowInvalid"),
    ("x.xlsx", "text\none\n", {}, r"must end in \.jsonl, .*\.txt, \.csv, .*not '\.xlsx'"),
    ("x.jsonl", '{"text": "one"}\n', {"split": "test"}, "calibration.split 'test'.*train"),
    ("x.jsonl", '{"prompt": "one", "id": 1}\n', {}, r"messages, .*text.*it has \['prompt', 'id'\]"),
    ("x.jsonl", '{"text": "one"}\n', {"column": "body"}, r"calibration.column 'body'.*it has \['text'\]"),
    ("x.jsonl", '{"text": "one"}\n', {"format": "messages"}, r"format: messages.*it has \['text'\]"),
    ("x.jsonl", '{"text": 5}\n', {}, "row 1: column 'text' must be text, not int"),
    ("x.jsonl", '{"messages": "one"}\n', {}, "column 'messages': must be a list of"),
    (
        "x.jsonl",
        '{"messages": [{"role": "wizard", "content": "a"}, {"role": "user", "content": 5}]}\n',
        {},
        "(?s)row 1, .*message 1 has role 'wizard'; roles are assistant, .*content of message 2 must be text",
    ),
    (
        "x.jsonl",
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
        {},
        r"row 1, .*content of message 1 has parts that are not text \(image\); remove",
    ),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD_FILES)
def test_a_bad_file_is_one_message(
    name: str, content: str, options: dict[str, Any], message: str, v4: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=message) as raised:
        load(v4, str(tmp_path / name), **options)
    assert "calibration." in str(raised.value) and "Traceback" not in str(raised.value)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("nowhere/data.jsonl", "no such file or directory"),
        ("./nowhere", "no such file or directory"),
        ("some-owner/some-data", "the hub cannot be reached.*set calibration.dataset: bundled"),
    ],
)
def test_a_data_set_that_is_not_there(dataset: str, message: str, v4: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=message) as raised:
        load(v4, dataset)
    assert len(raised.value.problems) == 1 and dataset in str(raised.value)


def test_a_chat_format_that_the_tokenizer_lacks(v4: Any, bare: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": DIALOGUE}])
    with pytest.raises(RecipeError, match=r"no chat template; set calibration\.chat: auto"):
        load(v4, path, chat="template")
    with pytest.raises(RecipeError, match=r"lacks the tokens <.User.>"):
        load(bare, path, chat="deepseek_v4")
    with pytest.raises(RecipeError, match=r"neither a chat template nor .*chat_template\.jinja"):
        load(bare, path)


def test_batches_need_no_pad_token(bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(
        tmp_path / "texts.jsonl",
        [{"text": text} for text in ("one of them", "two of them here", "all three of the same kind")],
    )
    monkeypatch.setattr(bare, "_special_tokens_map", {**bare._special_tokens_map, "pad_token": None, "eos_token": None})
    assert bare.pad_token_id is None and bare.eos_token_id is None
    data = load(bare, path, num_samples=3, batch_size=3)
    assert sorted(token_rows(data)) == sorted(token_rows(load(bare, path, num_samples=3, batch_size=1)))


@pytest.mark.parametrize("present", [False, True])
def test_a_tokenizer_that_cannot_be_loaded(present: bool, tmp_path: Path) -> None:
    if present:
        (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SourceError, match="tokenizer"):
        load_tokenizer(tmp_path if present else tmp_path / "nowhere", False)


def test_a_data_set_of_the_hub_names_its_commit_and_local_files_none() -> None:
    """As datasets 5.2 records the addresses of the files that it read."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    def table(addresses: list[str], files: list[Path] | None = None) -> Table:
        data = datasets.Dataset.from_dict({"text": ["x"]})
        data.info.download_checksums = {address: {} for address in addresses}
        return Table(data, "the data set", files)

    address = f"hf://datasets/some-org/rows@{commit}/data/train.parquet"
    assert table([address, address.replace("train", "test")]).revision == commit
    assert table([address], [Path("rows.jsonl")]).revision is None
    assert table([address, address.replace("0123", "4567")]).revision is None
    assert table(["https://example.org/x"]).revision is None and table([]).revision is None
