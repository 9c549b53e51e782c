"""A jsonl of conversations with image paths to Energon's WebDataset, checked sample by sample."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qwen35_mcore.data.images.messages import checked_messages, map_media, unread_keys
from qwen35_mcore.data.images.rules import BadSamples, check_length
from qwen35_mcore.data.images.shards import (
    Prepared,
    ShardWriter,
    check_target,
    parse_split,
)
from qwen35_mcore.data.ordered import check_workers, in_order, progress
from qwen35_mcore.data.readers import Record, json_object, read_records
from qwen35_mcore.data.sources import Source, expand_inputs
from qwen35_mcore.errors import DataError

_CHUNK = 16  # samples that a worker takes at a time: their images are in memory together


@dataclass(frozen=True)
class ImagesReport:
    """What a run wrote.

    Attributes:
        samples: samples of each split.
        tokens: tokens of all conversations.
        images: images, and frames of videos.
        left_out: samples that could not be used.
        blank_lines: lines that hold nothing.
        unused_keys: keys of the lines that are no part of a conversation, with how often.
        seconds: wall-clock time of the whole run.
    """

    samples: dict[str, int]
    tokens: int
    images: int
    left_out: int
    blank_lines: int
    unused_keys: dict[str, int]
    seconds: float

    def summary(self, folder: Path | str) -> str:
        """One line."""
        parts = ", ".join(f"{count:,} {part}" for part, count in self.samples.items())
        counts = {"bad samples": self.left_out, "blank lines": self.blank_lines}
        nothing = [f"{count:,} {what}" for what, count in counts.items() if count]
        nothing += [f"the key {key} of {n:,} lines" for key, n in self.unused_keys.items()]
        return (
            f"wrote {folder}: {sum(self.samples.values()):,} samples ({parts}), "
            f"{self.tokens:,} tokens, {self.images:,} images"
            + (f"; left out: {', '.join(nothing)}" if nothing else "")
        )


class _Outcome(NamedTuple):
    """What became of some lines: samples, or why they cannot be used."""

    samples: list[Prepared | DataError]
    blank: int
    unused_keys: Counter[str]
    consumed: int


@dataclass(frozen=True)
class _Preparer:
    """All that turns lines into samples; sent to each worker once."""

    processor: str
    key: str
    root: Path | None
    most: int | None

    def __call__(self, records: Sequence[Record]) -> _Outcome:
        unused: Counter[str] = Counter()
        lines = [record for record in records if not record.is_blank]
        return _Outcome(
            samples=[self._sample(record, unused) for record in lines],
            blank=len(records) - len(lines),
            unused_keys=unused,
            consumed=sum(record.consumed for record in records),
        )

    def _sample(self, record: Record, unused: Counter[str]) -> Prepared | DataError:
        try:
            value = json_object(record)
            if self.key not in value:
                raise DataError(
                    f"{record.where} has no key {self.key!r}",
                    got=f"keys {', '.join(value)}",
                    fix="choose the key that holds the messages with --json-key",
                )
            unused.update(value.keys() - {self.key, "tools"})
            return self._prepared(record, value, unused)
        except DataError as error:
            if error.what.startswith(record.where):
                return error
            return DataError(
                f"{record.where}: {error.what}",
                got=error.got,
                allowed=error.allowed,
                fix=error.fix,
            )

    def _prepared(self, record: Record, value: dict[str, Any], unused: Counter[str]) -> Prepared:
        from qwen35_mcore.data.images.chat import check_kept, load_chat, open_image

        chat = load_chat(self.processor)
        messages = checked_messages(value[self.key])
        unused.update(set(unread_keys(value[self.key], chat.words)))
        root = Path(record.path).parent if self.root is None else self.root
        paths: list[str] = []
        map_media(messages, paths.append)
        contents = [_read(root / path) for path in paths]
        opened = [
            open_image(content, str(root / path))
            for path, content in zip(paths, contents, strict=True)
        ]
        for path, read in zip(paths, contents, strict=True):
            check_kept(read, str(root / path))
        names = [f"{number}.{kind}" for number, (_, kind) in enumerate(opened)]
        in_order = iter(names)
        stored = map_media(messages, lambda path: next(in_order))
        tools = value.get("tools")
        images = {name: image for name, (image, _) in zip(names, opened, strict=True)}
        encoded = chat.encode(stored, images, tools)
        check_length(encoded, self.most, "--max-length")
        content = {
            "messages": stored,
            "source": record.where,
            "paths": dict(zip(names, paths, strict=True)),
        } | ({} if tools is None else {"tools": tools})
        files = dict(zip(names, contents, strict=True))
        return Prepared(content, files, len(encoded.tokens), len(files))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a NUL byte, half of a surrogate pair
        raise DataError(
            f"the image {path} cannot be read",
            got=str(getattr(error, "strerror", None) or error),
            fix="check the path; relative paths start at the jsonl file, or at --image-root",
        ) from error


def convert(
    *,
    inputs: Sequence[Path | str],
    output_dir: Path | str,
    processor: str,
    json_key: str = "messages",
    image_root: Path | str | None = None,
    max_length: int | None = None,
    bad_samples: BadSamples = "error",
    split: str = "100,0,0",
    shard_mib: int = 512,
    workers: int = 1,
    overwrite: bool = False,
    quiet: bool = False,
) -> ImagesReport:
    """Write conversations and their images to a folder that Energon reads.

    The samples and their order are the same for any number of workers. Every sample is encoded as
    training encodes it, so what is written can be trained on.

    Args:
        inputs: jsonl files, also packed as ``.gz`` or ``.zst``: an object a line, with messages as
            transformers' chat templates take them, and ``tools`` where the template has them.
        output_dir: the folder; missing parents are made.
        processor: the model's Hugging Face folder or name.
        json_key: the key that holds the messages.
        image_root: where relative paths of images begin; None: at the jsonl file.
        max_length: tokens of a sequence; None: no limit.
        bad_samples: what happens to a sample that cannot be used: an error that names it, or a
            warning, and it is left out.
        split: shares of train, val and test.
        shard_mib: MiB after which a new shard begins.
        workers: processes that encode; 1 works in this process. More than one starts processes
            afresh, so a script that calls this needs a main guard.
        overwrite: replace a dataset that is there.
        quiet: no progress bar.

    Raises:
        ConfigError: the extra ``vision`` is not installed.
        DataError: an input, a sample, the processor or the folder cannot be used; nothing is left
            behind.
    """
    started = time.perf_counter()
    check_workers(workers)
    folder = Path(os.path.realpath(output_dir))  # a link keeps leading to the data
    check_target(folder, overwrite=overwrite)
    shares = parse_split(split)
    sources = _sources(inputs, folder)
    import qwen35_mcore.mcore.energon  # noqa: F401  # is the extra there?
    from qwen35_mcore.data.images.chat import load_chat

    load_chat(processor)  # what is wrong with it is said once, before any sample
    root = None if image_root is None else Path(image_root)
    preparer = _Preparer(processor, json_key, root, max_length)
    tokens = images = left_out = blank = 0
    unused: Counter[str] = Counter()
    total = sum(source.size for source in sources)
    with (
        ShardWriter(
            folder, split=shares, shard_bytes=shard_mib * 2**20, overwrite=overwrite
        ) as writer,
        progress("encoding", total, quiet) as advance,
    ):
        for outcome in in_order(preparer, _chunks(sources), workers):
            for sample in outcome.samples:
                if isinstance(sample, DataError):
                    left_out += _leave_out(sample, bad_samples)
                    continue
                writer.add(sample)
                tokens += sample.tokens
                images += sample.images
            blank += outcome.blank
            unused += outcome.unused_keys
            advance(outcome.consumed)
        writer.commit()
        samples = dict(writer.counts)
    return ImagesReport(
        samples=samples,
        tokens=tokens,
        images=images,
        left_out=left_out,
        blank_lines=blank,
        unused_keys=dict(sorted(unused.items())),
        seconds=time.perf_counter() - started,
    )


def _leave_out(error: DataError, bad_samples: BadSamples) -> int:
    if bad_samples == "error":
        raise error
    print(f"warning: a sample is left out: {error}", file=sys.stderr, flush=True)
    return 1


def _sources(inputs: Sequence[Path | str], folder: Path) -> list[Source]:
    for item in inputs:
        if Path(item).is_dir():
            raise DataError(
                f"input {str(item)!r} is a folder",
                allowed="jsonl files, whose images lie beside them or below --image-root",
                fix=f"name its files: {Path(item) / '*.jsonl'}",
            )
    sources = expand_inputs(inputs, output_prefix=folder).sources
    for source in sources:
        if source.form != "jsonl":
            raise DataError(
                f"{source.path} is no jsonl file", allowed=".jsonl, .ndjson, .json, .gz or .zst"
            )
    return sources


def _chunks(sources: Sequence[Source]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    for source in sources:
        for record in read_records(source, text_key=""):
            chunk.append(record)
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk
