"""The verdict in a minute: what a terminal shows at the end of a run or of a verification, in at most fifteen lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from recipes.errors import printable
from recipes.units import duration, size
from verify.accuracy.recovery import recoveries
from verify.checks import LEVELS, SEVERITY, Check, level_verdicts, overall, unchecked
from verify.report.facts import Facts, Grade, Quality, measured_quality, was_served
from verify.report.remedies import remedy
from verify.report.tables import STYLE

#: Rows of a verdict: fifteen with the line of the error that ends a failed run.
MOST_ROWS = 14
_INDENT = "    "
#: Rows that one finding takes at most: what is wrong, and what to do.
_WRONG_ROWS, _REMEDY_ROWS = 2, 1


_GRADE_STYLE: dict[Grade, str] = {"high": "green", "reduced": "yellow", "low": "bold red"}


def print_verdict(checks: Sequence[Check], facts: Facts, console: Console) -> None:
    """Prints the lines of `verdict_lines`; paths are left whole, so that they can be copied."""
    for line in verdict_lines(checks, facts, console.width):
        console.print(line, soft_wrap=True)


def print_quality(checks: Sequence[Check], facts: Facts, console: Console) -> None:
    """The line that says what share of the source's quality is kept."""
    console.print(_quality_line(measured_quality(checks, facts)), soft_wrap=True)


def verdict_lines(checks: Sequence[Check], facts: Facts, width: int) -> list[Text]:
    """At most MOST_ROWS lines of at most `width` cells (paths excepted): verdicts, what is not PASS, quality, size, time,
    one sample, places."""
    quality, found = measured_quality(checks, facts), _findings(checks)
    head = _rows(_verdicts(checks, quality), width, 2)
    spare = 1 if found else 2
    tail = _rows(_quality_line(quality), width, 2)
    for line, most in (
        (_signature(checks), 1),
        (_accuracy(checks, facts), spare),
        (_size(checks, facts), 1),
        (_time(facts), spare),
        (_sample(checks, facts), spare),
    ):
        tail += _rows(line, width, most) if line.plain else []
    tail += [_line(f"{name}: {place}") for name, place in facts.places.items()]
    if not found:
        tail.append(_rows(Text(f"all {len(checks)} checks: {facts.more}"), width, 1)[0])
    taken = sum(-(-max(line.cell_len, 1) // width) for line in (*head, *tail))
    return [*head, *_fitting(found, width, max(MOST_ROWS - taken, 4), facts.more), *tail]


@dataclass(frozen=True)
class _Finding:
    wrong: Text
    remedy: str


def _findings(checks: Sequence[Check]) -> list[_Finding]:
    """What is not PASS, worst first; checks that stayed UNCHECKED for one reason are one finding."""
    alike: dict[tuple[str, str, str], list[Check]] = {}
    absent = [
        unchecked(level, "", "no check of this level was made")
        for level in LEVELS
        if not any(check.id.startswith(f"{level}.") for check in checks)
    ]
    for check in sorted([*checks, *absent], key=lambda check: SEVERITY.index(check.verdict)):
        if check.verdict != "PASS":
            own = "" if check.verdict == "UNCHECKED" and check not in absent else check.id
            alike.setdefault((check.verdict, own, check.figure), []).append(check)
    found = []
    for (_, _, figure), group in alike.items():
        first = group[0]
        named = first.id + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        limit = f" (threshold: {first.threshold})" if first.threshold not in ("", "no problem") else ""
        wrong = Text.assemble((first.verdict, STYLE[first.verdict]), _line(f" {named}: {_cut(figure, 400)}{limit}"))
        found.append(_Finding(wrong, remedy(first)))
    return found


def _fitting(found: Sequence[_Finding], width: int, room: int, more: str) -> list[Text]:
    """The first findings that fit into `room` rows, and how many do not."""
    rows: list[Text] = []
    for number, finding in enumerate(found):
        lines = _rows(finding.wrong, width, _WRONG_ROWS)
        lines += _rows(Text(f"{_INDENT}-> {finding.remedy}"), width, _REMEDY_ROWS)
        last = number == len(found) - 1
        if len(rows) + len(lines) > room - (0 if last else 1):
            return [*rows, *_rows(Text(f"and {len(found) - number} more: {more}"), width, 1)]
        rows += lines
    return rows


def _signature(checks: Sequence[Check]) -> Text:
    """What a signature proves; one that is not PASS is among the findings."""
    signed = [check for check in checks if check.id == "structure.signature" and check.verdict == "PASS"]
    return _line(f"signature: {signed[0].verdict}, {signed[0].figure}") if signed else Text()


def _verdicts(checks: Sequence[Check], quality: Quality | None) -> Text:
    total, parts = overall(checks), Text()
    lost = quality is not None and quality.grade != "high"
    parts.append("overall: ").append(total, STYLE["WARN"] if lost and total == "PASS" else STYLE[total])
    if quality is not None and lost:
        parts.append(f" (quality {quality.grade})", _GRADE_STYLE[quality.grade])
    for level, verdict in level_verdicts(checks).items():
        parts.append(f"  {level}: ").append(verdict, STYLE[verdict])
    return parts


def _quality_line(quality: Quality | None) -> Text:
    if quality is None:
        return Text("quality: unknown, the source was not served beside the output", STYLE["UNCHECKED"])
    kept = (
        f"keeps {quality.kept:.1%} of the source's perplexity" if quality.kept is not None else "perplexity not finite"
    )
    error = f" +- {quality.error:.3f}" if quality.error is not None else ""
    loss = f" ({quality.difference:+.3f}{error} nats)" if quality.difference is not None else ""
    kl = f"{quality.kl:.4f}" if quality.kl is not None else "not finite"
    top1 = f"{quality.top1:.1%}" if quality.top1 is not None else "not finite"
    line = Text("quality: ").append(quality.grade, _GRADE_STYLE[quality.grade])
    if quality.grade != "high":
        line.append(f" by {' and '.join(quality.beyond('high' if quality.grade == 'reduced' else 'reduced'))}")
    before, after = (
        "not finite" if value is None else f"{value:.4g}" for value in (quality.source_perplexity, quality.perplexity)
    )
    return line.append(f", {kept}: {before} -> {after}{loss}, KL {kl}, top-1 {top1}")


def _accuracy(checks: Sequence[Check], facts: Facts) -> Text:
    found = recoveries(facts.served) if was_served(checks) else []
    return _line(f"accuracy: {'; '.join(map(str, found))}" if found else "")


def _size(checks: Sequence[Check], facts: Facts) -> Text:
    parts = []
    if facts.output_bytes is not None:
        before = facts.source_bytes
        share = f" ({facts.output_bytes / before:.0%})" if before else ""
        parts.append(f"{size(before)} -> {size(facts.output_bytes)}{share}" if before else size(facts.output_bytes))
    parts += [f"{c.figure} bits per parameter" for c in checks if c.id == "structure.bits" and c.verdict == "PASS"]
    return Text(f"size: {', '.join(parts)}" if parts else "")


def _time(facts: Facts) -> Text:
    longest = sorted(facts.seconds.items(), key=lambda stage: -stage[1])
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in longest)
    return _line(f"time: {duration(sum(facts.seconds.values()))}; {stages}" if stages else "")


def _sample(checks: Sequence[Check], facts: Facts) -> Text:
    if not facts.samples or not was_served(checks):
        return Text()
    sample = facts.samples[0]
    prompt, text, source = sample["prompt"], sample["text"], sample.get("source_text")
    beside = f"; source: {_cut(source, 48)!r}" if isinstance(source, str) else ""
    return _line(f"sample: {_cut(prompt, 32)!r} -> {_cut(text, 48)!r}{beside}")


def _line(text: str) -> Text:
    """A stranger's words as one line in which nothing acts on a terminal."""
    return Text(printable(" ".join(text.split("\n"))))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _rows(text: Text, width: int, most: int) -> list[Text]:
    """`text` folded into rows of `width` cells, those after the first indented, the last one cut if there are more."""
    room = max(width - len(_INDENT), 8)
    lines = list(text.wrap(Console(width=width), room))
    if len(lines) > most:
        lines = lines[:most]
        lines[-1].truncate(room - 4)
        lines[-1].append(" ...")
    for line in lines:
        line.rstrip()
    return [Text.assemble(_INDENT if number else "", line) for number, line in enumerate(lines)]
