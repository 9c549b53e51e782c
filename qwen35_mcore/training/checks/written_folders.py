"""The folders that a run writes to: made and tried before anything starts, not at the first save.

A folder's permissions say too little (a full disk, a read-only mount, another node's /tmp), so a
file is written.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from pathlib import Path

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.process.file_lock import hold_until_exit
from qwen35_mcore.training.checks.data_flags import dataset_prefixes

OUTPUTS = (
    *("save", "tensorboard_dir", "wandb_save_dir"),
    *("non_persistent_global_ckpt_dir", "non_persistent_local_ckpt_dir"),
)
INDICES = "GPTDataset_indices"
"""megatron's name for the folder of a dataset's indices, below ``PREFIX/cache``."""

LOCK = "run.lock"
PATIENCE_S = 20.0
"""How long the run before this one may take to end."""


def check_written_folders(args: Namespace) -> None:
    """Make and try every folder that the flags let the run write to.

    Only rank 0 does: on a shared file system one rank's answer is everyone's.

    Raises:
        ConfigError: with the first that cannot be made or written to; or another run on this
            machine saves to the folder of ``--save``: each would remove what the other writes.
    """
    if args.rank != 0:
        return
    for name in OUTPUTS:
        path = getattr(args, name, None)
        if path:
            flag = "--" + name.replace("_", "-")
            _try(Path(path), flag, f"name another folder with {flag}")
    if args.save and not args.skip_train:
        _keep_others_out(Path(args.save))
    if args.data_cache_path:
        if dataset_prefixes(args):
            _try_cache(
                Path(args.data_cache_path), "--data-cache-path", "name another folder with it"
            )
        return
    for prefix in dataset_prefixes(args):
        folder = Path(prefix) / "cache" / INDICES
        what = f"the folder of megatron's indices of {prefix}"
        _try_cache(folder, what, "name a folder for them with --data-cache-path")


def _keep_others_out(save: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (process := hold_until_exit(save / LOCK)) is not None:
        if time.monotonic() < deadline:
            time.sleep(0.5)
        elif process:
            raise ConfigError(
                "another run saves to this folder",
                got=f"--save {save}, which process {process} writes to",
                fix="wait until that run has ended, or name another folder with --save",
            )
        else:
            print(
                f"> {save / LOCK} is locked from another machine: if a run there saves to this "
                "folder, too, stop one of them, for each would remove what the other writes",
                flush=True,
            )
            return


def _try_cache(folder: Path, what: str, fix: str) -> None:
    """A cache that holds indices already may be read-only: megatron writes what it lacks."""
    if not any(folder.glob("*-description.txt")):
        _try(folder, what, fix)


def _try(folder: Path, what: str, fix: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ConfigError(
            f"{what} cannot be written to",
            got=f"{folder}: {error.strerror}",
            allowed="a folder that is there or can be made, on a disk with space left",
            fix=fix,
        ) from error
