"""What the levels of verify say of a spoiled checkpoint."""

from __future__ import annotations

from pathlib import Path

from recipes.checks import Serving
from tests.faults.checkpoints import Good
from tests.faults.faults import Fault
from tests.reference.engine import FORKED_PYTHON, random_prompts
from verify.checks import Check
from verify.fidelity.fidelity import verify_fidelity
from verify.known import Known
from verify.serving.serving import Experiment, source_as_stored, verify_serving
from verify.structure.structure import verify_structure


def judged(fault: Fault, good: Good, directory: Path) -> list[Check]:
    """The checks of the fault's level on the spoiled copy in `directory`."""
    if fault.level == "fidelity":
        return verify_fidelity(directory, good.plan, good.source)
    if fault.level == "structure":
        return verify_structure(directory)
    digests = good.digests if fault.level == "structure in a run" else {}
    return verify_structure(directory, Known(good.plan, good.source, digests))


def served(good: Good, directory: Path, logs: Path) -> list[Check]:
    """The checks of a served checkpoint, its source served too. Random weights predict so little that no KL goes far
    above 1, the default limit: the recipe asks for more here."""
    options = Serving.model_validate(
        {"python": FORKED_PYTHON, "max_tokens": 8, "text": None, "require": {"max_kl": 0.3, "min_top1": 0.5}}
    )
    experiment, source = Experiment(random_prompts(1024, (40, 200))), source_as_stored(good.source, options)
    checks, _ = verify_serving(directory, options, logs, source=source, experiment=experiment)
    return checks
