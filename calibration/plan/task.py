"""What a run works on: a recipe, a source and the plan that follows from both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import Checkpoint
from calibration.families.family import Family
from calibration.families.registry import open_source
from calibration.plan.plan import Plan
from calibration.plan.planner import make_plan
from recipes.schema import Recipe


@dataclass(frozen=True)
class Task:
    """A recipe, the source with its stored formats, and the plan. It does not change during a run."""

    recipe: Recipe
    formats: Formats
    plan: Plan

    @classmethod
    def open(cls, recipe: Recipe, directory: Path) -> Task:
        """The task of `recipe` on the source in `directory`, from its headers. Raises SourceError and RecipeError as
        `open_source` and `make_plan` do."""
        return cls.of(recipe, Formats(open_source(directory)))

    @classmethod
    def of(cls, recipe: Recipe, formats: Formats) -> Task:
        """The task of `recipe` on a source that is open already. Raises as `make_plan` does."""
        return cls(recipe, formats, make_plan(formats.checkpoint, formats, recipe))

    @property
    def source(self) -> Checkpoint:
        """The source checkpoint."""
        return self.formats.checkpoint

    @property
    def family(self) -> Family:
        """The family of the source, whose grammar names its tensors."""
        return self.plan.family

    @property
    def output(self) -> Path:
        """The directory of the output checkpoint."""
        return Path(self.recipe.output)

    @property
    def scratch(self) -> Path | None:
        """`offload.directory`, if the recipe names one."""
        return Path(self.recipe.offload.directory) if self.recipe.offload.directory else None
