"""Which datasets the flags give to training, validation and test, and which part of each."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35_mcore.errors import DataError
from qwen35_mcore.mcore import imports

SPLITS = ("training", "validation", "test")
DEFAULT_SPLIT = "969, 30, 1"
"""megatron's, which leaves nothing for the test set of fewer than 500 documents."""
PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")
_KEYS = ("train", "valid", "test")
_PLAIN_SPLIT = re.compile(r"[\d.,;:/\s]+")


@dataclass(frozen=True)
class SplitData:
    """The data of one split.

    Attributes:
        name: one of `SPLITS`.
        given: the flags that say so, for messages.
        prefixes: datasets, without ``.bin`` and ``.idx``.
        weights: one per dataset, or None to take all of each once.
        begin, end: the part of each dataset's documents, from 0 to 1.
        shared: whether other splits have other parts of the same datasets.
    """

    name: str
    given: str
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None
    begin: float = 0.0
    end: float = 1.0
    shared: bool = False


def split_data(args: Namespace) -> dict[str, SplitData]:
    """The data of each split that has some; empty for mock data.

    Raises:
        DataError: two sources at once, a file of prefixes that cannot be read, a blend without
            datasets or with weights that are not positive, a malformed ``--split``, or one that has
            nothing to divide.
    """
    source = _source(args)
    if source in ("data_path", "data_args_path"):
        flag = _flag(source)
        words = args.data_path if source == "data_path" else _words(flag, args.data_args_path)
        prefixes, weights = _blend(flag, words)
        shares = _shares(args, source)
        given = f"--split {args.split or DEFAULT_SPLIT}"
        return {
            name: SplitData(name, given, prefixes, weights, *share, shared=True)
            for name, share in zip(SPLITS, shares, strict=True)
            if share is not None
        }
    if args.split is not None:
        raise DataError(
            "--split divides the datasets of --data-path or --data-args-path, and none is given",
            got=f"--split {args.split} with {_flag(source or 'no data')}",
            fix="drop --split",
        )
    return {
        name: SplitData(name, given, *_blend(given, words))
        for name, (given, words) in zip(SPLITS, _apart(args, source), strict=True)
        if words is not None
    }


def _apart(args: Namespace, source: str | None) -> list[tuple[str, Any]]:
    """For each split, the flag that gives it data of its own and what it gives."""
    if source == "per_split_data_args_path":
        flag = _flag(source)
        blends = _per_split_file(flag, args.per_split_data_args_path)
        return [(f"{flag}: {key}", blends[key]) for key in _KEYS]
    if source == PER_SPLIT[0]:
        return [(_flag(name), getattr(args, name)) for name in PER_SPLIT]
    return [("", None)] * len(SPLITS)


def dataset_prefixes(args: Namespace) -> list[str]:
    """The prefixes of every dataset that the flags name. Raises DataError as `split_data` does."""
    data = split_data(args).values()
    return list(dict.fromkeys(prefix for one in data for prefix in one.prefixes))


def _source(args: Namespace) -> str | None:
    """The one flag that says where data come from; of the three per split, the first."""
    given = [
        name
        for name in ("data_path", "data_args_path", "per_split_data_args_path")
        if getattr(args, name) is not None
    ]
    if any(getattr(args, name) is not None for name in PER_SPLIT):
        given.append(PER_SPLIT[0])
    if args.mock_data:
        given.append("mock_data")
    if len(given) > 1:
        raise DataError(
            "the flags name more than one source of data",
            got=", ".join(map(_flag, given)),
            allowed="--data-path, --data-args-path, --train-data-path with --valid-data-path and "
            "--test-data-path, --per-split-data-args-path, or --mock-data",
            fix=f"keep one, for example {_flag(given[0])}",
        )
    return given[0] if given else None


def _blend(given: str, words: Any) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    words = [str(word).strip() for word in words]
    if not any(words):
        raise DataError(
            f"{given} names no dataset",
            allowed="PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...",
            fix="name at least one, or leave it out",
        )
    numbers = [_as_number(word) for word in words]
    paired = len(words) % 2 == 0 and all(number is not None for number in numbers[::2])
    stray = [w for w, n in zip(words, numbers, strict=True) if n is not None and not _exists(w)]
    if not paired and stray:
        raise DataError(
            f"{given} does not name weights and datasets in turn",
            got=" ".join(words),
            allowed="PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ...",
            fix=f"put one weight before every dataset, or drop {' and '.join(stray)}",
        )
    prefixes, weights = imports.get_blend_from_list(words)
    for word, weight in zip(words[::2], weights or (), strict=False):
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(
                f"{given} has a weight that is not a positive number",
                got=f"{word} for {prefixes[weights.index(weight)]}"
                if weight == weight
                else f"{word} in {' '.join(words)}",
                allowed="finite numbers above 0",
                fix="correct the weight, or leave the dataset out",
            )
    return tuple(prefixes), tuple(weights) if weights is not None else None


def _as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _exists(prefix: str) -> bool:
    return Path(f"{prefix}.idx").exists()


def _shares(args: Namespace, source: str) -> Sequence[tuple[float, float] | None]:
    """The part of each dataset's documents that each split takes."""
    text = args.split
    if text is None and source == "data_args_path":
        raise DataError("--data-args-path needs --split", fix="pass for example --split 98,2,0")
    text = DEFAULT_SPLIT if text is None else text
    numbers = [_as_number(word) for word in re.findall(r"[.0-9]+", text)]
    well_formed = _PLAIN_SPLIT.fullmatch(text) and None not in numbers and len(numbers) <= 3
    if not well_formed or not sum(n for n in numbers if n is not None):
        raise DataError(
            "--split is not the shares of training, validation and test",
            got=f"--split {text!r}",
            allowed="up to three numbers of 0 or more, with commas between, not all of them 0",
            fix="pass for example --split 98,1,1, or --split 98,2,0 without a test set",
        )
    shares = imports.convert_split_vector_to_split_matrix(imports.parse_and_normalize_split(text))
    return [None if share is None else (share[0], share[1]) for share in shares]


def _words(flag: str, path: str) -> list[str]:
    return _read(flag, path).split()


def _per_split_file(flag: str, path: str) -> dict[str, list[str] | None]:
    """Datasets per split; a split's value is a list, one string of the same, or null."""
    try:
        value = json.loads(_read(flag, path))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{flag}: {path} is not JSON", got=str(error), fix=_PER_SPLIT_FIX
        ) from error
    if not isinstance(value, dict) or set(value) != set(_KEYS):
        got = f"keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{flag}: {path} does not name the splits", got=got, fix=_PER_SPLIT_FIX)
    for key, words in value.items():
        listed = isinstance(words, list) and all(isinstance(w, str | float | int) for w in words)
        if not (words is None or isinstance(words, str) or listed):
            raise DataError(
                f"{flag}: {key} in {path} is no list of datasets", got=words, fix=_PER_SPLIT_FIX
            )
    return {key: words.split() if isinstance(words, str) else words for key, words in value.items()}


_PER_SPLIT_FIX = (
    'write {"train": ["PREFIX"], "valid": ["PREFIX"], "test": null}, where a list may also be '
    "weights and datasets in turn"
)


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        raise DataError(
            f"the file of {flag} cannot be read", got=f"{path}: {error}", fix="correct the path"
        ) from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
