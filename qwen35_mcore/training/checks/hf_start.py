"""A run that starts from a Hugging Face folder: imported once, beside the run, before it starts.

The import is `qwen35-ckpt import` in a process of its own, started by one rank. All ranks wait for
its result, a folder that appears complete, before any process group exists that could time out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import qwen35_mcore
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import CheckpointError
from qwen35_mcore.mcore.checkpoint_files import (
    TRACKER,
    complete_checkpoints,
    damage,
    tracked_folder,
)
from qwen35_mcore.process.file_lock import try_lock
from qwen35_mcore.training.checks.checkpoint import check_same_model, check_same_tower

POLL_S, REPORT_S = 0.5, 10.0
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HELP = (
    " Also a Hugging Face folder, or a Hub id in the local cache: it is imported once, into "
    "imported/ beside --save, and without --flavor and --hf-config it is the model, too."
)


def model_of_start(argv: list[str]) -> str | None:
    """The folder whose config.json is the model, where the flags name no other: that of
    ``--pretrained-checkpoint`` if it is Hugging Face's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pretrained-checkpoint", nargs="?")
    given = parser.parse_known_args(argv)[0].pretrained_checkpoint
    folder = _hf_folder(given) if given else None
    return str(folder) if folder is not None else None


def import_start(args: argparse.Namespace, model_config: Qwen35Config) -> None:
    """Where ``--pretrained-checkpoint`` is Hugging Face's, import it and name the import instead.

    Does nothing where the run resumes from ``--load``. An import that is there is used again; it
    is another one for another source, and for one whose files changed.

    Raises:
        CheckpointError: there is no ``--save`` to put it beside, the source is of another model
            or cannot be imported, or ``--load`` names a Hugging Face folder.
    """
    if args.load and _is_hf(Path(args.load)) and any(Path(args.load).glob("*.safetensors")):
        raise CheckpointError(
            "--load names a Hugging Face folder, and continues only from a run's checkpoints",
            got=args.load,
            fix="pass it as --pretrained-checkpoint, and --load as the folder of --save",
        )
    source = _hf_folder(args.pretrained_checkpoint) if args.pretrained_checkpoint else None
    if source is None or _resumes(args):
        return
    options = _check_source(args, source, model_config)
    name = _name(args.pretrained_checkpoint, source, options)
    target = _shelf(Path(args.save)) / name
    _Import(source, target, options).wait()
    args.pretrained_checkpoint = str(target)


def _check_source(
    args: argparse.Namespace, source: Path, model_config: Qwen35Config
) -> tuple[str, ...]:
    """Check source and target before anything is imported; returns the options of the import."""
    if not args.save:
        raise CheckpointError(
            "--pretrained-checkpoint names a Hugging Face folder, whose import goes beside --save",
            got=f"{args.pretrained_checkpoint}, and no --save",
            fix="pass --save, or import it with "
            f"`qwen35-ckpt import {shlex.quote(args.pretrained_checkpoint)} OUT_DIR` and name "
            "OUT_DIR",
        )
    if Path(args.save).resolve().is_relative_to(source.resolve()):
        raise CheckpointError(
            "--save lies in the Hugging Face folder that --pretrained-checkpoint names",
            got=args.save,
            fix="choose a folder outside of it, so that a run does not change what it starts from",
        )
    published = Qwen35Config.from_hf(source)
    without_mtp = bool(published.mtp_num_hidden_layers) and not model_config.mtp_num_hidden_layers
    if without_mtp:
        published = replace(published, mtp_num_hidden_layers=0)
    try:
        check_same_model(published, source, model_config)
        if args.qwen35_vision:
            check_same_tower(published, source, model_config)
    except CheckpointError as error:
        raise CheckpointError(
            "--pretrained-checkpoint names a Hugging Face folder of another model than the flags",
            got=error.got,
            allowed=error.allowed,
            fix="drop --flavor, --hf-config and --override: without them the folder is the model",
        ) from error
    return ("--no-mtp",) * without_mtp + ("--vision",) * args.qwen35_vision


def _hf_folder(given: str) -> Path | None:
    """The Hugging Face folder that a flag names, by path or by a Hub id; None if it names none."""
    path = Path(given)
    if path.exists() or not _REPO_ID.fullmatch(given) or path.parent.is_dir():
        return path if _is_hf(path) else None
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(given, local_files_only=True))
    except Exception:  # of whichever kind the hub's client raises
        cached = None
    if cached is None or not _is_hf(cached) or not any(cached.glob("*.safetensors")):
        raise CheckpointError(
            "--pretrained-checkpoint names neither a folder nor a model in the local Hub cache",
            got=given,
            allowed="a Megatron checkpoint, a Hugging Face folder, or a Hub id that was downloaded",
            fix=f"correct the path, or `hf download {given}` and start again",
        )
    return cached


def _is_hf(folder: Path) -> bool:
    if (folder / TRACKER).exists():
        return False
    return (folder / "config.json").is_file() or any(folder.glob("*.safetensors"))


def _resumes(args: argparse.Namespace) -> bool:
    """Whether ``--load`` has checkpoints: `check_start` says whether the run can use them."""
    load = Path(args.load) if args.load else None
    if load is None:
        return False
    return bool(args.ckpt_step or (load / TRACKER).exists() or complete_checkpoints(load))


def _shelf(save: Path) -> Path:
    """The folder of imports: beside the run's, or in it where that is a file system of its own,
    because other nodes see nothing else."""
    save = save.absolute()
    return (save if os.path.ismount(save) else save.parent) / "imported"


def _name(given: str, source: Path, options: tuple[str, ...]) -> str:
    """A name that changes with the source (the files' names, sizes and times, and the config) and
    with the options of the import."""
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name, stat = path.relative_to(source), path.stat()
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    model = Path(given).name or source.resolve().name
    return f"{model}-{digest.hexdigest()[:12]}" + "".join(f"-{o.strip('-')}" for o in options)


@dataclass(frozen=True)
class _Import:
    """One import, seen by every rank.

    The lock file holds the failures so far. One that happens while a rank waits is that rank's
    failure, too; one that happened before is not, and the rank tries again.
    """

    source: Path
    target: Path
    flags: tuple[str, ...]

    @property
    def lock(self) -> Path:
        return self.target.with_name(f".{self.target.name}.lock")

    def wait(self) -> None:
        """Import, or wait until another rank or run has."""
        there = tracked_folder(self.target)
        if there is not None:
            self._check_there(there)
            _say(f"starting from {self.target}, imported before from {self.source}")
            return
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._take_turns()
        except OSError as error:
            raise CheckpointError(
                f"cannot import {self.source} beside the run",
                got=f"{error.filename or self.lock}: {error.strerror or error}",
                fix=f"import it with `{self._command_line('OUT_DIR')}`, and name OUT_DIR as "
                "--pretrained-checkpoint",
            ) from error

    def _check_there(self, there: Path) -> None:
        problem = damage(there)
        if problem is not None:
            raise CheckpointError(
                f"the import of {self.source} is incomplete",
                got=problem,
                fix=f"delete {self.target} and start again: the run imports it again",
            )

    def _take_turns(self) -> None:
        seen, report = len(self._failures()), _Report(self)
        while tracked_folder(self.target) is None:
            failures = self._failures()
            if len(failures) > seen:
                raise CheckpointError(failures[-1])
            if _on_first_node():
                with try_lock(self.lock) as lock:
                    if lock is not None and tracked_folder(self.target) is None:
                        if len(self._failures()) == seen:
                            self._run(lock, report)
                        continue
            report.say()
            time.sleep(POLL_S)
        _say(f"imported {self.source}")

    def _run(self, lock: IO[bytes], report: _Report) -> None:
        """Run the import; the process inherits the lock, and keeps it if this one is killed."""
        root = str(Path(qwen35_mcore.__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-P", "-m", "checkpoint_tools.cli", "import"]
        command += [str(self.source), str(self.target), *self.flags]
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                pass_fds=[lock.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
            try:
                while process.poll() is None:
                    report.say()
                    time.sleep(POLL_S)
            finally:
                process.terminate()
                process.wait()
            errors.seek(0)
            if process.returncode:
                failure = self._failure(errors.read(), process.returncode)
                lock.write(json.dumps(failure).encode() + b"\n")
                lock.flush()
                raise CheckpointError(failure)

    def _failure(self, errors: str, status: int) -> str:
        before, found, message = errors.strip().rpartition("error: ")
        if not found or status != 2:
            end = f"signal {-status}" if status < 0 else f"status {status}"
            last = "".join((before + found + message).splitlines()[-1:])
            message = f"it ended with {end}\n  got: {last or 'no message'}"
            message += "\n  fix: start again: it goes on where it stopped"
        text = f"importing {self.source} failed: {message}"
        if "--no-mtp" in message:
            text += "\n  here: --override mtp_num_hidden_layers=0 does so"
        elif "--" in message:
            text += "\n  here: give options to the import by hand, then start again: "
            text += self._command_line(self.target)
        return text

    def _command_line(self, target: Path | str) -> str:
        return shlex.join(["qwen35-ckpt", "import", str(self.source), str(target), *self.flags])

    def _failures(self) -> list[str]:
        try:
            return [json.loads(line) for line in self.lock.read_text().splitlines()]
        except FileNotFoundError:
            return []

    def bytes_written(self) -> int:
        """Bytes of the unfinished import."""
        return sum(_sizes(self.target.with_name(f"{self.target.name}.partial")))

    def bytes_read(self) -> int:
        """Bytes of the source's weights."""
        return sum(path.stat().st_size for path in self.source.glob("*.safetensors"))


class _Report:
    """One line when the wait begins, then one every ten seconds; from one rank a node."""

    def __init__(self, work: _Import) -> None:
        self._work = work
        self._next = 0.0

    def say(self) -> None:
        if time.monotonic() < self._next:
            return
        work = self._work
        if not self._next:
            _say(f"importing {work.source} to {work.target}, once; every rank waits for it")
        else:
            done, whole = work.bytes_written() / 1e9, work.bytes_read() / 1e9
            _say(f"importing {work.source.name}: {done:.1f} of {whole:.1f} GB")
        self._next = time.monotonic() + REPORT_S


def _sizes(folder: Path) -> Iterator[int]:
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # renamed meanwhile
                continue


def _say(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, flush=True)


def _on_first_node() -> bool:
    """Whether this rank may import: some file systems' locks hold within a machine only."""
    return os.environ.get("GROUP_RANK", "0") == "0"


def describe(action: Any) -> None:
    """Add to the help of megatron's flag what it means here."""
    if action.dest == "pretrained_checkpoint":
        action.help = (action.help or "") + HELP
