"""A dataset that is complete or absent: written under other names, published index last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from qwen35_mcore.data.sidecar import is_sidecar
from qwen35_mcore.errors import DataError
from qwen35_mcore.mcore import imports
from qwen35_mcore.process.interrupts import quiet_imports
from qwen35_mcore.process.sync import sync

_PARTIAL = ".partial"
_LONGEST_NAME = 255 - len(".json" + _PARTIAL)


def dataset_prefix(given: Path | str) -> Path:
    """The prefix as a path.

    Raises:
        DataError: it is a folder's name, or has the suffix of a file of the dataset.
    """
    prefix = Path(given)
    if os.path.basename(given) in ("", ".", ".."):
        raise DataError(
            "the output prefix is a folder",
            got=str(given),
            allowed="PREFIX, of which the files are PREFIX.bin and PREFIX.idx",
            fix=f"name the dataset in it: --output-prefix {prefix / 'NAME'}",
        )
    if prefix.suffix in (".bin", ".idx"):
        raise DataError(
            "the output prefix has a suffix, which would be there twice",
            got=str(given),
            allowed="PREFIX, of which the files are PREFIX.bin and PREFIX.idx",
            fix=f"--output-prefix {prefix.with_suffix('')}",
        )
    if len(os.fsencode(prefix.name)) > _LONGEST_NAME:
        raise DataError(
            "the output prefix is too long for names of files",
            got=f"{len(os.fsencode(prefix.name))} bytes",
            allowed=f"up to {_LONGEST_NAME}",
            fix="shorten the last part of --output-prefix",
        )
    return prefix


def check_target(prefix: Path, *, overwrite: bool) -> None:
    """Raise DataError if writing at ``prefix`` would replace a dataset without ``overwrite``, or
    a ``PREFIX.json`` that is no dataset's.

    A ``.partial`` file counts: it belongs to a run that is still writing or was killed.
    """
    sidecar = Path(f"{prefix}.json")
    if sidecar.exists() and not is_sidecar(sidecar):
        raise DataError(
            f"{sidecar} is there and describes no dataset: it may be somebody's text",
            allowed="only a dataset is replaced, with --overwrite",
            fix="choose another --output-prefix, or move the file away",
        )
    if overwrite:
        return
    for suffix in (".bin", ".idx", ".json"):
        if Path(f"{prefix}{suffix}").exists():
            raise DataError(
                f"{prefix}{suffix} exists already",
                fix="choose another --output-prefix, or pass --overwrite to replace the dataset",
            )
        if Path(f"{prefix}{suffix}{_PARTIAL}").exists():
            raise _unfinished(f"{prefix}{suffix}{_PARTIAL}")


def index_dtype(vocab_size: int) -> np.dtype:
    """Type in which Megatron stores tokens of such a vocabulary: uint16 or int32."""
    return np.dtype(_indexed_dataset()[0].optimal_dtype(vocab_size))


class DatasetWriter:
    """Writes ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.json``; a context manager.

    Everything goes to ``.partial`` names first. :meth:`commit` renames, and the index last:
    Megatron takes a dataset to exist when both ``.idx`` and ``.bin`` do, so the index is the
    one name whose appearance makes the others count. A run that fails or is interrupted
    removes its files; one that is killed leaves ``.partial`` files, never a dataset.

    Memory grows by about 100 bytes a document, for the index.

    Raises:
        DataError: the target exists and ``overwrite`` is not set, or the disk refuses a write.
    """

    def __init__(self, prefix: Path, *, dtype: np.dtype, overwrite: bool) -> None:
        check_target(prefix, overwrite=overwrite)
        self._prefix = prefix
        self._dtype = dtype
        self._overwrite = overwrite
        self._bin, self._idx, self._json = (
            Path(f"{prefix}{suffix}{_PARTIAL}") for suffix in (".bin", ".idx", ".json")
        )
        self._cleanup: list[Path] = []
        self._builder: Any = None

    def __enter__(self) -> Self:
        with writing(self._prefix):
            self._prefix.parent.mkdir(parents=True, exist_ok=True)
            if self._overwrite:
                self._bin.unlink(missing_ok=True)
            try:
                self._bin.touch(exist_ok=False)
            except FileExistsError:
                raise _unfinished(self._bin) from None
            self._cleanup += [self._bin, self._idx, self._json]
            self._builder = _indexed_dataset()[1](str(self._bin), dtype=self._dtype.type)
        return self

    def add(self, ids: np.ndarray, lengths: Sequence[int]) -> None:
        """Append documents: ``ids`` of all of them joined, ``lengths`` in tokens."""
        with writing(self._prefix):
            start = 0
            for length in lengths:
                self._builder.add_document(ids[start : start + length], [length])
                start += length

    def commit(self, sidecar: str) -> None:
        """Publish the dataset, with ``sidecar`` as the content of ``PREFIX.json``."""
        with writing(self._prefix):
            self._builder.finalize(str(self._idx))
            self._json.write_text(sidecar)
            for path in (self._bin, self._idx, self._json):
                sync(path)
            if self._overwrite:
                # From here until the last rename there is no dataset, rather than a mixed one.
                Path(f"{self._prefix}.idx").unlink(missing_ok=True)
                self._drop_cached_indices()
            for partial in (self._json, self._bin, self._idx):
                target = partial.with_name(partial.name.removesuffix(_PARTIAL))
                self._cleanup.append(target)
                partial.replace(target)
            self._cleanup.clear()
            sync(self._prefix.parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            self._builder.data_file.close()
        # The index goes first, as it came last.
        for path in reversed(self._cleanup):
            path.unlink(missing_ok=True)

    def _drop_cached_indices(self) -> None:
        """Forget sample indices that Megatron cached for the dataset being replaced.

        Its cache key holds the prefix and not the content: a stale one reads wrong positions.
        """
        cache = Path(f"{self._prefix}") / "cache" / "GPTDataset_indices"
        if cache.is_dir():
            shutil.rmtree(cache)


@contextmanager
def writing(target: Path | str) -> Iterator[None]:
    """Make a disk that is full or not to be written to one DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{target} cannot be written",
            got=str(error),
            fix="check the folder's permissions and the space left on its disk",
        ) from error


def _unfinished(partial: Path | str) -> DataError:
    return DataError(
        f"{partial} belongs to a run that is still writing or was killed",
        fix="if none is running, remove it or pass --overwrite",
    )


def _indexed_dataset() -> tuple[Any, Any]:
    """megatron's DType and IndexedDatasetBuilder."""
    # megatron.core imports torch and its optimizers, which warn about libraries that have no
    # part in writing a dataset.
    with quiet_imports(leave=False):
        return imports.DType, imports.IndexedDatasetBuilder
