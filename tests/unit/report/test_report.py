"""The report page: what it shows first, what it never shows, and when it is written."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from calibration.runs.journal import RunDirectory
from tests import synthetic_run
from verify.checks import LEVELS, Check
from verify.report import plots
from verify.report.facts import Facts
from verify.report.page import Report, marked
from verify.report.tiles import sentence, tiles
from workflows.run.report import ReportPage, write_report


def page(output: Path) -> str:
    return write_report(output).read_text()


def text_of(html: str) -> str:
    parts: list[str] = []

    class Text(HTMLParser):
        inside = 0

        def handle_starttag(self, tag: str, attributes: object) -> None:
            self.inside += tag in ("style", "svg")

        def handle_endtag(self, tag: str) -> None:
            self.inside -= tag in ("style", "svg")

        def handle_data(self, data: str) -> None:
            if not self.inside:
                parts.append(data)

    Text().feed(html)
    return " ".join(" ".join(parts).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("report") / "V4-NVFP4"
    synthetic_run.write(output, blocks=9, experts=256)
    return page(output)


def test_the_verdict_stands_first_and_what_failed_before_what_passed(finished: str) -> None:
    text = text_of(finished)
    assert text.startswith(
        "V4-NVFP4 V4-NVFP4 FAIL structure PASS fidelity FAIL serving UNCHECKED Do not serve this checkpoint: 1 of 4 checks "
        "failed, the first is fidelity.weights. quality kept 98.2%"
    )
    text = text[text.index("What was checked") :]
    order = [text.index(check) for check in ("fidelity.weights", "fidelity.outliers", "serving.load", "structure.open")]
    assert order == sorted(order)


def test_everything_is_on_the_page(finished: str) -> None:
    text = text_of(finished)
    for part in (
        "complete: ", "blocks: 9/9 finished", "Weight error by block and expert", "Forward error by block",
        "Tokens per expert", "Group scales", "Time and memory per block", "layers.7.ffn.experts.200.w2 1.41",
        "Paris . Paris , the", "1,573,000,000,000 parameters", "experts: NVFP4, 70,455 modules", "torch 2.13.0",
        "checkpoint: /models/V4",
    ):  # fmt: skip
        assert part in text, part
    assert finished.count("<svg") == 5


def test_what_a_checkpoint_says_is_text_and_nothing_is_fetched(finished: str) -> None:
    assert "<script" not in finished and "<img" not in finished and "<b>not bold" not in finished
    assert "<script>x</script>" in text_of(finished)
    loads = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", finished)
    assert loads and all(target.startswith(("#", "data:")) for target in loads if "example.org" not in target)


def test_a_run_under_way_is_unchecked_and_shows_what_is_known(tmp_path: Path) -> None:
    output = tmp_path / "out"
    synthetic_run.write(output, blocks=9, experts=8, finished=4, verified=False)
    with_holder = RunDirectory(output).open()
    html = page(output)
    with_holder.close()
    text = text_of(html)
    assert text.startswith("out out UNCHECKED structure UNCHECKED fidelity UNCHECKED serving UNCHECKED running")
    assert 'http-equiv="refresh"' in html and "blocks: 4/9 finished" in text
    assert "as the exporter measured it; not verified yet" in text and "Not verified yet" in text
    assert 'http-equiv="refresh"' not in page(output)


def test_an_empty_run_directory_has_a_page(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "out").open()
    assert "UNCHECKED" in page(tmp_path / "out")
    directory.close()


def test_blocks_of_a_run_before_a_restart_are_not_shown(tmp_path: Path) -> None:
    output = tmp_path / "out"
    synthetic_run.write(output, blocks=3, experts=4, verified=False)
    assert "Tokens per expert" in text_of(page(output))
    later = RunDirectory(output)
    later.restart("fingerprint", plan="q" * 64, blocks=3, parts={})
    assert "Tokens per expert" not in text_of(page(output))


def test_the_page_is_not_written_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, clock = tmp_path / "out", [100.0]
    monkeypatch.setattr("workflows.run.report.time.monotonic", lambda: clock[0])
    RunDirectory(output).open().close()
    kept = ReportPage(output)
    kept.update()
    assert not kept.path.exists()
    clock[0] += 31
    kept.update()
    first = kept.path.stat().st_mtime_ns
    kept.update()
    assert kept.path.stat().st_mtime_ns == first
    kept.update(now=True)
    assert kept.path.stat().st_mtime_ns != first


def test_a_page_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.run").write_text("in the way")
    ReportPage(tmp_path / "out").update(now=True)
    assert "not written" in caplog.text
    # matplotlib, whose import was broken off: from then on it fails in this process.
    monkeypatch.setitem(sys.modules, "verify.report.plots", None)
    ReportPage(tmp_path / "other").update(now=True)
    assert caplog.text.count("not written") == 2


def test_a_report_without_a_run_needs_checks_alone() -> None:
    html = Report("somebody's checkpoint", synthetic_run.CHECKS).html()
    assert "fidelity.weights" in html and "<svg" not in html


def test_differing_words_of_samples_are_marked_and_escaped() -> None:
    ours, its = marked("The <b> sat down.", "The <i> sat down.")
    assert str(ours) == "The &lt;<mark>b</mark>&gt; sat down." and str(its) == "The &lt;<mark>i</mark>&gt; sat down."
    assert str(marked("a <b>", None)[0]) == "a &lt;b&gt;"
    many = marked("x " * 5000, "y " * 5000)[0]
    assert "<mark>" not in many


@pytest.mark.parametrize(
    ("verdicts", "perplexity", "said"),
    [
        ("PASS PASS PASS", 5.0, "Every check passed, and it predicts text nearly as its source does."),
        (
            "PASS PASS PASS",
            7.7,
            "Every check passed, but it predicts text clearly worse than its source. It keeps 66.5%",
        ),
        ("PASS WARN PASS", 5.0, "Nothing failed; 1 of 3 checks warn, and it predicts"),
        ("PASS FAIL UNCHECKED", 5.0, "Do not serve this checkpoint: 1 of 3 checks failed, the first is fidelity.x."),
        ("PASS PASS UNCHECKED", 5.0, "Nothing failed, but not everything is proven: 1 checks were not made."),
        ("PASS PASS", 5.0, "Nothing failed, but not everything is proven: a level was not verified."),
        ("", 5.0, "Not verified yet"),
    ],
)
def test_the_sentence_says_what_to_think_of_it(verdicts: str, perplexity: float, said: str) -> None:
    checks = [
        Check(f"{level}.x", verdict, "", "", "", "")  # type: ignore[arg-type]
        for level, verdict in zip(LEVELS, verdicts.split(), strict=False)
    ]
    served = synthetic_run.SERVED | {"perplexity": perplexity}
    assert sentence(checks, Facts(served=served)).startswith(said)


def test_tiles_show_what_is_known_and_no_quality_of_an_earlier_verification() -> None:
    checks = [Check("structure.bits", "PASS", "", "4.50", "", ""), Check("serving.load", "PASS", "", "", "", "")]
    facts = Facts(source_bytes=100, output_bytes=40, seconds={"calibrate": 90.0}, served=synthetic_run.SERVED)
    shown = {tile.name: (tile.figure, tile.note) for tile in tiles(checks, facts)}
    assert shown["quality kept"][0] == "98.2%" and shown["size"] == ("40 B", "source 100 B (40%)")
    assert shown["bits per parameter"] == ("4.50", "") and shown["time"] == ("90.0 s", "calibrate 90.0 s")
    assert "quality kept" not in {tile.name for tile in tiles(checks[:1], facts)}


def test_strangers_of_a_heat_map_are_ringed_and_an_even_one_is_drawn() -> None:
    even = {(block, expert): 0.1 for block in range(3) for expert in range(8)}
    rings = [
        str(plots.expert_map(values, "t", "c", "l").svg).count("#ff2d20") for values in (even, even | {(1, 5): 1.4})
    ]
    assert rings[0] == 0 and rings[1] > 0
    assert plots.expert_map({}, "t", "c", "l") is None
