"""The dress rehearsal: before a run of hours, its whole way in miniature. The first block of every kind is calibrated, exported
and verified by the code that does it in the night, and the real vLLM serves the result.

What fails here would have failed in the morning. What was proven is kept in `rehearsal.json` of the run directory; the
miniature itself (`calibration.plan.miniature`) lies in `miniature/` of it and is removed at the end, or by the next start.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.checkpoint.files import no_link, read_json_or_none, write_json
from calibration.checkpoint.side_files import side_files
from calibration.plan.miniature import SAMPLES, TOKENS, Cut, NoMiniature, find_cut, make_miniature
from calibration.plan.task import Task
from calibration.plan.versions import versions
from calibration.runs.disk import Need, space_problems
from calibration.runs.memory import available_memory
from recipes.checks import Serving
from recipes.errors import EnvironmentProblem, Interrupted, VerificationFailed, WorkflowError
from recipes.units import duration, size
from verify.checks import Check, failed, level_verdicts, unchecked
from verify.known import Known
from verify.levels import Settings, verify_levels
from verify.report.remedies import remedy
from verify.serving.agreement import ID, WHAT
from verify.serving.serving import check_serving
from workflows.progress import Reporter
from workflows.run import forward_proof
from workflows.run.proofs import REHEARSAL, compared_forwards
from workflows.run.state import Run

if TYPE_CHECKING:  # torch takes seconds to import
    from calibration.data.batches import CalibrationData

SCRATCH = "miniature"
#: Seconds of the predicted run below which `rehearse.serving: auto` rehearses nothing: its morning comes before the coffee.
LONG = 900.0
#: Seconds that vLLM takes to start and to answer, and bytes per second that it loads, on 2 cores (docs/cost-model.md).
_START, _LOAD = 45.0, 100e6
#: Anonymous memory of vLLM on a CPU besides weights.
_ENGINE_BYTES = 2_500_000_000
_GENERATED = 4
#: vLLM's log, request and result, in the run directory.
_LOGS = "logs/rehearsal"
_WHAT = "the miniature does in vLLM what the whole will be asked for"
#: How a prompt is skipped if the tokenizer has no chat template at all, in transformers' words.
_NO_TEMPLATE = "Cannot use chat template functions because tokenizer.chat_template is not set"


def remove_remains(run: Run) -> None:
    """Removes the miniature that a killed rehearsal left."""
    for path in (run.directory.path / SCRATCH, run.directory.path / f"{SCRATCH}.run"):
        shutil.rmtree(path, ignore_errors=True)


def dress_rehearsal(run: Run, stages: Sequence[Callable[[Run], None]]) -> None:
    """Walks the miniature through `stages`, those that make an output, and verifies it.

    Rehearses the run unless it is short, was rehearsed before, or has no miniature, and reports which. Raises the error that
    the run would have ended with: VerificationFailed that lists every failed check, or what calibration and export raise."""
    wanted, serving = run.recipe.rehearse.serving, run.recipe.verify.serving
    predicted = (run.prediction or {}).get("stages", {}).get("calibrate", {}).get("seconds")
    serves = serving is not None and wanted is not False
    if wanted is not True and (predicted is None or predicted < LONG):
        run.reporter.say(
            f"no dress rehearsal: the run is predicted to take {duration(predicted or 0)}, less than {duration(LONG)} "
            "(rehearse.serving: true asks for one)"
        )
        family = run.plan.family
        if serves and family.derived and not family.tested and run.prepared.rehearsal is not None:
            _forward_alone(run)
        return
    found = _Proof(run, serves)
    with found.alone():
        if (where := found.held_by()) is not None:
            found.adopt(where)
            return run.reporter.say(f"rehearsed before, by the same plan, recipe and versions: {where}")
        _rehearse_and_keep(run, serves, stages, found)


def _rehearse_and_keep(run: Run, serves: bool, stages: Sequence[Callable[[Run], None]], found: _Proof) -> None:
    began = time.monotonic()
    try:
        checks, facts = _rehearse(run, serves, stages)
    except NoMiniature as why:
        checks, facts = [unchecked("serving.rehearsal", _WHAT, str(why))], {}
    except WorkflowError as error:
        if isinstance(error, Interrupted):
            raise
        found.keep([], {"problems": error.problems, "seconds": round(time.monotonic() - began, 1)})
        raise type(error)([f"dress rehearsal: {problem}" for problem in error.problems]) from None
    finally:
        remove_remains(run)
    facts["seconds"] = round(time.monotonic() - began, 1)
    if run.recipe.verify.serving is not None and not serves:
        checks.append(unchecked("serving.rehearsal", _WHAT, "rehearse.serving is false"))
    found.keep(checks, facts)
    _report(run, checks, facts)


class _Proof:
    """What a rehearsal has proven, in the run directory, and in a directory that the runs of a batch share. It holds for the
    plan, the parts of the recipe that the rehearsal depends on, the source's state, and the versions of the packages and of
    vLLM."""

    def __init__(self, run: Run, serves: bool) -> None:
        self.path, self.shared = run.directory.path / REHEARSAL, run.rehearsals
        recipe = run.recipe.model_dump(mode="json", include=_DEPENDS)
        if serves and run.engine_version is None and run.recipe.verify.serving is not None:
            run.engine_version = check_serving(
                run.recipe.verify.serving, run.recipe.verify.accuracy, run.source.directory
            )
        body = {
            "plan": run.plan.digest, "recipe": recipe, "source": run.source.state, "config": run.source.config,
            "versions": versions(), "vllm": run.engine_version if serves else None,
        }  # fmt: skip
        text = json.dumps(body, sort_keys=True, default=str)
        self.key, self.plan = hashlib.sha256(text.encode()).hexdigest(), run.plan.digest

    def places(self) -> list[Path]:
        """The files that may hold it."""
        return [self.path, *([self.shared / f"{self.key[:16]}.json"] if self.shared is not None else [])]

    def held_by(self) -> Path | None:
        """The file of an earlier rehearsal with this key that was complete and in which nothing failed."""
        for path in self.places():
            kept = read_json_or_none(path) or {}
            if kept.get("key") == self.key and kept.get("complete") is True:
                return path
        return None

    def compared(self) -> bool:
        """Whether this run's directory holds a comparison of the forwards with this key that was made and did not fail."""
        found = compared_forwards(self.path, "key", self.key)
        return found is not None and found.get("verdict") in ("PASS", "WARN")

    def adopt(self, where: Path) -> None:
        """Copies what another run of the batch has proven into the run directory."""
        if where != self.path:
            write_json(self.path, read_json_or_none(where))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits for another run of the batch that rehearses the same."""
        if self.shared is None:
            yield
            return
        try:
            self.shared.mkdir(parents=True, exist_ok=True)
            with open(self.shared / f"{self.key[:16]}.lock", "a", opener=no_link) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise EnvironmentProblem(f"{self.shared}: cannot be written: {error.strerror}") from None

    def keep(self, checks: Sequence[Check], facts: dict[str, Any]) -> None:
        """Writes `rehearsal.json`, and a complete one where the batch's other runs look."""
        bad = [check.id for check in checks if check.verdict in ("FAIL", "UNCHECKED") and check.id in _DECISIVE]
        complete = "blocks" in facts and not bad and not failed(checks)
        body = {
            "key": self.key,
            "plan": self.plan,
            "complete": complete,
            **facts,
            "checks": [asdict(c) for c in checks],
        }
        for path in self.places() if complete else [self.path]:
            write_json(path, body)


#: The parts of a recipe that a rehearsal depends on besides the plan: not which text, and how much of it.
_DEPENDS: Any = {
    "source": True, "method": True, "modifiers": True, "convert": {"input_amax"}, "export": True, "verify": {"serving"},
    "rehearse": {"forward"},
    "calibration": {"experts", "min_tokens_per_expert", "input_headroom", "chat"},
}  # fmt: skip
#: Checks without which a rehearsal is not complete; a weight-only kernel, say, stays unchecked in every rehearsal.
_DECISIVE = frozenset({"serving.rehearsal", "serving.load", "serving.tensors", "serving.finite", "serving.generate"})


def _rehearse(run: Run, serves: bool, stages: Sequence[Callable[[Run], None]]) -> tuple[list[Check], dict[str, Any]]:
    """The checks of the miniature, and what is told of it. Raises NoMiniature and every error of a run."""
    cut = find_cut(run.task)
    directory = run.directory.path / SCRATCH
    try:
        small = make_miniature(run.task, cut, directory)
    except OSError as error:
        raise NoMiniature(f"{directory}: {error.strerror}") from None
    data = None if run.prepared.data is None else _few(run.prepared.data)
    needs = _needs(run, small, serves, data)
    facts: dict[str, Any] = {"blocks": list(cut.kept), "kinds": [list(kind) for kind in cut.kinds], "needs": needs}
    run.reporter.event("dress_rehearsal", blocks=facts["blocks"], needs=needs)
    run.reporter.say(
        f"dress rehearsal: blocks {', '.join(map(str, cut.kept))} as a model of their own: {size(needs['disk'])} of disk, "
        f"{size(needs['memory'])} of memory, {duration(needs['seconds'])}" + (", vLLM included" if serves else "")
    )
    _require_room(run, needs, serves)
    mini = _run_of(run, small)
    mini.prepared.data = data
    mini.directory.open()
    try:
        for stage in stages:
            stage(mini)
    finally:
        mini.directory.close()
    if not serves:
        return _verify(run, small, cut, serves), facts
    _free_device()
    checks = _verify(run, small, cut, serves)
    if data is not None and not failed(checks):
        checks.append(_forward(run, small, data))
    return checks, facts


def _forward(run: Run, small: Task, data: CalibrationData) -> Check:
    """Whether vLLM computes the model that was calibrated (`workflows.run.forward_proof`), as the recipe takes a difference."""
    place, serving = run.directory.path / SCRATCH, run.recipe.verify.serving
    assert serving is not None
    _free_device()
    more = forward_proof.needs(small, bool(_device_bytes()))
    served = more["memory"] + (0 if _device_bytes() else _ENGINE_BYTES)
    there = _device_bytes() or available_memory()
    if problems := space_problems([Need("the miniature's plain copy", place, more["disk"])]):
        return unchecked(ID, WHAT, problems[0])
    if served > there:
        return unchecked(ID, WHAT, f"the source's miniature takes {size(served)} in vLLM, and {size(there)} are there")
    rows = forward_proof.rows_of(data.batches)
    found = forward_proof.compare_forwards(
        small, rows, _lenient(serving), place, run.directory.path / forward_proof.LOGS
    )
    if found.verdict == "FAIL" and run.recipe.rehearse.forward == "warn":
        found = replace(found, verdict="WARN")
    return found


def _forward_alone(run: Run) -> None:
    """The proof `forward` before a short run of a family that no test of this project compares: what a dress rehearsal does
    besides would take as long as the run."""
    assert run.prepared.data is not None, "blocks were rehearsed with it"
    found, began = _Proof(run, True), time.monotonic()
    if found.compared():
        return
    try:
        small = make_miniature(run.task, find_cut(run.task), run.directory.path / SCRATCH)
        check = _forward(run, small, _few(run.prepared.data))
    except (NoMiniature, OSError) as why:
        check = unchecked(ID, WHAT, str(why))
    finally:
        remove_remains(run)
    found.keep([check], {"seconds": round(time.monotonic() - began, 1)})
    _report(run, [check], {})


def _few(data: CalibrationData) -> CalibrationData:
    """The beginnings of the first samples, one a batch."""
    from torch.utils.data import DataLoader

    from calibration.data.batches import CalibrationData

    rows: list[dict[str, Any]] = []
    for batch in data.batches:
        for row in range(len(batch["input_ids"])):
            rows.append({key: value[row : row + 1, :TOKENS] for key, value in batch.items()})
            if len(rows) == SAMPLES:
                break
        if len(rows) == SAMPLES:
            break
    tokens = sum(row["input_ids"].numel() for row in rows)
    batches: Any = DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    text = f"the first {tokens} tokens of {len(rows)} samples"
    return CalibrationData(batches, f"{data.digest}: miniature", len(rows), tokens, text, regrouped=False)


def _needs(run: Run, small: Task, serves: bool, data: CalibrationData | None) -> dict[str, Any]:
    """Bytes of disk and of memory, and seconds, of the miniature's run; `served`: the memory that vLLM alone takes."""
    from calibration.forecast.predict import Seen, predict
    from calibration.forecast.speed import Machine

    shapes = None if data is None else [tuple(batch["input_ids"].shape) for batch in data.batches]
    work = predict(small, Machine(small, run.ranks.device), Seen(shapes))["stages"]["calibrate"]
    written = small.plan.output_bytes
    forward = _START + forward_proof.needs(small, False)["disk"] / _LOAD if serves and data is not None else 0.0
    # On a CPU vLLM holds NVFP4 weights dequantized (verify/inside_vllm/cpu_nvfp4), on an accelerator as they are stored.
    served = written if _device_bytes() else written + 2 * small.formats.parameters + _ENGINE_BYTES
    return {
        "disk": work["bytes_written"],
        "memory": max(work["peak_memory"] or 0, served if serves and not _device_bytes() else 0),
        "served": served if serves else 0,
        "seconds": round(work["seconds"] + (_START + written / _LOAD if serves else 0) + forward),
    }


def _device_bytes() -> int:
    """The memory of the accelerator, or 0 if there is none."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def _free_device() -> None:
    """Gives the accelerator's memory back: vLLM takes nine tenths of all of it, and this process keeps what it has freed."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _require_room(run: Run, needs: dict[str, Any], serves: bool) -> None:
    if problems := space_problems([Need("the miniature", run.directory.path, needs["disk"])]):
        raise NoMiniature(problems[0])
    there = available_memory()
    if needs["memory"] > there:
        raise NoMiniature(f"it needs {needs['memory']:,} bytes of memory and {there:,} are free")
    if serves and 0 < _device_bytes() < needs["served"]:
        raise NoMiniature(f"it takes {needs['served']:,} bytes in vLLM, and the device has {_device_bytes():,}")


def _run_of(run: Run, small: Task) -> Run:
    mini = Run(small.recipe, Reporter(muted=True), interrupts=run.interrupts)
    mini.task, mini.side_files = small, side_files(small.source.directory)
    return mini


def _verify(run: Run, small: Task, cut: Cut, serves: bool) -> list[Check]:
    options = _lenient(run.recipe.verify.serving) if serves and run.recipe.verify.serving is not None else None
    settings = Settings(
        ["structure", *(["serving"] if options else [])],
        run.directory.path / _LOGS,
        serving=options,
        trust_remote_code=run.recipe.source.trust_remote_code,
    )
    checks, result = verify_levels(small.output, Known(small.plan, small.formats), settings)
    skipped = [entry["skipped"] for entry in result.get("prompts", []) if entry.get("skipped")]
    broken = [why for why in skipped if "chat template" in why and _NO_TEMPLATE not in why]
    if broken and (run.source.directory / "tokenizer_config.json").exists():
        problem = f"{broken[0]}; repair chat_template in the source's tokenizer files, or remove it"
        checks.append(
            Check("serving.chat", "FAIL", "the chat template works in vLLM", problem, "no error", "one message")
        )
    return checks


def _lenient(options: Serving) -> Serving:
    """The serving options without what only the whole model can meet: text, perplexity, coherence, the source's behavior."""
    require = options.require.model_copy(update={"max_perplexity": None, "coherent": False})
    few = min(options.max_tokens, _GENERATED)
    return options.model_copy(update={"text": None, "compare": False, "max_tokens": few, "require": require})


def _report(run: Run, checks: Sequence[Check], facts: dict[str, Any]) -> None:
    """Says what was proven. Raises VerificationFailed that lists the failed checks."""
    bad = failed(checks)
    numbers = facts.get("blocks", [])
    moved = (
        f" (block {', '.join(map(str, range(len(numbers))))} of the miniature: {', '.join(map(str, numbers))} of the source)"
        if numbers != list(range(len(numbers)))
        else ""
    )
    if bad:
        raise VerificationFailed(
            [f"dress rehearsal: {check.id}: {check.figure}{moved}; {_remedy(run, check)}" for check in bad]
        )
    for check in checks:
        if check.id == ID:
            run.reporter.say(
                f"forward: {check.verdict}: {check.figure}", "info" if check.verdict == "PASS" else "warning"
            )
        elif check.verdict == "UNCHECKED" and check.id in _DECISIVE:
            run.reporter.say(f"dress rehearsal: {check.id} UNCHECKED: {check.figure}", "warning")
        elif check.verdict == "WARN" and check.id != "serving.coherent":
            run.reporter.say(f"dress rehearsal: {check.id}: {check.figure}{moved}", "warning")
    if facts.get("blocks"):
        verdicts = ", ".join(
            f"{level} {verdict}" for level, verdict in level_verdicts(checks).items() if level != "fidelity"
        )
        run.reporter.say(f"dress rehearsal: {verdicts}, in {duration(facts['seconds'])}")


def _remedy(run: Run, check: Check) -> str:
    if check.id == "serving.chat":
        return "correct the template"
    if check.id == ID:
        return remedy(check)
    ended = check.id == "serving.load" or check.figure.startswith("stage ")
    log = run.directory.path / _LOGS / "serving.log"
    return f"vLLM's log is {log}, docs/troubleshooting.md has its usual reasons" if ended else remedy(check)
