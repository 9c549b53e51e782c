"""A conversion in progress: a folder beside the target, and a manifest of the parts that are done.

The result grows in ``TARGET.partial/tree`` and becomes the target by one rename at the end, so
nothing half-finished is ever where a finished result is looked for. The manifest has one line per
finished part with its size and checksum; the same command, run again, keeps the parts that still
match and writes the others. That is also why a part need not be on the disk before it is noted:
everything is synchronised once, before the rename. What stood at the target before is moved away
only after the new result is complete, and removed last.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_tools.files.checksums import ChecksumWriter, checksum
from checkpoint_tools.files.direct_file import DirectFile
from checkpoint_tools.files.job import Options
from checkpoint_tools.files.paths import UNFINISHED
from checkpoint_tools.files.progress import Progress
from checkpoint_tools.files.workers import run_parallel
from qwen35_mcore.errors import CheckpointError
from qwen35_mcore.process.sync import sync

PARTIAL = ".partial"


class Work:
    """One conversion's folder. Use as a context manager; `publish` ends it.

    Args:
        target: where the result goes.
        job: what is converted and how, as plain JSON values. Work is resumed only when equal.
        options: among them whether to replace an existing target (after success).
        size: bytes of the whole result, for the progress bar.
        foreign: of the names in an existing target, those that no such conversion writes. It is
            not replaced while there are any.

    Raises:
        CheckpointError: the target exists, another process works on it, or the work in progress is
            of another job.
    """

    def __init__(
        self,
        target: Path,
        job: dict[str, Any],
        options: Options,
        *,
        size: int,
        foreign: Callable[[list[str]], list[str]],
    ) -> None:
        # a link leads to where the result goes: a rename would put the result in the link's place
        self.target = Path(os.path.realpath(target)) if target.is_symlink() else target.absolute()
        self.job, self._overwrite, self._foreign = job, options.overwrite, foreign
        self.folder = self.target.with_name(self.target.name + PARTIAL)
        self.tree, self.manifest = self.folder / "tree", self.folder / "manifest.jsonl"
        self._done: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._manifest: Any = None
        self._progress = Progress(size, job["command"], quiet=options.quiet)

    def __enter__(self) -> Work:
        self._refuse_existing()
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(
                "a file is where the work in progress would go", got=str(self.folder)
            )
        self.tree.mkdir(parents=True, exist_ok=True)
        self._manifest = open(self.manifest, "a+b")
        try:
            self._take()
            self._read()
        except BaseException:
            self._manifest.close()
            raise
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)
        self._manifest.close()

    def finished_before(self) -> bool:
        """Whether this job was completed and killed while it was cleaning up; cleans up."""
        if not _occupied(self.target) or not self.folder.is_dir() or self.tree.exists():
            return False
        if self.manifest.is_file():
            begun = _lines(self.manifest.read_bytes())[:1]
            if begun != [{"job": self.job}]:
                return False
        _remove(self.folder)
        return True

    def part(self, name: str, write: Callable[[Any], Any]) -> Any:
        """Write one file of the result unless it is there; returns what `write` returned.

        `write` gets a binary stream and returns a JSON value, which is kept in the manifest.
        """
        path = self.tree / name
        done = self._done.get(name)
        if done and _matches(path, done):
            self._progress.advance(done["bytes"])
            return done["value"]
        stream, value = _write(path, write, self._progress.advance)
        entry = {"part": name, "bytes": stream.count, "crc32": stream.crc, "value": value}
        self._append(entry)
        return json.loads(json.dumps(value))

    def publish(self) -> None:
        """Put the result in place of the target."""
        paths = sorted(self.tree.rglob("*"), reverse=True)
        run_parallel(sync, [*(path for path in paths if path.is_file()), self.manifest], 4)
        for folder in (*(path for path in paths if path.is_dir()), self.tree):
            sync(folder)
        if _occupied(self.target):
            os.rename(self.target, self.folder / "replaced")
        os.rename(self.tree, self.target)
        sync(self.target.parent)
        _remove(self.folder)

    def _refuse_existing(self) -> None:
        if self.target.is_symlink() or (self.target.exists() and not self.target.is_dir()):
            raise CheckpointError(
                "the target is no folder",
                got=str(self.target),
                fix="name a folder that is not there",
            )
        if not _occupied(self.target):
            return
        kept = self._foreign(sorted(path.name for path in self.target.iterdir()))
        if kept:
            raise CheckpointError(
                "the target holds what no conversion may replace",
                got=f"{', '.join(kept[:4])} in {self.target}",
                fix="choose another folder",
            )
        if not self._overwrite:
            raise CheckpointError(
                "the target exists",
                got=str(self.target),
                fix="choose another, or --overwrite to replace it after success",
            )

    def _take(self) -> None:
        try:
            fcntl.flock(self._manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                "another process is writing this target", got=str(self.target)
            ) from error
        except OSError:
            # some cluster file systems have no locks; the lock only guards against a mistake
            return

    def _read(self) -> None:
        self._manifest.seek(0)
        content = self._manifest.read()
        # a killed process can leave half a line, which the next one must not be glued to
        complete = content.rfind(b"\n") + 1
        self._manifest.truncate(complete)
        lines = _lines(content[:complete])
        if not lines:
            self._append({"job": self.job})
            return
        if lines[0] != {"job": self.job}:
            others = lines[0].get("job", {})
            keys = dict.fromkeys([*self.job, *others])
            what = [key for key in keys if others.get(key) != self.job.get(key)]
            raise CheckpointError(
                "there is unfinished work of another command or of other input",
                got=f"{self.folder}: other {', '.join(what)}",
                fix="finish it with the command that began it, or delete this folder",
            )
        self._done = {line["part"]: line for line in lines[1:]}

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock:
            self._manifest.write(json.dumps(entry).encode() + b"\n")
            self._manifest.flush()


def _write(
    path: Path, write: Callable[[Any], Any], advance: Callable[[int], None]
) -> tuple[ChecksumWriter, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    with DirectFile(unfinished) as file:
        stream = ChecksumWriter(file, advance)
        try:
            value = write(stream)
            file.finish()
        except Exception as error:
            reason = stream.failure or error
            if not isinstance(reason, OSError):
                raise
            raise CheckpointError(
                "cannot write",
                got=f"{unfinished}: {reason.strerror}",
                fix="make room, and run the same command again: it goes on where it stopped",
            ) from error
    os.rename(unfinished, path)
    return stream, value


def _matches(path: Path, done: dict[str, Any]) -> bool:
    same_size = path.is_file() and path.stat().st_size == done["bytes"]
    return same_size and checksum(path) == done["crc32"]


def _occupied(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is not None


def _lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


def _remove(folder: Path) -> None:
    """Remove a finished work folder, the manifest last: it tells a rerun that the job is done."""
    shutil.rmtree(folder / "replaced", ignore_errors=True)
    (folder / "manifest.jsonl").unlink(missing_ok=True)
    folder.rmdir()
