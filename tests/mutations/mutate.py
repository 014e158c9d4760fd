"""Seeded mutations of JSON, YAML and bytes: what a hostile or damaged file may hold instead of what it should."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any


class Sound(random.Random):
    """Chooses, and mutates nothing: what every mutation begins with must itself be taken."""


class Raw(str):
    """JSON text that no Python value spells."""


#: What stands where something else should. Every type, the ends of every number type, text that acts somewhere.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 128, 2**31, 2**31 - 1, 2**53, 2**63, 2**63 - 1, 2**64, 10**30, -(10**30), 0.5, -0.0,
    1e308, 1e-320, Raw("9" * 4000), Raw("-" + "9" * 4299), Raw("9" * 5000), Raw("1e999"), Raw("-1e999"), Raw("NaN"),
    Raw("Infinity"), Raw("-Infinity"), Raw("9" * 400 + ".0"), Raw("01"), Raw(""), Raw("{"), Raw("]"), Raw('"\\ud800"'),
    Raw('"\\udc00\\ud800"'), Raw('"\\x"'), Raw("[" * 150 + "]" * 150), Raw("[" * 5000), Raw('{"a":' * 190 + "1" + "}" * 190),
    "", " ", "x", "0", "1", "-1", "1e999", "nan", "true", "null", "\0", "\n", "\x1b]0;x\x07", "\x9b2J", "\u202e", "\ufeff",
    "[/bold]", "[bold]", "{x}", "{0}", "%s", "%(a)s", "$x$", "<img src=x>", "|", "`", "x" * 300, "x" * 5000, "re:", "re:(",
    "re:[a-", "re:.*", "re:^$", "*", "?", "/", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "model.safetensors",
    "config.json", "layers.99999999999999999999.x", "layers.-1.x", "\u0663", "model.layers.0.mlp.experts.99999999.w1.weight",
    "BF16", "F8_E4M3", "U8", "I8", "F32", "F8_E8M0", "I64", "BOOL", "float", "int", "block", "channel", "group", "tensor_group",
    "compressed-tensors", "fp8", "gptq", "awq", "modelopt", "bitsandbytes", "llama", "deepseek_v4", "mixtral", "qwen3_moe",
    "nvfp4-pack-quantized", "float-quantized", "Linear", "lm_head", "local", "torch.float8_e4m3fn", [], {}, [[]], [{}], [None],
    [0], [0, 0], [-1, -1], [1, 1], [128, 128], [128], [1, 2, 3], [2**63, 2**63], ["a"], ["a", "b"], [["a"]], ["re:("],
    [1.5, 2.5], [True, True], list(range(300)), ["x"] * 300, {"": {}}, {"a": 1}, {"a": {"a": {"a": {}}}}, {"0": 0},
    {"x" * 300: 1},
)  # fmt: skip
KEYS = tuple(value for value in VALUES if isinstance(value, str) and not isinstance(value, Raw))

#: Lines and scalars of YAML that mean something else than they look like.
SNIPPETS = (
    "&a [*a]", "&a {x: *a}", "*a", "<<: *a", "<<: {a: 1}", "!!python/object/apply:os.system ['true']", "!!binary aGk=",
    "!!set {a}", "!!timestamp 2001-01-01", "2001-01-01", "2001-99-99", "0o17", "0x1f", "1_000", "1e3", ".inf", "-.nan", "~",
    "yes", "off", "190:20:30", "'\\", '"\\u0000"', '"\\ud800"', "\t", "- ", "? ", ": ", "# ", "---", "...", "%YAML 9.9", "|",
    ">-",
    "[", "{", "}", "]", ",", "@", "`", "&", "*", "!", "\x00", "\x1b", "\ufeff", "\u2028", "9" * 5000, "-" * 300, "[" * 300,
    "re:(", "re:.*", "{a: 1, a: 2}", "500GiB", "-1", "1.5", "nan", "[1, 2]", "{}", "null", "true", "''",
)  # fmt: skip


def dumps(tree: Any) -> str:
    """JSON text of a tree with Raw parts. Lone surrogates are spelled as escapes."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{dumps(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dumps, tree)) + "]"
    return json.dumps(tree)


def mutated_json(tree: Any, rng: random.Random) -> bytes:
    """The JSON text of `tree` after one to three changes of its structure, sometimes of its bytes as well."""
    if isinstance(rng, Sound):
        return dumps(tree).encode()
    tree = _copy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _change(tree, rng)
    text = dumps(tree).encode()
    return mutated_bytes(text, rng) if rng.random() < 0.1 else text


def mutated_bytes(raw: bytes, rng: random.Random) -> bytes:
    """`raw` with one to three changes: bits, bytes, lengths, parts of itself elsewhere."""
    if isinstance(rng, Sound):
        return raw
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        what = rng.randrange(7)
        if what == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif what == 2:
            del data[at : min(end, at + rng.choice((1, 2, 30)))]
        elif what == 3:
            del data[at:]
        elif what == 4:
            data[at:at] = data[at : min(end, at + 200)]
        elif what == 5:
            data[at:at] = rng.choice(
                (b"\0", b"\xff", b"\xef\xbb\xbf", b"\xc0\xaf", b"[", b"{", b'"', b"\\", b",", b"\xed\xa0\x80")
            )
        else:
            data[at : at + 1] = rng.choice((b"0", b"-", b"e", b" ", b"\n"))
    return bytes(data)


def mutated_lines(text: str, rng: random.Random) -> bytes:
    """A text of lines (YAML, JSON lines) after one to three changes of lines, scalars, indents or bytes."""
    if isinstance(rng, Sound):
        return text.encode()
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, other, what = rng.randrange(len(lines)), rng.randrange(len(lines)), rng.randrange(8)
        line = lines[at]
        if what == 0 and len(lines) > 1:
            del lines[at]
        elif what == 1:
            lines.insert(other, line)
        elif what == 2:
            lines[at], lines[other] = lines[other], line
        elif what == 3:
            lines[at] = " " * rng.randrange(6) + line.lstrip()
        elif what == 4:
            lines.insert(at, " " * rng.randrange(8) + rng.choice(SNIPPETS))
        elif what == 5:
            lines[at] = f"{line.partition(':')[0]}: {rng.choice(SNIPPETS)}"
        elif what == 6:
            lines[at] = f"{line.partition(':')[0]}: {dumps(rng.choice(VALUES))}"
        else:
            lines[at] = mutated_bytes(line.encode(errors="replace"), rng).decode(errors="replace")
    raw = "\n".join(lines).encode(errors="replace")
    return mutated_bytes(raw, rng) if rng.random() < 0.05 else raw


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value below `tree`."""
    pending = [tree]
    while pending:
        here = pending.pop()
        for key, value in here.items() if isinstance(here, dict) else enumerate(here):
            yield here, key
            if isinstance(value, dict | list):
                pending.append(value)


def _change(tree: Any, rng: random.Random) -> Any:
    places = list(_places(tree)) if isinstance(tree, dict | list) else []
    if not places or rng.random() < 0.01:
        return rng.choice(VALUES)
    here, key = rng.choice(places)
    what = rng.randrange(10)
    if what < 4:
        here[key] = _copy(rng.choice(VALUES))
    elif what == 4:
        del here[key]
    elif what == 5:
        other, at = rng.choice(places)
        here[key] = _copy(other[at]) if at in other or isinstance(other, list) else None
    elif isinstance(here, dict) and what < 8:
        new = rng.choice(KEYS) if rng.random() < 0.5 else _text(str(key), rng)
        here[new] = here[key] if what == 6 else here.pop(key)
    else:
        here[key] = _near(here[key], rng)
    return tree


def _near(value: Any, rng: random.Random) -> Any:
    """A value like this one and not the same."""
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, 1, 0, None))
    if isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, value * 2, -value, value // 2, float(value), str(value), [value], value * 10**9)
        )
    if isinstance(value, float):
        return rng.choice((-value, value * 2, str(value), int(value) if abs(value) < 1e18 else 0))
    if isinstance(value, str):
        return _text(value, rng)
    if isinstance(value, list):
        return rng.choice(
            ([*value, *value], value[:-1], value[::-1], [value], {str(n): v for n, v in enumerate(value)})
        )
    return list(value.values()) if isinstance(value, dict) else value


def _text(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    new = rng.choice(
        (
            "",
            "x",
            "0",
            "9",
            ".",
            ".0.",
            "_",
            "/",
            "\0",
            "\x1b",
            "\u202e",
            "weight",
            ".weight",
            "_scale",
            "experts.",
            "-1",
        )
    )
    return rng.choice(
        (text[:at] + new + text[at:], text[:at], text[at:], text[:at] + new + text[at + 1 :], text + new, new + text)
    )
