"""The vocabulary of the families for the tensors that a checkpoint's own config.json promises: names, shapes and kinds.

A logical tensor is independent of the stored format: a weight is `<module>.weight` `[M, K]`, its scales are companions.
Shapes follow transformers' modules of each family (5.17) and, for DeepSeek-V4, the hub checkpoints' headers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["linear", "plain", "float", "float32", "table", "fp8"]
Shape = tuple[int, ...]
#: Tensors that some writers add and that no config promises: scales of the KV cache, which vLLM reads in these spellings
#: (model_loader/weight_utils.py, maybe_remap_kv_scale_name), and rotary tables of old exports, which every loader computes.
CARRIED = r"\.self_attn\.(?:[qkv]|kv|[kv]_proj\.[kv]|qkv_proj\.[kv])_(?:scale|zero_point)$"
LEFT_OUT = r"(?:^|\.)rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$"
#: Their leaves.
ADDED = ("k_scale", "v_scale", "q_scale", "kv_scale", "inv_freq")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A logical tensor that the config promises. `kind`: linear may be stored quantized; plain (in the config's dtype),
    float (in any float dtype) and float32 may not; table contains integers; fp8 is E4M3 with scales in every
    checkpoint. `optional`: may be absent (a tied head)."""

    shape: Shape
    kind: Kind = "linear"
    optional: bool = False


class ConfigReader:
    """Reads fields of a config. `problems` collects messages about fields that are missing or of a wrong type. `within`
    is the field that contains these, if they are nested."""

    def __init__(self, values: dict[str, Any], within: str = "") -> None:
        self.values, self.problems = values, list[str]()
        self._where = f"config.json: {within}." if within else "config.json: "

    def part(self, key: str) -> ConfigReader:
        """A reader of the mapping in a field, or of an empty one; it shares this reader's `problems`."""
        value = self.values.get(key)
        reader = ConfigReader(value if isinstance(value, dict) else {}, key)
        reader.problems = self.problems
        return reader

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 0; 0 and a problem if it is missing and has no default."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            found = "is missing" if key not in self.values else f"is {value!r}"
            self.problems.append(f"{self._where}{key} {found}, a whole number is needed to serve this model")
            return 0
        return value

    def numbers(self, key: str, least: int) -> list[int]:
        """A list of at least `least` whole numbers; an empty list and a problem if it is missing."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) < least or not all(isinstance(n, int) for n in value):
            found = "is missing" if value is None else f"is {str(value)[:60]}"
            self.problems.append(f"{self._where}{key} {found}, a list of at least {least} whole numbers is needed")
            return []
        return value

    def flag(self, key: str) -> bool:
        """Whether the field is true."""
        return self.values.get(key) is True


#: Yields the logical tensors that a config promises; missing fields become the reader's problems.
Promise = Callable[[ConfigReader], Iterator[tuple[str, Wanted]]]


def norm(name: str, width: int) -> tuple[str, Wanted]:
    """The weight of a norm, [width]."""
    return f"{name}.weight", Wanted((width,), "plain")


def linear(name: str, rows: int, columns: int, bias: bool = False) -> Iterator[tuple[str, Wanted]]:
    """The weight of a linear layer, [rows, columns], and its bias [rows]."""
    yield f"{name}.weight", Wanted((rows, columns))
    if bias:
        yield f"{name}.bias", Wanted((rows,), "plain")
