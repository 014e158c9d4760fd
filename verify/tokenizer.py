"""Tokenizer and generation files: the source's, or, without a source, at least fitting the config."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import is_file, read_json_object, read_text
from recipes.errors import SourceError
from verify.checks import Check, verdict

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
#: A vocabulary is padded by a few percent at most; one much smaller than the embedding is another model's.
_SMALLEST_SHARE = 0.75


def tokenizer_check(directory: Path, config: dict[str, Any], source: Path | None) -> Check:
    """Against the source every file is byte-equal or means the same; alone, every token has a row of the embedding."""
    id, what = "structure.tokenizer", "tokenizer, chat template and generation settings are the source's"
    own, problems, doubts = _vocabulary(directory / "tokenizer.json"), list[str](), list[str]()
    rows = config.get("vocab_size")
    if own and isinstance(rows, int):
        largest = max(own.values())
        if largest >= rows:
            problems.append(f"tokenizer.json: token {largest} has no row in an embedding of vocab_size {rows}")
        elif largest + 1 < _SMALLEST_SHARE * rows and source is None:
            doubts.append(f"tokenizer.json: {largest + 1} tokens for vocab_size {rows}: another model's?")
    elif not own and (directory / "tokenizer.json").exists():
        problems.append("tokenizer.json: no vocabulary can be read from it")
    if source is None:
        if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            doubts.append("no tokenizer file")
        what = "the tokenizer fits the config"
        return verdict(id, what, problems, doubts, "tokenizer.json against config.json", f"{len(own)} tokens")
    equal = 0
    for name in _FILES:
        ours, theirs = directory / name, source / name
        if is_file(ours) and is_file(theirs) and filecmp.cmp(ours, theirs, shallow=False):
            equal += 1
        elif theirs.exists() or ours.exists():
            different = _difference(directory, source, name)
            (problems if different else doubts).append(f"{name}: {different or 'spelled otherwise, means the same'}")
    return verdict(id, what, problems, doubts, "files compared with the source's", f"{equal} files equal")


def _difference(directory: Path, source: Path, name: str) -> str | None:
    """How a file that is not byte-equal differs in meaning, None where it does not."""
    ours, theirs = _json(directory / name), _json(source / name)
    if name in ("tokenizer_config.json", "chat_template.jinja"):
        if _template(directory) != _template(source):
            return "another chat template"
        changed = _changed(_json(directory / "tokenizer_config.json"), _json(source / "tokenizer_config.json"),
                           ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token"))  # fmt: skip
        return changed
    if name == "tokenizer.json":
        if _vocabulary(directory / name) != _vocabulary(source / name):
            return "another vocabulary" if ours else "missing or not readable"
        return _changed(ours.get("model"), theirs.get("model"), ("type", "merges"))
    if name == "generation_config.json":
        return _changed(ours, theirs, set(ours) & set(theirs) - {"transformers_version"} | {"eos_token_id"})
    if not (source / name).exists():
        return None
    # What the older files say stands in tokenizer.json too.
    whole = bool(_vocabulary(directory / "tokenizer.json"))
    return None if whole and not (directory / name).exists() else "differs"


def _changed(ours: Any, theirs: Any, keys: Iterable[str]) -> str | None:
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return "missing or not readable"
    for key in sorted(keys):
        mine, other = _text(ours.get(key)), _text(theirs.get(key))
        if mine != other and theirs.get(key) is not None:
            return f"{key} is {mine!r:.60}, the source has {other!r:.60}"
    return None


def _text(value: Any) -> Any:
    """A token as text: some writers give it attributes; merges as pairs or joined."""
    if isinstance(value, dict) and "content" in value:
        return value["content"]
    if isinstance(value, list):
        return [" ".join(map(str, item)) if isinstance(item, list) else item for item in value]
    return value


def _template(directory: Path) -> Any:
    path = directory / "chat_template.jinja"
    with suppress(SourceError):
        return read_text(path, errors="replace").strip()
    template = _json(directory / "tokenizer_config.json").get("chat_template")
    return template.strip() if isinstance(template, str) else template


def _vocabulary(path: Path) -> dict[str, int]:
    """Token -> id, added tokens included; empty where the file holds none that can be read."""
    content = _json(path)
    model, found = content.get("model"), dict[str, int]()
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        found |= {str(token): id for token, id in vocabulary.items() if isinstance(id, int)}
    elif isinstance(vocabulary, list):
        found |= {str(entry[0]): id for id, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    added = content.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            found[str(entry.get("content"))] = entry["id"]
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, constants=True)
    except SourceError:
        return {}
