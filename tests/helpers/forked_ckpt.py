"""A process that has imported everything and forks a child per command, to kill cheaply.

Reads one JSON list of arguments per line, answers with the child's process id, then with its exit
status (negative: the signal that ended it).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class ForkServer:
    """The other end: starts commands, kills them, waits for them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forked_ckpt"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._answer() == "ready"

    def start(self, *arguments: object) -> int:
        """Begin a command; returns its process id. `wait` must follow."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([str(one) for one in arguments]) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """Exit status of the command."""
        return int(self._answer())

    def kill(self, process: int) -> int:
        """Kill the command without warning; its exit status, should it have ended just before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        return self.wait()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


def serve() -> None:
    """Answer commands until standard input ends."""
    import checkpoint_tools.convert
    import checkpoint_tools.export  # noqa: F401
    from checkpoint_tools.cli import main

    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.argv = ["qwen35-ckpt", *json.loads(line)]
            try:
                main()
            except SystemExit as stop:
                os._exit(stop.code if isinstance(stop.code, int) else 1)
            except BaseException:
                os._exit(70)
            os._exit(0)
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
