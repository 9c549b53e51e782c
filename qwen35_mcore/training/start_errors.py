"""What megatron, Transformer Engine or torch raise before the first step is done, as one error.

While the model, the datasets and the first step are set up, the cause is a flag or the machine, and
the error names both. After that it is a bug or a fault of the hardware, and its traceback is
printed as it is. Memory or a disk that is full, and a gradient that is not finite, get advice at
any time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from qwen35_mcore.errors import Qwen35Error
from qwen35_mcore.mcore import imports
from qwen35_mcore.mcore.megatron_errors import failed_assertion, first_raised, named_values

TRACEBACK = "QWEN35_TRACEBACK"

PHASES = {
    "initialize_megatron": "starting the process groups",
    "setup_model_and_optimizer": "setting up the model and its optimizer",
    "get_model": "building the model",
    "get_megatron_optimizer": "building the optimizer",
    "load_checkpoint": "loading the checkpoint",
    "build_train_valid_test_data_iterators": "building the datasets",
    "train_step": "the first step",
}
"""What the run was doing, by megatron's innermost function of these on the stack."""


def traceback_wanted() -> bool:
    """Whether the environment asks for the traceback of every error."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


class StartError(Qwen35Error):
    """A run that cannot start, with megatron's own message. The whole traceback is in a file."""

    exit_status = 1  # not always the user's mistake: a job may be queued again


class OutOfMemoryError(StartError):
    """A device or the host ran out of memory."""


class SaveError(StartError):
    """A checkpoint that could not be written."""


def explained(error: BaseException) -> Qwen35Error | None:
    """One error for the exception that ended a run, or None where its traceback says more.

    Writes the traceback to a file that the error names.
    """
    args = _arguments()
    if args is None:
        return None
    if _is_out_of_memory(error):
        return _out_of_memory(error, args)
    if _megatrons_functions(error)[-1:] == ["validate_result"]:
        return _rejected(error)
    if "save_checkpoint" in _megatrons_functions(error):
        return _save_failed(error, args)
    phase = _phase(error, args)
    if phase is None:
        return None
    first = first_raised(error)
    condition = failed_assertion(first)
    text = " ".join(str(first).split()) or condition
    return StartError(
        f"{phase} failed: {type(first).__name__}: {text}\n  at: {_place(first)}",
        got=named_values(args, f"{condition} {text}") or _command_line(),
        allowed=condition if condition != text else None,
        fix="correct or drop the flag that the message names; if it names none, the whole "
        f"traceback is in {_write_traceback(error, args)}",
    )


def _arguments() -> argparse.Namespace | None:
    """megatron's arguments, once they are checked and registered."""
    if "megatron.training" in sys.modules:
        with contextlib.suppress(AssertionError):  # not yet
            return imports.get_args()
    return None


def _phase(error: BaseException, args: argparse.Namespace) -> str | None:
    names = _megatrons_functions(error)
    known = [name for name in names if name in PHASES]
    if not known or "evaluate" in names:
        return None
    later = "train" in names and args.curr_iteration > args.iteration
    return None if later else PHASES[known[-1]]


def _megatrons_functions(error: BaseException) -> list[str]:
    """Names of the functions of megatron's on the stack, the innermost one last."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [
        frame.f_code.co_name
        for frame in frames
        if frame.f_globals.get("__name__", "").startswith("megatron.")
    ]


def _rejected(error: BaseException) -> Qwen35Error:
    """What --check-for-nan-in-loss-and-grad finds in the gradients, which megatron checks."""
    from qwen35_mcore.mcore.non_finite import non_finite

    text = " ".join(str(error).split())
    result = re.search(r"Unexpected result (.*) \(message='(.*)'\)", text)
    return non_finite(result[2], result[1]) if result else non_finite(text, None)


def _place(error: BaseException) -> str:
    """``megatron/core/x.py:12``: where an error was raised, from its package on."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    parts = Path(frame.filename).parts
    start = len(parts) - parts[::-1].index("site-packages") if "site-packages" in parts else 0
    return f"{Path(*parts[start:])}:{frame.lineno}"


def _command_line() -> str:
    return shlex.join(sys.argv[1:])


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text)
    )


def _out_of_memory(error: BaseException, args: argparse.Namespace) -> OutOfMemoryError:
    step = getattr(args, "curr_iteration", 0) + 1
    sizes = "micro_batch_size seq_length recompute_granularity tensor_model_parallel_size "
    sizes += "pipeline_model_parallel_size context_parallel_size expert_model_parallel_size"
    return OutOfMemoryError(
        f"out of memory on rank {args.rank}: {_phase(error, args) or f'iteration {step}'}: "
        + " ".join(str(error).split())[:400],
        got=named_values(args, sizes),
        fix="lower --micro-batch-size, recompute activations (--recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1), divide the model over more ranks, "
        "or ask `qwen35 plan` for a layout that fits; the whole traceback is in "
        f"{_write_traceback(error, args)}",
    )


def _save_failed(error: BaseException, args: argparse.Namespace) -> SaveError:
    """Written by several threads and ranks, whose errors megatron and torch fold into one text."""
    from qwen35_mcore.mcore.checkpoint_files import (
        tracked_folder,
    )  # torch, which a launcher waits for

    folder = tracked_folder(Path(args.save))
    return SaveError(
        f"the checkpoint of iteration {args.curr_iteration + 1} could not be saved",
        got=f"--save {args.save}, where {_free(Path(args.save))} free; {type(error).__name__}",
        allowed=None if folder is None else f"complete in it is {folder.name}",
        fix="make room, or name another folder with --save, and start again; the whole traceback "
        f"is in {_write_traceback(error, args)}",
    )


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.3f} GB are"
    except OSError as error:
        return f"nobody knows what is ({error.strerror})"


def _write_traceback(error: BaseException, args: argparse.Namespace) -> str:
    """Name of a new file beside the run's checkpoints, or else among temporary files."""
    text = "".join(traceback.format_exception(error))
    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-rank{args.rank}-{os.getpid()}.txt"
    for folder in (args.save, tempfile.gettempdir()):
        with contextlib.suppress(OSError, TypeError):
            path = Path(folder) / name
            try:
                path.write_text(text)
            except OSError:  # a full disk may have room for the name alone
                path.unlink(missing_ok=True)
                raise
            return str(path)
    print(text, file=sys.stderr)
    return "the lines above"
