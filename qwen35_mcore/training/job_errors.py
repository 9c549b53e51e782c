"""One error message for the whole job, whichever ranks see the error.

Every rank runs the same checks, so all of them find the same mistake; one message per rank would
bury it. The launcher's store, which exists before any process group, decides who prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from qwen35_mcore.errors import Qwen35Error
from qwen35_mcore.process.interrupts import interrupted
from qwen35_mcore.training.launch import REPORTED
from qwen35_mcore.training.start_errors import explained, traceback_wanted

PATIENCE_S = 20.0
"""How long other ranks give rank 0, which may still be importing, to print the error they share."""
EXIT_USAGE = 2
_KEY = "qwen35_mcore/error"


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Run a training script: a `Qwen35Error` ends every rank with its exit status and one message.
    So does what megatron raises before the first step is done (`start_errors`).

    Once a rank has reported an error, the other ranks lose their connections to it; they end with
    status 1 and print nothing. Any other exception passes. Ctrl-C prints one line.
    QWEN35_TRACEBACK=1 prints the traceback of every error.
    """
    try:
        yield
    except Qwen35Error as error:
        _leave(error)
    except KeyboardInterrupt:
        interrupted()
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        if _is_reported():
            _mark_as_reported("another rank has said why the job ends")
            sys.exit(1)
        if (known := explained(error)) is None:
            raise
        known.__cause__ = error
        _leave(known)


def _leave(error: Qwen35Error) -> NoReturn:
    if traceback_wanted():
        traceback.print_exception(error)
    prints = _prints(_store())
    sys.stdout.flush()
    if prints:
        print(f"error: {error}", file=sys.stderr, flush=True)
    _mark_as_reported(f"error: {error}")
    if dist.is_initialized():
        time.sleep(1.0)  # rank 0 may hold the store that tells the others to be silent
    elif not prints:
        time.sleep(0.2)  # the launcher ends all ranks when one leaves, also the one that prints
    sys.exit(getattr(error, "exit_status", EXIT_USAGE))


def _mark_as_reported(text: str) -> None:
    """torchrun ends its own report with the text in this file, `launch` adds nothing to it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": f"\n{text}", "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            content = {"message": {"message": REPORTED, "extraInfo": extra}}
            Path(path).write_text(json.dumps(content))


def _prints(store: Any) -> bool:
    """Whether this rank is the one that prints.

    Before the process groups form that is rank 0, unless it sees no error (a file that only another
    node lacks); afterwards the first rank to come, because the others may wait for it for ever.
    """
    rank, ranks = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    # of a number that cannot be there is no rank 0 that would print
    another = rank.isdecimal() and ranks.isdecimal() and 0 < int(rank) < int(ranks)
    if store is None:
        return not another
    try:
        if another and not dist.is_initialized():
            with contextlib.suppress(dist.DistStoreError):
                store.wait([_KEY], timedelta(seconds=PATIENCE_S))
        return int(store.add(_KEY, 1)) == 1
    except Exception:  # the store is gone: better twice than never
        return True


def _is_reported() -> bool:
    try:
        store = _store()
        return store is not None and bool(store.check([_KEY]))
    except Exception:  # the store is gone, so nobody knows
        return False


def _store() -> Any:
    """A store that all ranks reach, or None: the process groups' own, or torchrun's before."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
    except Exception:  # torchrun's store is not there: rank 0 prints
        return None
    return dist.PrefixStore(f"attempt_{attempt}", store)
