"""The interpreter that tests give to runs: what it starts is a process as any other, which has imported vLLM already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.reference.engine import FORKED_PYTHON, VLLM_PYTHON
from verify.serving.engine import environment, run_process

pytestmark = pytest.mark.skipif(FORKED_PYTHON == VLLM_PYTHON, reason="nothing is forked on this machine")
IMPORTED = "import sys; print('vllm.entrypoints.llm' in sys.modules, *sys.argv)"


def start(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command, variables = [FORKED_PYTHON, *arguments], environment() | changes
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


def test_vllm_is_imported_before_the_first_line() -> None:
    done = start("-c", IMPORTED, "one", "two")
    assert (done.returncode, done.stdout) == (0, "True -c one two\n"), done.stderr


@pytest.mark.parametrize("changed", [{"VLLM_LOGGING_LEVEL": "ERROR"}, {"VLLM_FORKS_OWNER": ""}], ids=str)
def test_in_another_environment_it_starts_as_usual(changed: dict[str, str]) -> None:
    assert start("-c", IMPORTED, **changed).stdout == "False -c\n"


def test_a_script_has_its_own_directory_environment_and_streams(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import json, os, sys\n"
        "print(json.dumps([__name__, sys.argv, sys.path[0], os.environ['GIVEN'], os.getcwd(), sys.stdin.read()]))\n"
        "sys.exit('the end')\n"
    )
    done = subprocess.run(
        [FORKED_PYTHON, "script.py", "argument"], cwd=tmp_path, env=environment() | {"GIVEN": "a value"}, input="typed",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "the end\n")
    place = str(tmp_path)
    assert json.loads(done.stdout) == ["__main__", ["script.py", "argument"], place, "a value", place, "typed"]


def test_it_ends_as_its_fork_does() -> None:
    assert start("-c", "raise SystemExit(3)").returncode == 3
    raised = start("-c", "raise ValueError('no number')")
    assert raised.returncode == 1 and raised.stderr.endswith("ValueError: no number\n")
    assert start("-c", "import os; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL


def test_the_time_out_kills_the_fork_and_what_it_started(tmp_path: Path) -> None:
    code = "import os, subprocess as s; p = s.Popen(['sleep', '600']); print(os.getpid(), p.pid, flush=True); p.wait()"
    start("-c", "")  # the import is not part of the time
    _, timed_out = run_process([FORKED_PYTHON, "-c", code], tmp_path / "log", 2.0)
    pids = list(map(int, (tmp_path / "log").read_text().split()))
    assert timed_out and len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(lives, pids)):
        assert time.monotonic() < deadline, "the fork outlived the time-out"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
