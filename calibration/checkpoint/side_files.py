"""Selects the files beside the weights that are copied from a source to its output. Only what the hub repository of a
finished model needs is listed; everything else (training states, other weight formats, a description of the source's
own quantization) is large, misleading or private."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from calibration.checkpoint.files import open_regular
from recipes.errors import SourceError, first_of

#: The files of a tokenizer.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "chat_template*")
#: Files at the top of a repository, lower case.
_KINDS = re.compile(
    r"generation_config\.json|configuration\.json"  # ModelScope's
    r"|tokenizer[\w.-]*|special_tokens_map\.json|added_tokens\.json|tekken\.json|vocab[\w.-]*\.(json|txt)|merges\.txt"
    r"|[\w.-]+\.(model|tiktoken|spm|bpe|vocab)|bpe\.codes"
    r"|chat_template[\w.-]*|[\w.-]+\.jinja"
    r"|[\w-]*processor_config\.json|(image|video|audio|feature)[\w-]*(processor|extractor)[\w-]*\.json"
    r"|[\w-]*licen[cs]e[\w.-]*|(notice|copying|copyright|use_policy|usage_policy|acceptable_use)[\w.-]*"
    r"|[\w.-]+\.(py|md)|requirements[\w-]*\.txt"
)
#: Directories that belong to a model, and the files copied from them: code and text.
_DIRECTORIES = ("encoding", "inference", "tokenizer", "processor", "chat_templates", "additional_chat_templates")
_TEXT = re.compile(r"[\w.-]+\.(py|md|json|jsonl|txt|jinja|model|tiktoken|yaml|yml|toml|sh)|license|notice")
#: Match the kinds above, but are never side files: weights, and descriptions of the source's weights.
_NEVER = re.compile(
    r"[\w.-]*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack|npz|partial)|.*\.index\.json|.*quant\w*_config\.json"
)
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class SideFiles:
    """`copied`: paths below the source, sorted. `left_out`: relative name -> why; a directory's name ends with a slash."""

    copied: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def side_files(directory: Path) -> SideFiles:
    """The side files of the checkpoint in `directory`. Each is opened once, so that an unreadable one is reported
    before anything is computed. Weights and their index, config.json, the model card, hidden files and caches are
    neither copied nor reported as left out. Raises SourceError that lists every file that cannot be read or is a link
    out of the source."""
    found, problems = SideFiles(), list[str]()
    for path, name, why in _candidates(directory):
        if why is None and (target := _leads_out(path, directory)) is not None:
            problems.append(
                f"{path}: is a link out of the source, to {target}, whose content the output would get; put the file itself "
                "there, or remove the link"
            )
            continue
        if why is None:
            try:
                with open_regular(path, "make it readable, or move it out of the source") as file:
                    size = os.fstat(file.fileno()).st_size
                    file.read(1)
            except SourceError as error:
                problems += error.problems
                continue
            except OSError as error:
                problems.append(f"{path}: cannot be read: {error.strerror}; move it out of the source")
                continue
            if size > _MAX_BYTES and not path.name.lower().startswith("tokenizer"):
                why = f"{size:,} bytes, more than the {_MAX_BYTES:,} of a side file"
        if why is None:
            found.copied.append(path)
        else:
            found.left_out[name] = why
    if problems:
        raise SourceError(first_of(problems))
    return found


def _candidates(directory: Path) -> Iterator[tuple[Path, str, str | None]]:
    """Yields (path, name relative to the source, why it is left out) for every file and directory to report."""
    for path in _entries(directory):
        name = path.name.lower()
        if path.is_dir():
            if name not in _DIRECTORIES or path.is_symlink():
                yield path, f"{path.name}/", "no directory of a finished model" if not path.is_symlink() else "a link"
                continue
            for below in _files(path):
                yield below, str(below.relative_to(directory)), _why_not(below, _TEXT)
        elif not name.endswith((".safetensors", ".safetensors.index.json")) and name not in (
            "config.json",
            "readme.md",
            "recipe.yaml",
        ):
            yield path, path.name, _why_not(path, _KINDS)


def _why_not(path: Path, kinds: re.Pattern[str]) -> str | None:
    name = path.name.lower()
    if kinds.fullmatch(name) and not _NEVER.fullmatch(name):
        return None
    quantization = "quant" in name and name.endswith("_config.json")
    return "describes the source's own quantization" if quantization else "no kind of side file"


def _leads_out(path: Path, source: Path) -> str | None:
    """The target of a link that is neither in the source nor, for a snapshot, in the hub's cache: a stranger's `LICENSE
    -> ~/.ssh/id_rsa` would be published with the output."""
    target, real = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    inside = target.is_relative_to(real) or (
        real.parent.name == "snapshots" and target.parent == real.parents[1] / "blobs"
    )
    return None if inside else str(target)


def _files(directory: Path) -> Iterator[Path]:
    """Yields every file below a directory, without following links."""
    left = [directory]
    while left:
        for path in _entries(left.pop()):
            if not path.is_dir():
                yield path
            elif not path.is_symlink():
                left.append(path)


def _entries(directory: Path) -> list[Path]:
    """The entries of a directory, sorted, except hidden files and caches. Raises SourceError if it cannot be read."""
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith((".", "__pycache__")))
    except OSError as error:
        raise SourceError(f"{directory}: cannot be read: {error.strerror}; check the permissions") from None
