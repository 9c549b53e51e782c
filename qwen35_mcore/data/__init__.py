"""Text, JSON lines and parquet to Megatron's ``PREFIX.bin`` and ``PREFIX.idx``; in `images`,
conversations to Energon's shards, and those to microbatches.

Importing this package loads neither torch nor transformers nor pyarrow: worker processes and
command lines that only check a dataset start in milliseconds. It may import `config`,
`process`, `errors` and, for megatron's writer of datasets and Energon, `mcore`.
"""

from __future__ import annotations

from qwen35_mcore.data.index_file import IndexFile, read_index
from qwen35_mcore.data.pipeline import TokenizeReport, tokenize
from qwen35_mcore.data.sidecar import Sidecar, check_dataset, read_sidecar
from qwen35_mcore.data.sources import STDLIB
from qwen35_mcore.data.token_ids import check_ids
from qwen35_mcore.data.tokenizers import (
    BYTE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)

__all__ = [
    "BYTE",
    "STDLIB",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "IndexFile",
    "Sidecar",
    "TokenizeReport",
    "Tokenizer",
    "check_dataset",
    "check_ids",
    "load_tokenizer",
    "read_index",
    "read_sidecar",
    "tokenize",
]
