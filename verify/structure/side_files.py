"""Checks the files beside the shards: none is incomplete, runs code, or describes another quantization of the
weights."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterator
from pathlib import Path

from calibration.checkpoint.dialect import is_nvidia
from calibration.checkpoint.files import is_file, read_json
from calibration.checkpoint.index import Checkpoint
from calibration.plan.nvidia_config import HF_QUANT_CONFIG, agrees
from recipes.errors import SourceError
from verify.checks import Check, verdict

#: Files that are executed or unpickled when they are loaded.
_RUNS = re.compile(
    r"\.(?:py|pyc|so|dll|dylib|exe|sh|bat|ps1|jar|pkl|pickle|dill|joblib|pt|pth|bin|ckpt|nemo|npy|npz|h5|keras)$", re.I
)
#: Descriptions of a quantization that other tools (modelopt, GPTQ, AWQ) write beside config.json, and that some readers
#: prefer to it. vLLM reads hf_quant_config.json if config.json has no quantization.
_QUANTIZATION = re.compile(r"^(?:hf_)?quant\w*_config\.json$|^compression_config\.json$", re.I)


def files_check(output: Checkpoint, source: Checkpoint | None) -> Check:
    """The check of the directory by file names; with a `source`, a file that runs code must equal the source's byte for
    byte."""
    problems, doubts = _stray(output), list[str]()
    problems += _quantization(output)
    for name in _running(output.directory):
        mine = output.directory / name
        if source is None:
            # DeepSeek publishes scripts in separate folders, which no loader imports.
            if "/" not in name or not name.endswith(".py"):
                doubts.append(f"{name}: runs code when it is loaded")
        elif not is_file(source.directory / name):
            problems.append(f"{name}: runs code when it is loaded, and the source has no such file")
        elif not is_file(mine) or not filecmp.cmp(mine, source.directory / name, shallow=False):
            problems.append(f"{name}: runs code when it is loaded, and is not the source's")
    what = "no shard beside the index, nothing half written, nothing that runs code or contradicts config.json"
    return verdict("structure.files", what, problems, doubts, "listing")


def _stray(output: Checkpoint) -> list[str]:
    problems = []
    for path in sorted(output.directory.iterdir()):
        if path.suffix == ".partial":
            problems.append(f"{path.name}: left half written")
        elif path.suffix == ".safetensors" and path.name not in output.shards:
            problems.append(f"{path.name}: not in the index")
        elif path.is_symlink():
            target = path.resolve()
            # A hub cache links every file to blobs/ beside its snapshots/.
            if not target.is_relative_to(output.directory.resolve()) and target.parent.name != "blobs":
                problems.append(f"{path.name}: a link out of the checkpoint, to {target}: copies and uploads lose it")
    return problems


def _quantization(output: Checkpoint) -> list[str]:
    planned, problems = output.config.get("quantization_config"), []
    for path in sorted(output.directory.iterdir()):
        if not _QUANTIZATION.match(path.name):
            continue
        try:
            said = read_json(path)
        except SourceError:
            said = None
        inner = said.get("quantization_config") if isinstance(said, dict) else None
        if isinstance(planned, dict) and path.name == HF_QUANT_CONFIG and is_nvidia(planned) and agrees(said, planned):
            continue
        if planned is None or planned not in (said, inner):
            problems.append(f"{path.name}: describes another quantization than config.json; some readers prefer it")
    return problems


def _running(directory: Path) -> Iterator[str]:
    """Yields files at any depth that run code, without following links to directories."""
    for parent, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted(names):
            if _RUNS.search(name):
                yield str((Path(parent) / name).relative_to(directory))
