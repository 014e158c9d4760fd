"""Checks the token ids of a tokenizer.json before the tokenizers library reads it: when the library writes a
vocabulary, it allocates four bytes for every id below the largest one, and aborts the process if that fails (tokenizers
0.23, OrderedVocabIter)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import is_file, read_json_object
from recipes.errors import SourceError, first_of

#: Largest id that is accepted; the largest vocabularies have about 260,000 tokens.
MAX_TOKEN_ID = (1 << 24) - 1


def check_token_ids(directory: Path) -> None:
    """Raises SourceError if the tokenizer.json of a checkpoint is not a JSON object or has an impossible token id."""
    path = directory / "tokenizer.json"
    if not is_file(path):
        return
    problems = token_id_problems(read_json_object(path))
    if problems:
        raise SourceError([f"{path}: {problem}; get a whole copy" for problem in first_of(problems, 20)])


def token_id_problems(content: dict[str, Any]) -> list[str]:
    """One problem for each token with an impossible id in the content of a tokenizer.json."""
    return [
        f"token {token!r:.80} has the id {id!r:.80}, whole numbers from 0 to {MAX_TOKEN_ID:,} are allowed"
        for token, id in _numbered(content)
        if type(id) is not int or not 0 <= id <= MAX_TOKEN_ID
    ]


def _numbered(content: dict[str, Any]) -> Iterator[tuple[object, object]]:
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict):
            yield entry.get("content"), entry.get("id")
