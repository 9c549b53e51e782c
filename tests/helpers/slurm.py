"""A SLURM of one machine: `srun` and `scontrol` for the batch script, `sbatch` for the test.

The stand-ins do what the manual says of the options that launch/slurm.sbatch uses, and refuse any
other one, so that a script which relies on more fails here.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.ports import free_port

ROOT = Path(__file__).parents[2]
LAYOUT = """\
# tiny-moe on two ranks; experts: 4 each
--flavor tiny-moe
--expert-model-parallel-size 2   # of 8 experts
  --use-distributed-optimizer

--seq-length 64
"""
"""A preset for tests."""
JOB_ID = "4242"
SRUN = '''
"""Tasks of a step as local processes: their environment, their files, the highest exit status."""
import argparse, os, subprocess, sys, time
parser = argparse.ArgumentParser(allow_abbrev=False)
for flag in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "kill-on-bad-exit"):
    parser.add_argument("--" + flag, type=int, required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--mpi")
parser.add_argument("command", nargs=argparse.REMAINDER)
args = parser.parse_args()
assert args.ntasks == args.nodes * args.ntasks_per_node, args
assert args.cpus_per_task >= 1, args
tasks = []
for rank in range(args.ntasks):
    node = "node%d" % (rank // args.ntasks_per_node)
    output = args.output.replace("%N", node).replace("%5t", "%05d" % rank)
    env = dict(
        os.environ,
        SLURM_PROCID=str(rank),
        SLURM_LOCALID=str(rank % args.ntasks_per_node),
        SLURM_NTASKS=str(args.ntasks),
        SLURMD_NODENAME=node,
    )
    with open(output, "wb") as file:
        tasks.append(subprocess.Popen(
            args.command, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            start_new_session=True,
        ))
with open(os.environ["STAND_IN"] + "/tasks", "a") as file:
    file.writelines("%d\\n" % task.pid for task in tasks)
while any(task.poll() is None for task in tasks):
    if args.kill_on_bad_exit and any(task.poll() for task in tasks):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, 9)
    time.sleep(0.05)
sys.exit(max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks)))
'''
SCONTROL = """
case "$1 $2" in
"show hostnames") printf '127.0.0.1\\nnode1\\n' ;;
"show job") printf '   Command=%s a b\n' "$STAND_IN_SCRIPT" ;;
"requeue $SLURM_JOB_ID") touch "$STAND_IN/requeue" ;;
*) echo "scontrol: $*" >&2 && exit 1 ;;
esac
"""


@dataclass
class Job:
    """A job that has left the queue for good."""

    status: int
    starts: int
    output: str


class Slurm:
    """Commands in a folder of their own, and the queue that calls the batch script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._command("srun", f"#!{sys.executable}{SRUN}")
        self._command("scontrol", f"#!/bin/bash{SCONTROL}")

    def _command(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def sbatch(
        self,
        *flags: str,
        nodes: int = 1,
        per_node: int = 2,
        env: Mapping[str, str],
        cwd: Path = ROOT,
        at_start: Callable[[int, subprocess.Popen[str]], None] | None = None,
        most_starts: int = 10,
        timeout: float = 600,
    ) -> Job:
        """Run launch/slurm.sbatch until it is not queued again.

        Args:
            flags: of the script.
            env: what the user exports.
            cwd: where the user submits.
            at_start: called with the number of the start and the running batch shell.
            most_starts: a job that is queued more often fails the test.
            timeout: seconds for each start, after which it hangs and the test fails.
        """
        spooled = self.folder / "slurm_script"  # SLURM runs a copy, from the submission's folder
        spooled.write_bytes((ROOT / "launch" / "slurm.sbatch").read_bytes())
        (self.folder / "tasks").unlink(missing_ok=True)
        place = {"SLURM_SUBMIT_DIR": str(cwd)}
        output, job_env = "", self._environment(place | env, nodes, per_node)
        for start in range(most_starts):
            with (self.folder / "job.out").open("w+") as file:
                job = subprocess.Popen(
                    ["bash", spooled, *flags],
                    cwd=cwd,
                    env=job_env | ({"SLURM_RESTART_COUNT": str(start)} if start else {}),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    text=True,
                )
                try:
                    if at_start is not None:
                        at_start(start, job)
                    status = job.wait(timeout=timeout)
                finally:
                    job.kill()
                    self.signal_tasks(signal.SIGKILL)  # what is left when a job ends
                file.seek(0)
                output += file.read()
            requeue = self.folder / "requeue"
            if not requeue.exists():
                return Job(status, start + 1, output)
            requeue.unlink()
        raise AssertionError(f"queued {most_starts} times:\n{output}")

    def signal_tasks(self, number: signal.Signals) -> None:
        """To every process of every step, as SLURM does."""
        tasks = self.folder / "tasks"
        for pid in tasks.read_text().split() if tasks.exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid), number)

    def _environment(self, env: Mapping[str, str], nodes: int, per_node: int) -> dict[str, str]:
        path = f"{self.folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
        return (
            os.environ
            | {
                "PATH": path + os.environ.get("PATH", os.defpath),
                "PYTHONPATH": str(ROOT),
                "PYTHON": sys.executable,
                "CUDA_VISIBLE_DEVICES": "",
                "STAND_IN": str(self.folder),
                "SLURM_JOB_ID": JOB_ID,
                "SLURM_JOB_NUM_NODES": str(nodes),
                "SLURM_JOB_NODELIST": "node[0-1]",
                "STAND_IN_SCRIPT": str(ROOT / "launch" / "slurm.sbatch"),
                "SLURM_NTASKS_PER_NODE": str(per_node),
                "SLURM_CPUS_ON_NODE": "2",
                "MASTER_PORT": str(free_port()),
            }
            | env
        )


def sbatch_options() -> dict[str, str]:
    """The options that the script gives itself."""
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, flags=re.M))


def signal_before_time_limit(job: subprocess.Popen[str]) -> None:
    """What SLURM sends for the script's --signal, and to whom: the batch shell alone."""
    match = re.fullmatch(r"B:(\w+)@\d+", sbatch_options()["signal"])
    assert match is not None
    job.send_signal(signal.Signals[f"SIG{match[1]}"])


def wait_for(path: Path, text: str, job: subprocess.Popen[str], timeout: float = 600) -> None:
    """Until a file holds a text; the job must not end before."""
    deadline = time.monotonic() + timeout
    while not path.exists() or text not in path.read_text(errors="replace"):
        assert job.poll() is None, f"the job ended before {path.name} held {text!r}"
        assert time.monotonic() < deadline, f"{path.name} never held {text!r}"
        time.sleep(0.05)


def train_sh(
    *arguments: object, cwd: Path = ROOT.parent, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run launch/train.sh, with no GPU to be seen."""
    without = {k: v for k, v in os.environ.items() if k not in ("DATA", "SAVE", "NPROC")}
    return subprocess.run(
        ["bash", ROOT / "launch" / "train.sh", *map(str, arguments)],
        cwd=cwd,
        env=without
        | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        | env,
        capture_output=True,
        text=True,
        timeout=600,
    )
