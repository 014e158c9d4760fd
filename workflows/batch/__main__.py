"""`python -m workflows.batch RECIPE... [--matrix FILE]`: many recipes one after the other, unattended.

The same command again skips what is done and verified and resumes the rest. summary.html in the batch's directory is
rewritten after every block.

Exit codes: 0 every run is done; 2, 3, 4 the preflight found problems (recipe, source, environment), nothing was started;
6 at least one run failed, the others are done; 130 stopped (Ctrl-C, SIGTERM, --until): run the same command to resume.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from recipes.errors import BatchFailed, EnvironmentProblem, Interrupted, RecipeError, WorkflowError
from recipes.matrix import load_matrix, parse_resources
from recipes.streams import exit_with, parse_arguments, print_result, printed
from recipes.units import clock, size
from verify.report.tables import OutputConsole
from workflows.batch.attempt import Slot
from workflows.batch.executors import EXECUTORS, Executor, Jobs, find_jobs, make_executor, read_outcomes, submit_batch
from workflows.batch.hooks import Hooks
from workflows.batch.outcome import Outcome
from workflows.batch.preflight import Preflight, Wanted, predict_ends, preflight, require_own_places, wanted_runs
from workflows.batch.queue import Queue, Rules, parse_slots
from workflows.batch.state import BatchDirectory
from workflows.batch.submission import Submission
from workflows.batch.summary import print_summary, rewrite_summary, summarize, write_summary
from workflows.interrupts import Interrupts
from workflows.progress import Reporter


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse_arguments(_parser(), arguments)
    reporter = Reporter(options.log_level)
    interrupts = Interrupts()
    interrupts.install()
    batch: BatchDirectory | None = None
    try:
        try:
            batch = BatchDirectory(_directory(options), options.dry_run)
            if options.status:
                jobs = _find_submitted(batch)
                _show(batch, options.json, summarize(batch, jobs.under_way, jobs.ended))
                return printed()
            _work(options, batch, reporter, interrupts)
        except KeyboardInterrupt:
            raise Interrupted from None
    except WorkflowError as error:
        reporter.say(f"error: {error}", "error")
        return error.exit_code
    finally:
        if batch is not None:
            batch.close()
    return printed() if options.json else 0


@dataclass
class _Session:
    """One call of the command: what it was asked for and what it works with."""

    options: argparse.Namespace
    batch: BatchDirectory
    wanted: Sequence[Wanted]
    slots: Sequence[Slot]
    rules: Rules
    hooks: Hooks
    reporter: Reporter
    interrupts: Interrupts


def _work(options: argparse.Namespace, batch: BatchDirectory, reporter: Reporter, interrupts: Interrupts) -> None:
    slots = parse_slots(options.gpus)
    rules = Rules(options.tries, options.backoff, _until(options.until), options.space_patience * 60, options.overwrite)
    wanted = wanted_runs(options.recipes, [(path, load_matrix(path)) for path in options.matrix], options.set)
    require_own_places(wanted, {"--directory": batch.path, "--mlflow": options.mlflow})
    hooks = Hooks(batch.path, options.notify, options.mlflow, reporter.say)
    session = _Session(options, batch, wanted, slots, rules, hooks, reporter, interrupts)
    if options.executor is None:  # a cluster's nodes may have other programs than this machine
        hooks.require_command()
    executor = None if options.executor is None else make_executor(options.executor)
    batch.open()
    under_way = _jobs_under_way(batch)
    if executor is None:
        _require_no_jobs(under_way)
    found = preflight(wanted, batch, len(slots), options.overwrite, reporter.say, under_way)
    if not options.keep_going:
        found.require_sound()
    for _, problem in found.problems:
        reporter.say(f"preflight: {problem}", "error")
    _say_plan(found, len(slots), reporter)
    if options.dry_run:
        return
    if executor is None:
        _run_here(session, found)
    else:
        _submit(session, found, executor)


def _run_here(session: _Session, found: Preflight) -> None:
    """Works through the runs in this process's queue."""
    batch, hooks, say = session.batch, session.hooks, session.reporter.say
    _require_no_jobs(_jobs_under_way(batch))  # the preflight may have taken minutes
    batch.save(found.entries, slots=len(session.slots))
    queue = Queue(
        batch, found.entries, session.slots, session.rules, say,
        should_stop=lambda: session.interrupts.requested,
        changed=lambda: rewrite_summary(batch, say),
        failed=lambda entry, reason: hooks.notify("failure", entry.name, reason),
    )  # fmt: skip
    try:
        with session.interrupts.deferring():
            queue.work()
    finally:
        summary = summarize(batch)
        _show(batch, session.options.json, summary)
        hooks.track(summary)
        hooks.notify("end")
    _judge(queue.outcomes, queue.stopping)


def _submit(session: _Session, found: Preflight, executor: Executor) -> None:
    """Gives the runs to the executor that `--executor` names."""
    options, batch = session.options, session.batch
    resources = {
        entry.name: parse_resources(options.resource, wanted.resources)
        for wanted, entry in zip(session.wanted, found.entries, strict=True)
    }
    batch.save(found.entries, slots=len(session.slots))
    batch.release_claims()
    work = Submission(
        options.executor, batch, found.entries, resources, session.rules, session.slots, session.hooks,
        should_stop=lambda: session.interrupts.requested,
    )  # fmt: skip
    try:
        with session.interrupts.deferring():
            submit_batch(executor, work)
    except KeyboardInterrupt:
        executor.stop(batch)
        raise
    finally:
        _show(batch, options.json, write_summary(batch, find_jobs(batch, found.entries).under_way))
    if executor.waits:
        _judge(read_outcomes(batch, found.entries), "stopped")


def _find_submitted(batch: BatchDirectory) -> Jobs:
    """The jobs of a batch; none if none of its runs was ever submitted."""
    entries, _ = batch.load()
    if not any(attempt["fact"] == "submitted" for entry in entries for attempt in batch.attempts(entry.name)):
        return Jobs()
    return find_jobs(batch, entries)


def _jobs_under_way(batch: BatchDirectory) -> Mapping[str, str]:
    return _find_submitted(batch).under_way if (batch.path / "batch.json").exists() else {}


def _require_no_jobs(under_way: Mapping[str, str]) -> None:
    if under_way:
        raise EnvironmentProblem(
            [f"{name}: {job}; wait for it, or end it with scancel" for name, job in under_way.items()]
        )


def _judge(outcomes: dict[str, Outcome], why: str) -> None:
    bad = [f"{name}: {outcome.reason}" for name, outcome in outcomes.items() if outcome.kind == "failed"]
    left = [name for name, outcome in outcomes.items() if outcome.kind == "stopped"]
    if left:
        raise Interrupted([f"{why}: {len(left)} runs are left; run the same command to resume", *bad])
    if bad:
        raise BatchFailed([f"{len(bad)} of {len(outcomes)} runs failed", *bad])


def _say_plan(found: Preflight, slots: int, reporter: Reporter) -> None:
    sound = [entry for entry in found.entries if not entry.problems and entry.output_state().kind != "done"]
    total = sum(entry.output_bytes for entry in sound)
    reporter.say(f"preflight: {len(sound)} of {len(found.entries)} runs are to be done, outputs {size(total)}")
    for name, seconds in predict_ends(sound, slots):
        when = "time unknown" if seconds is None else f"ends in {clock(seconds)} or later"
        reporter.say(f"  {name}: {when}")


def _show(batch: BatchDirectory, as_json: bool, summary: dict[str, object]) -> None:
    if as_json:
        print_result(json.dumps(summary, indent=2))
    else:
        print_summary(summary, OutputConsole(200))


def _directory(options: argparse.Namespace) -> Path:
    if options.directory is not None:
        return Path(options.directory)
    files = [*options.matrix, *options.recipes]
    if not files:
        raise RecipeError("name at least one recipe file, a matrix with --matrix, or with --status a --directory")
    more = f"-and-{len(files) - 1}-more" if len(files) > 1 else ""
    return Path(f"batch-{files[0].stem}{more}.run")


def _until(text: str | None) -> float | None:
    """The next time that this machine's clock shows `HH:MM`, in seconds since the epoch. Raises RecipeError."""
    if text is None:
        return None
    try:
        hour = datetime.strptime(text, "%H:%M")
    except ValueError:
        raise RecipeError(f"--until {text}: must be a time of day such as 07:00") from None
    now = datetime.fromtimestamp(time.time())
    when = now.replace(hour=hour.hour, minute=hour.minute, second=0, microsecond=0)
    return (when if when > now else when + timedelta(days=1)).timestamp()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipes", type=Path, nargs="*", metavar="RECIPE", help="recipe YAML files, run in this order")
    add("--matrix", type=Path, action="append", default=[], metavar="FILE", help="a base recipe and its variants")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of every recipe")
    add("--directory", help="the batch's own directory (default: batch-<first file>.run in the current directory)")
    add("--gpus", metavar="0-3,4-7", help="one slot per entry; a run has its slot's GPUs for itself")
    add("--until", metavar="HH:MM", help="stop at this time, after every run has finished its block")
    add(
        "--tries",
        type=int,
        default=3,
        help="attempts in a row that finish nothing before a run is given up (default: 3)",
    )
    add(
        "--backoff",
        type=float,
        default=30,
        metavar="SECONDS",
        help="pause before the second attempt; four times longer before each further one (default: 30)",
    )
    add(
        "--space-patience",
        type=float,
        default=60,
        metavar="MINUTES",
        help="how long a run waits for a full disk (default: 60)",
    )
    add(
        "--keep-going",
        action="store_true",
        help="if the preflight finds problems, start the runs that have none",
    )
    add("--overwrite", action="store_true", help="replace what other recipes left in the outputs")
    add("--dry-run", action="store_true", help="run the preflight only; start nothing")
    add("--executor", choices=tuple(EXECUTORS), help="give the runs to submitit; slurm returns after the submission")
    add(
        "--resource",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what a job requests from the cluster, such as hours=8",
    )
    add("--status", action="store_true", help="show the state of every run; start nothing")
    add("--notify", metavar="CMD", help="run this on every failure and at the end (BATCH_EVENT, BATCH_SUMMARY)")
    add("--mlflow", type=Path, metavar="DIR", help="also write the results to an MLflow file store (extra: tracking)")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add("--json", action="store_true", help="print the summary as one JSON object on stdout")
    return parser


if __name__ == "__main__":
    exit_with(main)
