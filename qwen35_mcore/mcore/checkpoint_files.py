"""The files of a run's checkpoints: which are complete, and how a new one takes its place.

A run folder holds ``iter_NNNNNNN`` (or ``release``) folders and a tracker file that names the one
to resume from. Nothing here needs a process group.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from torch.distributed.checkpoint import FileSystemReader

from qwen35_mcore.process.sync import sync

TRACKER = "latest_checkpointed_iteration.txt"
_PARTIAL, _REPLACED = ".partial", ".replaced"
_LONGEST_NUMBER = 18  # of an iteration, in digits


def iteration_folder(root: Path, iteration: int | str) -> Path:
    """The folder of an iteration, or of ``release``."""
    return root / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")


def tracked_folder(root: Path) -> Path | None:
    """The folder that the tracker file names; None without a tracker, or when it says nothing."""
    try:
        text = (root / TRACKER).read_text(errors="replace").strip()
    except OSError:
        return None
    if text == "release":
        return iteration_folder(root, text)
    number = text.isdecimal() and len(text) <= _LONGEST_NUMBER
    return iteration_folder(root, int(text)) if number else None


def damage(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be loaded; None for a complete checkpoint."""
    for name in (".metadata", "metadata.json"):
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    try:
        stored = FileSystemReader(str(folder)).read_metadata().storage_data
        ends: dict[str, int] = {}
        for info in stored.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), end)
    except Exception as error:
        return f"{folder / '.metadata'} cannot be read: {error}"
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            return f"{path} is missing" if size < 0 else f"{path} has {size} of {end} bytes"
    return None


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete ``iter_NNNNNNN`` folders of a run, newest first."""
    folders = [f for f in root.glob("iter_*") if f.name.removeprefix("iter_").isdecimal()]
    newest_first = sorted(folders, key=lambda f: int(f.name.removeprefix("iter_")), reverse=True)
    return [folder for folder in newest_first if damage(folder) is None]


def partial_folder(target: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return _beside(target, _PARTIAL)


def recover(root: Path) -> None:
    """Finish what a process that died while it replaced a checkpoint left half done.

    It has moved the old checkpoint away and not yet the new one in. The new one takes the place
    where it is whole, else the old one comes back. Every rank of a job may call this at once.
    """
    for replaced in root.glob(f".iter_*{_REPLACED}"):
        target = _place_of(replaced, _REPLACED)
        if os.path.lexists(target):
            continue
        partial = partial_folder(target)
        with contextlib.suppress(OSError):  # another rank has done it, or nobody may write here
            os.rename(partial if damage(partial) is None else replaced, target)


def remove_leftovers(root: Path) -> None:
    """Remove what a killed save left behind, and nothing that has no better one in its place."""
    recover(root)
    for folder in root.glob(f".iter_*{_PARTIAL}"):
        _remove(folder)
    for folder in root.glob(f".iter_*{_REPLACED}"):
        if os.path.lexists(_place_of(folder, _REPLACED)):
            _remove(folder)


def publish(partial: Path, target: Path) -> None:
    """Put a finished checkpoint in its place.

    Whenever the process dies in here, `recover` leaves a complete checkpoint in the place.
    """
    for path in (partial / "metadata.json", partial):
        sync(path)
    replaced = _beside(target, _REPLACED)
    if os.path.lexists(target):
        _remove(replaced)
        os.rename(target, replaced)
    os.rename(partial, target)
    sync(target.parent)
    _remove(replaced)


@contextlib.contextmanager
def replaced_when_closed(path: str | Path) -> Iterator[TextIO]:
    """Open a text file for writing that takes the place of ``path`` in one step, once complete."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}{kind}")


def _place_of(folder: Path, kind: str) -> Path:
    return folder.with_name(folder.name.removeprefix(".").removesuffix(kind))


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one without what it points to."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
