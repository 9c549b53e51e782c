"""Run `qwen35-ckpt` and `qwen35` in this process, where one for each case takes too long; or
`qwen35-ckpt` as a real one."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

COMMAND = [sys.executable, "-m", "checkpoint_tools.cli"]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """Exit status and what was printed."""

    code: int
    out: str
    err: str


def ckpt(*arguments: object) -> Outcome:
    """The command in this process, through its own entry point."""
    from checkpoint_tools.cli import main

    return _called(main, "qwen35-ckpt", *arguments)


def qwen35(*arguments: object) -> Outcome:
    """The same of `qwen35`."""
    from qwen35_mcore.cli import main

    return _called(main, "qwen35", *arguments)


def _called(main: Callable[[], None], name: str, *arguments: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        patch.object(sys, "argv", [name, *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return Outcome(code, out.getvalue(), err.getvalue())


def ckpt_process(*arguments: object, **environment: str) -> Outcome:
    """The command as users run it."""
    import os

    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=600,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def ok(outcome: Outcome) -> Outcome:
    """The outcome of a command that must succeed."""
    assert outcome.code == 0, outcome
    return outcome


def refused(outcome: Outcome, *mentions: str) -> None:
    """Assert one clear error, exit status 2, every mention in it, and no traceback."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: "), outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.err.count("error: ") == 1
    for mention in mentions:
        assert mention in outcome.err, (mention, outcome.err)
