"""Small inputs for tests of tokenizing, and what came out of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from qwen35_mcore import data

EOD = 256
TEXTS = ["def f():\n    return 1\n", "naïve café — ☃ 🎈", "a", "line\r\nend\n\n", "x" * 5000]


def tokenize(inputs: list[Path | str], prefix: Path, **options: Any) -> data.TokenizeReport:
    return data.tokenize(
        **{
            "inputs": inputs,
            "output_prefix": prefix,
            "tokenizer": "byte",
            "workers": 1,
            "quiet": True,
            **options,
        }
    )


def read(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def texts_of(prefix: Path) -> list[str]:
    documents = read(prefix)
    assert all(ids[-1] == EOD and EOD not in ids[:-1] for ids in documents)
    return [data.ByteTokenizer().decode(ids) for ids in documents]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str | None], key: str = "text") -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), key: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def make_bpe(folder: Path, **special_tokens: str) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([Path(os.__file__).read_text()], trainer)
    # What some tokenizers do to prompts must not happen to documents.
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A <|im_end|>", special_tokens=[("<|im_end|>", 1)]
    )
    backend.enable_truncation(64)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens).save_pretrained(folder)
    return folder
