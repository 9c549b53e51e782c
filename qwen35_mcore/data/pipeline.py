"""Tokenize files to a Megatron dataset, in order, with any number of processes."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwen35_mcore.data.ordered import check_workers, in_order, progress
from qwen35_mcore.data.readers import Record, document_text, read_chunks
from qwen35_mcore.data.sidecar import Sidecar, name_beside
from qwen35_mcore.data.sources import Form, Source, expand_inputs, hash_sources
from qwen35_mcore.data.text_split import parse_text_split
from qwen35_mcore.data.tokenizers import Tokenizer, load_tokenizer
from qwen35_mcore.data.writer import DatasetWriter, check_target, dataset_prefix, index_dtype
from qwen35_mcore.errors import DataError


@dataclass(frozen=True)
class TokenizeReport:
    """What a run wrote.

    Attributes:
        documents: documents written.
        empty_documents: documents left out because they held no token.
        tokens: tokens written, end-of-document tokens included.
        bytes: UTF-8 bytes of the documents' text.
        seconds: wall-clock time of the whole run.
        files: input files read.
        blank_lines: lines of jsonl files that hold nothing, and so no document.
        left_out: files of the folders that were not read, by type.
    """

    documents: int
    empty_documents: int
    tokens: int
    bytes: int
    seconds: float
    files: int
    blank_lines: int
    left_out: dict[str, int]


class _Encoded(NamedTuple):
    ids: np.ndarray
    lengths: list[int]
    empty: int
    blank: int
    text_bytes: int
    consumed: int


@dataclass(frozen=True)
class _Encoder:
    """All that turns records into tokens; sent to each worker once."""

    tokenizer: Tokenizer
    text_key: str
    eod: int | None
    dtype: np.dtype

    def __call__(self, chunk: Sequence[Record]) -> _Encoded:
        records = [record for record in chunk if not record.is_blank]
        texts = [document_text(record, text_key=self.text_key) for record in records]
        documents = [ids for ids in self.tokenizer.encode_batch(texts) if len(ids)]
        ending = np.array([] if self.eod is None else [self.eod], dtype=self.dtype)
        parts = [part for ids in documents for part in (ids.astype(self.dtype), ending)]
        return _Encoded(
            ids=np.concatenate(parts) if parts else np.array([], dtype=self.dtype),
            lengths=[len(ids) + len(ending) for ids in documents],
            empty=len(texts) - len(documents),
            blank=len(chunk) - len(records),
            text_bytes=sum(len(text.encode()) for text in texts),
            consumed=sum(record.consumed for record in chunk),
        )


def tokenize(
    *,
    inputs: Sequence[Path | str],
    output_prefix: Path | str,
    tokenizer: str,
    text_key: str = "text",
    form: Form | None = None,
    split_text: str = "none",
    workers: int,
    append_eod: bool = True,
    overwrite: bool = False,
    quiet: bool = False,
) -> TokenizeReport:
    """Write the documents of ``inputs`` to ``PREFIX.bin``, ``PREFIX.idx`` and ``PREFIX.json``.

    The output is the same, byte for byte, for any number of workers. Input streams: memory does
    not grow with the size of files, only by about 100 bytes a document for the index.

    Args:
        inputs: files, folders, or ``stdlib``. A text file (``.txt``, ``.text``, ``.py``) is one
            document; ``.jsonl``, ``.ndjson`` and ``.json`` hold one JSON object per line,
            ``.parquet`` one row per document; all but parquet may be packed as ``.gz`` or ``.zst``.
            Other files of folders are left out and counted.
        output_prefix: path without suffix; missing folders are made.
        tokenizer: ``byte``, a folder with a Hugging Face tokenizer, or a name on the hub.
        text_key: JSON key or parquet column that holds the text.
        form: what every input file is, whatever its name; None goes by the names.
        split_text: ``none``, ``blank-lines`` or ``bytes:N``: cut text files into documents.
        workers: processes that tokenize; 1 works in this process. More than one starts
            processes afresh, so a script that calls this needs a main guard.
        append_eod: end every document with the tokenizer's end-of-document token.
        overwrite: replace a dataset at ``output_prefix``, and Megatron's cached index of it.
        quiet: no line about what is read and left out, and no progress bar; there is no bar
            either where standard error is not a terminal.

    Raises:
        DataError: an input, the tokenizer or the target cannot be used; nothing is left behind.
    """
    started = time.perf_counter()
    check_workers(workers)
    prefix = dataset_prefix(output_prefix)
    check_target(prefix, overwrite=overwrite)
    text_split = parse_text_split(split_text)
    found = expand_inputs(inputs, output_prefix=prefix, form=form)
    if text_split and not any(source.form == "text" for source in found.sources):
        raise DataError(
            "--split-text cuts text files, and there are none",
            got=found.summary(),
            fix="drop --split-text, or pass --format text if the files are plain text",
        )
    if not quiet:
        print("\n".join(filter(None, (found.summary(), found.advice()))), file=sys.stderr)
    loaded = load_tokenizer(tokenizer)
    if append_eod and loaded.eod is None:
        raise DataError(
            f"tokenizer {tokenizer!r} has no end-of-sequence token to end documents with",
            fix="set eos_token in its tokenizer_config.json, or pass --no-append-eod",
        )
    dtype = index_dtype(loaded.vocab_size)
    encoder = _Encoder(loaded, text_key, loaded.eod if append_eod else None, dtype)
    chunks = read_chunks(found.sources, text_key=text_key, text_split=text_split)
    with DatasetWriter(prefix, dtype=dtype, overwrite=overwrite) as writer:
        encoded = in_order(encoder, chunks, workers)
        sidecar, blank_lines = _write(writer, encoder, found.sources, encoded, quiet)
        stored = dataclasses.replace(sidecar, tokenizer=name_beside(prefix, sidecar.tokenizer))
        writer.commit(stored.to_json())
    return TokenizeReport(
        documents=sidecar.documents,
        empty_documents=sidecar.empty_documents,
        tokens=sidecar.tokens,
        bytes=sidecar.text_bytes,
        seconds=time.perf_counter() - started,
        files=sidecar.files,
        blank_lines=blank_lines,
        left_out=dict(found.left_out),
    )


def _write(
    writer: DatasetWriter,
    encoder: _Encoder,
    sources: Sequence[Source],
    chunks: Iterable[_Encoded],
    quiet: bool,
) -> tuple[Sidecar, int]:
    documents = empty = blank = tokens = text_bytes = 0
    with progress("tokenizing", sum(source.size for source in sources), quiet) as advance:
        for encoded in chunks:
            writer.add(encoded.ids, encoded.lengths)
            documents += len(encoded.lengths)
            empty += encoded.empty
            blank += encoded.blank
            tokens += len(encoded.ids)
            text_bytes += encoded.text_bytes
            advance(encoded.consumed)
    if not tokens:
        raise DataError(
            "the inputs hold no text",
            got=f"{empty} empty documents in {len(sources)} files",
            allowed="at least one document that is not empty",
        )
    sidecar = Sidecar(
        tokenizer=encoder.tokenizer.name,
        vocab_size=encoder.tokenizer.vocab_size,
        eod_id=encoder.tokenizer.eod,
        append_eod=encoder.eod is not None,
        dtype=encoder.dtype.name,
        documents=documents,
        empty_documents=empty,
        tokens=tokens,
        text_bytes=text_bytes,
        files=len(sources),
        sources_sha256=hash_sources(sources),
    )
    return sidecar, blank
