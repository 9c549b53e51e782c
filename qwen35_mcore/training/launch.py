"""torchrun that leaves the last word to the training script.

    python -m qwen35_mcore.training.launch --nproc-per-node 8 -m qwen35_mcore.training.pretrain ...
    python -m qwen35_mcore.training.launch --nproc-per-node 8 examples/pretrain_qwen35.py ...

Flags and behaviour are torchrun's. Where a rank has said in one error why the job ended, torchrun
adds thirty lines of its own, its traceback among them; this adds nothing. What torchrun itself
fails at is one error. A rank that was killed or that crashed is named in one line, Ctrl-C and
SIGTERM are one word, and the exit status is the rank's.
"""

from __future__ import annotations

from qwen35_mcore.process.interrupts import interrupted, quiet_imports

with quiet_imports():
    import shlex
    import sys
    from typing import Any, NoReturn

    from qwen35_mcore.mcore.megatron_errors import failed_assertion
    from qwen35_mcore.training.start_errors import TRACEBACK, traceback_wanted

REPORTED = "qwen35_mcore has reported this error"
"""Marks a rank's error file whose error is on the screen already."""


def main(argv: list[str] | None = None) -> None:
    """Run torchrun's main with these arguments; exits with the status of the rank that failed."""
    with quiet_imports():
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    _silence_torchrun()
    try:
        run.run(run.parse_args(argv))
    except ChildFailedError as error:
        _leave(*error.get_first_failure())
    except SignalException as error:
        if error.sigval.name == "SIGINT":
            interrupted()
        print("terminated", file=sys.stderr)
        sys.exit(128 + error.sigval)
    except KeyboardInterrupt:
        interrupted()
    except Exception as error:
        if traceback_wanted():
            raise
        _failed(error)


def _failed(error: Exception) -> NoReturn:
    text = " ".join(str(error).split()) or failed_assertion(error)
    print(
        f"error: torchrun failed: {type(error).__name__}: {text}\n"
        f"  got: {shlex.join(sys.argv[1:])}\n"
        "  fix: correct what stands before the script's name, or see whether the first node is "
        f"there; {TRACEBACK}=1 prints the traceback",
        file=sys.stderr,
    )
    sys.exit(1)


def _leave(rank: int, failure: Any) -> NoReturn:
    status = failure.exitcode
    if not _is_reported(failure):
        ended = f"was killed by {failure.signal_name()}" if status < 0 else f"ended with {status}"
        print(
            f"error: rank {rank} {ended} (local rank {failure.local_rank}, pid {failure.pid})\n"
            "  fix: see what it printed above; a rank that was killed by SIGKILL and says nothing "
            "had most likely no memory left",
            file=sys.stderr,
        )
    sys.exit(128 - status if status < 0 else status)


def _is_reported(failure: Any) -> bool:
    message = failure.message
    return isinstance(message, dict) and message.get("message") == REPORTED


def _silence_torchrun() -> None:
    """Its warnings and errors are about signals and exit statuses, which `main` reports."""
    import logging

    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    main()
