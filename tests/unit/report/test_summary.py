"""The verdict at the end of a run: at most fifteen lines, whatever was found, and nothing damaged reads as plain green."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.terminal import NASTY, SHOWN, console, text_of
from verify.checks import Check
from verify.report.facts import BOUNDS, Facts, read_quality
from verify.report.remedies import REMEDIES, remedy
from verify.report.summary import MOST_ROWS, print_verdict, verdict_lines
from workflows.run.report import verdict_facts

SERVED: dict[str, Any] = {
    "perplexity": 12.5,
    "source": {
        "perplexity": 12.25, "nll_difference": 0.0202, "nll_error": 0.004,
        "agreement": {"tokens": 1024, "kl": 0.0213, "top1": 0.945},
    },
}  # fmt: skip
SAMPLE = {"kind": "recipe 1", "prompt": "The capital of France is", "text": " Paris.", "source_text": " Paris,"}
FACTS = Facts(
    source_bytes=865_000_000_000,
    output_bytes=512_000_000_000,
    seconds={"inspect": 3.2, "rehearse": 71.0, "calibrate": 30_000.0, "export": 12.0, "verify": 4_000.0},
    served=SERVED,
    samples=[SAMPLE],
    places={"output": "/models/out", "report": "/models/out.run/report.html"},
)
PASSED = [
    Check("structure.tensors", "PASS", "what", "2853 tensors", "no problem", "how"),
    Check("structure.bits", "PASS", "what", "4.7312", "no problem", "how"),
    Check("fidelity.weights", "PASS", "what", "worst 0.0964 (layers.1.w2)", "<= 0.3000", "how"),
    Check("serving.source", "PASS", "what", "KL 0.0213", "KL <= 0.6", "how"),
]
FAILED = Check(
    "structure.fused", "FAIL", "what", "layers.0.ffn.experts.3.w3.weight_global_scale: 2048, its group has 4096",
    "no problem", "how",
)  # fmt: skip


def shown(checks: list[Check], facts: Facts = FACTS, width: int = 120) -> str:
    return "\n".join(line.plain for line in verdict_lines(checks, facts, width))


def served(**changed: Any) -> Facts:
    """FACTS with other figures of the comparison."""
    told = json.loads(json.dumps(SERVED))
    for key, value in changed.items():
        (told if key == "perplexity" else told["source"]["agreement"])[key] = value
    return replace(FACTS, served=told)


def test_a_run_that_passes_shows_its_figures_and_nothing_to_scroll() -> None:
    assert shown(PASSED) == (
        "overall: PASS  structure: PASS  fidelity: PASS  serving: PASS\n"
        "quality: high, keeps 98.0% of the source's perplexity: 12.25 -> 12.5 (+0.020 +- 0.004 nats), KL 0.0213, top-1 94.5%\n"
        "size: 865.0 GB -> 512.0 GB (59%), 4.7312 bits per parameter\n"
        "time: 9:28:06; calibrate 8:20:00, verify 1:06:40, rehearse 71.0 s, export 12.0 s, inspect 3.2 s\n"
        "sample: 'The capital of France is' -> ' Paris.'; source: ' Paris,'\n"
        "output: /models/out\n"
        "report: /models/out.run/report.html\n"
        "all 4 checks: --details"
    )


def test_a_failure_comes_first_with_figure_threshold_and_remedy() -> None:
    warned = Check("fidelity.block_cosine", "WARN", "what", "worst 0.8952 (block 0) of 2", ">= 0.9", "how")
    found = shown([PASSED[0], warned, FAILED, PASSED[3]], Facts(places=FACTS.places), 80)
    assert found == (
        "overall: FAIL  structure: FAIL  fidelity: WARN  serving: PASS\n"
        "FAIL structure.fused: layers.0.ffn.experts.3.w3.weight_global_scale: 2048,\n"
        "    its group has 4096\n"
        "    -> do not serve it; make it again from the source (--overwrite)\n"
        "WARN fidelity.block_cosine: worst 0.8952 (block 0) of 2 (threshold: >= 0.9)\n"
        "    -> calibrate on more text, or quantize fewer modules\n"
        "quality: unknown, the source was not served beside the output\n"
        "output: /models/out\n"
        "report: /models/out.run/report.html"
    )


def test_a_good_signature_is_said_and_a_bad_one_is_a_failure() -> None:
    signed = Check("structure.signature", "PASS", "what", "signed by the key a.pub", "no problem", "how")
    assert "signature: PASS, signed by the key a.pub" in shown([*PASSED, signed]).splitlines()
    assert "\nsignature: " not in shown([*PASSED, replace(signed, verdict="FAIL")])
    assert "\nsignature: " not in shown(PASSED)


def test_what_stayed_unchecked_is_named_with_what_is_missing() -> None:
    reason = "not reached: the engine was killed"
    unserved = [Check(f"serving.{name}", "UNCHECKED", "what", reason, "all", "not run") for name in ("load", "finite")]
    found = shown([*PASSED[:2], *unserved])
    assert found == (
        "overall: UNCHECKED  structure: PASS  fidelity: UNCHECKED  serving: UNCHECKED\n"
        "UNCHECKED serving.load and 1 more: not reached: the engine was killed (threshold: all)\n"
        "    -> read logs/serving.log and docs/troubleshooting.md\n"
        "UNCHECKED fidelity: no check of this level was made\n"
        "    -> verify.fidelity in the recipe, or --level fidelity, asks for it\n"
        "quality: high, keeps 98.0% of the source's perplexity: 12.25 -> 12.5 (+0.020 +- 0.004 nats), KL 0.0213, top-1 94.5%\n"
        "size: 865.0 GB -> 512.0 GB (59%), 4.7312 bits per parameter\n"
        "time: 9:28:06; calibrate 8:20:00, verify 1:06:40, rehearse 71.0 s, export 12.0 s, inspect 3.2 s\n"
        "sample: 'The capital of France is' -> ' Paris.'; source: ' Paris,'\n"
        "output: /models/out\n"
        "report: /models/out.run/report.html"
    )


def test_a_level_that_was_not_checked_stands_before_forty_warnings() -> None:
    warned = [Check(f"fidelity.check_{n}", "WARN", "what", str(n), "<= 1", "how") for n in range(40)]
    assert "UNCHECKED serving: no check of this level was made" in shown([*PASSED[:3], *warned], width=80)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("figure", ["short", "long words " * 100, "\u6f22" * 300, "a\nb\n" * 50])
def test_forty_warnings_never_take_more_than_fifteen_lines(width: int, figure: str) -> None:
    warned = [Check(f"fidelity.check_{n}", "WARN", "what", f"{n} {figure}", "<= 1", "how") for n in range(40)]
    facts = replace(FACTS, samples=[SAMPLE | {"text": figure, "source_text": figure}])
    lines = verdict_lines([*PASSED, *warned, FAILED], facts, width)
    assert sum(-(-line.cell_len // width) for line in lines) <= MOST_ROWS
    assert all(line.cell_len <= width for line in lines if not line.plain.startswith(("output: ", "report: ")))
    text = "\n".join(line.plain for line in lines)
    assert "FAIL structure.fused" in text
    more = re.search(r"and (\d+) more:", text)
    assert more and int(more[1]) + len(re.findall(r"^(?:FAIL|WARN) ", text, re.M)) == 41


@pytest.mark.parametrize(
    ("facts", "grade", "why"),
    [
        (served(), "high", ""),
        (served(perplexity=12.25 * 1.5), "low", " by perplexity"),
        (served(perplexity=12.25 * 1.2), "reduced", " by perplexity"),
        (served(kl=0.2), "reduced", " by KL"),
        (served(kl=0.5, top1=0.3), "low", " by KL and top-1"),
        (served(kl="nan"), "low", " by KL"),
        (served(perplexity="inf"), "low", " by perplexity"),
    ],
)
def test_a_pass_that_lost_quality_is_not_plain_green(facts: Facts, grade: str, why: str) -> None:
    head, quality = verdict_lines(PASSED, facts, 200)[:2]
    assert quality.plain.startswith(f"quality: {grade}{why}, ")
    styles = {head.plain[span.start : span.end]: span.style for span in head.spans}
    if grade == "high":
        assert "quality" not in head.plain
    else:
        assert head.plain.startswith(f"overall: PASS (quality {grade})  ")
        assert styles[f" (quality {grade})"] != "green"
        assert [span.style for span in head.spans if span.start == len("overall: ")] == ["yellow"]


def test_the_bounds_of_quality_are_those_of_the_docs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "verification.md").read_text()
    for grade, (kept, kl, top1) in BOUNDS.items():
        assert f"| {grade} | {kept:.0%} | {kl:g} | {top1:.0%} |".replace("%", " %") in page


@pytest.mark.parametrize("damaged", [{}, {"source": []}, {"source": {"agreement": 3}}, {"source": {"why": "large"}}])
def test_quality_is_unknown_if_the_source_was_not_served(damaged: dict[str, Any]) -> None:
    assert read_quality(damaged) is None


def test_an_earlier_serving_is_not_shown_beside_a_verification_that_served_nothing() -> None:
    found = shown(PASSED[:3])
    assert "quality: unknown" in found and "sample" not in found and "12.5" not in found


def test_a_damaged_run_directory_leaves_lines_out(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    for name in ("plan.json", "serving.json", "events.jsonl", "journal.jsonl"):
        (tmp_path / "out.run" / name).write_text('{"checkpoint": [], "plan": {"output_bytes": "x"}, "samples": 3}')
    assert shown(PASSED, verdict_facts(tmp_path / "out")).startswith("overall: PASS")


def test_the_verdict_shows_names_literally_and_paths_whole() -> None:
    made, stream = console()
    path = f"/{'deep/' * 100}{NASTY}"
    print_verdict(
        [*PASSED, Check("structure.files", "FAIL", "what", NASTY, NASTY, "how")], Facts(places={"output": path}), made
    )
    assert text_of(stream).count(SHOWN) == 3 and "deep/" * 100 in text_of(stream)


def test_every_check_of_the_docs_has_a_remedy_that_fits_a_line() -> None:
    page = (Path(__file__).parents[3] / "docs" / "verification.md").read_text()
    documented = set(re.findall(r"^\| `((?:structure|fidelity|serving|proof)\.\w+)`", page, re.M))
    assert documented <= REMEDIES.keys() and len(documented) > 40
    checks = [Check(id, verdict, "", "", "", "") for id in REMEDIES for verdict in ("FAIL", "UNCHECKED")]
    assert [remedy(check) for check in checks if len(remedy(check)) > 69] == []
