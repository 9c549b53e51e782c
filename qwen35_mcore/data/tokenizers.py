"""Text to token ids: a byte tokenizer that needs no download, and any Hugging Face one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen35_mcore.errors import DataError

BYTE = "byte"


class Tokenizer(Protocol):
    """What tokenizing needs. Instances are pickled once into every worker process."""

    @property
    def name(self) -> str:
        """How the user named it."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id it can produce."""
        ...

    @property
    def eod(self) -> int | None:
        """Id of the end-of-document token, None if it has none."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without any special token added around it."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as the end of a document.

    Megatron reads such data with ``--tokenizer-type NullTokenizer --vocab-size 257``: its null
    tokenizer never sees text, and puts the end of a document at ``vocab_size - 1``. An instance
    also serves as ``GPTDatasetConfig.tokenizer``.
    """

    name = BYTE
    vocab_size = 257
    eod = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without end-of-document tokens.

        A model may produce bytes that are not UTF-8: they become U+FFFD, never an error.
        """
        return bytes(i for i in ids if i != self.eod).decode(errors="replace")

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """Megatron's datasets hash this into the name of their cached index."""
        return {"class": type(self).__qualname__, "vocab_size": self.vocab_size, "eod": self.eod}


class HuggingFaceTokenizer:
    """A fast Hugging Face tokenizer, reduced to its Rust part.

    The Rust part pickles and loads in milliseconds, where every worker would otherwise import
    transformers. Special tokens that are spelt out in the text become their ids, as they do in
    transformers and in Megatron's own preprocessing.

    Raises:
        DataError: the tokenizer cannot be loaded, or has no fast implementation.
    """

    def __init__(self, name: str) -> None:
        loaded = load_auto_tokenizer(name)
        if not loaded.is_fast:
            raise DataError(
                f"tokenizer {name!r} has no fast implementation",
                got=type(loaded).__name__,
                allowed="tokenizers that come with a tokenizer.json",
                fix="convert it: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)",
            )
        self.name = name
        # Ids may have holes, so the number of tokens can be smaller than the embedding they need.
        self.vocab_size: int = max(len(loaded), max(loaded.get_vocab().values()) + 1)
        self.eod: int | None = loaded.eos_token_id
        self._backend = loaded.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([i for i in ids if i != self.eod], skip_special_tokens=False)


def where_to_load(name: str) -> tuple[str, bool]:
    """What transformers' ``from_pretrained`` is to load, a folder or a name on the hub, and whether
    from local files alone.

    Raises:
        DataError: it is a path, and no folder.
    """
    is_path = name.startswith((".", "~", os.sep)) or Path(name).exists()
    folder = Path(name).expanduser()
    if is_path and not folder.is_dir():
        raise DataError(
            f"tokenizer path {name!r} is not a folder",
            allowed="'byte', a folder with tokenizer.json and tokenizer_config.json, or a model "
            "name on the Hugging Face hub",
            fix="name the folder that holds tokenizer.json",
        )
    return str(folder) if is_path else name, is_path or not _hub_answers(name)


def load_auto_tokenizer(name: str) -> Any:
    """transformers' tokenizer of that name. Raises DataError where it cannot be loaded."""
    source, is_local = where_to_load(name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=is_local)
    except Exception as error:  # the Rust library raises bare Exception
        raise DataError(
            f"tokenizer {name!r} could not be loaded",
            got=str(error).strip().partition("\n")[0],
            allowed="'byte', a folder with tokenizer.json and tokenizer_config.json, or a model "
            "name on the Hugging Face hub",
            fix="check the spelling, or download the tokenizer's files and name their folder",
        ) from error


def _hub_answers(name: str) -> bool:
    """Asked once, because transformers asks for each of a dozen files, and five times again with
    pauses and warnings where there is no network; what the cache holds needs none."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "tokenizer_config.json"))
    except HfHubHTTPError:  # also a no is an answer, which transformers explains
        return True
    except Exception:  # of whichever HTTP library the hub's client uses
        return False
    return True


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called ``name``: ``byte``, a local folder, or a name on the hub.

    Raises:
        DataError: no such tokenizer, or it has no fast implementation.
    """
    return ByteTokenizer() if name == BYTE else HuggingFaceTokenizer(name)
