"""Finds the modules of a source that the targets and ignore entries of a recipe match."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import product

from calibration.families.family import BESIDE, NOT_LINEAR, PARTS, Place
from recipes.errors import without_numbers
from recipes.patterns import Pattern, PatternError, TimeLimit

#: What an entry begins with that names a part of the model instead of modules.
PART = "part:"
#: How recipes of llm-compressor name the head of any model; DeepSeek's own name is `head`, wrappers put a prefix before it.
_HEAD = "lm_head"
#: Limits for suggesting the closest names to an entry that matches nothing: entries per recipe, letters of an entry.
_COMPARED, _COMPARED_LENGTH = 20, 300


class Matcher:
    """Matches entries with the modules of a source (names -> places). Appends errors to `problems` and harmless
    findings to `notes`."""

    def __init__(self, places: Mapping[str, Place], problems: list[str], notes: list[str]) -> None:
        self._places, self._problems, self._notes = places, problems, notes
        self._limit, self._names = TimeLimit(), sorted({without_numbers(module) for module in places})

    def targeted(self, where: str, entry: str) -> list[str]:
        """The modules that a target matches, in the source's order. No match is a problem, and so is a pattern that
        takes too long."""
        hits = self._hits(where, entry)
        if hits == [] and entry.removeprefix(PART) in PARTS:  # recipes for any family name parts that some have not
            self._notes.append(f"{where}: this source has no {entry.removeprefix(PART)}: {entry!r} changes nothing")
        elif hits == []:
            self._problems.append(f"{where}: {entry!r} matches no module of the source{self._closest(entry)}")
        return hits or []

    def ignored(self, entry: str) -> list[str]:
        """The modules that an ignore entry matches; `lm_head` names the head, however the source spells it. No match is
        a note, because published lists have such entries; a pattern that takes too long is a problem."""
        hits = self._hits("ignore", entry)
        if hits == [] and entry == _HEAD:
            hits = self._hits("ignore", f"{PART}head")
        if hits == []:
            self._notes.append(
                f"ignore: {entry!r} matches no module of the source and changes nothing{self._closest(entry)}"
            )
        return hits or []

    def _hits(self, where: str, entry: str) -> list[str] | None:
        if entry == "Linear":
            return [module for module, place in self._places.items() if place.part not in NOT_LINEAR | BESIDE]
        if entry.startswith(PART):
            part = entry.removeprefix(PART)
            return [module for module, place in self._places.items() if place.part == part and not place.mtp]
        if not entry.startswith("re:"):
            return [entry] if entry in self._places else []
        try:
            pattern = Pattern(entry[3:], self._limit)
            return [module for module in self._places if pattern.match(module)]
        except PatternError as error:
            self._problems.append(f"{where}: {entry!r} {error}")
            return None

    def _closest(self, entry: str) -> str:
        """A hint for an entry that matches nothing: names must be spelled as in the source, not as in transformers."""
        if entry.startswith(PART):
            here = sorted({place.part for place in self._places.values()})
            return f"; the parts of this source are {', '.join(here)}"
        wanted = re.sub(r"[\\^$()]", "", entry.removeprefix("re:"))
        # Comparing each entry of a long list would take minutes.
        look = len(wanted) <= _COMPARED_LENGTH and len(self._problems) + len(self._notes) < _COMPARED
        close = difflib.get_close_matches(wanted, self._names, n=2, cutoff=0.3) if look else []
        hint = f"; closest: {', '.join(close)}" if close else ""
        return f"{hint}; names are spelled as in the source (see inspect_checkpoint)"


def resolved_targets(wanted: Collection[str], everything: Collection[str]) -> list[str]:
    """Few regexes that match exactly `wanted` among the module names `everything`.

    compressed-tensors tries every target on every module, so 70,000 names would take hours: numbers are generalised
    to \\d+ where all modules of a pattern are wanted, to the wanted numbers where these make up the choice, and only
    otherwise the names are listed, in one regex.
    """
    patterns: dict[str, list[str]] = defaultdict(list)
    for name in everything:
        patterns[re.sub(r"\d+", "#", name)].append(name)
    chosen = set(wanted)
    targets = []
    for pattern, members in patterns.items():
        hits = [name for name in members if name in chosen]
        if hits:
            targets.append(f"re:^{_pattern_regex(pattern, hits, members)}$")
    matched = {name for name in everything if any(re.match(target[3:], name) for target in targets)}
    assert matched == chosen, f"targets do not match what was resolved: {sorted(matched ^ chosen)[:4]}"
    return targets


def _pattern_regex(pattern: str, hits: list[str], members: list[str]) -> str:
    fixed = [re.escape(part) for part in pattern.split("#")]
    if len(hits) == len(members):
        return r"\d+".join(fixed)
    numbers = [tuple(re.findall(r"\d+", name)) for name in hits]
    columns = [sorted(set(column), key=int) for column in zip(*numbers, strict=True)]
    all_columns = [set(column) for column in zip(*(re.findall(r"\d+", name) for name in members), strict=True)]
    taken = {tuple(re.findall(r"\d+", name)) for name in members} & set(product(*columns))
    if taken == set(numbers):
        parts = [
            r"\d+" if set(c) == whole else f"(?:{'|'.join(c)})" for c, whole in zip(columns, all_columns, strict=True)
        ]
        return fixed[0] + "".join(part + f for part, f in zip(parts, fixed[1:], strict=True))
    return f"(?:{'|'.join(re.escape(name) for name in hits)})"
