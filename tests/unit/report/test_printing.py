"""What a stranger's names and paths do on a terminal, a page and a model card: they are shown, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from calibration.plan.task import Task
from recipes.errors import SourceError, printable
from tests.exported import recipe, task_of
from tests.models import standard
from tests.terminal import NASTY, SHOWN, console, text_of
from verify.checks import Check
from verify.report.page import Report
from verify.report.tables import markdown, print_checks
from workflows.batch.summary import print_summary
from workflows.inspect_checkpoint import print_checkpoint, print_plan
from workflows.progress import Reporter
from workflows.run.card import model_card


def test_printable_text_is_spelled_as_python_spells_it() -> None:
    assert printable(NASTY) == SHOWN
    plain = "\u00e4 \u6f22\u5b57\u3000\U0001f600\u00a0a\n\tb"
    assert printable(plain) == plain


def test_a_message_of_an_error_holds_nothing_that_acts() -> None:
    assert str(SourceError(f"{NASTY}: wrong")) == f"{SHOWN}: wrong"


def test_verdicts_show_names_literally() -> None:
    made, stream = console()
    print_checks([Check("structure.tensors", "FAIL", "what", NASTY, NASTY, "how")], made)
    assert text_of(stream).count(SHOWN) == 2


def test_a_checkpoint_and_its_plan_show_names_literally() -> None:
    made, stream = console()
    checkpoint = {
        "checkpoint": NASTY, "model_type": NASTY, "family": "dense", "parameters": 1, "bytes": 1, "shards": 1, "tensors": 1,
        "blocks": 1, "routed_experts_per_block": [], "blocks_with_shared_experts": 0, "routers": 0, "norms": 0,
        "mtp_blocks": 0, "parts": {NASTY: 1},
        "patterns": [{"pattern": NASTY, "count": 1, "dtype": "U8", "stored": "plain", "shapes": [(1,)], "bytes": 1}],
    }  # fmt: skip
    plan = {
        "digest": "0" * 64, "steps": [{"pattern": NASTY, "action": "copy", "count": 1, "reason": NASTY}],
        "groups": {NASTY: {"scheme": "NVFP4", "modules": 1}}, "output_bytes": 1, "output_shards": 1, "source_bytes": 1,
        "bits_per_parameter": 4.5, "warnings": [NASTY],
    }  # fmt: skip
    print_checkpoint(checkpoint, made)
    print_plan(plan, made)
    assert text_of(stream).count(SHOWN) == 8


def test_a_batch_and_a_running_log_show_names_literally() -> None:
    made, stream = console()
    row = {
        "name": NASTY, "state": "failed", "verdict": "FAIL", "reason": NASTY, "blocks": None, "eta": None, "size": 0,
        "bits_per_parameter": None, "seconds": None, "peak_memory": None, "perplexity": None, "kl": None,
    }  # fmt: skip
    print_summary({"runs": [row], "counts": {"failed": 1}, "batch": NASTY}, made)
    reporter = Reporter()
    reporter.console.file = stream
    reporter.say(NASTY)
    assert text_of(stream).count(SHOWN) == 4


def test_a_page_escapes_and_spells_names() -> None:
    page = Report(
        f"<img src=x>{NASTY}", [Check("structure.x", "FAIL", "w", "<script>", NASTY, "h")], recipe=NASTY
    ).html()
    page.encode()
    assert "<img" not in page and "<script>" not in page and "\x1b" not in page and "\u202e" not in page


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Task:
    source = standard.write(tmp_path_factory.mktemp("card") / "source", "llama")
    return task_of(recipe(source, Path("/nowhere/out"), [r"re:.*_proj$"]))


@pytest.mark.parametrize(
    "name", ["a: b <img src=x onerror=alert(1)>", "#x", "- a\n---\n# b", "| x | `y` [z](u) |", "'\"", "x\n```\n# b"]
)
def test_a_model_card_shows_names_literally(name: str, planned: Task) -> None:
    made = planned.recipe
    made = made.model_copy(update={"source": made.source.model_copy(update={"checkpoint": name})})
    card = model_card(replace(planned, recipe=made), [], {"calibration": name})
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front) == {  # no base_model: a path on this machine leads no reader anywhere
        "base_model_relation": "quantized", "library_name": "vllm", "pipeline_tag": "text-generation",
        "tags": ["nvfp4", "compressed-tensors", "vllm", "llm-compressor"],
    }  # fmt: skip
    prose, _, text = body.partition("## Recipe")
    assert "<" not in prose and "\n# b" not in prose
    row = next(line for line in prose.splitlines() if line.startswith("| source"))
    assert row.replace(r"\|", "").count("|") == 3
    fence = text.strip().splitlines()[0].removesuffix("yaml")
    assert text.count(fence) == 2 and text.rstrip().endswith(f"\n{fence}")


def test_a_table_of_checks_in_markdown_keeps_its_cells() -> None:
    line = markdown([Check("structure.x", "FAIL", "a|b", "<b>`c`</b>\nd", "[x](y)", "*how*")]).splitlines()[-1]
    assert line == r"| structure.x | FAIL | a\|b | &lt;b&gt;\`c\`&lt;/b&gt; d | \[x\](y) | \*how\* |"
