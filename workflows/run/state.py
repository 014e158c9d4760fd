"""The state of a run: its task, its directory, and what its stages pass to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.checkpoint.side_files import SideFiles, side_files
from calibration.families.registry import open_source
from calibration.plan.budget import BudgetTask
from calibration.plan.plan import Plan
from calibration.plan.respelling import require_exact_scales
from calibration.plan.task import Task
from calibration.runs.journal import RunDirectory
from calibration.runs.ranks import Ranks
from recipes.schema import Recipe
from verify.checks import Check
from workflows.interrupts import Interrupts
from workflows.progress import Reporter
from workflows.run.report import ReportPage
from workflows.source import require_apart, resolve_source

if TYPE_CHECKING:  # torch and llm-compressor take seconds to import
    from calibration.data.batches import CalibrationData
    from calibration.forecast.rehearsal import Rehearsal
    from calibration.model.source_model import SourceModel

STAGES = ("inspect", "rehearse", "calibrate", "export", "verify")


@dataclass
class Prepared:
    """What the rehearsal loads and the calibrate stage reuses: the token batches and the empty model."""

    data: CalibrationData | None = None
    model: SourceModel | None = None
    rehearsal: Rehearsal | None = None

    @property
    def shapes(self) -> list[tuple[int, int]] | None:
        """`(samples, tokens each)` of every batch, if the data is loaded."""
        if self.data is None:
            return None
        return [tuple(batch["input_ids"].shape) for batch in self.data.batches]


@dataclass
class Run:
    """The run of one recipe. `make_plan` opens its source; the stages of `workflows.run.stages` do the work in
    order."""

    recipe: Recipe
    reporter: Reporter
    overwrite: bool = False
    restart: bool = False
    interrupts: Interrupts = field(default_factory=Interrupts)
    ranks: Ranks = field(default_factory=Ranks)
    #: Whether every check is printed at the end, not the verdict alone.
    details: bool = False
    output: Path = field(init=False)
    directory: RunDirectory = field(init=False)
    task: Task = field(init=False)
    side_files: SideFiles = field(default_factory=SideFiles)
    page: ReportPage = field(init=False)
    checks: list[Check] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    prepared: Prepared = field(default_factory=Prepared)
    #: The rehearsal's prediction, and what each stage of this process took.
    prediction: dict[str, Any] | None = None
    took: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: The recipe with its budget, if it has one; until it is settled, the task is the smallest choice's.
    budget: BudgetTask | None = None
    #: Where the runs of a batch keep what their rehearsals have proven.
    rehearsals: Path | None = None
    #: The version of the recipe's vLLM, after it was asked.
    engine_version: str | None = None

    def __post_init__(self) -> None:
        self.output = Path(self.recipe.output)
        self.directory = RunDirectory(self.output)
        self.page = ReportPage(self.output)

    @property
    def source(self) -> Checkpoint:
        """The source checkpoint."""
        return self.task.source

    @property
    def formats(self) -> Formats:
        """The stored formats of the source."""
        return self.task.formats

    @property
    def plan(self) -> Plan:
        """The plan: what happens to every tensor."""
        return self.task.plan

    def make_plan(self) -> None:
        """Opens the source and makes the plan from its headers. Starts and writes nothing. Raises RecipeError if the
        run would write into the source."""
        where = resolve_source(self.recipe.source)
        require_apart(self.recipe, where)
        formats = Formats(open_source(where))
        if self.recipe.budget is None:
            self.task = Task.of(self.recipe, formats)
        else:
            self.budget = BudgetTask.of(self.recipe, formats)
            self.task = self.budget.task_of(self.budget.smallest)
        require_exact_scales(self.plan, self.formats)
        self.side_files = side_files(where)
        for warning in self.plan.warnings:
            self.reporter.say(f"warning: {warning}", "warning")
        if left_out := list(self.side_files.left_out.items()):
            shown = ", ".join(f"{name} ({why})" for name, why in left_out[:5])
            more = f" and {len(left_out) - 5} more, in plan.json" if len(left_out) > 5 else ""
            self.reporter.say(f"warning: not copied from the source: {shown}{more}", "warning")

    def settle(self, choice: dict[str, str]) -> None:
        """From now on this is the run of the recipe that has the choice written out instead of its budget."""
        assert self.budget is not None, "the recipe has a budget"
        self.task = self.budget.task_of(choice)
        self.recipe = self.task.recipe
