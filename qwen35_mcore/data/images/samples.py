"""Energon's samples of a shard to microbatches: decoded, encoded, packed into rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.data.images.chat import MEDIA, Chat, Encoded, open_image
from qwen35_mcore.data.images.rules import BadSamples, Positions, check_length
from qwen35_mcore.errors import DataError
from qwen35_mcore.mcore.energon import (
    FatalSampleError,
    InterleavedSample,
    Sample,
    SkipSample,
    TaskEncoder,
    edataclass,
    stateless,
)

_MOST_IN_A_ROW = 1000
_RECORD = "\x1e"


@edataclass
class Document(Sample):
    """An encoded conversation of n tokens, and their positions: ``[3, n]``, or ``[n]`` without a
    tower."""

    encoded: Encoded
    positions: Tensor


@edataclass
class Row(Sample):
    """Documents that share a row."""

    documents: list[Document]


class Samples(TaskEncoder):
    """How Energon makes microbatches: see `qwen35_mcore.data.images.loader.ImageLoader`.

    A bad sample stops the run, or is left out and reported with the next batch; after a thousand
    in a row the run stops in any case.
    """

    decoder = None  # contents stay bytes

    def __init__(
        self,
        chat: Chat,
        *,
        vision: VisionConfig | None,
        rope_index: Positions | None,
        seq_length: int,
        rows: int,
        bad_samples: BadSamples,
    ) -> None:
        self.chat, self.vision, self.rope_index = chat, vision, rope_index
        self.seq_length, self.rows, self.bad_samples = seq_length, rows, bad_samples
        self._left_out: list[str] = []
        self._in_a_row = 0

    @stateless
    def encode_sample(self, sample: InterleavedSample) -> Document:
        """A sample as `qwen35_mcore.data.images.shards` stores it. Raises SkipSample or
        FatalSampleError for a bad one."""
        stored, files = sample.sequence
        try:
            content = json.loads(stored)
        except (ValueError, RecursionError) as error:
            damaged = DataError(
                "the text of a sample is damaged", got=str(error), fix="copy the data again"
            )
            self._refuse(f"key {sample.__key__}", damaged)
        try:
            images = {
                name: open_image(_part(files, name), path)[0]
                for name, path in content["paths"].items()
            }
            encoded = self.chat.encode(content["messages"], images, content.get("tools"))
            if encoded.media and self.vision is None:
                raise DataError(
                    "a conversation holds an image, and the model has no vision tower",
                    fix="train a vision-language model, or make the data without images",
                )
            check_length(encoded, self.seq_length, "--seq-length")
            positions = self._positions(encoded)
        except DataError as error:
            self._refuse(f"{content['source']} (key {sample.__key__})", error)
        self._in_a_row = 0
        return Document.derive_from(sample, encoded=encoded, positions=positions)

    @stateless
    def select_samples_to_pack(self, samples: list[Document]) -> list[list[Document]]:
        """The longest first, each into the first row that has room."""
        rows: list[list[Document]] = []
        free: list[int] = []
        for sample in sorted(samples, key=lambda sample: -len(sample.encoded.tokens)):
            length = len(sample.encoded.tokens)
            at = next((row for row, room in enumerate(free) if room >= length), len(rows))
            if at == len(rows):
                rows.append([])
                free.append(self.seq_length)
            rows[at].append(sample)
            free[at] -= length
        return rows

    @stateless
    def pack_selected_samples(self, samples: list[Document]) -> Row:
        return Row.derive_from(samples[0], documents=samples)

    @stateless
    def batch(self, samples: list[Document | Row]) -> dict[str, Any]:
        """A microbatch; rows that the end of the data leaves open are padding."""
        packed = isinstance(samples[0], Row)
        rows = [sample.documents if packed else [sample] for sample in samples]
        rows += [[] for _ in range(self.rows - len(rows))]
        made = [self._row(row) for row in rows]
        batch: dict[str, Any] = {key: torch.stack([row[key] for row in made]) for key in made[0]}
        batch["position_ids"] = torch.stack([self._row_positions(row) for row in rows], dim=-2)
        media = [document.encoded.media for row in rows for document in row]
        for key in MEDIA:
            given = [each[key] for each in media if key in each]
            batch[key] = torch.cat(given) if given else None
        bounds = [self._bounds(row) for row in rows] if packed else None
        left_out, self._left_out = self._left_out, []
        return (
            batch
            | {"attention_mask": None, "cu_seqlens": None, "max_seqlen": None}
            | (_stacked(bounds, self.seq_length) if bounds else {})
            | {"left_out": left_out}
        )

    def _row(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """Everything of a row that has a value a token, ``[s]``."""
        tokenizer = self.chat.tokenizer
        padding = next(
            (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token), 0
        )
        row = {
            "tokens": torch.full((self.seq_length,), padding),
            "labels": torch.zeros(self.seq_length, dtype=torch.int64),
            "loss_mask": torch.zeros(self.seq_length),
            "padding_mask": torch.ones(self.seq_length, dtype=torch.bool),
        }
        start = 0
        for tokens, answers, _ in (document.encoded for document in documents):
            end = start + len(tokens)
            row["tokens"][start:end] = tokens
            row["labels"][start : end - 1] = tokens[1:]
            row["loss_mask"][start : end - 1] = answers[1:].float()
            row["padding_mask"][start:end] = False
            start = end
        return row

    def _positions(self, encoded: Encoded) -> Tensor:
        tokens, _, media = encoded
        if self.vision is None or self.rope_index is None:
            return torch.arange(len(tokens))
        grids = (media.get("image_grid_thw"), media.get("video_grid_thw"))
        return self.rope_index(tokens[None], self.vision, *grids)[:, 0]

    def _row_positions(self, documents: Sequence[Document]) -> Tensor:
        """``[3, s]``, or ``[s]`` without a tower; padding counts from zero."""
        parts = [document.positions for document in documents]
        rest = torch.arange(self.seq_length - sum(part.shape[-1] for part in parts))
        parts.append(rest if self.vision is None else rest.expand(3, -1))
        return torch.cat(parts, dim=-1)

    def _bounds(self, documents: Sequence[Document]) -> Tensor:
        lengths = [0, *(len(document.encoded.tokens) for document in documents)]
        bounds = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        full = int(bounds[-1]) == self.seq_length
        return bounds if full else torch.cat([bounds, bounds.new_tensor([self.seq_length])])

    def _refuse(self, where: str, error: DataError) -> None:
        self._in_a_row += 1
        told = {key: vars(error)[key] for key in ("got", "allowed", "fix")}
        told["what"] = f"{where}: {error.what}"
        if self.bad_samples == "error" or self._in_a_row >= _MOST_IN_A_ROW:
            raise FatalSampleError(f"{_RECORD}{json.dumps(told, default=str)}{_RECORD}")
        self._left_out.append(str(DataError(**told)))
        raise SkipSample


def refused(error: Exception) -> DataError | None:
    """The bad sample behind an error that Energon, and torch's workers, wrapped in their own."""
    parts = str(error).split(_RECORD)
    if len(parts) < 3:
        return None
    told = json.loads(parts[1])
    fix = told.pop("fix") or "make the data again without it"
    return DataError(**told, fix=f"{fix}, or leave such samples out with --bad-samples skip")


def _part(files: dict[str, bytes], name: str) -> bytes:
    if name not in files:
        raise DataError(f"the shard has no {name} of the sample", fix="copy the data again")
    return files[name]


def _stacked(bounds: list[Tensor], seq_length: int) -> dict[str, Tensor]:
    most = max(map(len, bounds))
    filled = bounds[0].new_full((len(bounds), most), seq_length)
    for row, each in zip(filled, bounds, strict=True):
        row[: len(each)] = each
    return {"cu_seqlens": filled, "max_seqlen": filled.diff().amax(1).int()}
