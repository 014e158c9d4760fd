"""What goes to the hub: the files, the card as it will stand there, and why an output may not be published."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from calibration.checkpoint.files import is_file, read_text
from calibration.checkpoint.index import CONFIG_NAME, INDEX_NAME, Checkpoint
from calibration.checkpoint.side_files import side_files
from calibration.plan.nvidia_config import HF_QUANT_CONFIG
from calibration.runs.finish import CARD_NAME
from calibration.runs.journal import RunDirectory
from recipes import documents
from recipes.errors import RecipeError, SourceError, collapsed
from verify.checks import LEVELS
from verify.proof.statistics import PROVENANCE_NAME
from verify.report.tables import markdown_text
from verify.signature import SIGNATURE_NAME
from workflows.run.card import MARK
from workflows.run.judged import read_judged

#: Files beside the shards and the source's side files.
_OURS = (CONFIG_NAME, INDEX_NAME, HF_QUANT_CONFIG, CARD_NAME, "recipe.yaml", PROVENANCE_NAME, SIGNATURE_NAME)
_DESPITE = "## Published despite its verdict"


@dataclass(frozen=True)
class Publication:
    """`files`: name in the repository -> local file; `left_out`: what lies in the output and stays there; `notes`: what its
    owner should know."""

    files: dict[str, Path]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def prepare(output: Checkpoint) -> Publication:
    """The publication of an output: the shards that the index names, and the files that belong to a repository. Raises
    SourceError for a file that cannot be read or is a link out of the output."""
    directory = output.directory
    names = [*sorted(output.shards), *(name for name in _OURS if is_file(directory / name))]
    names += [str(path.relative_to(directory)) for path in side_files(directory).copied]
    files = {name: directory / name for name in dict.fromkeys(names)}
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    left = tuple(sorted(name for name in there - files.keys() if not name.startswith(".")))
    return Publication(files, left, tuple(_notes(directory)))


def loses_signature(directory: Path, card: str) -> bool:
    """Whether a signature is there that `card` would break: it is of the card as it is."""
    return is_file(directory / SIGNATURE_NAME) and read_card(directory) != card


def card_notes(card: str) -> list[str]:
    """What the metadata of a card do not say, and readers of a hub look for."""
    try:
        said, _ = _front(card)
    except RecipeError:
        return [f"{CARD_NAME} has no metadata"]
    notes = []
    if "base_model" not in said:
        notes.append("the card names no base_model, because the source is a local directory: --base-model OWNER/NAME")
    if "license" not in said:
        notes.append(f"the card names no license, because the source's {CARD_NAME} names none")
    return notes


def _notes(directory: Path) -> list[str]:
    path = directory / "recipe.yaml"
    paths = re.findall(r"^\s*[\w.]+: (/\S+)$", read_text(path), re.M) if is_file(path) else []
    return (
        [f"recipe.yaml names paths of this machine, which everyone will read: {', '.join(paths[:4])}"] if paths else []
    )


def verdict_problems(output: Checkpoint) -> list[str]:
    """Why the recorded verdict does not let an output be published; empty if it is PASS, and of these bytes."""
    directory = RunDirectory(output.directory)
    judged = read_judged(directory, output.shards)
    remedy = "run the recipe again with --from verify"
    if not judged.checks:
        return [f"{output.directory}: no verdict of a run is recorded in {directory.path}; {remedy}"]
    if judged.verdict != "PASS":
        worst = [check for check in judged.checks if check.verdict != "PASS"]
        shown = "; ".join(f"{check.verdict} {check.id}: {check.figure[:120]}" for check in worst[:3])
        more = f"; and {len(worst) - 3} more" if len(worst) > 3 else ""
        missing = [level for level in LEVELS if not any(check.id.startswith(f"{level}.") for check in judged.checks)]
        said = f"{shown}{more}" if worst else f"not run: {', '.join(missing)}"
        repair = "repair it" if worst else f"ask for it in the recipe (verify.{missing[0]}) and {remedy}"
        return [
            f"{output.directory}: the verdict is {judged.verdict} ({said}); {repair}, or say why with --despite REASON"
        ]
    return collapsed(f"{output.directory}/{problem}; {remedy}" for problem in judged.changed(output))


def named_card(card: str, repository: str | None, base_model: str | None, despite: str | None) -> str:
    """A card of `workflows.run` for `repository` (None: as it is): its commands name it, its metadata name `base_model` if it is
    given, and `despite` says why it was published without a PASS. A card without our mark keeps its text."""
    mark = re.compile(re.escape(MARK).replace(r"\{\}", r"([\w./-]+)"))
    if repository and (found := mark.search(card)) is not None:
        card = card.replace(found[1], repository)
    if base_model is not None:
        said, text = _front(card)
        said = {"base_model": base_model} | {key: value for key, value in said.items() if key != "base_model"}
        card = f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}---\n{text}"
    card = re.sub(rf"\n{_DESPITE}\n\n[^\n]*\n", "", card)
    return card.rstrip("\n") + f"\n\n{_DESPITE}\n\n{markdown_text(despite)}\n" if despite else card


def _front(card: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card, and the text after it. Raises RecipeError if it has none, or none that is plain YAML."""
    front = re.match(r"---\n(.*?)\n---\n", card, re.S)
    said = None
    with contextlib.suppress(yaml.YAMLError):
        found = documents.parse(front[1] if front else "")
        said = None if found.problems else found.data
    if front is None or not isinstance(said, dict):
        raise RecipeError(
            f"--base-model: {CARD_NAME} has no metadata to put it into; write the card again (--from verify)"
        )
    return said, card[front.end() :]


def read_card(directory: Path) -> str:
    """The text of an output's card. Raises SourceError if there is none."""
    try:
        return read_text(directory / CARD_NAME)
    except SourceError as error:
        raise SourceError(f"{error}: a repository needs a card; write it again (--from verify)") from None
