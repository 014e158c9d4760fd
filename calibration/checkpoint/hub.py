"""Finds a checkpoint by what a user calls it: a local directory, or a hub id, whose snapshot is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from recipes.errors import SourceError

#: owner/name, and for a command line owner/name@revision.
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def snapshot(name: str, revision: str | None, where: str) -> Path:
    """The local directory `name`; a hub id is downloaded at `revision` through huggingface_hub (its cache, offline mode and
    token apply). `where` begins every message. Raises SourceError if there is neither."""
    path = Path(name)
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(name) or name.startswith(".") or "@" in name:
        raise SourceError(f"{where}: {path}: no such directory, and not a hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as error:  # huggingface_hub, its HTTP client and the file system raise different types
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"{where}: {name}: no such directory, and the hub snapshot "
            f"(revision {revision or 'main'}) cannot be downloaded: {first}; check the name, the network and the token, "
            "or download it and name the directory"
        ) from None


def named_directory(path: Path, where: str) -> Path:
    """The directory that a command line names: `path` itself if there is something, or the snapshot of owner/name or
    owner/name@revision. A path that is neither is returned as it is: whoever opens it reports it. Raises SourceError as
    `snapshot` does."""
    found = HUB_ID.fullmatch(str(path))
    if path.exists() or path.is_symlink() or found is None or found["id"].startswith((".", "~")):
        return path
    return snapshot(found["id"], found["revision"], where)
