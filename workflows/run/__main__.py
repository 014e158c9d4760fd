"""`python -m workflows.run recipe.yaml`: inspect -> rehearse -> calibrate -> export -> verify.

A run that stopped resumes with the same command. docs/running.md explains the stages, docs/troubleshooting.md the messages.

Exit codes: 0 success; 1 a defect of this program; 2 recipe or command line; 3 source checkpoint or data set;
4 environment (disk, output, vLLM); 5 verification failed; 130 interrupted; 141 the result of --status, --dry-run or
--json could not be printed.
"""

from __future__ import annotations

import argparse
import json
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import write_json
from calibration.runs.ranks import Ranks
from calibration.runs.torchrun import connect
from recipes.errors import Interrupted, RecipeError, VerificationFailed, WorkflowError, printable
from recipes.loader import load_recipe
from recipes.streams import exit_with, parse_arguments, print_result, printed
from verify.checks import Check, failed, level_verdicts
from verify.levels import print_samples
from verify.report.summary import print_quality, print_verdict
from verify.report.tables import OutputConsole, print_checks
from workflows.inspect_checkpoint import describe_budget, print_budget, print_checkpoint, print_plan
from workflows.interrupts import Interrupts
from workflows.progress import Reporter
from workflows.run import prediction as estimate
from workflows.run import stages
from workflows.run.budget import choose_schemes
from workflows.run.report import verdict_facts
from workflows.run.state import STAGES, Run
from workflows.run.status import read_status, render_status


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code. Only defects print a traceback."""
    options = parse_arguments(_parser(), arguments)
    interrupts = Interrupts()
    interrupts.install()
    try:
        ranks = connect()
    except WorkflowError as error:
        Reporter(options.log_level).say(f"error: {error}", "error")
        return error.exit_code
    interrupts.hopeless, interrupts.silent = ranks.failing, not ranks.writes
    reporter = Reporter(options.log_level, muted=not ranks.writes)
    run: Run | None = None
    try:
        try:
            chosen = _chosen(options)
            recipe = load_recipe(options.recipe, options.set, options.output)
            if options.status:
                if ranks.writes:
                    status = read_status(Path(recipe.output))
                    print_result(
                        json.dumps(status, indent=2) if options.json else printable("\n".join(render_status(status)))
                    )
                return printed()
            run = Run(recipe, reporter, options.overwrite, options.restart, interrupts, ranks, options.details)
            run.rehearsals = options.rehearsals
            _execute(run, chosen, options.dry_run, options.json)
        except KeyboardInterrupt:
            raise Interrupted from None
        except Exception as error:
            if ranks.size == 1 or isinstance(error, WorkflowError):
                raise
            # The other ranks must stop, and the rank with the defect must print the traceback.
            ended = ranks.agree(WorkflowError(f"{type(error).__name__}: {error}: a defect here"))
            if ranks.failure is not None and ranks.failure.rank == ranks.rank:
                traceback.print_exc()
            raise ended from None
    except (WorkflowError, KeyboardInterrupt) as end:  # Stopped may come while another error is handled
        agreed = _agreed(ranks, end)
        if ranks.speaks:
            if ranks.writes:
                reporter.event("error", exit_code=agreed.exit_code, problems=agreed.problems)
            elif run is not None:  # rank 0 is lost and cannot write the event that --status reads
                run.directory.event("error", exit_code=agreed.exit_code, problems=agreed.problems)
            reporter.muted = False
            reporter.say(f"error: {_shortened(agreed, options)}", "error")
            if options.json:
                print_result(json.dumps(_result(run, agreed), indent=2))
        return agreed.exit_code
    finally:
        if run is not None:
            run.directory.close()
            if reporter.directory is not None:
                with suppress(
                    KeyboardInterrupt
                ):  # the run's end is already reported; another Ctrl-C only stops writing the page
                    run.page.update(now=True)
        ranks.end()
    if options.json and not options.dry_run and ranks.writes:
        print_result(json.dumps(_result(run, None), indent=2))
    return printed() if options.json or options.dry_run else 0


def _agreed(ranks: Ranks, end: BaseException) -> WorkflowError:
    """How all ranks end, if this one ends so."""
    own = end if isinstance(end, WorkflowError) else Interrupted()
    try:
        return ranks.agree(own)
    except KeyboardInterrupt:  # Stopped comes again until the ranks agree
        return ranks.agree(own)


def _execute(run: Run, chosen: list[str], dry_run: bool, as_json: bool) -> None:
    run.make_plan()
    choose_schemes(run, chosen, dry_run)
    ranks = run.ranks
    if ranks.size > 1 and "calibrate" in chosen:
        stages.require_shareable(run.recipe)
    if not ranks.writes:
        # Only calibration is distributed: rank 0 alone runs the other stages.
        if "calibrate" in chosen and not dry_run and not ranks.all_gather("inspect", False)[0]:
            stages.calibrate(run)
        return
    if dry_run:
        return _dry_run(run, as_json)
    done = stages.judged_before(run, chosen)
    if done is not None:
        ranks.all_gather("inspect", True)
        return _judge(run, done, as_json)
    # The checks of inspect are cheap and protect the later stages, so they run whatever stage is chosen.
    with run.reporter.stage("inspect"):
        stages.inspect(run, chosen)
    if "calibrate" in chosen:
        ranks.all_gather("inspect", False)
    for name in chosen[1:] if chosen[0] == "inspect" else chosen:
        with run.reporter.stage(name), estimate.measured(run.took, name):
            getattr(stages, name)(run)
    _compare(run)
    _judge(run, run.checks, as_json)


def _judge(run: Run, checks: list[Check], as_json: bool) -> None:
    run.checks = checks
    _summarize(run, as_json)
    bad = failed(run.checks)
    if bad:
        raise VerificationFailed(
            [f"{run.output}: verification failed: {len(bad)} of {len(run.checks)} checks"]
            + [f"{check.id}: {check.figure}" for check in bad]
        )


def _dry_run(run: Run, as_json: bool) -> None:
    """Prints the plan and the prediction for this machine. Starts nothing and leaves no file."""
    from calibration.forecast.predict import predict  # imported late: needs torch and the conversion's kernels
    from calibration.forecast.speed import Machine

    facts = stages.describe_run(run)
    unsettled = run.budget if run.recipe.budget is not None else None
    if unsettled is not None:
        facts["budget"] = describe_budget(unsettled)
    machine = Machine(run.task, run.ranks.device)
    facts["estimate"] = predict(run.task, machine, ranks=run.ranks.size)
    if unsettled is not None:
        from calibration.forecast.measuring import predict_measuring  # imported late: needs transformers

        facts["estimate"]["stages"] = {"budget": predict_measuring(unsettled, machine)} | facts["estimate"]["stages"]
    if as_json:
        print_result(json.dumps(facts, indent=2))
        return
    console = OutputConsole()
    print_checkpoint(facts["checkpoint"], console)
    print_plan(facts["plan"], console)
    if unsettled is not None:
        print_budget(facts["budget"], console)
    predicted = facts["predicted"]
    console.print(
        f"needs: {predicted['output_bytes']:,} bytes of disk for the output; memory: one block "
        f"{predicted['largest_block_bf16_bytes']:,} in BF16, activations {predicted['activation_bytes_at_a_boundary']:,}"
    )
    for line in estimate.render(facts["estimate"]) + facts["estimate"]["notes"]:
        console.print(line, soft_wrap=True)


def _compare(run: Run) -> None:
    """Prints and saves the rehearsal's prediction, if there is one, beside what the stages took."""
    if run.prediction is None:
        return
    both = estimate.compare(run.prediction, run.took)
    run.reporter.event("estimate", **both)
    write_json(run.directory.path / estimate.FILE, both)
    for line in estimate.render(both):
        run.reporter.say(line)


def _summarize(run: Run, as_json: bool) -> None:
    if as_json or not run.checks:
        return
    console, facts = OutputConsole(), verdict_facts(run.output)
    if not run.details:
        return print_verdict(run.checks, facts, console)
    print_checks(run.checks, console)
    print_quality(run.checks, facts, console)
    print_samples(stages.read_samples(run), console)
    console.print(f"output: {run.output}", soft_wrap=True)
    console.print(
        f"run directory: {run.directory.path} (report.html, events.jsonl, verify.json, serving.json, logs/)",
        soft_wrap=True,
    )


def _shortened(error: WorkflowError, options: argparse.Namespace) -> WorkflowError:
    """A failed verification in one line: the verdict before it shows the figures."""
    if options.details or options.json or not isinstance(error, VerificationFailed) or len(error.problems) < 2:
        return error
    said, *figures = error.problems
    more = f" and {len(figures) - 3} more" if len(figures) > 3 else ""
    return VerificationFailed(f"{said}: {', '.join(figure.partition(':')[0] for figure in figures[:3])}{more}")


def _result(run: Run | None, error: WorkflowError | None) -> dict[str, Any]:
    return {
        "output": str(run.output) if run else None,
        "run_directory": str(run.directory.path) if run else None,
        "exit_code": error.exit_code if error else 0,
        "problems": error.problems if error else [],
        "verdicts": level_verdicts(run.checks) if run else {},
        "samples": stages.read_samples(run) if run else [],
    }


def _chosen(options: argparse.Namespace) -> list[str]:
    if options.stages and options.from_stage:
        raise RecipeError("--stages and --from exclude each other; give one of them")
    if options.from_stage:
        names = list(STAGES[STAGES.index(options.from_stage) :])
    else:
        names = options.stages.split(",") if options.stages else list(STAGES)
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise RecipeError(f"--stages: {', '.join(unknown)} unknown; stages are {', '.join(STAGES)}")
    return [name for name in STAGES if name in names and not (options.no_rehearsal and name == "rehearse")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="recipe YAML file")
    parser.add_argument("--stages", metavar="A,B", help=f"run only these of the stages {', '.join(STAGES)}")
    parser.add_argument("--from", dest="from_stage", choices=STAGES, help="run this stage and those after it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a recipe key, e.g. calibration.num_samples=32",
    )
    parser.add_argument("--output", help="override the recipe's output directory")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already in the output")
    parser.add_argument(
        "--restart", action="store_true", help="discard what an unfinished run has finished, and start over"
    )
    parser.add_argument("--no-rehearsal", action="store_true", help="skip stage rehearse")
    parser.add_argument("--rehearsals", type=Path, metavar="DIRECTORY",
                        help="where several runs share what their dress rehearsals have proven (a batch does)")  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and the predicted disk, memory and time; start nothing"
    )
    parser.add_argument("--status", action="store_true", help="print how far the run is; start nothing")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info",
                        help="how much is printed (default: info)")  # fmt: skip
    parser.add_argument("--details", action="store_true", help="print every check at the end, not the verdict alone")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    return parser


if __name__ == "__main__":
    exit_with(main)
