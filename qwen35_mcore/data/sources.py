"""Which files the inputs of a command name, in an order that never changes."""

from __future__ import annotations

import hashlib
import os
import shlex
import sysconfig
from collections import Counter
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
FORMS: dict[str, Form] = {
    **dict.fromkeys((".txt", ".text", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
_UNPACK = {
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".lzma": "unlzma -k",
    ".lz4": "unlz4 -k",
    ".z": "uncompress -k",
    ".br": "brotli -dk",
    ".zip": "unzip",
    ".7z": "7z x",
    ".rar": "unrar x",
    ".tar": "tar xf",
    **dict.fromkeys((".tgz", ".tbz", ".tbz2", ".txz", ".tzst"), "tar xf"),
}
"""Packed files that are not read, and what unpacks them."""


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: where it is.
        name: its path below the input that named it, the same on every machine.
        size: bytes on disk when the run began.
        modified: nanoseconds since the epoch, then.
        form: how documents lie in it.
        compression: None for a plain file.
    """

    path: Path
    name: str
    size: int
    modified: int
    form: Form
    compression: Compression | None


@dataclass(frozen=True)
class Inputs:
    """The files to read, and how many of the folders' others are left out.

    Attributes:
        sources: in reading order.
        left_out: by type, such as ``.md``, or by the reason where the type is not it.
    """

    sources: list[Source]
    left_out: Counter[str]

    def summary(self) -> str:
        """One line: what is read and what is not, by type."""
        read = Counter(kind_of(source.path) for source in self.sources)
        line = f"reading {len(self.sources)} files: {_listing(read)}"
        return line + (f"; left out: {_listing(self.left_out)}" if self.left_out else "")

    def advice(self) -> str | None:
        """What to do about packed files that were left out."""
        tools = {kind: _unpacking(Path(f"x{kind}")) for kind in sorted(self.left_out)}
        listed = "; ".join(f"{kind} with {tool}" for kind, tool in tools.items() if tool)
        return f"unpack what is packed otherwise than .gz and .zst: {listed}" if listed else None


def expand_inputs(
    inputs: Sequence[Path | str], *, output_prefix: Path, form: Form | None = None
) -> Inputs:
    """Files named by ``inputs``: in the order given, a folder's files sorted by path.

    A folder stands for the files of known types below it (`FORMS`, also packed as ``.gz`` or
    ``.zst``), or for every file where ``form`` says what they are. Left out are names that start
    with a dot, ``__pycache__``, datasets with their sidecars and cached indices, and further links
    to a file that it holds already. ``stdlib`` stands for the ``.py`` files of the running
    interpreter's standard library, without its tests.

    Raises:
        DataError: nothing given, a path that does not exist, a folder without files to read, a
            file of unknown type without ``form``, a file packed in a way that is not read, a file
            named twice.
    """
    if not inputs:
        raise DataError(
            "no input to tokenize",
            allowed=f"files, folders, or {STDLIB!r} for the interpreter's own source files",
        )
    own = {Path(f"{output_prefix}{suffix}").resolve() for suffix in ("", ".bin", ".idx", ".json")}
    left_out: Counter[str] = Counter()
    sources = [source for item in inputs for source in _expand(item, own, form, left_out)]
    _refuse_repeats(sources)
    return Inputs(sources, left_out)


def kind_of(path: Path) -> str:
    """The type of a file as its name tells: ``.jsonl.gz``, ``.md``, or ``no suffix``."""
    packed = path.suffix.lower() in _COMPRESSIONS or path.suffix.lower() in _UNPACK
    inner = path.with_suffix("").suffix if packed else ""
    return f"{inner}{path.suffix}".lower() or "no suffix"


def _listing(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts)) or "none"


def hash_sources(sources: Iterable[Source]) -> str:
    """SHA-256 of the names and sizes, in order: tells whether two runs read the same files."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\0{source.size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _expand(
    item: Path | str, own: set[Path], form: Form | None, left_out: Counter[str]
) -> list[Source]:
    if item == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = (path for path in _walk(root, set(), Counter(), _STDLIB_SKIPPED))
        return [
            _source(path, f"{STDLIB}/{path.relative_to(root).as_posix()}", "text")
            for path in files
            if path.suffix == ".py"
        ]
    root = Path(item).expanduser()
    if root.is_file():
        return [_source(root, root.name, form)]
    if not root.exists():
        pattern = any(letter in str(item) for letter in "*?[")
        raise DataError(
            f"input {str(item)!r} does not exist",
            allowed=f"files, folders, or {STDLIB!r} for the interpreter's own source files",
            fix="no file matches this pattern; correct it, or name the folder"
            if pattern
            else "check the path; relative paths start at the current directory",
        )
    if not root.is_dir():
        raise DataError(
            f"input {str(item)!r} is neither a file nor a folder",
            fix="write it to a file first",
        )
    return _folder(root, own, form, left_out)


def _folder(root: Path, own: set[Path], form: Form | None, left_out: Counter[str]) -> list[Source]:
    others: Counter[str] = Counter()
    found = []
    for path in _walk(root, own, others, set()):
        if _unpacking(path) or (form is None and _known_form(path) is None):
            others[kind_of(path)] += 1
        else:
            found.append(_source(path, f"{root.name}/{path.relative_to(root).as_posix()}", form))
    left_out.update(others)
    if not found:
        raise DataError(
            f"folder {str(root)!r} holds no input file",
            got=_listing(others),
            allowed=f"files of type {', '.join(FORMS)}, also packed as .gz or .zst",
            fix=Inputs([], others).advice()
            or "name another folder, or say what its files are with --format text, jsonl or "
            "parquet",
        )
    return found


def _walk(root: Path, own: set[Path], left_out: Counter[str], skipped: set[str]) -> Iterator[Path]:
    """Files below ``root`` that may hold text, in order; counts the others."""
    paths: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a parent would never end
            subfolders.clear()
            continue
        seen.add(real)
        datasets = {Path(name).stem for name in names if name.endswith(".idx")}
        hidden = [name for name in (*subfolders, *names) if _is_hidden(name)]
        left_out.update({"hidden": len(hidden)} if hidden else {})
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not (_is_hidden(name) or name in skipped or name in datasets)
            if Path(folder, name).resolve() not in own
        )
        for name in names:
            stem, _, suffix = name.rpartition(".")
            if stem in datasets and suffix in ("bin", "idx", "json"):
                left_out["files of datasets"] += 1
            elif not _is_hidden(name):
                paths.append(Path(folder, name))
    paths.sort(key=lambda path: path.relative_to(root).parts)
    files = [path for path in paths if path.is_file()]
    # links make one file appear twice; Debian's standard library has some
    by_file = {path.resolve(): path for path in reversed(files)}
    first = {path for real, path in by_file.items() if real not in own}
    counts = {
        "no regular file": len(paths) - len(files),
        "a second link to a file": len(files) - len(by_file),
        "this dataset's own": len(by_file) - len(first),
    }
    left_out.update({kind: count for kind, count in counts.items() if count})
    return (path for path in files if path in first)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"folder {error.filename!r} cannot be read",
        got=str(error.strerror),
        fix="check its permissions, or name the files to read instead of the folder",
    ) from error


def _source(path: Path, name: str, form: Form | None) -> Source:
    """Raises DataError: see `expand_inputs`."""
    unpack = _unpacking(path)
    if unpack:
        raise DataError(
            f"{path} is packed in a way that is not read",
            got=kind_of(path),
            allowed="files as they are, or packed as .gz or .zst",
            fix=f"unpack it first: {unpack} {shlex.quote(str(path))}",
        )
    form = form or _known_form(path)
    if form is None:
        raise DataError(
            f"the name of {path} does not tell how documents lie in it",
            got=kind_of(path),
            allowed=f"{', '.join(FORMS)}, also packed as .gz or .zst, or any name with --format",
            fix="pass --format text (plain text), jsonl (a JSON object per line) or parquet",
        )
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if form == "parquet" and compression:
        raise DataError(
            f"{path} is a compressed parquet file",
            allowed="parquet files as they are: they are compressed inside",
            fix=f"unpack it to {path.with_suffix('').name}",
        )
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read", got=str(error.strerror)) from error
    return Source(path, name, status.st_size, status.st_mtime_ns, form, compression)


def _known_form(path: Path) -> Form | None:
    inner = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return FORMS.get(inner.suffix.lower())


def _unpacking(path: Path) -> str | None:
    """What unpacks a file that is packed in a way that is not read."""
    packed = path.suffix.lower() in _COMPRESSIONS
    inner = path.with_suffix("").suffix.lower() if packed else ""
    return _UNPACK.get(inner if inner == ".tar" else path.suffix.lower())


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
