"""One error for the whole job, whichever ranks see it.

Every rank runs the same checks, so a mistake is found by all of them; printing it once per rank
buries it. The launcher's store, which exists before any process group, says who prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from qwen35_mcore.errors import Qwen35Error

PATIENCE_S = 20.0
"""How long other ranks give rank 0, which may still be importing, to print the error they share."""
EXIT_USAGE = 2
_KEY = "qwen35_mcore/error"


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Run a training script: a `Qwen35Error` ends every rank with its exit status and one message.

    Once a rank has reported an error, what its absence causes elsewhere (a closed connection in
    the middle of a collective) ends in silence with status 1; any other exception passes.
    """
    try:
        yield
    except Qwen35Error as error:
        _leave(error)
    except Exception:
        if _is_reported():
            sys.exit(1)
        raise


def _leave(error: Qwen35Error) -> NoReturn:
    prints = _prints(_store())
    if prints:
        print(f"error: {error}", file=sys.stderr, flush=True)
    _point_to_message()
    if dist.is_initialized():
        time.sleep(1.0)  # rank 0 may hold the store that tells the others to be silent
    elif not prints:
        time.sleep(0.2)  # the launcher ends all ranks when one leaves, also the one that prints
    sys.exit(getattr(error, "exit_status", EXIT_USAGE))


def _point_to_message() -> None:
    """torchrun ends its own report with this file's text, or else with advice on tracebacks."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        text = "see the line that begins with 'error:' above"
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def _prints(store: Any) -> bool:
    """Whether this rank is the one that prints.

    Before the process groups form that is rank 0, unless it sees no error (a file that only another
    node lacks); afterwards the first rank to come, because the others may wait for it for ever.
    """
    rank = int(os.environ.get("RANK", "0"))
    if store is None:
        return rank == 0
    try:
        if rank != 0 and not dist.is_initialized():
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
    except Exception:  # no agent there: rank 0 prints
        return None
    return dist.PrefixStore(f"attempt_{attempt}", store)
