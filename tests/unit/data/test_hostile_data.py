"""Data sets, chat templates and tokenizers of strangers: bounded, never executed, and one documented error each."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pytest

from calibration.data import bounded, json_rows
from calibration.data import table as dataset
from calibration.data.batches import load_tokenizer
from calibration.data.bounded import Bounded, Exceeded
from recipes.errors import SourceError
from tests.calibration_sets import decoded, load, write_rows
from tests.models.tokenizer import write_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
GOOD = b'{"text": "a good line of text"}\n'
DIALOGUE = [{"role": "user", "content": "Hello"}]


def nested(depth: int) -> bytes:
    return b'{"text": "a", "x": ' + b"[" * depth + b"]" * depth + b"}\n"


TEMPLATES = {
    "loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "1 seconds of processor",
    ),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
    "multiplied": ("{{ 'x' * 10**10 }}", "MemoryError: more than"),
    "doubled": (
        "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "MemoryError: more than",
    ),
    "long": ("{{ 'x ' * 10**8 }}", "MemoryError: more than|ended with SIGABRT, as for want of memory"),
    "attribute": ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
    "mutation": ("{{ messages.append(1) }}", "SecurityError"),
    "globals": ("{{ raise_exception.__globals__.os }}", "SecurityError"),
    "include": ("{% include '/etc/hostname' %}", "no loader for this environment"),
    "import": ("{% import 'os' as os %}", "no loader for this environment"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
    "syntax": ("{% if %}", "TemplateSyntaxError"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_one_message(
    name: str, templated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, message = TEMPLATES[name]
    monkeypatch.setattr(bounded, "SECONDS", 1)
    monkeypatch.setattr(bounded, "MEMORY", 200 << 20)
    monkeypatch.setattr(templated, "chat_template", template)
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": DIALOGUE}])
    with pytest.raises(SourceError, match=f"row 1: chat: template cannot render it: .*({message})") as raised:
        load(templated, path)
    assert len(raised.value.problems) == 1 and "\n" not in str(raised.value)


def test_a_bounded_function_that_ends_its_process_is_started_again() -> None:
    def function(what: str) -> bytes:
        if what == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "exit":
            os._exit(3)
        if what == "panic":
            raise type("PanicException", (BaseException,), {})("of Rust")
        return what.encode() * (1 << 20 if what == "long" else 1)

    with Bounded(function) as call:
        assert call("one") == b"one"
        with pytest.raises(ValueError, match="PanicException: of Rust"):
            call("panic")
        with pytest.raises(Exceeded, match="its process ended with SIGSEGV"):
            call("die")
        with pytest.raises(Exceeded, match="its process ended with exit code 3"):
            call("exit")
        with pytest.raises(Exceeded, match="an answer of more than"):
            call("long")
        assert call("two") == b"two"
        process = call._process
        pid = process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_process_of_a_bounded_function_survives_no_parent() -> None:
    """Its end of the pipe must be the only one: else it would wait for ever, with the parent's locks open."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        call = Bounded(lambda: str(os.getpid()).encode())
        os.write(writing, call())
        os._exit(0)
    os.close(writing)
    os.waitpid(parent, 0)
    child = int(os.read(reading, 100))
    assert os.read(reading, 1) == b"", "the child holds the pipe open"  # returns once the child is gone
    os.close(reading)
    assert child != parent


FILES = {
    "latin1": (
        "x.jsonl",
        GOOD + '{"text": "caf\u00e9"}\n'.encode("latin-1"),
        r"x\.jsonl, line 2 is not UTF-8 .*latin1",
    ),
    "utf16": ("x.jsonl", GOOD.decode().encode("utf-16"), r"line 1 is not UTF-8 .*utf-16"),
    "utf16_without_mark": ("x.jsonl", GOOD.decode().encode("utf-16-le"), "UTF-16.* must be UTF-8"),
    "latin1_csv": ("x.csv", b"text\ncaf\xe9\n", r"x\.csv, line 2 is not UTF-8"),
    "latin1_txt": ("x.txt", b"caf\xe9\n", r"x\.txt, line 1 is not UTF-8"),
    "deep_last": ("x.jsonl", GOOD * 3 + nested(100_000), "line 4 is nested too deeply"),
    "deep_first": ("x.jsonl", nested(100_000) + GOOD, "line 1 is nested too deeply"),
    "deep_array": ("x.json", b"[" * 100_000, "nested too deeply"),
    "deep_behind_an_object": ("x.jsonl", GOOD[:-1] + nested(100_000), "is not JSON|nested"),
    "deep_over_lines": ("x.json", b'{"text": "a", "x":' + b"[\n" * 100_000 + b"]" * 100_000 + b"}", "nested"),
    "a_zip_by_another_name": (
        "x.jsonl",
        b"PK\x03\x04" + b"\0" * 30,
        r"x\.jsonl is compressed \(zip\); unpack it|is not JSON",
    ),
    "truncated_gz": ("x.jsonl.gz", b"\x1f\x8b1234", r"x\.jsonl\.gz cannot be read"),
    "ragged_csv": ("x.csv", b"text,b\na,b\na,b,c,d\n", "cannot be read: ParserError"),
    "half_a_pair": ("x.jsonl", GOOD + b'["a"]\n{"text": "\\ud800"}\n', "half of a surrogate pair|is no row"),
    "half_a_pair_alone": ("x.jsonl", GOOD + b'{"text": "\\ud800"}\n', "surrogate"),
    "a_number": ("x.jsonl", b"5\n", "line 1 is not a row but int"),
    "mixed": ("x.jsonl", GOOD + b'{"text": 5}\n', "row 2: column 'text' must be text, not int"),
    "a_dict": ("x.jsonl", b'{"text": {"a": 1}}\n', "column 'text' must be text, not dict"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_one_message(name: str, v4: Any, tmp_path: Path) -> None:
    file, content, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        load(v4, str(tmp_path / file), num_samples=8)


def test_a_file_that_expands_without_end_is_refused(v4: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "EXPANDED", 100_000)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * 1_000_000 + b'"}\n'))
    with pytest.raises(SourceError, match=r"expands to more than [0-9,]+ bytes, which text never does"):
        load(v4, str(path))
    path.write_bytes(gzip.compress(GOOD * 20))
    assert load(v4, str(path)).num_samples == 1


def test_what_is_read_whole_is_bounded(v4: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MOST_BYTES", 100)
    (tmp_path / "x.jsonl").write_text('["a message"]\n' * 100)
    with pytest.raises(SourceError, match="holds more than 0 MiB; make several files"):
        load(v4, str(tmp_path / "x.jsonl"))


def test_null_rows_do_not_end_the_process(v4: Any, tmp_path: Path) -> None:
    """pyarrow 26 ends it with SIGSEGV when the first row of a file is null."""
    (tmp_path / "x.jsonl").write_bytes(b"null\n" + GOOD + b" null \r\n")
    data = load(v4, str(tmp_path / "x.jsonl"), shuffle=False)
    assert decoded(v4, data) == ["a good line of text"] and "1 rows skipped" in data.description


def test_a_row_group_of_bytes_that_are_no_text(v4: Any, tmp_path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": broken}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=r"row 1 cannot be read: UnicodeDecodeError.*is it UTF-8"):
        load(v4, str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("kind", ["fifo", "fifo_inside", "device", "loop", "link_loop"])
def test_what_is_no_file_is_refused_before_it_is_opened(kind: str, v4: Any, tmp_path: Path) -> None:
    directory = tmp_path / "set"
    directory.mkdir()
    (directory / "train.jsonl").write_bytes(GOOD)
    path, message = directory / "x.jsonl", "not a regular file"
    if kind.startswith("fifo"):
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link_loop":
        path.symlink_to(path)
        message = "cannot be read"
    else:
        (directory / "again").symlink_to(directory)
        message = "links to a directory above it"
    with pytest.raises(SourceError, match=message):
        load(v4, str(directory if kind in ("fifo_inside", "loop") else path))


def test_a_directory_of_thousands_of_files(v4: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text("A text of one line.")
    assert load(v4, str(tmp_path), num_samples=300).num_samples == 300
    monkeypatch.setattr(dataset, "MAX_ENTRIES", 299)
    with pytest.raises(SourceError, match="more than 299 files"):
        load(v4, str(tmp_path))


def test_the_code_of_a_data_set_does_not_run(v4: Any, tmp_path: Path) -> None:
    directory = tmp_path / "scripted"
    directory.mkdir()
    proof = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(proof)!r}).touch()\n"
    for name in ("scripted.py", "train.py", "__init__.py", "dataset.py"):
        (directory / name).write_text(code)
    with pytest.raises(SourceError, match="Dataset scripts are no longer supported"):
        load(v4, str(directory))
    (directory / "scripted.py").unlink()
    (directory / "train.jsonl").write_bytes(GOOD)
    (directory / "README.md").write_text("---\ntrust_remote_code: true\nloading_script: train.py\n---\n")
    load(v4, str(directory))
    with pytest.raises(SourceError):
        load(v4, str(directory / "dataset.py"))
    assert not proof.exists()


@pytest.mark.parametrize("address", ["{outside}", "../outside.txt", "file://{outside}", "/dev/zero"])
def test_a_data_set_reads_no_file_outside_its_directory(address: str, v4: Any, tmp_path: Path) -> None:
    directory, outside = tmp_path / "set", tmp_path / "outside.txt"
    directory.mkdir()
    outside.write_text("a text of somebody else")
    (directory / "train.jsonl").write_bytes(GOOD)
    card = f"configs:\n- config_name: default\n  data_files: {address.format(outside=outside)}\n"
    (directory / "README.md").write_text(f"---\n{card}---\n")
    with pytest.raises(SourceError, match=r"which is not in the directory|Unable to find|doesn't match any"):
        load(v4, str(directory))
    (directory / "README.md").write_text(f"---\n{card.replace(address.format(outside=outside), 'train.jsonl')}---\n")
    assert decoded(v4, load(v4, str(directory))) == ["a good line of text"]


def test_a_column_that_would_be_fetched_is_refused(v4: Any, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [{"bytes": b"no image", "path": None}]})
    rows.cast_column("text", datasets.Image()).save_to_disk(tmp_path / "saved")
    with pytest.raises(SourceError, match="column 'text' holds Image, not text"):
        load(v4, str(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoConfig"])
def test_the_code_of_a_tokenizer_runs_only_with_the_recipe_s_word(name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 1024, chat_template=True)
    proof = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"from pathlib import Path\nPath({str(proof)!r}).touch()\nclass T: ...\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "own.T"}}))
    path = tmp_path / "tokenizer_config.json"
    own = {"AutoTokenizer": [None, "own.T"]} if name == "AutoTokenizer" else {"AutoConfig": "own.T"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Odd", "auto_map": own}))
    try:
        load_tokenizer(tmp_path, False)
    except SourceError as error:
        assert "the tokenizer cannot be loaded" in str(error)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("pattern", "text", "message"),
    [
        ("(a+)+$", "a" * 24 + "b", "PanicException: Onig: .*retry-limit-in-match over"),
        ("a*a*b", "a" * 3000 + "xb", "no end within 1 seconds of processor time"),
    ],
)
def test_a_regex_of_a_tokenizer_that_never_ends_is_one_message(
    pattern: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    write_tokenizer(tmp_path, 1024, chat_template=False)
    path = tmp_path / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split}))
    rows = write_rows(tmp_path / "x.jsonl", [{"text": text}])
    with pytest.raises(SourceError, match=f"the tokenizer cannot encode a text of .*{message}"):
        load(load_tokenizer(tmp_path, False), rows)


@pytest.mark.parametrize("id", [2**32 - 1, 2**24, -1, 1.5, "1", None])
@pytest.mark.parametrize("place", ["vocabulary", "added"])
def test_a_token_id_that_would_fill_the_memory_is_named(id: Any, place: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512, chat_template=False)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    if place == "added":
        content["added_tokens"][0]["id"] = id
    else:
        content["model"]["vocab"]["ab"] = id
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"tokenizer\.json: token .* has the id"):
        load_tokenizer(tmp_path, False)
