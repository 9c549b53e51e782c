"""``PREFIX.json`` beside a dataset: which tokenizer made it, so that training can check."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen35_mcore.data.index_file import read_index
from qwen35_mcore.data.tokenizers import BYTE, ByteTokenizer
from qwen35_mcore.errors import DataError

_FORMAT = 1
_LARGEST = 2**26  # a sidecar has a few lines, and a list of its inputs at most


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What a dataset holds. Nothing in it depends on when or with how many workers it was made.

    Attributes:
        tokenizer: ``byte``, a name on the Hugging Face hub, or a folder. The file holds a folder
            as its absolute path, or from ``./`` on where it lies beside or below the file;
            `read_sidecar` returns it absolute.
        vocab_size: one more than the largest id the tokenizer can produce.
        eod_id: end-of-document id of the tokenizer, None if it has none.
        append_eod: whether every document ends with it.
        dtype: numpy name of the type of a stored token.
        documents: documents written.
        empty_documents: documents left out because they held no token.
        tokens: tokens written, end-of-document tokens included.
        text_bytes: UTF-8 bytes of the documents' text.
        files: input files read.
        sources_sha256: hash over the input files' names and sizes, in order.
    """

    tokenizer: str
    vocab_size: int
    eod_id: int | None
    append_eod: bool
    dtype: str
    documents: int
    empty_documents: int
    tokens: int
    text_bytes: int
    files: int
    sources_sha256: str
    format: int = _FORMAT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def megatron_flags(self) -> list[str]:
        """Flags with which ``megatron.training`` agrees with this data on vocabulary and EOD."""
        if self.tokenizer == BYTE:
            # The null tokenizer's end of document is vocab_size - 1, which is the byte one's.
            return [
                "--tokenizer-type",
                "NullTokenizer",
                "--vocab-size",
                str(ByteTokenizer.vocab_size),
            ]
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.tokenizer]


def name_beside(prefix: Path, tokenizer: str) -> str:
    """How the sidecar of ``prefix`` names a tokenizer: see `Sidecar.tokenizer`."""
    folder = Path(tokenizer).expanduser()
    if tokenizer == BYTE or not folder.is_dir():
        return tokenizer
    folder, home = folder.resolve(), prefix.parent.resolve()
    return f"./{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def _resolved(path: Path, tokenizer: str) -> str:
    """A folder is looked for beside the sidecar, then from the current directory, where the paths
    of older sidecars begin."""
    if tokenizer == BYTE or Path(tokenizer).is_absolute():
        return tokenizer
    beside = (path.parent / tokenizer).resolve()
    for folder in (beside, Path(tokenizer).expanduser()):
        if folder.is_dir():
            return str(folder.resolve())
    return str(beside) if tokenizer.startswith(".") else tokenizer


def is_sidecar(path: Path) -> bool:
    """Whether a file is what tokenizing writes, of any version."""
    if path.stat().st_size > _LARGEST:
        return False
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"format", "tokenizer"} <= value.keys()


def read_sidecar(prefix: Path | str) -> Sidecar | None:
    """The sidecar of a dataset; None where another tool wrote the dataset without one.

    Raises:
        DataError: ``PREFIX.json`` is there but not a sidecar this version can read.
    """
    path = Path(f"{prefix}.json")
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != _FORMAT:
            raise ValueError(f"format {value['format']}")
        _check_types(value)
        return Sidecar(**value | {"tokenizer": _resolved(path, value["tokenizer"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path} does not describe a dataset",
            got=str(error),
            allowed=f"the file that tokenizing writes, format {_FORMAT}",
            fix="move the file away; if it was the dataset's, tokenize again with --overwrite",
        ) from error


def _check_types(value: dict[str, object]) -> None:
    """Raise TypeError where a value is of another type than `Sidecar` says."""
    for field in dataclasses.fields(Sidecar):
        given = value.get(field.name, field.default)
        if type(given).__name__ not in str(field.type).replace("None", "NoneType").split(" | "):
            raise TypeError(f"{field.name} {given!r} is not of type {field.type}")
    np.dtype(str(value["dtype"]))


def check_dataset(
    prefix: Path | str, *, vocab_size: int, eod_id: int | None = None
) -> Sidecar | None:
    """Check, in milliseconds, that a dataset can train a model of ``vocab_size`` tokens.

    Its ids are not looked at: `check_ids` does.

    Args:
        prefix: one path of ``--data-path``, without ``.bin`` or ``.idx``.
        vocab_size: rows of the model's embedding.
        eod_id: end-of-document id that training will use, where it is known.

    Raises:
        DataError: the dataset does not exist or is incomplete, its files do not fit each other,
            its tokenizer is larger than the vocabulary, or it ends documents with another id.
    """
    _check_files(prefix)
    sidecar = read_sidecar(prefix)
    if sidecar is not None:
        _check_sidecar(prefix, sidecar, vocab_size, eod_id)
    read_index(prefix)
    return sidecar


def _check_sidecar(
    prefix: Path | str, sidecar: Sidecar, vocab_size: int, eod_id: int | None
) -> None:
    stored = Path(f"{prefix}.bin").stat().st_size
    expected = sidecar.tokens * np.dtype(sidecar.dtype).itemsize
    if stored != expected:
        raise DataError(
            f"{prefix}.bin is not the file that {prefix}.json describes",
            got=f"{stored} bytes",
            allowed=f"{expected} bytes",
            fix="copy the dataset again, or tokenize again with --overwrite",
        )
    if sidecar.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer of {prefix} is larger than the model's vocabulary",
            got=f"tokenizer {sidecar.tokenizer!r} with {sidecar.vocab_size} ids ({prefix}.json)",
            allowed=f"at most {vocab_size}, the model's vocab_size",
            fix="tokenize with the model's own tokenizer, or choose a flavor with this vocabulary",
        )
    if eod_id is not None and sidecar.append_eod and sidecar.eod_id != eod_id:
        raise DataError(
            f"{prefix} ends documents with another token than training expects",
            got=f"{sidecar.eod_id} in the data, {eod_id} in training",
            fix=f"train with {' '.join(sidecar.megatron_flags())}",
        )


def _check_files(prefix: Path | str) -> None:
    missing = [suffix for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
    if not missing:
        return
    folder = Path(prefix).parent
    there = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx"))
    raise DataError(
        f"no dataset at prefix {str(prefix)!r}",
        got=" and ".join(f"no {prefix}{suffix}" for suffix in missing),
        allowed=f"prefixes in {folder}: {', '.join(there)}"
        if there
        else "a prefix whose .bin and .idx files exist; none does in this folder",
        fix="name the prefix without .bin or .idx, or make it with `qwen35 data tokenize`",
    )
