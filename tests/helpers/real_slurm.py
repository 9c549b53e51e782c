"""A real SLURM on this machine: munged, slurmctld and two slurmd in a folder of their own.

Debian's packages slurm-wlm and munge, started as root without cgroups or systemd. Nothing is
installed here, no file outside the folder is touched, and everything that was started is stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from tests.helpers.ports import free_port

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
KillWait=5
NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN
NodeName={node}-2 NodeAddr=127.0.0.1 Port={other_port} CPUs=1 State=UNKNOWN
PartitionName=all Nodes={node},{node}-2 Default=YES MaxTime=INFINITE State=UP
"""


def search_path() -> str:
    """Daemons are in sbin, which not every user's PATH has."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


def why_not() -> str | None:
    """Why SLURM cannot run here; None where it can."""
    missing = [name for name in COMMANDS if shutil.which(name, path=search_path()) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmctld and slurmd run as root here, and this is another user"
    try:
        socket.getaddrinfo(_node(), None)
    except OSError:
        return f"the name of this machine, {_node()}, does not resolve, and ranks meet at a name"
    return None


def _node() -> str:
    return socket.gethostname().partition(".")[0]


class RealSlurm:
    """Commands for a test; made by `cluster`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def command(self, *words: str, **options: object) -> str:
        """Standard output of one of SLURM's commands, which has to succeed."""
        done = subprocess.run(
            words, env=self.env, capture_output=True, text=True, timeout=300, **options
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def sbatch(self, *words: str, cwd: Path, env: Mapping[str, str]) -> str:
        """Submit a job; its number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words],
            cwd=cwd,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.command("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, timeout: float = 600) -> dict[str, str]:
        """Until a job is in one of some states."""
        deadline = time.monotonic() + timeout
        while (found := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, (states, found, self.logs())
            time.sleep(0.2)
        return found

    def logs(self) -> str:
        return "\n".join(
            f"== {file.name}\n{file.read_text(errors='replace')[-2000:]}"
            for file in sorted(self.folder.glob("*.log"))
        )

    def start(self) -> None:
        folder, node = self.folder, _node()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (folder / "state").mkdir()
        ports = [free_port() for _ in range(3)]
        names = dict(zip(("controller_port", "port", "other_port"), ports, strict=True))
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, node=node, **names))
        munge = {"key": key, "socket": folder / "munge.socket", "pid": folder / "munge.pid"}
        munge |= {"log": folder / "munge.log", "seed": folder / "munge.seed"}
        flags = [f"--{name}{'' if name == 'socket' else '-file'}={p}" for name, p in munge.items()]
        self._daemon("munged", "--foreground", *flags)
        self._until(munge["socket"].exists)
        self._daemon("slurmctld", "-D", "-c", "-i")
        for name in (node, f"{node}-2"):
            self._daemon("slurmd", "-D", "-N", name)
        self._until(self._is_idle)

    def _daemon(self, *words: str) -> None:
        with (self.folder / f"{len(self.daemons)}-{words[0]}.log").open("wb") as output:
            daemon = subprocess.Popen(
                words,
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.daemons.append(daemon)

    def _is_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%D %t"], env=self.env, capture_output=True, text=True
        )
        return done.stdout.split() == ["2", "idle"]

    def _until(self, is_so: Callable[[], bool], timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not is_so():
            assert time.monotonic() < deadline, self.logs()
            assert all(one.poll() is None for one in self.daemons), self.logs()
            time.sleep(0.1)

    def stop(self) -> None:
        """End jobs and daemons; whatever is left of either is killed."""
        with contextlib.suppress(AssertionError, OSError, subprocess.SubprocessError):
            self.command("scancel", "--user=root")
            deadline = time.monotonic() + 20
            while self.command("squeue", "--noheader").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    process.kill()


@contextlib.contextmanager
def cluster() -> Iterator[RealSlurm]:
    """A SLURM of two nodes for as long as this lasts."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o711)  # munge wants its socket to be reachable by everyone
    slurm = RealSlurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)
