"""vLLM's interpreter for tests, without the 6 CPU-s in which each start imports vLLM: imported once, forked for each start.

    forked_python ARGUMENTS      # what `python -c CODE ...` and `python SCRIPT ...` do, in a process of its own

Whoever is given it as interpreter starts it, waits for it and kills it as any other. The process that was started passes its
arguments, streams, directory and environment to a server, which forks; the fork dies with it, and its exit code or signal
becomes that of the process. The first one starts the server, which ends with the process that OWNER names. Without OWNER, or
with an environment that the import of vLLM may read differently, the interpreter starts as usual.

Runs in vLLM's interpreter. A server has one thread, or a fork would lose the others: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

OWNER = "VLLM_FORKS_OWNER"
"""In the environment: the process id of the test session."""
PROCESSOR = "VLLM_FORKS_PROCESSOR"
"""In the environment: what the import of vLLM is told of the CPU, as JSON (see processor.py). Each has a server of its own."""
READ_AT_IMPORT = ("VLLM_", "TORCH", "ATEN_", "HF_", "CUDA_", "PYTHON", "LD_", "MALLOC_", "ONEDNN_", "MKL_")
"""How variables begin that an import reads."""
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
FORKED = b"forked\n"


def main(arguments: list[str]) -> None:
    """Ends as the fork that ran `arguments` did."""
    owner = os.environ.get(OWNER)
    if owner and arguments and (arguments[0] == "-c" or not arguments[0].startswith("-")):
        server = connect(owner)
        code = run(server, arguments) if server else None
        if code is not None:
            if code < 0:
                with suppress(OSError):  # SIGKILL has no other handler
                    signal.signal(-code, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            os._exit(code)
    os.execv(sys.executable, [sys.executable, *arguments])


def connect(owner: str) -> socket.socket | None:
    """A connection to the server of `owner`, which is started if there is none; None if it does not start."""
    import subprocess

    process = None
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address(owner))
            return connection
        except ConnectionRefusedError:
            ended = 0 if process is None else process.poll()
            if ended:
                return None
            if ended == 0:  # none was started, or another one was faster
                process = subprocess.Popen(
                    [sys.executable, "-P", __file__, "serve"], env=os.environ | THREADS, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            time.sleep(0.02)


def address(owner: str) -> str:
    """A name without a file, which goes with the server."""
    return f"\0vllm-forks-{owner}-{os.environ.get(PROCESSOR)}"


def run(server: socket.socket, arguments: list[str]) -> int | None:
    """The fork's exit code (negative: the signal); None if there is no fork: the server could not import vLLM, or has done so in
    another environment."""
    request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [struct.pack("!I", len(request))], [0, 1, 2])
    server.sendall(request)
    answers = server.makefile("rb")
    try:
        if answers.readline() != FORKED:
            return None
    except ConnectionResetError:
        return None
    return int(answers.readline())


class Server:
    """Forks for every connection; a connection that closes kills what was forked for it."""

    def __init__(self, owner: str) -> None:
        self.owner = os.pidfd_open(int(owner))
        self.listener = socket.socket(socket.AF_UNIX)
        try:
            self.listener.bind(address(owner))
        except OSError:  # another one was faster
            sys.exit(0)
        self.listener.listen(64)
        self.environment = read_at_import(dict(os.environ))
        #: The descriptor of a connection, and of the process forked for it -> both.
        self.jobs: dict[int, tuple[socket.socket, int, int]] = {}

    def serve(self) -> None:
        """Until the owner ends."""
        import select

        poll = select.poll()
        for descriptor in (self.listener.fileno(), self.owner):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self.owner:
                    for _, pid, _ in self.jobs.values():
                        kill_group(pid)
                    return
                if descriptor == self.listener.fileno():
                    for started in self.accept():
                        poll.register(started, select.POLLIN)
                elif descriptor in self.jobs:
                    connection, pid, process = self.jobs[descriptor]
                    if descriptor == process:
                        for known in (connection.fileno(), process):
                            poll.unregister(known)
                            del self.jobs[known]
                        self.end(connection, pid, process)
                    else:  # nothing else is sent: it has closed
                        poll.modify(descriptor, 0)
                        kill_group(pid)

    def accept(self) -> tuple[int, ...]:
        """Forks for the next connection; the descriptors to watch."""
        connection, _ = self.listener.accept()
        user = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        head, streams, _, _ = socket.recv_fds(connection, 4, 3)
        body = b""
        while head and len(body) < struct.unpack("!I", head)[0]:
            body += connection.recv(1 << 16)
        if not body or user != os.getuid():
            connection.close()
            return ()
        arguments, directory, environment = json.loads(body)
        if read_at_import(environment) != self.environment:
            connection.close()
            pid = 0
        elif (pid := os.fork()) == 0:
            os.setsid()
            for descriptor in (*self.jobs, self.listener.fileno(), self.owner, connection.fileno()):
                os.close(descriptor)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(environment)
            execute(arguments)
        for stream in streams:
            os.close(stream)
        if pid == 0:
            return ()
        connection.sendall(FORKED)
        process = os.pidfd_open(pid)
        self.jobs[process] = self.jobs[connection.fileno()] = connection, pid, process
        return connection.fileno(), process

    @staticmethod
    def end(connection: socket.socket, pid: int, process: int) -> None:
        """Passes on how the fork ended; kills what it left."""
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        kill_group(pid)
        os.close(process)
        with suppress(BrokenPipeError):
            connection.sendall(b"%d\n" % code)
        connection.close()


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    """The variables of which the import of vLLM may make something else."""
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def execute(arguments: list[str]) -> None:
    """What the interpreter does with its arguments, to the end of the process."""
    import runpy
    import traceback

    code = 0
    try:
        sys.argv = arguments
        if arguments[0] == "-c":
            sys.argv, source = ["-c", *arguments[2:]], arguments[1]
            sys.path.insert(0, "")
            exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def preload() -> None:
    """Imports what the scripts of verify/inside_vllm import."""
    import gc
    import importlib.util
    from pathlib import Path

    # pyarrow, which vLLM imports if lm-eval is installed beside it, brings an allocator with a thread of its own.
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    path = Path(__file__).parents[2] / "verify" / "inside_vllm" / "worker.py"
    spec = importlib.util.spec_from_file_location("vllm_worker", path)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    gc.disable()  # nothing of what is imported is garbage
    processor = worker.sibling("processor")
    probes = {probe: getattr(processor.torch.cpu, probe) for probe in processor.PROBES.values()}
    processor.set_features(json.loads(os.environ.get(PROCESSOR, "{}")), "auto")
    worker.sibling("torchvision_operators").declare()
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import LLM, SamplingParams  # noqa: F401
    from vllm.model_executor.models import registry

    # vLLM looks at a class that it sees for the first time on a machine in a new process, so as not to start CUDA in this one.
    registry._run_in_subprocess = lambda look: look()
    for probe, true in probes.items():  # every fork is told for itself, and says so
        setattr(processor.torch.cpu, probe, true)
    for name in ("sentinel", "watch", "prompts", "cpu_nvfp4", "cpu_repairs"):
        worker.sibling(name)
    gc.freeze()
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1, "importing vLLM started threads"


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        server = Server(os.environ[OWNER])
        preload()
        server.serve()
    else:
        main(sys.argv[1:])
