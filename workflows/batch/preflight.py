"""The preflight of a batch: checks every recipe, source, output and disk before the first run starts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from calibration.checkpoint.files import write_text
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.side_files import side_files
from calibration.families.registry import open_source
from calibration.forecast.cost import boundary_bytes, hidden_width, nominal_shapes, scratch_bytes
from calibration.plan.budget import BudgetTask
from calibration.plan.task import Task
from calibration.runs.disk import Need, space_problems
from calibration.runs.journal import RunDirectory
from calibration.runs.output import overwrite_problems
from calibration.runs.resume import activations_directory, finished_blocks
from recipes.errors import EnvironmentProblem, RecipeError, SourceError, WorkflowError, collapsed
from recipes.loader import dump_recipe, load_recipe, recipe_digest
from recipes.matrix import Matrix, Resources, variants
from recipes.places import is_inside
from recipes.schema import Recipe
from verify.accuracy.tasks import request
from verify.serving.engine import check_environment, check_tasks
from workflows.batch.state import BatchDirectory, Entry, orphan
from workflows.run.budget import asked, known_choice
from workflows.run.rehearse import FILES_PER_BATCH, OWN_FILES, RUN_FILES
from workflows.source import require_apart, resolve_source


@dataclass(frozen=True)
class Wanted:
    """A run that the command line asks for: a recipe file and its overrides, under a unique name."""

    name: str
    recipe: Path
    overrides: tuple[str, ...] = ()
    output: str | None = None
    resources: Resources = field(default_factory=Resources)

    @property
    def given(self) -> str:
        """How the user spelled it."""
        return " ".join([str(self.recipe), *(f"--set {text}" for text in self.overrides)])


@dataclass
class Preflight:
    """What the preflight found: the runs in their order, and every problem with its exit code."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def require_sound(self) -> None:
        """Raises one error with every problem; its exit code is the smallest of theirs."""
        if self.problems:
            code = min(code for code, _ in self.problems)
            kind = next(kind for kind in (RecipeError, SourceError, EnvironmentProblem) if kind.exit_code == code)
            raise kind(collapsed(dict.fromkeys(text for _, text in self.problems)))


def wanted_runs(
    recipes: Sequence[Path], matrices: Sequence[tuple[Path, Matrix]], overrides: Sequence[str]
) -> list[Wanted]:
    """The runs of a command line in their order: the recipes, then each matrix. A run is named after its recipe file, with the
    directory in front if two files have one name. Raises RecipeError if a file is named twice, a base recipe cannot be read, or
    names clash."""
    again = [*_named_again(recipes, "recipe file"), *_named_again([path for path, _ in matrices], "matrix")]
    if again:
        raise RecipeError(again)
    stems = Counter(path.stem for path in recipes)
    found = [
        Wanted(
            path.stem if stems[path.stem] == 1 else f"{path.resolve().parent.name}-{path.stem}", path, tuple(overrides)
        )
        for path in recipes
    ]
    for _, matrix in matrices:
        base = Path(matrix.base)
        ours = load_recipe(base, overrides).output.rstrip("/")
        for variant, own in variants(matrix):
            name = f"{base.stem}-{variant}"
            output = matrix.output.replace("{name}", name) if matrix.output else f"{ours}-{variant}"
            found.append(Wanted(name, base, (*overrides, *own), output, matrix.resources))
    twice = [name for name, count in Counter(wanted.name for wanted in found).items() if count > 1]
    if twice:
        raise RecipeError([f"{name}: two runs have this name; rename one recipe file or variant" for name in twice])
    if not found:
        raise RecipeError("name at least one recipe file, or a matrix with --matrix")
    return found


def _named_again(paths: Iterable[Path], what: str) -> Iterator[str]:
    """A problem for each of `paths` that is a file named before, by whatever spelling or link."""
    first: dict[Path, Path] = {}
    for path in paths:
        file = path.resolve()
        if file in first:
            spelled = "" if str(first[file]) == str(path) else f", first as {first[file]}"
            yield f"{path}: this {what} is named twice{spelled}; name it once (--matrix runs variants of one recipe)"
        first.setdefault(file, path)


def require_own_places(wanted: Sequence[Wanted], places: Mapping[str, Path | None]) -> None:
    """Raises RecipeError if one of the `places` that the batch itself writes to, by the option that names it, lies in the source
    or in the output of a run. The preflight reports what is wrong with a recipe."""
    problems = []
    for run in wanted:
        with suppress(WorkflowError):
            recipe = load_recipe(run.recipe, run.overrides, run.output)
            source, output = Path(recipe.source.checkpoint), Path(recipe.output)
            for option, place in places.items():
                if place is None:
                    continue
                if source.is_dir() and is_inside(place, source):
                    problems.append(
                        f"{option}: {place} lies inside the source checkpoint {source}, which is read only; name another "
                        "directory"
                    )
                if is_inside(place, output):
                    problems.append(
                        f"{option}: {place} lies inside the output {output}, which holds a checkpoint alone; name another "
                        "directory"
                    )
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def preflight(
    wanted: Sequence[Wanted], batch: BatchDirectory, slots: int, overwrite: bool, say: Callable[[str], None],
    under_way: Collection[str] = (),
) -> Preflight:  # fmt: skip
    """Checks everything that can be known before the first run; freezes the recipes into the batch's directory and claims the
    outputs, except those of runs that a cluster has `under_way`. Opens a source once, however many runs read it. Collects
    all problems and raises none."""
    result = Preflight()
    loaded: dict[str, Recipe] = {}
    problems: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for run in wanted:
        try:
            loaded[run.name] = load_recipe(run.recipe, run.overrides, run.output)
            write_text(batch.frozen(run.name), dump_recipe(loaded[run.name]))
        except WorkflowError as error:
            problems[run.name] += [(error.exit_code, text) for text in error.problems]
    planned = _plan_runs(loaded, batch, problems, say)
    _require_separate_outputs(loaded, problems)
    _check_serving_engines(loaded, problems)
    for run in wanted:
        recipe = loaded.get(run.name)
        frozen = batch.frozen(run.name)
        entry = planned.get(run.name) or Entry(run.name, "", "", "" if recipe is None else recipe.output)
        entry = replace(entry, given=run.given, recipe=str(frozen.absolute()))
        if run.name in planned and run.name not in under_way:
            problems[run.name] += [
                (EnvironmentProblem.exit_code, text) for text in _claim_output(entry, batch, overwrite)
            ]
        if problems[run.name]:
            texts = (text.removeprefix(f"{run.name}: ") for _, text in problems[run.name])
            entry = replace(entry, problems=list(dict.fromkeys(texts)))
        result.entries.append(entry)
        result.problems += problems[run.name]
    result.problems += [(EnvironmentProblem.exit_code, text) for text in _space_problems(result.entries, slots)]
    return result


def predict_ends(entries: Sequence[Entry], slots: int) -> list[tuple[str, float | None]]:
    """(name, seconds from now) in the order in which the runs will end, each taking the first free slot; None from the first
    run whose time is unknown."""
    free = [0.0] * slots
    found: list[tuple[str, float | None]] = []
    known = True
    for entry in entries:
        known = known and entry.seconds is not None
        if not known or entry.seconds is None:
            found.append((entry.name, None))
            continue
        slot = min(range(slots), key=free.__getitem__)
        free[slot] += entry.seconds
        found.append((entry.name, free[slot]))
    return sorted(found, key=lambda pair: float("inf") if pair[1] is None else pair[1])


def space_needs(entry: Entry) -> tuple[Need, Need]:
    """The disk space that a run still needs: for the rest of its output, and for its activations."""
    scratch = activations_directory(Path(entry.scratch) if entry.scratch else None, entry.run.path, Path(entry.output))
    computed = entry.output_state().kind in ("done", "verify")
    rest, files = (0, 0) if computed else (entry.activation_bytes, entry.activation_files)
    written, saved = _size(Path(entry.output).glob("*.safetensors")), _size(scratch.rglob("*"))
    return (
        Need(entry.name, Path(entry.output), max(entry.output_bytes - written[0], 0), max(entry.files - written[1], 1)),
        Need(f"activations of {entry.name}", scratch, max(rest - saved[0], 0), max(files - saved[1], 0)),
    )


def _plan_runs(
    loaded: dict[str, Recipe],
    batch: BatchDirectory,
    problems: dict[str, list[tuple[int, str]]],
    say: Callable[[str], None],
) -> dict[str, Entry]:
    by_source: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for name, recipe in loaded.items():
        by_source[(recipe.source.checkpoint, recipe.source.revision)].append(name)
    entries = {}
    for (checkpoint, _), names in by_source.items():
        say(f"preflight: {checkpoint}, read by {len(names)} run{'s' if len(names) > 1 else ''}")
        try:
            formats = Formats(open_source(resolve_source(loaded[names[0]].source)))
        except WorkflowError as error:
            for name in names:
                problems[name] += [(error.exit_code, text) for text in error.problems]
            continue
        for name in names:
            try:
                entries[name] = _make_entry(name, batch.frozen(name), loaded[name], formats)
            except WorkflowError as error:
                problems[name] += [(error.exit_code, f"{name}: {text}") for text in error.problems]
    return entries


def _make_entry(name: str, frozen: Path, recipe: Recipe, formats: Formats) -> Entry:
    source = formats.checkpoint
    require_apart(recipe, source.directory)
    beside, budget = side_files(source.directory), None if recipe.budget is None else BudgetTask.of(recipe, formats)
    choice = None if budget is None else known_choice(RunDirectory(Path(recipe.output)).path, budget)
    task = Task.of(recipe, formats) if budget is None else budget.task_of(choice or budget.smallest)
    activation_bytes, activation_files = _activations(task)
    entry = Entry(
        name,
        given="",
        recipe=str(frozen.absolute()),
        output=recipe.output,
        method=recipe.method,
        recipe_digest=recipe_digest(recipe),
        plan_digest=task.plan.digest,
        output_bytes=task.plan.output_bytes if budget is None or choice else budget.limit,
        source_bytes=source.total_bytes,
        activation_bytes=activation_bytes,
        files=len(task.plan.shards) + len(beside.copied) + OWN_FILES + RUN_FILES,
        activation_files=activation_files,
        scratch=recipe.offload.directory,
        parameters=task.plan.parameters,
        bits_per_parameter=task.plan.bits_per_parameter
        if budget is None or choice
        else budget.budget.bits_per_parameter,
        budget="" if budget is None else asked(budget),
    )
    if entry.output_state().kind == "done":
        return entry
    return replace(entry, seconds=_predict_seconds(task, entry, None if choice else budget))


def _activations(task: Task) -> tuple[int, int]:
    """Bytes and files of activations that are on disk at any time, at most."""
    if task.recipe.method != "calibrate":
        return 0, 0
    shapes = nominal_shapes(task.recipe)
    boundary = boundary_bytes(hidden_width(task.source.config), shapes)
    most = scratch_bytes(boundary, len(task.plan.block_numbers), task.recipe.offload.max_host_memory)
    return most, FILES_PER_BATCH * len(shapes)


def _predict_seconds(task: Task, entry: Entry, budget: BudgetTask | None) -> float:
    """Seconds that calibration or conversion, the reading of verification and the measurement for a `budget` take on this machine
    if nothing else runs. Serving is not included; finished blocks cost nothing."""
    from calibration.forecast.predict import predict  # torch's products and the conversion's kernels
    from calibration.forecast.speed import Machine

    machine = Machine(task)
    stages = list(predict(task, machine, finished=finished_blocks(entry.run, task.plan))["stages"].values())
    if budget is not None:
        from calibration.forecast.measuring import predict_measuring  # imported late: needs transformers

        stages.append(predict_measuring(budget, machine))
    return float(sum(stage["seconds"] for stage in stages))


def _require_separate_outputs(loaded: dict[str, Recipe], problems: dict[str, list[tuple[int, str]]]) -> None:
    where = {name: Path(recipe.output).resolve() for name, recipe in loaded.items()}
    for name, output in where.items():
        for other, theirs in where.items():
            if name != other and (output == theirs or theirs in output.parents):
                how = "is also the output of" if output == theirs else "lies inside the output of"
                text = f"{name}: output {loaded[name].output} {how} {other}; give each run a directory of its own"
                problems[name].append((RecipeError.exit_code, text))


def _check_serving_engines(loaded: dict[str, Recipe], problems: dict[str, list[tuple[int, str]]]) -> None:
    users: dict[str, list[str]] = defaultdict(list)
    for name, recipe in loaded.items():
        if recipe.verify.serving is not None:
            users[recipe.verify.serving.python].append(name)
    for python, names in users.items():
        try:
            check_environment(python)
            for accuracy in {
                str(a): a for a in (loaded[name].verify.accuracy for name in names) if a is not None
            }.values():
                check_tasks(python, request(accuracy))
        except (EnvironmentProblem, RecipeError) as error:
            for name in names:
                problems[name] += [(error.exit_code, text) for text in error.problems]


def _claim_output(entry: Entry, batch: BatchDirectory, overwrite: bool) -> list[str]:
    """Why the output cannot be written to; claims it if it can."""
    holder = entry.run.holder()
    if holder is not None and orphan(batch.attempts(entry.name)) is None and not entry.run.free():
        return [f"{entry.output}: another process works on it ({holder}); wait for it, or name another output"]
    found = entry.output_state()
    if found.kind == "foreign" and not overwrite:
        return [f"{entry.output}: {found.why}; name another output, or pass --overwrite to replace what is there"]
    if found.kind == "foreign" and (problems := overwrite_problems(entry.run, Path(entry.output))):
        return problems
    try:
        taken = batch.claim(Path(entry.output))
    except OSError as error:
        return [f"{entry.output}: cannot be written: {error.strerror}; name another output"]
    return [taken] if taken else []


def _space_problems(entries: Sequence[Entry], slots: int) -> list[str]:
    """Compares the outputs of all runs, and the activations of those that may run at the same time, with each file system."""
    open_runs = [
        entry
        for entry in entries
        if not entry.problems and entry.plan_digest and entry.output_state().kind not in ("done", "verify")
    ]
    at_once = sorted(open_runs, key=lambda entry: entry.activation_bytes, reverse=True)[:slots]
    outputs, activations = [space_needs(entry)[0] for entry in open_runs], [space_needs(entry)[1] for entry in at_once]
    return space_problems([*outputs, *activations])


def _size(paths: Iterable[Path]) -> tuple[int, int]:
    """Bytes and number of the files among the paths."""
    sizes = [path.stat().st_size for path in paths if path.is_file()]
    return sum(sizes), len(sizes)
