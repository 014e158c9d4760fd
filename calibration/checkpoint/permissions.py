"""Finds what the files of a checkpoint ask a library to do beyond reading them: run code, download something, open
another path.

A checkpoint is a stranger: it may ask, but it cannot grant permissions. Code runs only if the recipe or the command
line allows it; downloads and paths outside the checkpoint are never followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from calibration.checkpoint.files import read_json
from recipes.errors import SourceError

#: The JSON files that transformers and vLLM read from a checkpoint's directory.
_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
#: Keys whose value may be `owner/name`: transformers then downloads a compute kernel and runs it
#: (modeling_utils.py, integrations/hub_kernels.py, 5.17).
_KERNELS = frozenset(
    f"{prefix}{what}_implementation{suffix}"
    for what in ("attn", "experts")
    for prefix in ("", "_")
    for suffix in ("", "_internal")
)


@dataclass(frozen=True)
class Request:
    """One request of `file`: `code` runs only if it is trusted; `fetch` and `path` are never followed."""

    file: str
    key: str
    value: str
    kind: Literal["code", "fetch", "path"]

    def __str__(self) -> str:
        asks = {"code": "names code to run", "fetch": "names something to download", "path": "names a file outside"}
        return f"{self.file}: {self.key}: {asks[self.kind]}, {self.value[:80]!r}"


def requests(directory: Path) -> list[Request]:
    """All requests in the JSON files of a checkpoint, in the order of the files. A file that is not JSON has none:
    whatever needs the file reports it."""
    found: list[Request] = []
    for name in _FILES:
        path = directory / name
        if not path.exists():
            continue
        try:
            content = read_json(path)
        except SourceError:
            continue
        found += _walk(name, "", content)
    return found


def refuse_outside(directory: Path) -> None:
    """Raises SourceError that lists every path outside the checkpoint that a file of the checkpoint names."""
    problems = [f"{directory}/{request}" for request in requests(directory) if request.kind == "path"]
    if problems:
        raise SourceError([*problems, "Remedy: remove these keys; a checkpoint holds all that it needs"])


def without_choices(config: Any) -> Any:
    """A config without the keys, at any depth, that choose the code of a layer: they may name a download."""
    if isinstance(config, dict):
        return {key: without_choices(inner) for key, inner in config.items() if key not in _KERNELS}
    return [without_choices(item) for item in config] if isinstance(config, list) else config


def _walk(file: str, at: str, value: Any) -> Iterator[Request]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, dict | list):
                yield from _walk(file, f"{at}.{number}" if at else str(number), item)
    elif isinstance(value, dict):
        for key, inner in value.items():
            place = f"{at}.{key}" if at else str(key)
            kind = _kind(str(key), inner)
            if kind is not None:
                yield Request(file, place, str(inner), kind)
            elif isinstance(inner, dict | list):
                yield from _walk(file, place, inner)


def _kind(key: str, value: Any) -> Literal["code", "fetch", "path"] | None:
    if key in ("auto_map", "custom_generate", "custom_pipelines") and value:
        return "code"
    if key in _KERNELS and "/" in str(value):
        return "fetch"
    if key.endswith(("_file", "_path")) and isinstance(value, str) and not key.endswith("name_or_path"):
        path = PurePosixPath(value)
        return "path" if path.is_absolute() or ".." in path.parts else None
    return None
