"""How the command lines end whatever becomes of their standard streams: with their own exit code, and no traceback.

A signal ends them with one line."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from calibration.runs.ranks import Ranks
from calibration.runs.torchrun import Stopped
from recipes.errors import Interrupted, RecipeError, WorkflowError
from recipes.streams import OUTPUT_LOST, Stream
from tests.models import standard
from workflows.run import __main__ as run

ROOT = Path(__file__).parents[3]
#: Every command: `python -m NAME` -> what its file's name adds to its own.
COMMANDS = dict.fromkeys(
    ("workflows.run", "workflows.batch", "workflows.compare", "workflows.publish", "verify"), "/__main__"
) | {"workflows.inspect_checkpoint": "", "workflows.convert_dialect": ""}


@pytest.fixture(autouse=True)
def signals_that_are_not_ignored() -> Iterator[None]:
    """nohup, and a shell that starts pytest in the background, have signals ignored, and every process that a test starts."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def into_a_closed_pipe(*arguments: str) -> tuple[int, bytes]:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    return done.returncode, done.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "llama")
    assert into_a_closed_pipe("-m", "workflows.inspect_checkpoint", str(source)) == (OUTPUT_LOST, b"")
    # Python itself ends with another code and a traceback.
    code, said = into_a_closed_pipe("-c", "print('lost', flush=True)")
    assert code != OUTPUT_LOST and b"BrokenPipeError" in said


def test_every_command_line_ends_that_way() -> None:
    files = [path for package in ("workflows", "verify") for path in (ROOT / package).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if "\n    exit_with(main)" in path.read_text()}
    assert found == {f"{command.replace('.', '/')}{end}.py" for command, end in COMMANDS.items()}
    assert not [path for path in files if "sys.exit(main" in path.read_text()]


#: A sitecustomize that sends a signal when the command imports its first module after those of its packages.
SIGNAL_AT_IMPORT = """
import importlib.abc, os, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "argparse":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_during_the_imports_of_a_command_is_one_line(
    tmp_path: Path, command: str, number: signal.Signals
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_AT_IMPORT.format(number=int(number)))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-m", command, "--help"]
    ended = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "error: interrupted\n")
    second = subprocess.run(
        line, cwd=ROOT, env=environment | {"RANK": "1"}, capture_output=True, text=True, check=False
    )
    assert (second.returncode, second.stderr) == (130, "")  # torchrun's rank 0 has said it


def test_lines_that_nobody_hears_end_no_run() -> None:
    """`python -m workflows.run ... 2>&1 | tee log`, and tee is killed."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "from workflows.progress import Reporter; r = Reporter(); r.say('a'); r.say('b'); print('done')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, check=False)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"done\n")


#: A command line that prints, fails or not, and tells by a file that it came to its end.
COMMAND = """
import sys
from pathlib import Path
from recipes.streams import exit_with, print_result, printed, results
def main():
    print_result("result" * 3)
    print("log", file=sys.stderr, flush=True)
    file = open({done!r}, "w")
    results().write("more" * 9999)
    print("1 and 2 are not this file", file.fileno(), file=file)
    return {code}
exit_with(main)
"""


@pytest.mark.parametrize(
    ("streams", "own", "code"),
    [
        (">&-", "0", 0),
        ("2>&-", "0", 0),
        (">&- 2>&- <&-", "5", 5),
        (">/dev/full", "0", 0),
        (">/dev/full", "5", 5),
        (">/dev/full", "printed()", OUTPUT_LOST),
        (">&-", "printed()", 0),  # nobody wanted it
        (">/dev/full 2>/dev/full", "5", 5),
        ("2>/dev/full", "printed()", 0),
        ("| true", "printed()", OUTPUT_LOST),
        ("| true", "5", 5),
        ("2>&1 | true", "0", 0),
    ],
)
def test_a_verdict_does_not_depend_on_the_streams(tmp_path: Path, streams: str, own: str, code: int) -> None:
    script, done = tmp_path / "command.py", tmp_path / "done"
    script.write_text(COMMAND.format(done=str(done), code=own))
    line = f"'{sys.executable}' '{script}' {streams}; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", line], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == code and "Traceback" not in ended.stderr and "Exception" not in ended.stderr
    assert int(done.read_text().split()[-1]) > 2  # else what is printed would go into the file


def ends(tmp_path: Path, main: str, **options: Any) -> tuple[int, str]:
    """The exit code and the stderr of a command whose main function is `main`."""
    script = tmp_path / "command.py"
    script.write_text(
        f"import argparse, os, signal, threading, time\nfrom recipes.streams import exit_with\n{main}\nexit_with(main)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False, **options
    )
    return ended.returncode, ended.stderr


#: A sitecustomize: once a command imports its loader of recipes, every kind of library prints to standard output.
NOISE = """
import atexit, importlib.abc, os, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "recipes.schema" and self in sys.meta_path:
            sys.meta_path.remove(self)
            import ctypes, logging
            logging.getLogger("noise").addHandler(logging.StreamHandler(sys.stdout))  # as llm-compressor's does
            for when in (lambda say: say(), atexit.register):
                when(lambda: print("noise of Python"))
                when(lambda: logging.getLogger("noise").error("noise of a log"))
                when(lambda: os.system("echo noise of a child"))
                when(lambda: (ctypes.CDLL(None).puts(b"noise of C"), ctypes.CDLL(None).fflush(None)))
sys.meta_path.insert(0, Finder())
"""
NOISES = ("Python", "a log", "a child", "C")


def test_json_on_stdout_stays_alone_whatever_a_library_prints(tmp_path: Path) -> None:
    source = standard.write(tmp_path / "source", "llama")
    (tmp_path / "sitecustomize.py").write_text(NOISE)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-m", "workflows.inspect_checkpoint", str(source), "--json"]
    ended = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and json.loads(ended.stdout)["checkpoint"], ended.stdout
    assert [ended.stderr.count(f"noise of {noise}\n") for noise in NOISES] == [2, 2, 2, 2]


def test_help_is_a_result(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(
        "import argparse\nfrom recipes.streams import exit_with, parse_arguments\n"
        "exit_with(lambda: parse_arguments(argparse.ArgumentParser(), ['--help']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith("usage: ")


def prints(path: Path) -> list[str]:
    """Where a file prints elsewhere than to a stream that it names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            if (name == "print" and "file" not in given) or (name.endswith("parse_args") and path.name != "streams.py"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    return found


def test_no_command_prints_a_result_where_libraries_print() -> None:
    files = [path for package in ("workflows", "verify", "calibration") for path in (ROOT / package).rglob("*.py")]
    outside = [ROOT / "verify/inside_vllm", ROOT / "workflows/batch/cluster"]  # vLLM's process; a job's log
    files = [path for path in files if not any(folder in path.parents for folder in outside)]
    assert [found for path in files for found in prints(path)] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_without_a_traceback(tmp_path: Path, number: signal.Signals) -> None:
    stop = f"os.kill(os.getpid(), {int(number)}); time.sleep(60)"
    assert ends(tmp_path, f"def main():\n    {stop}\n") == (130, "error: interrupted\n")
    in_parser = "def main():\n    argparse.ArgumentParser().parse_args(['--help'])\n"
    printing = f"def stop(*_):\n    {stop}\nargparse.ArgumentParser.print_help = stop\n"
    assert ends(tmp_path, in_parser + printing) == (130, "error: interrupted\n")


def test_a_signal_after_a_command_has_ended_changes_nothing(tmp_path: Path) -> None:
    stop = "os.kill(os.getpid(), signal.SIGINT)"
    waiting = f"threading.Thread(target=lambda: (time.sleep(0.1), {stop}, time.sleep(1))).start()"
    assert ends(tmp_path, f"def main():\n    {waiting}\n    return 5\n") == (5, "")
    dropped = f"class Dropped:\n    def __del__(self):\n        {stop}\ndropped = Dropped()\n"  # Python's last second
    assert ends(tmp_path, f"{dropped}def main():\n    return 5\n") == (5, "")
    refused = f"{dropped}def main():\n    argparse.ArgumentParser().parse_args(['--unknown'])\n"
    assert ends(tmp_path, refused)[0] == RecipeError.exit_code


def test_the_end_looks_once_for_garbage(tmp_path: Path) -> None:
    """What lies in a cycle ends as ever; Python's own three searches at the end find nothing to go through."""
    seen = "import atexit, gc, sys\natexit.register(lambda: print(gc.get_freeze_count() > 1000, file=sys.stderr))\n"
    dropped = "class Dropped:\n    def __del__(self):\n        print('ended', file=sys.stderr)\n"
    main = "def main():\n    dropped = Dropped()\n    dropped.itself = dropped\n    return 5\n"
    assert ends(tmp_path, seen + dropped + main) == (5, "ended\nTrue\n")


def test_a_lost_terminal_ends_no_command_under_nohup(tmp_path: Path) -> None:
    main = "def main():\n    os.kill(os.getpid(), signal.SIGHUP)\n    return 0\n"
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    assert ends(tmp_path, main, **ignoring) == (0, "")


def test_a_disk_that_has_room_again_gets_the_later_lines(tmp_path: Path) -> None:
    class Full(io.StringIO):
        full = True

        def flush(self) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "full")

    file = Full()
    stream = Stream(file)
    stream.flush()
    file.full = False
    assert stream.write("later") == 5 and file.getvalue() == "later" and stream.lost is not None


def test_a_run_whose_output_is_lost_ends_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = standard.write(tmp_path / "source", "llama")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump({"source": {"checkpoint": str(source)}, "output": str(tmp_path / "out"), "method": "plain"})
    )
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", Stream(full))
        assert run.main([str(recipe), "--dry-run"]) == OUTPUT_LOST
        assert run.main([str(recipe), "--status"]) == OUTPUT_LOST
        assert run.main([str(recipe), "--stages", "inspect"]) == 0
        assert run.main([str(tmp_path / "absent.yaml")]) == RecipeError.exit_code


def test_the_word_of_another_rank_s_end_may_come_twice() -> None:
    class Told(Ranks):
        times = 0

        def agree(self, error: WorkflowError) -> WorkflowError:
            self.times += 1
            if self.times == 1:
                raise Stopped
            return error

    ended = run._agreed(Told(), Stopped())
    assert ended.exit_code == Interrupted.exit_code
    assert ended.problems == ["interrupted: what is finished stays; run the same command again to resume"]
