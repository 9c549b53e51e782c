"""Whether the datasets and the tokenizer that the flags name can train the model."""

from __future__ import annotations

import struct
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwen35_mcore.config import Qwen35Config
from qwen35_mcore.data import check_dataset, read_sidecar
from qwen35_mcore.errors import DataError

SPLITS = ("training", "validation", "test")
DEFAULT_SPLIT = "969, 30, 1"
"""megatron's, which leaves nothing for the test set of fewer than 500 documents."""
_COUNT_OFFSET = 18  # of the index: after the magic, the version and the token type


def dataset_prefixes(args: Namespace) -> list[str]:
    """The prefixes of every dataset that the flags name, weights left out.

    Raises:
        DataError: a file of prefixes is missing or cannot be read.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise DataError("cannot tell the datasets from the flags", got=str(error)) from error
    blends = [blend, *(per_split or [])]
    return list(dict.fromkeys(prefix for one in blends if one for prefix in one[0]))


def check_datasets(args: Namespace, hf: Qwen35Config) -> None:
    """Check that every dataset is there, fits the vocabulary, and fills every split.

    Raises:
        DataError: with the first problem.
    """
    prefixes = dataset_prefixes(args)
    for prefix in prefixes:
        check_dataset(prefix, vocab_size=hf.vocab_size)
    if args.data_path or args.data_args_path:
        for prefix in prefixes:
            _check_split(prefix, args.split or DEFAULT_SPLIT)


def check_tokenizer(args: Namespace, hf: Qwen35Config, tokenizer: Any) -> None:
    """Check the tokenizer that megatron built against the model and the datasets.

    Raises:
        DataError: it has more ids than the model, or datasets end documents with another one.
    """
    if tokenizer.vocab_size > hf.vocab_size:
        raise DataError(
            "the tokenizer is larger than the model's vocabulary",
            got=f"{args.tokenizer_model or args.tokenizer_type} with {tokenizer.vocab_size} ids",
            allowed=f"at most {hf.vocab_size}",
            fix="use the model's own tokenizer, or choose a model with this vocabulary",
        )
    for prefix in dataset_prefixes(args):
        if read_sidecar(prefix) is not None:
            check_dataset(prefix, vocab_size=hf.vocab_size, eod_id=getattr(tokenizer, "eod", None))


def _check_split(prefix: str, split: str) -> None:
    """megatron repeats the documents of a split until they are enough; none are never enough, and
    the run hangs."""
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

    weights = parse_and_normalize_split(split)
    documents = _documents(prefix)
    bounds = [round(sum(weights[:i]) * documents) for i in range(len(weights) + 1)]
    counts = [end - start for start, end in pairwise(bounds)]
    empty = [
        name
        for name, count, weight in zip(SPLITS, counts, weights, strict=False)
        if weight and not count
    ]
    if empty:
        raise DataError(
            f"--split leaves no document for {' and '.join(empty)}",
            got=f"--split {split} of the {documents} documents of {prefix}",
            allowed="at least one document in every split whose weight is not 0",
            fix="give these splits larger weights, or weight 0 (with --eval-iters 0)",
        )


def _documents(prefix: str) -> int:
    with Path(f"{prefix}.idx").open("rb") as file:
        header = file.read(_COUNT_OFFSET + 8)
    if len(header) < _COUNT_OFFSET + 8:
        raise DataError(f"{prefix}.idx is not a dataset's index", got=f"{len(header)} bytes")
    return int(struct.unpack_from("<Q", header, _COUNT_OFFSET)[0])
