"""`python -m verify CHECKPOINT`: verifies a compressed-tensors NVFP4 checkpoint, ours or not.

A checkpoint cannot grant itself anything: thresholds, data, trust and the interpreter come from the command line, from
the recipe that --recipe names, or from the defaults. A recipe.yaml inside the checkpoint only provides the plan. A
check without its inputs is UNCHECKED, never PASS. docs/verification.md lists every check with its threshold.

Exit codes as in workflows.run: 0 no check says FAIL, 2 command line or recipe, 3 source, 4 environment, 5 a check says
FAIL, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from calibration.checkpoint.files import is_directory, write_json
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.hub import named_directory
from calibration.checkpoint.index import Checkpoint
from calibration.families.registry import open_source
from calibration.plan.plan import Plan
from calibration.plan.planner import make_plan
from calibration.plan.task import Task
from recipes.checks import Fidelity, Serving
from recipes.errors import EnvironmentProblem, RecipeError, SourceError, VerificationFailed, WorkflowError
from recipes.loader import load_recipe, read_yaml
from recipes.places import is_inside
from recipes.streams import exit_with, parse_arguments, print_result, printed
from verify.checks import LEVELS, Check, failed, to_json, verdict
from verify.known import Known
from verify.levels import Settings, print_samples, verify_levels
from verify.proof.prove import Proof, prove
from verify.proof.statistics import PROVENANCE_NAME, recorded_statistics
from verify.report.facts import Facts
from verify.report.page import Report
from verify.report.summary import print_quality, print_verdict
from verify.report.tables import OutputConsole, print_checks
from verify.serving.serving import check_serving
from verify.signature import require_public_key, signature_check


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Path, help="directory of the checkpoint to verify, or owner/name[@revision] of the hub"
    )
    parser.add_argument(
        "--source", type=Path,
        help="the checkpoint that it was made from, a directory or hub id: compares weights and blocks",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", type=Path,
        help="the recipe it was made with, for plan, thresholds, data and trust (default: the plan alone, from the "
        "checkpoint's own recipe.yaml)",
    )  # fmt: skip
    parser.add_argument(
        "--level", choices=LEVELS, help="check up to this level (default: serving; with --prove: structure)"
    )
    parser.add_argument(
        "--prove", action="store_true",
        help="derive every byte again from --source and the recipe, without calibrating, and name those that differ",
    )  # fmt: skip
    parser.add_argument(
        "--provenance", type=Path, metavar="FILE",
        help="provenance.json of the run, for its calibrated input scales (default: that of the run directory, if it is there)",
    )  # fmt: skip
    parser.add_argument(
        "--statement", type=Path, metavar="FILE", help="write there what --prove states, as an in-toto statement (JSON)"
    )
    parser.add_argument(
        "--python", help="interpreter of the vLLM environment (default: that of --recipe, or .venv-vllm)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code of the checkpoint and of the source: tokenizer, model",
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the engine's requests, results and logs there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one self-contained page as well")
    parser.add_argument("--details", action="store_true", help="print every check, not the verdict alone")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the verdict")
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="PEM file of the key that must have signed every file (model.sig)",
    )
    options = parse_arguments(parser, arguments)
    try:
        options.checkpoint = named_directory(options.checkpoint, "CHECKPOINT")
        options.source = options.source and named_directory(options.source, "--source")
        _require_apart(options)
        _require_provable(options)
        granted = Granted(options.python, options.trust_remote_code, options.logs)
        level = options.level or ("structure" if options.prove else "serving")
        if options.public_key is not None:
            require_public_key(options.public_key)
        checks, facts = verify(options.checkpoint, options.source, options.recipe, level, granted)
        if (signature := signature_check(options.checkpoint, options.public_key)) is not None:
            checks.insert(0, signature)
        if options.prove:
            provenance, own = options.provenance, options.checkpoint / PROVENANCE_NAME
            if provenance is None and signature is not None and signature.verdict == "PASS" and own.exists():
                provenance = own  # the signer vouches for it
            proof = prove_checkpoint(options.checkpoint, options.source, options.recipe, provenance)
            checks = [*checks, *proof.checks]
            if options.statement is not None:
                write_json(options.statement, proof.statement)
        if options.html is not None:
            write_page(options.html, Report(options.checkpoint.name, checks, measured=facts))
        if options.json:
            print_result(json.dumps(to_json(checks) | {"samples": facts.samples}, indent=2))
        elif options.details:
            console = OutputConsole()
            print_checks(checks, console)
            print_quality(checks, facts, console)
            print_samples(facts.samples, console)
        else:
            places = {"checkpoint": options.checkpoint} | ({"report": options.html} if options.html else {})
            facts = replace(facts, places={name: str(path) for name, path in places.items()})
            print_verdict(checks, facts, OutputConsole())
        bad = failed(checks)
        if bad:
            raise VerificationFailed([f"{options.checkpoint}: {len(bad)} of {len(checks)} checks say FAIL"])
    except WorkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return printed()


def _require_apart(options: argparse.Namespace) -> None:
    """Raises RecipeError if a page or logs would be written into a checkpoint."""
    places = {"--html": options.html, "--logs": options.logs, "--statement": options.statement}
    written = [(name, path) for name, path in places.items() if path is not None]
    read = [path for path in (options.checkpoint, options.source) if path is not None]
    problems = [
        f"{name}: {path} lies inside the checkpoint {place}, which is only read; name another place"
        for name, path in written
        for place in read
        if is_inside(path, place)
    ]
    if problems:
        raise RecipeError(problems)


def _require_provable(options: argparse.Namespace) -> None:
    """Raises RecipeError if the options of a proof are not all there, or there without it."""
    if options.prove and options.source is None:
        raise RecipeError("--prove: needs --source, the checkpoint that it was made from")
    alone = [name for name in ("provenance", "statement") if getattr(options, name) is not None and not options.prove]
    if alone:
        raise RecipeError(f"--{alone[0]}: belongs to --prove; add it")


def write_page(path: Path, report: Report) -> None:
    """Writes the page of a report. Raises EnvironmentProblem if it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(report.html(), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: --html: cannot be written: {error.strerror}; name another file") from None


@dataclass(frozen=True)
class Granted:
    """What the caller of a verification allows and no file of the checkpoint can: `python` is vLLM's interpreter (None:
    the recipe's, or the default), `trust_remote_code` allows running the checkpoint's own code, `logs` is a directory
    in which to keep the engine's files."""

    python: str | None = None
    trust_remote_code: bool = False
    logs: Path | None = None


def verify(
    checkpoint: Path, source: Path | None, recipe: Path | None, level: str, granted: Granted | None = None
) -> tuple[list[Check], Facts]:
    """Runs the checks up to `level`; returns them, the sizes, and what the engine did. `recipe` is a file that the caller
    named. Raises WorkflowError for a wrong command, source or environment, never for a broken checkpoint."""
    granted = granted or Granted()
    if not is_directory(checkpoint):
        raise SourceError(f"{checkpoint}: no such checkpoint directory")
    named = load_recipe(recipe) if recipe is not None else None
    serving, fidelity, text, accuracy = Serving(), Fidelity(), None, None
    if named is not None:
        serving, fidelity = named.verify.serving or serving, named.verify.fidelity or fidelity
        text, accuracy = named.calibration, named.verify.accuracy
    formats = Formats(open_source(source)) if source is not None else None
    plan, own = None, list[Check]()
    if formats is not None and named is not None:
        plan = make_plan(formats.checkpoint, formats, named)
    elif formats is not None:
        plan, own = own_plan(checkpoint, formats)
    wanted = LEVELS[: LEVELS.index(level) + 1]
    serving = serving.model_copy(update={"python": granted.python}) if granted.python else serving
    if "serving" in wanted:
        check_serving(serving, accuracy, checkpoint, *([source] if source is not None else []))
    with TemporaryDirectory(prefix="verify-") as temporary:
        settings = Settings(
            wanted, granted.logs or Path(temporary), fidelity, text, serving, accuracy,
            trust_remote_code=granted.trust_remote_code or (named is not None and named.source.trust_remote_code),
        )  # fmt: skip
        checks, result = verify_levels(checkpoint, Known(plan, formats), settings)
    facts = Facts(
        source_bytes=formats.checkpoint.total_bytes if formats is not None else None,
        output_bytes=_tensor_bytes(checkpoint),
        served=result,
        samples=result.get("samples", []),
    )
    return own + checks, facts


def prove_checkpoint(checkpoint: Path, source: Path, recipe: Path | None, provenance: Path | None = None) -> Proof:
    """The proof of a checkpoint by the recipe that the caller names, or else by its own recipe.yaml, which only says what to
    derive. Raises RecipeError if there is neither, and for one that makes no plan of the source."""
    path = recipe or checkpoint / "recipe.yaml"
    remedy = "name the recipe that it was made with by --recipe"
    if recipe is None and not path.exists():
        raise RecipeError(f"--prove: {checkpoint} holds no recipe.yaml, which says what to derive; {remedy}")
    if recipe is None and not {"source", "output"} <= read_yaml(path)[1].keys():
        raise RecipeError(f"--prove: {path}: is no recipe of this project; {remedy}")
    task = Task.open(load_recipe(path), source)
    return prove(checkpoint, task, recorded_statistics(checkpoint, provenance))


def _tensor_bytes(checkpoint: Path) -> int | None:
    """Bytes of its tensors; None if it is too broken to say."""
    try:
        return Checkpoint.open(checkpoint).total_bytes
    except SourceError:
        return None


def own_plan(checkpoint: Path, source: Formats) -> tuple[Plan | None, list[Check]]:
    """The plan that the recipe inside a checkpoint makes from the source, and a check that says whether it could be
    made. Nothing else of that recipe is used. A recipe.yaml of llm-compressor is ignored."""
    id, what = "structure.recipe", "the recipe inside the checkpoint makes a plan of the source"
    path = checkpoint / "recipe.yaml"
    if not path.exists():
        return None, []
    try:
        if not {"source", "output"} <= read_yaml(path)[1].keys():
            return None, []
        plan = make_plan(source.checkpoint, source, load_recipe(path))
    except WorkflowError as error:
        doubt = f"recipe.yaml is not used, name one with --recipe: {error.problems[0]}"
        return None, [verdict(id, what, [], [doubt], "headers of the source")]
    return plan, [verdict(id, what, [], [], "headers of the source", f"{len(plan.quantized)} modules to quantize")]


if __name__ == "__main__":
    exit_with(main)
