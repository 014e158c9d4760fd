"""`python -m verify CHECKPOINT`: verifies a compressed-tensors NVFP4 checkpoint, ours or not.

Exit codes as in workflows.run: 0 no check says FAIL, 2 command line or recipe, 3 source, 4 environment, 5 a check says
FAIL.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.plan import Plan, make_plan
from recipes.errors import EnvironmentProblem, SourceError, VerificationFailed, WorkflowError, exit_with
from recipes.loader import load_recipe
from recipes.schema import Fidelity, Serving
from verify.checks import Check
from verify.levels import print_samples, verify_levels
from verify.page import Report
from verify.report import LEVELS, OutputConsole, failed, print_checks, to_json
from verify.serving import check_serving


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--source", type=Path, help="the checkpoint it was made from")
    parser.add_argument(
        "--recipe", type=Path, help="the recipe it was made with (default: recipe.yaml in the checkpoint)"
    )
    parser.add_argument("--level", choices=LEVELS, default="serving", help="check up to this level (default: serving)")
    parser.add_argument(
        "--python", help="interpreter of the vLLM environment (default: that of --recipe, or .venv-vllm)"
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the engine's requests, results and logs there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one self-contained page as well")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(arguments)
    try:
        checks, samples = verify(
            options.checkpoint, options.source, options.recipe, options.level, options.python, options.logs
        )
        if options.html is not None:
            write_page(options.html, Report(options.checkpoint.name, checks, samples=samples))
        if options.json:
            print(json.dumps(to_json(checks) | {"samples": samples}, indent=2))
        else:
            console = OutputConsole()
            print_checks(checks, console)
            print_samples(samples, console)
        bad = failed(checks)
        if bad:
            raise VerificationFailed([f"{options.checkpoint}: {len(bad)} of {len(checks)} checks say FAIL"])
    except WorkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write_page(path: Path, report: Report) -> None:
    """Writes the page of a report. Raises EnvironmentProblem where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(report.html(), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: --html: cannot be written: {error.strerror}; name another file") from None


def verify(
    checkpoint: Path, source: Path | None, recipe: Path | None, level: str, python: str | None, logs: Path | None = None
) -> tuple[list[Check], list[dict[str, str]]]:
    """Checks up to `level`; returns the checks and generated samples. `logs` gets the engine's logs. Raises
    WorkflowError for a wrong command, source or environment, never for a broken checkpoint."""
    if not checkpoint.is_dir():
        raise SourceError(f"{checkpoint}: no such checkpoint directory")
    plan: Plan | None = None
    formats: Formats | None = None
    serving, fidelity = Serving(), Fidelity()
    own = _own_recipe(checkpoint) if recipe is None else None
    used = recipe or own
    loaded = load_recipe(used) if used is not None else None
    if loaded is not None:
        serving, fidelity = loaded.verify.serving or serving, loaded.verify.fidelity or fidelity
    if own is not None:  # a checkpoint that came from elsewhere must not choose what is executed here
        serving = serving.model_copy(update={"python": Serving().python})
    if source is not None:
        formats = Formats(Checkpoint.open(source))
        plan = make_plan(formats.checkpoint, formats, loaded) if loaded is not None else None
    wanted = LEVELS[: LEVELS.index(level) + 1]
    serving = serving.model_copy(update={"python": python}) if python else serving
    if "serving" in wanted:
        check_serving(serving)
    with TemporaryDirectory(prefix="verify-") as temporary:
        checks, result = verify_levels(
            checkpoint, wanted, logs or Path(temporary), plan=plan, source=formats, fidelity=fidelity,
            text=loaded.calibration if loaded is not None else None, serving=serving,
            trust_remote_code=loaded is not None and loaded.source.trust_remote_code,
        )  # fmt: skip
    return checks, result.get("samples", [])


def _own_recipe(checkpoint: Path) -> Path | None:
    """The recipe inside the checkpoint where it is one of this project: llm-compressor writes a recipe.yaml too."""
    path = checkpoint / "recipe.yaml"
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return path if isinstance(body, dict) and {"source", "output"} <= body.keys() else None


if __name__ == "__main__":
    exit_with(main)
