"""The summary of a batch, and what the user is told of its end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from recipes.errors import RecipeError
from tests.unit.batch.batches import finish, looked_at, recipe
from workflows.batch.__main__ import main
from workflows.batch.hooks import Hooks
from workflows.batch.state import BatchDirectory
from workflows.batch.submission import remove_outstanding, set_outstanding
from workflows.batch.summary import summarize, write_summary


def test_summary_of_every_state(tmp_path: Path, source: Path, batch: BatchDirectory) -> None:
    names = ("finished", "gave_up", "broken", "retried", "later", "dead")
    paths = [recipe(tmp_path, name, source, **({"output": 3} if name == "broken" else {})) for name in names]
    found = looked_at(batch, *paths)
    batch.save(found.entries, slots=1)
    finish(found.entries[0])
    (found.entries[0].run.path / "serving.json").write_text(
        json.dumps({"perplexity": 12.5, "source": {"agreement": {"kl": 0.01}}})
    )
    (found.entries[0].run.path / "report.html").write_text("x")
    batch.record("gave_up", "gave_up", reason="<b>no</b> vLLM")
    batch.record(
        "retried", "ended", outcome="transient", reason="killed by SIGKILL", seconds=60.0, peak_rss=2_000_000_000
    )
    batch.record("dead", "begun", pid=1, began="0", host="elsewhere")
    write_summary(batch)
    told = json.loads((batch.path / "summary.json").read_text())
    rows = {row["name"]: row for row in told["runs"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "finished": "done", "gave_up": "failed", "broken": "failed", "retried": "retrying", "later": "waiting",
        "dead": "stopped",
    }  # fmt: skip
    assert rows["finished"]["verdict"] == "UNCHECKED" and rows["finished"]["perplexity"] == 12.5
    assert rows["finished"]["report"] == "../out/finished.run/report.html"
    assert (batch.path / rows["finished"]["report"]).read_text() == "x"
    assert rows["retried"]["seconds"] is None and rows["retried"]["peak_memory"] == 2_000_000_000
    assert rows["finished"]["kl"] == 0.01 and rows["later"]["kl"] is None and rows["later"]["report"] is None
    page = (batch.path / "summary.html").read_text()
    assert "&lt;b&gt;no&lt;/b&gt; vLLM" in page and "<b>no</b>" not in page
    assert 'href="../out/finished.run/report.html"' in page and 'http-equiv="refresh"' in page
    assert not re.search(r"(src|href)=.https?:", page)
    # A bare reader sees the failed ones first.
    assert page.index("<b>gave_up</b></td>") < page.index("<b>finished</b></td>")
    assert summarize(batch)["counts"]["failed"] == 2


def test_hooks_get_the_summary_and_their_failure_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    script = tmp_path / "hook with space.sh"
    script.write_text(f'#!/bin/sh\necho "$BATCH_EVENT $BATCH_RUN $BATCH_REASON $BATCH_SUMMARY $1" >> {tmp_path}/told\n')
    script.chmod(0o755)
    Hooks(tmp_path, f"'{script}' '$(touch {tmp_path}/shell)'", None, lambda text, level: said.append(text)).notify(
        "failure", "a", "no disk"
    )
    told = (tmp_path / "told").read_text()
    assert told == f"failure a no disk {tmp_path / 'summary.json'} $(touch {tmp_path}/shell)\n"
    assert not (tmp_path / "shell").exists() and not said
    for command in ("/nowhere", "false"):
        Hooks(tmp_path, command, None, lambda text, level: said.append(text)).notify("end")
    assert len(said) == 2 and "ended with 1" in said[1]
    with pytest.raises(RecipeError, match="--notify"):
        Hooks(tmp_path, "echo 'open", None, lambda text, level: None)


def test_a_notify_command_that_is_not_there_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("source: {checkpoint: /nowhere}\n")
    code = main([str(recipe), "--directory", str(tmp_path / "batch"), "--notify", "/nowhere --now"])
    assert code == RecipeError.exit_code and not (tmp_path / "batch").exists()
    assert "--notify /nowhere --now: /nowhere is no program here" in capsys.readouterr().err


def test_the_last_run_of_a_cluster_ends_the_batch_once(tmp_path: Path) -> None:
    set_outstanding(tmp_path, ["a", "b"], [])
    assert [remove_outstanding(tmp_path, name) for name in ("b", "b", "a", "a", "c")] == [
        False,
        False,
        True,
        False,
        False,
    ]
    set_outstanding(tmp_path, ["a", "b"], [])
    remove_outstanding(tmp_path, "b")  # ended between the look at the queue and the next submission
    set_outstanding(tmp_path, ["c"], ["a", "b"])
    assert [remove_outstanding(tmp_path, name) for name in ("c", "a")] == [False, True]
