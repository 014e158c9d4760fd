"""A real Slurm of one machine on loopback: munged, slurmctld and a slurmd for each of two nodes in the foreground, started
and ended by this process alone, everything below one directory. Needs root and Debian's packages slurm-wlm and munge.

Each node has a host name of its own and an /etc/hosts with both (UTS and mount namespaces): its processes take the other
for another machine. The nodes share what those of a cluster share, the file system, and beyond that processors, process
numbers and loopback.

    python -m tests.slurm.local_cluster DIRECTORY     # until Ctrl-C; says which SLURM_CONF to export
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = (
    "munged",
    "mungekey",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "scancel",
    "squeue",
    "sinfo",
    "unshare",
)
NODES = ("node1", "node2")
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class LocalSlurm:
    """`with LocalSlurm(directory) as cluster:` has SLURM_CONF set in this process's environment, and two idle nodes.
    Raises RuntimeError with the daemons' own words where Slurm cannot start."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.daemons: list[subprocess.Popen[bytes]] = []
        self._started = False

    def __enter__(self) -> LocalSlurm:
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing or os.geteuid() != 0:
            raise RuntimeError(
                f"Slurm cannot start here: missing {', '.join(missing) or 'root'}; apt-get install slurm-wlm munge, as root"
            )
        (self.directory / "state").mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().partition(".")[0]
        text = _CONFIGURATION.format(host=host, directory=self.directory, ports=_free_ports(3), cpus=os.cpu_count())
        (self.directory / "slurm.conf").write_text(text)
        os.environ["SLURM_CONF"] = str(self.directory / "slurm.conf")
        try:
            self._start()
            self._await_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if "SLURM_CONF" in os.environ and self._started:
            self._cancel_all()
        for daemon in reversed(self.daemons):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        self.daemons = []
        os.environ.pop("SLURM_CONF", None)

    def logs(self) -> str:
        """The last lines of every daemon."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.directory.glob("*.log"))
        )

    def _cancel_all(self) -> None:
        """slurmd's end would not end the jobs."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            told = subprocess.run(["squeue", "-h", "-o", "%A"], capture_output=True, text=True, check=False)
            if told.returncode or not told.stdout.strip():
                return
            subprocess.run(["scancel", *told.stdout.split()], check=False)
            time.sleep(0.5)

    def _start(self) -> None:
        at = self.directory
        key = at / "munge.key"
        if not key.exists():
            subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
        munge = [f"--{kind}-file={at / f'munge.{kind}'}" for kind in ("key", "pid", "log", "seed")]
        # --force: below /tmp, which everybody may write to, munged would refuse.
        self._daemon("munged", "--foreground", "--force", f"--socket={at / 'munge.socket'}", *munge)
        self._until(lambda: (at / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-i")
        self._started = True
        (at / "hosts").write_text(Path("/etc/hosts").read_text() + "".join(f"\n127.0.0.1 {node}\n" for node in NODES))
        for node in NODES:
            become = f"hostname {node} && mount --bind {shlex.quote(str(at / 'hosts'))} /etc/hosts"
            self._daemon("unshare", "--uts", "--mount", "sh", "-c", f"{become} && exec slurmd -D -N {node}")

    def _daemon(self, program: str, *arguments: str) -> None:
        with (self.directory / f"{program}.out.log").open("ab") as log:
            command = [shutil.which(program) or program, *arguments]
            self.daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _await_nodes(self) -> None:
        def idle() -> bool:
            told = subprocess.run(
                ["sinfo", "-h", "-N", "-p", "low", "-o", "%T"], capture_output=True, text=True, check=False
            )
            return told.stdout.split() == ["idle"] * len(NODES)

        self._until(idle, "a node")

    def _until(self, ready: object, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():  # type: ignore[operator]
            dead = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"Slurm cannot start here: {what} is not ready; ended: {dead}\n{self.logs()}")
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    with LocalSlurm(Path(sys.argv[1])) as cluster:
        print(f"export SLURM_CONF={cluster.directory / 'slurm.conf'}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            signal.pause()
