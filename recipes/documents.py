"""Reads untrusted YAML documents within bounds, and accepts only spellings that have the same meaning in every YAML
version.

PyYAML reads YAML 1.1, in which `1:30` is 90, `010` is 8 and `no` is false. It also calls Python constructors for tags,
and expands an alias at every use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent

from recipes.errors import RecipeError
from recipes.files import open_regular

Location = tuple[int | str, ...]

#: Largest document. The shipped recipes take about 2 KB; PyYAML reads about 50 KB of numbers per second.
MAX_BYTES = 512 * 1024
MAX_DEPTH = 40
#: Maximum number of values, counted with every alias expanded.
MAX_VALUES = 100_000
_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "int": re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    "float": re.compile(r"[-+]?[0-9]*\.[0-9]*([eE][-+]?[0-9]+)?"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
}
_WRITE = {
    "int": "is no plain number in YAML; write it in decimal digits, such as 8 or 1000",
    "float": "must be a finite number; write it in decimal digits with a point, such as 1000.0",
    "bool": "is no plain truth value in YAML; write true or false",
}
# C0 and C1 except tab and line ends, DEL, and halves of surrogate pairs, which UTF-8 cannot encode.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """A YAML document: its nodes (for line numbers), its data, and `problems` as (line, key path, problem)."""

    root: yaml.Node | None
    data: Any
    problems: list[tuple[int, str, str]]


class _Loader(yaml.SafeLoader):
    """A SafeLoader that limits the depth and refuses tags."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if not isinstance(event, AliasEvent) and event.tag is not None:
            shown = event.tag.replace(_TAG, "!!")
            raise yaml.MarkedYAMLError(
                None, None, f"the tag {shown} is not taken, write the value alone, text in quotes", event.start_mark
            )
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested more than {MAX_DEPTH} deep", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def parse(text: str) -> Document:
    """The document in `text`. Raises yaml.YAMLError with a one-line message if it cannot be read."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Document(None, None, [])
        if _size(root, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"holds more than {MAX_VALUES:,} values once its aliases are written out")
        # Checked before merge keys are resolved, which edits the nodes.
        problems = list(_problems(root, (), set()))
        return Document(root, loader.construct_document(root), problems)
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML's constructors raise any exception of Python's conversions
        raise yaml.YAMLError(str(error) or type(error).__name__) from None
    finally:
        loader.dispose()


def read(path: Path, what: str = "recipe") -> Document:
    """The document in a UTF-8 file. Raises RecipeError if the file cannot be read or is not YAML."""
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such {what} file; the shipped ones are listed in recipes/README.md") from None
    except OSError as error:
        shown = str(path) if str(path).isprintable() else repr(str(path))
        raise RecipeError(f"{shown}: cannot be read ({error.strerror}); give a readable YAML file") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            f"{path}: holds more than {MAX_BYTES:,} bytes, the most that a {what} takes; is it the right file?"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: must be UTF-8, byte {error.start} is 0x{raw[error.start]:02x}; save the file as UTF-8"
        ) from None
    try:
        return parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        written = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
        if "\t" in written[: len(written) - len(written.lstrip())] or "'\\t'" in str(error.problem):
            raise RecipeError(f"{path}:{line}: has a tab; YAML is indented with spaces, replace it") from None
        context = f"{error.context}: " if error.context else ""
        raise RecipeError(
            f"{path}:{line}: is not valid YAML ({context}{error.problem}); see {written.strip()[:120]!r}"
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not valid YAML ({str(error).splitlines()[0]}); correct the file") from None


def dotted(location: Location) -> str:
    """A location in a document as `a.b.0`, safe to print."""
    return ".".join(str(p) if str(p).isprintable() else ascii(str(p))[1:-1] for p in location) or "the recipe"


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """The number of values in a node, counting the target of an alias at every use; a node inside itself counts 1."""
    if id(node) not in sizes:
        sizes[id(node)] = 1
        if isinstance(node, yaml.CollectionNode):
            children = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
            sizes[id(node)] += sum(_size(child, sizes) for child in children)
    return sizes[id(node)]


def _problems(node: yaml.Node, at: Location, seen: set[int]) -> Iterator[tuple[int, str, str]]:
    # An alias is the same node object, and may contain itself.
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            yield from _problems(entry, (*at, index), seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in first:
                yield line, dotted((*at, name)), f"is given twice, first in line {first[name]}; remove one of the two"
            first.setdefault(name, line)
            yield from _problems(key, (*at, name), seen)
            yield from _problems(value, (*at, name), seen)
    elif problem := _scalar_problem(node):
        yield node.start_mark.line + 1, dotted(at), problem


def _scalar_problem(node: yaml.Node) -> str | None:
    kind = node.tag.removeprefix(_TAG)
    if kind in _PLAIN and not _PLAIN[kind].fullmatch(node.value):
        return f"{node.value[:40]} {_WRITE[kind]}, or put it in quotes if it is text"
    if found := _CONTROL.search(node.value):
        return f"holds the control character {found[0]!a}; remove it"
    return None
