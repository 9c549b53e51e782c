"""What the flags say of data is decided from the flags and the indexes, before anything starts."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import pytest
import torch

from qwen35_mcore import data
from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.errors import ConfigError, DataError
from qwen35_mcore.training.checks import written_folders
from qwen35_mcore.training.checks.data import check_batch, check_datasets, check_tokenizer_flags
from qwen35_mcore.training.checks.data_flags import split_data
from qwen35_mcore.training.checks.written_folders import check_written_folders

VOCAB_SIZE = get_flavor("tiny-dense").vocab_size
LENGTHS = {"big": [100] * 50, "small": [100] * 3, "short": [10] * 5, "empty": [0] * 5}
SEQUENCE = 64


def write_dataset(prefix: Path, documents: list[Any], dtype: Any = np.int32) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.asarray(document, dtype=dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of another tool, without sidecars."""
    folder = tmp_path_factory.mktemp("data")
    for name, lengths in LENGTHS.items():
        write_dataset(folder / name, [[1] * length for length in lengths])
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(**more: Any) -> Namespace:
    """A run of 10 steps of 2 sequences, as megatron's parser leaves it."""
    off = ("data_path", "data_args_path", "per_split_data_args_path", "mock_data", "split")
    off += ("train_data_path", "valid_data_path", "test_data_path", "skip_train")
    off += ("full_validation", "multiple_validation_sets", "validation_set_names")
    off += ("eval_global_batch_size", "eval_micro_batch_size", "train_samples")
    off += ("start_eval_at_iter", "dataloader_type", "save", "data_cache_path", "tensorboard_dir")
    parallel = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    sizes = {
        **dict.fromkeys((*parallel, "context_parallel_size", "world_size"), 1),
        "seq_length": SEQUENCE,
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "rank": 0,
        "train_iters": 10,
        "eval_iters": 0,
        "eval_interval": 1000,
    }
    return Namespace(**(dict.fromkeys(off) | sizes | more))


def check(**more: Any) -> None:
    check_datasets(run(**more), get_flavor("tiny-dense"))


EVALUATED = {"eval_iters": 2}
WHOLE = {"full_validation": True, "multiple_validation_sets": True, "eval_iters": 1}


@pytest.mark.parametrize(
    "more",
    [
        {"data_path": ["big"], "split": "100,0,0"},
        {"data_path": ["big"], "split": "1"},
        {"data_path": ["big"], "split": " 80, 10 / 10", **EVALUATED},
        {"data_path": ["short"], "split": "60,40,0", **EVALUATED},  # repeated until they are enough
        {"data_path": ["big", "small"], "split": "100,0,0"},
        {"data_path": ["1", "big", "2.5", "small"], "split": "80,20,0", **EVALUATED},
        {"data_path": ["big"], "split": "0,100,0", "skip_train": True, **EVALUATED},
        {"train_data_path": ["big"]},
        {"train_data_path": ["big"], "valid_data_path": ["short"], **EVALUATED},
        {"train_data_path": ["big"], "valid_data_path": ["2", "big"], **EVALUATED},
        {"train_data_path": ["big"], "valid_data_path": ["big", "small"], **WHOLE},
        {"data_path": ["big"], "split": "80,20,0", **WHOLE},
        {"mock_data": True, **EVALUATED},
    ],
)
def test_data_that_can_train(more: dict[str, Any]) -> None:
    check(**more)


NO_DATA = "the run evaluates but has no validation data"
WEIGHT = "has a weight that is not a positive number"
TURN = "does not name weights and datasets in turn"
SPLIT = "--split is not the shares"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data_path": ["big"], "split": "100,0,0", **EVALUATED}, NO_DATA),
        ({"train_data_path": ["big"], **EVALUATED}, NO_DATA),
        ({"train_data_path": ["big"], **WHOLE}, NO_DATA),
        ({"data_path": ["big"], "split": "0,100,0", **EVALUATED}, "the run has no training data"),
        ({"valid_data_path": ["big"], **EVALUATED}, "the run has no training data"),
        *[
            ({"data_path": ["big"], "split": split}, SPLIT)
            for split in ("", "a,b", "0,0,0", "-90,5,5", "80,10,5,5", "1..2,1", "nan,1", "1e2,1,1")
        ],
        ({"data_path": ["small"], "split": "98,1,1"}, "leaves no document for validation"),
        ({"data_path": ["empty"], "split": "100,0,0"}, "leaves no document for training"),
        ({"data_path": ["short"], "split": "60,40,0"}, "validation has too few tokens in short"),
        ({"data_path": ["big", "short"], "split": "1"}, "training has too few tokens in short"),
        (
            {"data_path": ["big", "small"], "split": "1", "train_iters": 1000},
            "training needs more sequences than its datasets hold",
        ),
        ({"train_data_path": ["big"], "valid_data_path": ["small", "small"], "eval_iters": 9}, ""),
        ({"data_path": ["1", "big"], "split": "80,20,0"}, "weights that nothing reads"),
        *[
            ({"data_path": ["1", "big", weight, "small"], "split": "1"}, WEIGHT)
            for weight in ("0", "-1", "nan", "inf")
        ],
        ({"data_path": ["1", "big", "small"], "split": "1"}, TURN),
        ({"data_path": ["1", "big", "2"], "split": "1"}, TURN),
        ({"data_path": ["big", "1", "small", "2"], "split": "1"}, TURN),
        ({"valid_data_path": [], "train_data_path": ["big"]}, "--valid-data-path names no dataset"),
        ({"data_path": ["big"], "mock_data": True}, "more than one source of data"),
        ({"data_path": ["big"], "train_data_path": ["big"]}, "more than one source of data"),
        ({"mock_data": True, "split": "80,10,10"}, "--split divides the datasets of --data-path"),
        ({"train_data_path": ["big"], "split": "1"}, "--split divides the datasets of --data-path"),
        ({"data_path": ["big"], "split": "9,1", "full_validation": True}, "only together with"),
        ({"mock_data": True, "multiple_validation_sets": True}, "only together with"),
        ({"mock_data": True, **WHOLE}, "cannot evaluate a test set, and mock data have one"),
        ({"data_path": ["big"], "split": "8,1,1", **WHOLE}, "cannot evaluate a test set"),
        (
            {"train_data_path": ["big"], "valid_data_path": ["1", "big", "1", "small"], **WHOLE},
            "none can have a weight",
        ),
        (
            {"train_data_path": ["big"], "valid_data_path": ["big", "short"], **WHOLE},
            "validation has too few tokens in short",
        ),
        (
            {"data_path": ["big"], "split": "9,1", "validation_set_names": ["a", "b"], **WHOLE},
            "got: 2 names for 1 sets",
        ),
        (
            {
                "data_path": ["big"],
                "split": "9,1",
                "micro_batch_size": 2,
                "tensor_model_parallel_size": 2,
                "world_size": 2,
                **WHOLE,
            },
            "pass --eval-micro-batch-size 1",
        ),
    ],
)
def test_data_that_cannot(more: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        check(**more)
    assert "fix: " in str(caught.value)


class TestFilesOfDatasets:
    def test_data_args(self, tmp_path: Path) -> None:
        file = tmp_path / "data.txt"
        file.write_text("1 big\n2 small\n")
        found = split_data(run(data_args_path=str(file), split="1"))["training"]
        assert (found.prefixes, found.weights) == (("big", "small"), (1.0, 2.0))
        with pytest.raises(DataError, match="needs --split"):
            split_data(run(data_args_path=str(file)))
        with pytest.raises(DataError, match="cannot be read"):
            split_data(run(data_args_path=str(tmp_path), split="1"))

    def test_per_split(self, tmp_path: Path) -> None:
        file = tmp_path / "data.json"
        file.write_text(json.dumps({"train": "1 big 2 small", "valid": ["big"], "test": None}))
        found = split_data(run(per_split_data_args_path=str(file)))
        assert {name: one.prefixes for name, one in found.items()} == {
            "training": ("big", "small"),
            "validation": ("big",),
        }

    @pytest.mark.parametrize(
        "content",
        [
            *["", "[]", '{"train": ["big"]}', '{"train": 5, "valid": null, "test": null}'],
            '{"train": ["big"], "valid": null, "test": null, "tests": null}',
            '{"train": [null], "valid": null, "test": null}',
            "[" * 100_000,
        ],
        ids=lambda content: content[:50],
    )
    def test_malformed(self, tmp_path: Path, content: str) -> None:
        file = tmp_path / "data.json"
        file.write_text(content)
        with pytest.raises(DataError, match=r'fix: write {"train": \["PREFIX"\]'):
            split_data(run(per_split_data_args_path=str(file)))


class TestIndex:
    def damaged(self, tmp_path: Path, at: int, value: int) -> str:
        prefix = write_dataset(tmp_path / "x", [[1] * 100] * 5)
        content = bytearray(Path(f"{prefix}.idx").read_bytes())
        content[at] = value
        Path(f"{prefix}.idx").write_bytes(content)
        return prefix

    @pytest.mark.parametrize(
        ("at", "value", "message"),
        [
            (0, 0, "is not a dataset's index"),
            (9, 7, "got: version 7"),
            (17, 77, "got: type 77"),
            (17, 7, "got: float32"),
            (17, 8, "is not the file that"),  # uint16: half the bytes
            (18, 9, "is cut, or was written over"),
        ],
    )
    def test_damage(self, tmp_path: Path, at: int, value: int, message: str) -> None:
        prefix = self.damaged(tmp_path, at, value)
        with pytest.raises(DataError, match=message):
            check(data_path=[prefix], split="1")

    @pytest.mark.parametrize("suffix", [".bin", ".idx"])
    def test_cut(self, tmp_path: Path, suffix: str) -> None:
        prefix = write_dataset(tmp_path / "x", [[1] * 100] * 5)
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(DataError, match=r"is cut|is not the file"):
            check(data_path=[prefix], split="1")
        path.write_bytes(b"")
        with pytest.raises(DataError, match=r"is not a dataset's index|is not the file"):
            check(data_path=[prefix], split="1")


class TestIds:
    @pytest.mark.parametrize("found", [VOCAB_SIZE, -1])
    @pytest.mark.parametrize("place", [0, 150, 499])
    def test_outside_the_vocabulary(self, tmp_path: Path, found: int, place: int) -> None:
        tokens = np.ones(500, np.int32)
        tokens[place] = found
        prefix = write_dataset(tmp_path / "x", np.split(tokens, 5))
        with pytest.raises(DataError, match="ids that the model does not have") as caught:
            check(data_path=[prefix], split="1")
        where = f"got: {found}, token {place % 100} of document {place // 100}, both from 0"
        assert where in str(caught.value)

    def test_a_dataset_above_the_budget(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its beginning, its end and what lies evenly between; batches show the rest."""
        monkeypatch.setattr("qwen35_mcore.data.token_ids._BLOCK", 40)
        seen = []
        for place in range(0, 1000, 10):
            tokens = np.ones(1000, np.int32)
            tokens[place] = VOCAB_SIZE
            prefix = write_dataset(tmp_path / "x", [tokens])
            try:
                data.check_ids(data.read_index(prefix), vocab_size=VOCAB_SIZE, budget=400)
            except DataError:
                seen.append(place)
        assert len(seen) == 10
        assert (seen[0], seen[-1]) == (0, 990)

    def test_batches(self) -> None:
        inside = torch.tensor([[0, VOCAB_SIZE - 1]])
        check_batch(inside, None, VOCAB_SIZE)
        for ids in (inside + 1, inside - 1):
            for batch in ((ids, inside), (inside, ids)):
                with pytest.raises(DataError, match="a batch holds an id"):
                    check_batch(*batch, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"tokenizer_type": None}, "big.json, which would name it, is missing"),
        ({"tokenizer_type": "NullTokenizer"}, "fix: pass --vocab-size N"),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, "fix: pass --tokenizer-model FOLDER"),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "./none"},
            "the tokenizer's folder does not exist",
        ),
        (
            {
                "tokenizer_type": "HuggingFaceTokenizer",
                "tokenizer_model": "/none",
                "qwen35_tokenizer_sidecar": "big.json",
            },
            "named by big.json",
        ),
    ],
)
def test_tokenizers_that_are_not_there(flags: dict[str, Any], part: str) -> None:
    given = {"tokenizer_model": None, "vocab_size": None, "data_path": ["big"], "split": "1"}
    with pytest.raises(DataError, match=part):
        check_tokenizer_flags(run(**given | flags))


class TestWrittenFolders:
    @pytest.mark.parametrize("flag", ["save", "tensorboard_dir", "data_cache_path"])
    def test_below_a_file(self, tmp_path: Path, flag: str) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "folder"):
            args = run(data_path=["big"], split="1", **{flag: str(path)})
            with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} cannot be written"):
                check_written_folders(args)
            check_written_folders(Namespace(**vars(args) | {"rank": 1}))

    def test_another_run_saves_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A lock ends with its process, also where a child lives on."""
        holder = (
            "import os, sys; from pathlib import Path\n"
            "from qwen35_mcore.process.file_lock import hold_until_exit\n"
            "assert hold_until_exit(Path(sys.argv[1])) is None\n"
            "if os.fork(): print('held', flush=True)\n"
            "sys.stdin.read()"
        )
        monkeypatch.setattr(written_folders, "PATIENCE_S", 0.0)
        args = run(data_path=["big"], split="1", save=str(tmp_path))
        command = [sys.executable, "-c", holder, str(tmp_path / written_folders.LOCK)]
        with Popen(command, stdin=PIPE, stdout=PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(ConfigError, match=rf"process {process.pid} writes to"):
                check_written_folders(args)
            check_written_folders(Namespace(**vars(args) | {"skip_train": True}))
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr(written_folders, "hold_until_exit", lambda _: 0)
                check_written_folders(args)
            assert "is locked from another machine" in capsys.readouterr().out
            process.kill()
            process.wait()
            check_written_folders(args)

    def test_the_datasets_own_cache(self, tmp_path: Path) -> None:
        prefix = write_dataset(tmp_path / "x", [[1] * 100])
        (tmp_path / "x").touch()
        args = run(data_path=[prefix], split="1")
        with pytest.raises(ConfigError, match="name a folder for them with --data-cache-path"):
            check_written_folders(args)
        args.data_cache_path = str(tmp_path / "new" / "cache")
        check_written_folders(args)
        assert not list((tmp_path / "new" / "cache").iterdir())

    def test_a_full_cache_may_be_read_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        args = run(data_path=["big"], split="1", data_cache_path=str(tmp_path))
        with pytest.raises(ConfigError, match="Read-only file system"):
            check_written_folders(args)
        (tmp_path / "0-GPTDataset-train-description.txt").touch()
        check_written_folders(args)
