"""How the command lines end where their reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from recipes.errors import PIPE_CLOSED
from tests.models import standard

ROOT = Path(__file__).parents[2]


def into_a_closed_pipe(*arguments: str) -> tuple[int, bytes]:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    return done.returncode, done.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "llama")
    assert into_a_closed_pipe("-m", "workflows.inspect_checkpoint", str(source)) == (PIPE_CLOSED, b"")
    # Python itself ends with another code and a traceback.
    code, said = into_a_closed_pipe("-c", "print('lost', flush=True)")
    assert code != PIPE_CLOSED and b"BrokenPipeError" in said


def test_every_command_line_ends_that_way() -> None:
    ends = [path for package in ("workflows", "verify") for path in (ROOT / package).glob("*.py")]
    found = {path.stem for path in ends if "\n    exit_with(main)" in path.read_text()}
    assert found == {"run", "batch", "inspect_checkpoint", "__main__"}
    assert not [path for path in ends if "sys.exit(main" in path.read_text()]


def test_lines_that_nobody_hears_end_no_run() -> None:
    """`python -m workflows.run ... 2>&1 | tee log`, and tee is killed."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "from workflows.progress import Reporter; r = Reporter(); r.say('a'); r.say('b'); print('done')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, check=False)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"done\n")
