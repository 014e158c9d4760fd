"""What an environment of vLLM may lack is said before anything starts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recipes.errors import EnvironmentProblem
from tests.reference.engine import VLLM_PYTHON
from verify.serving import engine

FIND = "import importlib.util; print(importlib.util.find_spec('vllm').origin)"


def test_a_library_of_the_system_that_vllm_lacks_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels are the installed ones, but need a library that no system has in place of libnuma.so.1."""
    found = subprocess.run([VLLM_PYTHON, "-c", FIND], capture_output=True, text=True, check=True).stdout
    package, changed = tmp_path / "vllm", 0
    package.mkdir()
    for entry in Path(found.strip()).parent.iterdir():
        kernels = entry.read_bytes() if re.fullmatch(r"_C.*\.so", entry.name) else b""
        if b"libnuma.so.1" in kernels:
            changed += (package / entry.name).write_bytes(kernels.replace(b"libnuma.so.1", b"libnoma.so.1"))
        else:
            (package / entry.name).symlink_to(entry)
    if not changed:
        pytest.skip("this vLLM is not the one for CPUs")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{VLLM_PYTHON}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # as a user may have it
    monkeypatch.setattr(engine, "_PACKAGES", {"libnoma.so.1": engine._PACKAGES["libnuma.so.1"]})
    said = f"{python}: vLLM's kernels need libnoma.so.1 (verify.serving.python); install libnuma1 (`apt-get install libnuma1`; "
    with pytest.raises(EnvironmentProblem, match=re.escape(said)):
        engine.check_environment(str(python))
    shutil.rmtree(package)
