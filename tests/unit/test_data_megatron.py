"""Megatron's own tokenizers, from its own flags, and its own dataset read what tokenizing wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore import data
from tests.helpers.text_data import TEXTS, make_bpe, read, tokenize, write_jsonl


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE tokenizer as a Hugging Face folder."""
    return make_bpe(tmp_path_factory.mktemp("bpe"), eos_token="<|endoftext|>")


class TestMegatron:
    @pytest.mark.parametrize("kind", ["byte", "bpe"])
    def test_gpt_dataset_reads_every_token(
        self, tmp_path: Path, bpe_folder: Path, kind: str
    ) -> None:
        name = "byte" if kind == "byte" else str(bpe_folder)
        prefix = tmp_path / "out"
        tokenize([write_jsonl(tmp_path / "a.jsonl", TEXTS * 3)], prefix, tokenizer=name)
        sidecar = data.check_dataset(prefix, vocab_size=1000)
        assert sidecar is not None
        args, tokenizer = megatron_tokenizer([*sidecar.megatron_flags()])
        assert (tokenizer.vocab_size, tokenizer.eod) == (sidecar.vocab_size, sidecar.eod_id)
        assert args.padded_vocab_size % 128 == 0
        args, _ = megatron_tokenizer([*sidecar.megatron_flags(), "--padded-vocab-size", "1000"])
        assert args.padded_vocab_size == 1000
        check_samples(prefix, gpt_dataset(prefix, tokenizer), sidecar)

    def test_byte_tokenizer_in_process(self, tmp_path: Path) -> None:
        tokenize([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out")
        sidecar = data.read_sidecar(tmp_path / "out")
        check_samples(
            tmp_path / "out", gpt_dataset(tmp_path / "out", data.ByteTokenizer()), sidecar
        )

    def test_overwriting_forgets_the_cached_index(self, tmp_path: Path) -> None:
        prefix = tmp_path / "out"
        for texts in (["long " * 500] * 9, TEXTS):
            source = write_jsonl(tmp_path / "a.jsonl", texts)
            tokenize([source], prefix, overwrite=True)
            dataset = gpt_dataset(prefix, data.ByteTokenizer())
            check_samples(prefix, dataset, data.read_sidecar(prefix))
            assert list((prefix / "cache" / "GPTDataset_indices").glob("*sample_index.npy"))


def megatron_tokenizer(flags: list[str]) -> tuple[Any, Any]:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import parse_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train", *flags])
        args = parse_args()
    args.rank = 0
    return args, build_tokenizer(args)


def gpt_dataset(prefix: Path, tokenizer: Any) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=16,
        blend=([str(prefix)], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None, 0, 0], lambda: True, config)
    return builder.build()[0]


def check_samples(prefix: Path, dataset: Any, sidecar: Any) -> None:
    """Samples are the documents, shuffled, joined, and cut; positions restart after each EOD."""
    documents = read(prefix)
    assert all(ids[-1] == sidecar.eod_id for ids in documents)
    stream = [token for i in dataset.document_index for token in documents[i]]
    assert len(stream) == sidecar.tokens
    assert len(dataset) == (len(stream) - 1) // 16
    for i in range(len(dataset)):
        start = int(dataset.shuffle_index[i]) * 16
        sample = dataset[i]
        tokens = stream[start : start + 16]
        assert sample["tokens"].tolist() == tokens
        assert sample["labels"].tolist() == stream[start + 1 : start + 17]
        ends = [t == sidecar.eod_id for t in tokens]
        assert sample["loss_mask"].tolist() == [0.0 if end else 1.0 for end in ends]
        restarts = [at for at in range(1, 16) if sample["position_ids"][at] == 0]
        assert restarts == [at + 1 for at, end in enumerate(ends[:-1]) if end]
