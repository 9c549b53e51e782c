"""Which files the inputs of a command name, in an order that never changes."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen35_mcore.errors import DataError

STDLIB = "stdlib"

Form = Literal["text", "jsonl", "parquet"]
Compression = Literal["gz", "zst"]

# Tests of the standard library hold files that are broken on purpose; installed packages are
# not the interpreter's own and differ from machine to machine.
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_FORMS: dict[str, Form] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: where it is.
        name: its path below the input that named it, the same on every machine.
        size: bytes on disk.
        form: how documents lie in it.
        compression: None for a plain file.
    """

    path: Path
    name: str
    size: int
    form: Form
    compression: Compression | None


def expand_inputs(inputs: Sequence[Path | str], *, output_prefix: Path) -> list[Source]:
    """Files named by ``inputs``: in the order given, a folder's files sorted by path.

    A folder stands for every file below it, except names that start with a dot,
    ``__pycache__``, what an earlier run wrote at ``output_prefix``, and further links to a file
    that it holds already. ``stdlib`` stands for
    the ``.py`` files of the running interpreter's standard library, without its tests.

    Raises:
        DataError: nothing given, a path that does not exist, a folder without files, a file
            named twice.
    """
    if not inputs:
        raise DataError(
            "no input to tokenize",
            allowed=f"files, folders, or {STDLIB!r} for the interpreter's own source files",
        )
    own = {Path(f"{output_prefix}{suffix}").resolve() for suffix in ("", ".bin", ".idx", ".json")}
    sources = [source for item in inputs for source in _expand(item, own)]
    _refuse_repeats(sources)
    return sources


def hash_sources(sources: Iterable[Source]) -> str:
    """SHA-256 of the names and sizes, in order: tells whether two runs read the same files."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\0{source.size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _expand(item: Path | str, own: set[Path]) -> list[Source]:
    if item == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = (path for path in _walk(root, _STDLIB_SKIPPED, set()) if path.suffix == ".py")
        return [_source(path, f"{STDLIB}/{path.relative_to(root).as_posix()}") for path in files]
    root = Path(item).expanduser()
    if root.is_file():
        return [_source(root, root.name)]
    if not root.exists():
        raise DataError(
            f"input {str(item)!r} does not exist",
            allowed=f"files, folders, or {STDLIB!r} for the interpreter's own source files",
            fix="check the path; relative paths start at the current directory",
        )
    if not root.is_dir():
        raise DataError(f"input {str(item)!r} is neither a file nor a folder")
    found = [
        _source(path, f"{root.name}/{path.relative_to(root).as_posix()}")
        for path in _walk(root, set(), own)
    ]
    if not found:
        raise DataError(
            f"folder {str(item)!r} holds no input file",
            allowed="a folder with at least one file whose name does not start with a dot",
        )
    return found


def _walk(root: Path, skipped: set[str], own: set[Path]) -> Iterator[Path]:
    paths: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a parent would never end
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and name != "__pycache__" and name not in skipped
            if Path(folder, name).resolve() not in own
        )
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    paths.sort(key=lambda path: path.relative_to(root).parts)
    # links make one file appear twice; Debian's standard library has some
    by_file = {path.resolve(): path for path in reversed(paths) if path.is_file()}
    first = {path for real, path in by_file.items() if real not in own}
    return (path for path in paths if path in first)


def _source(path: Path, name: str) -> Source:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    inner = path.with_suffix("") if compression else path
    form = _FORMS.get(inner.suffix.lower(), "text")
    if form == "parquet" and compression:
        raise DataError(
            f"{path} is a compressed parquet file",
            allowed="parquet files as they are: they are compressed inside",
            fix=f"unpack it to {inner.name}",
        )
    return Source(path, name, path.stat().st_size, form, compression)


def _refuse_repeats(sources: Sequence[Source]) -> None:
    seen: set[str] = set()
    for source in sources:
        real = os.path.realpath(source.path)
        if real in seen:
            raise DataError(
                f"{source.path} is named twice by the inputs",
                allowed="each file once: repeating one would train on it twice",
                fix="name it once; to weight data, tokenize apart and blend with --data-path",
            )
        seen.add(real)
