"""The pages in a real browser: no console error, nothing wider than the window. Needs chromium: make test-browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import synthetic_run
from workflows.batch.state import BatchDirectory
from workflows.batch.summary import write_summary
from workflows.compare.__main__ import page
from workflows.compare.runs import differences, read_runs
from workflows.run.report import write_report

pytestmark = pytest.mark.browser
#: Reports the widths through the console, where errors are looked for too.
_PROBE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, .plot, pre") &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className);
  console.log("PROBE window " + innerWidth + " page " + document.documentElement.scrollWidth +
    " ground " + getComputedStyle(document.body).backgroundColor + " wide [" + wide + "]");
})</script>"""


def browse(html: str, width: int, folder: Path, dark: bool = False) -> str:
    """What the console of a headless Chromium says of a page in a window of `width` CSS pixels, and a screenshot
    `<width>.png` in `folder`."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "no chromium on this machine: install it (make test-browser says how) or leave the marker out"
    # Chromium's own window is never narrower than 500 pixels: a frame is.
    (folder / "page.html").write_text(html.replace("</body>", _PROBE + "</body>"))
    (folder / "frame.html").write_text(
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    )
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--window-size=1400,1000", f"--screenshot={folder / f'{width}.png'}",
         *(["--force-dark-mode"] if dark else []), (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def require_clean(console: str, width: int) -> None:
    probe = re.search(r"PROBE window (\d+) page (\d+) ground rgb\(.*?\) wide \[(.*?)\]", console)
    assert probe and int(probe[1]) == width, console
    assert int(probe[2]) <= width and not probe[3], console
    others = [line for line in console.splitlines() if "PROBE" not in line]
    assert not others, others


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("state", ["finished", "running"])
def test_report_of_61_blocks_with_384_experts(tmp_path: Path, width: int, state: str) -> None:
    output = tmp_path / "DeepSeek-V4-Pro-NVFP4"
    running = {"finished": 30, "verified": False} if state == "running" else {}
    synthetic_run.write(output, **running)
    path = write_report(output)
    assert path.stat().st_size < 2_000_000
    require_clean(browse(path.read_text(), width, tmp_path), width)


def test_a_page_is_dark_where_the_reader_s_system_is(tmp_path: Path) -> None:
    output = tmp_path / "out"
    synthetic_run.write(output, blocks=3, experts=4)
    html = write_report(output).read_text()
    shown = [browse(html, 1280, tmp_path, dark) for dark in (False, True)]
    assert "ground rgb(250, 250, 248)" in shown[0] and "ground rgb(21, 23, 26)" in shown[1]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_comparison_of_runs(tmp_path: Path, width: int) -> None:
    outputs = [tmp_path / f"DeepSeek-V4-Pro-NVFP4-{name}" for name in ("round-to-nearest", "gptq", "awq-weighted")]
    for number, output in enumerate(outputs):
        synthetic_run.write(output, blocks=3, experts=4)
        synthetic_run.remeasure(output, [1.62 - number / 50, 1.70, 1.63 - number / 90], 5.2 - number / 10)
    runs = read_runs(outputs)
    require_clean(browse(page(runs, differences(runs)), width, tmp_path), width)


@pytest.mark.parametrize("width", [390, 1280])
def test_summary_of_a_batch(tmp_path: Path, width: int) -> None:
    batch = BatchDirectory(tmp_path / "night.run")
    batch.save(synthetic_run.batch(batch, tmp_path), slots=2)
    write_summary(batch)
    html = (batch.path / "summary.html").read_text()
    assert html.count("<tr>") == 7  # six states and the head
    require_clean(browse(html, width, tmp_path), width)


def test_a_console_error_and_a_wide_page_are_seen(tmp_path: Path) -> None:
    broken = "<html><body><script>nothing.there()</script><div style='width:3000px'>wide</div></body></html>"
    console = browse(broken, 390, tmp_path)
    assert "nothing is not defined" in console
    with pytest.raises(AssertionError):
        require_clean(console, 390)
