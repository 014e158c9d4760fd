"""Types shared by the recipe models: targets, preset schemes, byte sizes, paths, and the base of every section."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, JsonValue, WithJsonSchema

from recipes.patterns import Pattern, PatternError
from recipes.schemes import ARGUMENTS, OBSERVERS, OWN_OBSERVERS, is_observer, is_own_observer

# Preset names of compressed-tensors (quant_scheme.PRESET_SCHEMES) without UNQUANTIZED: modules to leave unquantized are
# simply not targeted. Those in `recipes.schemes` can be written; the others are refused by name.
PRESET_SCHEMES = (
    *("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
    *("W8A8", "INT8", "W4AFP8", "W4A16_ASYM", "W2A4", "W2A8", "W2A16", "W3A4", "W3A8", "W3A16", "W4A4", "W4A8"),
    *("W4A16", "W5A8", "W5A16", "W6A8", "W6A16", "W7A8", "W7A16", "W8A16"),
)

_REGEX_SIGNS = re.compile(r"[\\^$*+?()\[\]|{}]")
_BYTES = re.compile(r"\d+(\.\d+)?\s*([KMGTP]i?)?B?", re.IGNORECASE)
_SMALLEST_SIZE = 64 * 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# Linux allows 255 and 4,095 bytes; a run appends `.run`, `.partial` and file names of its own.
_LONGEST_NAME, _LONGEST_PATH = 240, 3_800
_GROUP_NAME = re.compile(r"[A-Za-z0-9_.-][A-Za-z0-9_. -]{0,63}")
#: The name of the config group for the source's FP8 tiles that the output keeps.
KEPT_FP8 = "kept_fp8"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: `; did you mean 'x'? Known: ...` or `; known: ...`."""
    by_lower = {name.lower(): name for name in known}
    match = get_close_matches(word.lower(), list(by_lower), n=1)
    names = ", ".join(by_lower.values())
    return f"; did you mean {by_lower[match[0]]!r}? Known: {names}" if match else f"; known: {names}"


def _check_target(target: str) -> str:
    if target.startswith("re:"):
        try:
            Pattern(target.removeprefix("re:"))
        except PatternError as error:
            raise ValueError(f"must be a regular expression that compiles after 're:'; {error}") from None
        if target == "re:":
            raise ValueError("must not be an empty regular expression, it would match every module")
    elif _REGEX_SIGNS.search(target):
        raise ValueError("looks like a regular expression and must then begin with 're:'")
    return target


def _check_scheme(name: str) -> str:
    if name.upper() not in ARGUMENTS:
        known = "is not one this project can write and verify; use one of " + ", ".join(ARGUMENTS)
        raise ValueError(known if name.upper() in PRESET_SCHEMES else f"is no scheme{did_you_mean(name, ARGUMENTS)}")
    return name.upper()


def _check_observer(name: str) -> str:
    if not is_observer(name):
        raise ValueError(f"is no observer of llm-compressor{did_you_mean(name, (*OBSERVERS, *OWN_OBSERVERS))}")
    return name


def _check_not_of_weights(name: str) -> str:
    if is_own_observer(name):
        raise ValueError("chooses group scales of weights, and those of inputs are computed during serving; remove it")
    return name


def _check_byte_text(value: object) -> object:
    # ByteSize itself reads '5GB, or so' as 5GB, and accepts bits.
    if isinstance(value, str) and not _BYTES.fullmatch(value.strip()):
        raise ValueError("must be a number of bytes, or text such as 500MB, 5GB, 500GiB")
    return value


def _check_byte_size(size: ByteSize) -> ByteSize:
    if size < _SMALLEST_SIZE:
        raise ValueError(f"must be at least 64KiB; {int(size)} bytes looks like a forgotten unit (5GB, 500GiB)")
    return size


def _check_path(path: str) -> str:
    if found := _CONTROL.search(path):
        raise ValueError(f"must not hold the control character {found[0]!a}; correct the path")
    if len(os.fsencode(path)) > _LONGEST_PATH or max(map(len, os.fsencode(path).split(b"/"))) > _LONGEST_NAME:
        raise ValueError(
            f"is longer than a path may be ({_LONGEST_NAME} bytes per name, {_LONGEST_PATH:,} in all); shorten it"
        )
    return os.path.expanduser(path)


def _check_group_name(name: str) -> str:
    if not _GROUP_NAME.fullmatch(name):
        raise ValueError("must be a name of at most 64 letters, digits, '_', '-', '.' and spaces; rename the group")
    if name == KEPT_FP8:
        raise ValueError("is the name of the group of FP8 tiles that the output keeps; rename the group")
    return name


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
GroupName = Annotated[str, AfterValidator(_check_group_name)]
Target = Annotated[str, Field(min_length=1), AfterValidator(_check_target)]
Scheme = Annotated[str, AfterValidator(_check_scheme), WithJsonSchema({"type": "string", "enum": list(ARGUMENTS)})]
Observer = Annotated[str, AfterValidator(_check_observer)]
ActivationObserver = Annotated[Observer, AfterValidator(_check_not_of_weights)]
_OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Targets = Annotated[
    list[Target],
    _OneOrMore,
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]}),
]
Ignored = Annotated[
    list[Target],
    _OneOrMore,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Bytes = Annotated[
    ByteSize,
    BeforeValidator(_check_byte_text),
    AfterValidator(_check_byte_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": _SMALLEST_SIZE}, {"type": "string"}]}),
]
PassThrough = dict[str, JsonValue]


class Section(BaseModel):
    """The base of every part of a recipe: refuses unknown keys, keeps values in their YAML type, and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
