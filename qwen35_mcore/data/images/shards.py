"""Conversations and their images as a WebDataset that Energon reads: complete, or absent."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from qwen35_mcore.data.writer import writing
from qwen35_mcore.errors import DataError
from qwen35_mcore.process.sync import sync

PARTS = ("train", "val", "test")
_DATASET = """\
sample_type:
  __module__: megatron.energon
  __class__: InterleavedSample
part_filter: sample_loader.py:part_filter
sample_loader: sample_loader.py:sample_loader
"""
_SAMPLE_LOADER = '''\
"""A sample's sequence: its conversation (messages, tools, source, paths), its images by name."""


def part_filter(part):
    return True


def sample_loader(raw):
    names = [name for name in raw if name != "json" and not name.startswith("__")]
    return {"sequence": [raw["json"], {name: raw[name] for name in names}]}
'''
"""Energon reads a folder's samples with the functions that the folder brings."""


class Prepared(NamedTuple):
    """A sample as it lies in a shard.

    Attributes:
        content: ``messages`` with the names of ``files`` in place of paths, ``tools``, ``source``
            (file and line), and ``paths``: name in ``files`` to path.
        files: images and frames, as they were.
        tokens: tokens of the conversation.
        images: images, and frames of videos.
    """

    content: dict[str, Any]
    files: dict[str, bytes]
    tokens: int
    images: int


def parse_split(text: str) -> dict[str, float]:
    """Weights of train, val and test, of ``98,2,0``. Raises DataError if they are none."""
    try:
        weights = [float(each) for each in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) > 3 or not all(0 <= weight < 1e9 for weight in weights) or not sum(weights):
        raise DataError(
            "--split must give the shares of train, val and test",
            got=text,
            allowed="up to three numbers, such as 98,2,0; shares that are not given are 0",
        )
    shares = dict(zip(PARTS, [*weights, 0.0, 0.0], strict=False))
    return {part: share / sum(weights) for part, share in shares.items() if share}


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raise DataError if writing to ``folder`` would replace what is no dataset, or one without
    ``overwrite``."""
    if folder == Path.cwd():
        raise DataError(
            "the output folder is the current one, which a dataset would replace",
            got=str(folder),
            fix="name a folder in it",
        )
    partial = _partial(folder)
    if partial.exists() and not overwrite:
        raise DataError(
            f"{partial} belongs to a run that is still writing or was killed",
            fix="if none is running, remove it or pass --overwrite",
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / ".nv-meta" / ".info.json").is_file():
        raise DataError(
            f"{folder} is there and is no dataset",
            allowed="a new or empty folder; only a dataset is replaced, with --overwrite",
            fix="choose another --output-dir",
        )
    if not overwrite:
        raise DataError(
            f"{folder} exists already",
            fix="choose another --output-dir, or pass --overwrite to replace the dataset",
        )


class ShardWriter:
    """Writes the folder of a dataset; a context manager.

    Everything goes to ``FOLDER.partial``, which :meth:`commit` renames: a run that fails or is
    interrupted removes it, one that is killed leaves it.

    Args:
        folder: where the dataset goes.
        split: shares of the parts, which sum to 1. Samples are dealt out in turn, so that every
            part has its share, but for one sample, at any time.
        shard_bytes: a shard that has reached them is closed.
        overwrite: replace a dataset that is there.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, *, split: dict[str, float], shard_bytes: int, overwrite: bool
    ) -> None:
        check_target(folder, overwrite=overwrite)
        self._folder, self._partial = folder, _partial(folder)
        self._split, self._shard_bytes, self._overwrite = split, shard_bytes, overwrite
        self._open: dict[str, Any] = {}
        self._shards: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        with writing(self._folder):
            if self._overwrite and self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir(parents=True)
        return self

    def add(self, sample: Prepared) -> None:
        """Append a sample to the part that lacks most of its share."""
        number = self.counts.total()
        part = max(
            self._split, key=lambda part: self._split[part] * (number + 1) - self.counts[part]
        )
        content = json.dumps(sample.content, ensure_ascii=False).encode(errors="surrogatepass")
        with writing(self._folder):
            self._shard(part).write({"__key__": f"{number:09d}", "json": content, **sample.files})
        self.counts[part] += 1

    def commit(self) -> None:
        """Publish the dataset. Raises DataError where a part with a share has no sample."""
        if not self.counts:
            raise DataError(
                "there is no conversation to write",
                got="lines that are blank or left out, or none",
                allowed="at least one that can be used",
                fix="see the warnings, if there are any, or name another jsonl file",
            )
        empty = [part for part in self._split if not self.counts[part]]
        if empty:
            raise DataError(
                f"there are not enough samples for the split {' and '.join(empty)}",
                got=f"{self.counts.total()} samples",
                fix="give it a larger share in --split, or none",
            )
        with writing(self._folder):
            for shard in self._open.values():
                shard.close()
            self._write_metadata()
            for path in self._partial.rglob("*"):
                sync(path)
            replaced = None
            if self._folder.exists():  # whole until the new one is in its place
                prefix = f"{self._folder.name}.replaced."
                replaced = tempfile.mkdtemp(prefix=prefix, dir=self._folder.parent)
                self._folder.replace(replaced)
            self._partial.replace(self._folder)
            sync(self._folder.parent)
            if replaced is not None:
                shutil.rmtree(replaced, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            for shard in self._open.values():
                shard.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _shard(self, part: str) -> Any:
        """The open shard of a part; the next one where it is full."""
        import webdataset

        shard = self._open.get(part)
        if shard is not None and shard.stream.tell() >= self._shard_bytes:
            shard.close()
            shard = None
        if shard is None:
            path = self._partial / f"{part}-{self._shards[part]:06d}.tar"
            self._shards[part] += 1
            shard = webdataset.TarWriter(str(path), encoder=False, mtime=0)
            self._open[part] = shard
        return shard

    def _write_metadata(self) -> None:
        from qwen35_mcore.mcore.energon import MAIN_FOLDER_NAME, EPath, WebdatasetPreparator

        names = [
            f"{part}-{number:06d}.tar"
            for part in self._split
            for number in range(self._shards[part])
        ]
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                WebdatasetPreparator.prepare_dataset(
                    EPath(str(self._partial.resolve())),
                    names,
                    split_parts_patterns=[(part, f"{part}-.*") for part in PARTS],
                    shuffle_seed=None,
                    workers=min(len(names), os.cpu_count() or 1),
                )
        finally:
            logging.disable(logging.NOTSET)
        metadata = self._partial / MAIN_FOLDER_NAME
        (metadata / "dataset.yaml").write_text(_DATASET)
        (metadata / "sample_loader.py").write_text(_SAMPLE_LOADER)


def _partial(folder: Path) -> Path:
    return Path(f"{folder}.partial")
