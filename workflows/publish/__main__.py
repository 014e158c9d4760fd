"""`python -m workflows.publish OUTPUT OWNER/NAME`: brings a verified output to the hub.

Refuses unless the recorded verdict is PASS and the bytes are those that it was said of; --despite REASON overrides that, and
the card shows the reason. Uploads the shards that the index names and the files that belong to a repository, in one commit;
what the hub has already is not uploaded again, so the same command resumes.

Exit codes: 0 published; 2 command line; 3 the output is no whole checkpoint; 4 the hub cannot be reached, or the token may
not write there; 5 the verdict is not PASS, or is not of these bytes; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calibration.checkpoint.files import write_text
from calibration.checkpoint.index import Checkpoint
from calibration.runs.finish import CARD_NAME
from recipes.errors import EnvironmentProblem, Interrupted, RecipeError, VerificationFailed, WorkflowError
from recipes.streams import exit_with, parse_arguments, printed
from recipes.units import size
from verify.report.tables import OutputConsole
from verify.signature import SIGNATURE_NAME
from workflows.publish.publication import (
    Publication,
    card_notes,
    loses_signature,
    named_card,
    prepare,
    read_card,
    verdict_problems,
)
from workflows.publish.signing import require_private_key, sign


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse_arguments(_parser(), arguments)
    try:
        _publish(options)
    except KeyboardInterrupt:
        error: WorkflowError = Interrupted("interrupted: what was uploaded stays; run the same command again to resume")
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except WorkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return printed()


def _publish(options: argparse.Namespace) -> None:
    _require_names(options)
    if options.sign is not None:
        require_private_key(options.sign)
    output = Checkpoint.open(options.output)
    problems = verdict_problems(output)
    if problems and options.despite is None:
        raise VerificationFailed(problems)
    despite = options.despite if problems else None
    card = named_card(read_card(output.directory), options.repository, options.base_model, despite)
    console, notes = OutputConsole(), card_notes(card) if options.repository else []
    if options.sign is None and loses_signature(output.directory, card):
        broken = f"{SIGNATURE_NAME} is of the card as it is, and publishing changes it; sign again with --sign KEY"
        if not options.dry_run:
            raise RecipeError(f"{output.directory}: {broken}, or remove {SIGNATURE_NAME}")
        notes.append(broken)
    if options.dry_run:
        _print(prepare(output), options, [*_doubts(problems), *_noted(notes)], console)
        return
    api = _hub(options.repository) if options.repository else None
    write_text(output.directory / CARD_NAME, card)
    if options.sign is not None:
        sign(output.directory, options.sign)
    if api is None:
        console.print(f"signed: {output.directory / SIGNATURE_NAME}", soft_wrap=True)
        console.print(f"check it: python -m verify {output.directory} --public-key PUBLIC_KEY", soft_wrap=True)
        return
    publication = prepare(output)
    _print(publication, options, [*_doubts(problems), *_noted(notes)], console)
    address = _upload(api, options, publication, console)
    console.print(f"published: {address}", soft_wrap=True)


def _require_names(options: argparse.Namespace) -> None:
    """Raises RecipeError for names that no repository can have, and for an empty reason."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    problems = [] if options.repository or options.sign else ["REPOSITORY: name one, or sign alone with --sign KEY"]
    for where, name in (("REPOSITORY", options.repository), ("--base-model", options.base_model)):
        try:
            if name is not None:
                validate_repo_id(name)
            if name is not None and "/" not in name:
                problems.append(f"{where}: {name!r}: name the owner too, owner/name")
        except HFValidationError as error:
            problems.append(f"{where}: {error}")
    if options.despite is not None and not options.despite.strip():
        problems.append("--despite: needs a reason, which the card shows")
    if problems:
        raise RecipeError(problems)


def _hub(repository: str) -> Any:
    """The hub's interface, after it has told who the token belongs to. Raises EnvironmentProblem."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # huggingface_hub, its HTTP client and the file system raise different types
        raise EnvironmentProblem(f"{repository}: {_first_line(error)}; {_REMEDY}") from None
    return api


_REMEDY = (
    "check the network, the token (`hf auth login`, HF_TOKEN) and its right to write there; --dry-run needs neither"
)


def _upload(api: Any, options: argparse.Namespace, publication: Publication, console: OutputConsole) -> str:
    """Creates the repository if there is none, uploads what it lacks, and commits everything at once: a reader never sees half a
    checkpoint. Returns its address. Raises EnvironmentProblem."""
    try:
        api.create_repo(options.repository, private=options.private, exist_ok=True)
        additions = operations(publication)
        for done, addition in enumerate(additions, 1):
            api.preupload_lfs_files(options.repository, [addition])
            console.print(f"uploaded {done} of {len(additions)}: {addition.path_in_repo}", soft_wrap=True)
        return str(api.create_commit(options.repository, additions, commit_message=_message(options)).repo_url)
    except Exception as error:  # as above
        raise EnvironmentProblem(
            f"{options.repository}: {_first_line(error)}; {_REMEDY}; run the same command again to resume"
        ) from None


def operations(publication: Publication) -> list[Any]:
    """The commit: one addition a file."""
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(name, path) for name, path in publication.files.items()]


def _message(options: argparse.Namespace) -> str:
    return f"NVFP4 checkpoint by nvfp4-workflows{' (published despite its verdict)' if options.despite else ''}"


def _noted(notes: Iterable[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


def _doubts(problems: Iterable[str]) -> list[str]:
    return [f"despite: {problem}" for problem in problems]


def _print(publication: Publication, options: argparse.Namespace, more: list[str], console: OutputConsole) -> None:
    kind = "private" if options.private else "public"
    begin = "would publish" if options.dry_run else "publishing"
    lines = [
        f"{begin} {options.output} as {options.repository} ({kind}): {len(publication.files)} files, {size(publication.nbytes)}"
    ]
    lines += [f"  {name}  {size(path.stat().st_size)}" for name, path in publication.files.items()]
    if options.sign is not None and options.dry_run:
        lines.append(f"  model.sig  signed with {options.sign}")
    lines += [f"left out: {name}" for name in publication.left_out]
    for line in [*lines, *_noted(publication.notes), *more]:
        console.print(line, soft_wrap=True)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="directory of the output")
    parser.add_argument(
        "repository", nargs="?",
        help="owner/name of the repository, which is created if there is none; without it the output is only signed",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", help="create it as a private repository")
    parser.add_argument("--dry-run", action="store_true", help="print what would be uploaded; write and upload nothing")
    parser.add_argument("--despite", metavar="REASON", help="publish without a PASS; the card shows the reason")
    parser.add_argument(
        "--base-model", metavar="OWNER/NAME", help="hub id of the source, for the card of a local source"
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="sign every file with this private key (PEM), as OpenSSF model signing"
    )
    return parser


if __name__ == "__main__":
    exit_with(main)
