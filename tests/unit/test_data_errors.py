"""Tokenizing bad input: one clear error, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from qwen35_mcore.data.tokenizers import load_tokenizer
from qwen35_mcore.errors import DataError
from tests.helpers.text_data import tokenize, write_jsonl, write_parquet


def _jsonl(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + content)
        return folder / "bad.jsonl"

    return write


def _parquet(**columns: list) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "bad.parquet")
        return folder / "bad.parquet"

    return write


def _file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


BAD_INPUTS = {
    "broken json": (_jsonl(b'{"text": "half'), r"bad\.jsonl:2 is not valid JSON"),
    "too many digits": (_jsonl(b'{"text": ' + b"9" * 5000 + b"}"), r"jsonl:2 is not valid JSON"),
    "array": (_jsonl(b'["a"]'), r"bad\.jsonl:2 is not a JSON object"),
    "missing key": (_jsonl(b'\n{"body": "a"}'), r"jsonl:3 has no key 'text'[^$]*keys body"),
    "number": (_jsonl(b'{"text": 5}'), r"bad\.jsonl:2: 'text' is not a string"),
    "surrogate": (_jsonl(rb'{"text": "\ud800"}'), r"jsonl:2: .* unpaired surrogate"),
    "invalid utf-8 line": (_jsonl(b'{"text": "\xff"}'), r"bad\.jsonl:2 is not valid UTF-8"),
    "invalid utf-8 file": (_file("bad.txt", b"a\nb\n\xe9"), r"bad\.txt:3 is not valid UTF-8"),
    "cut parquet": (_file("bad.parquet", b"PAR1" * 9), r"bad\.parquet is not a readable parquet"),
    "packed parquet": (_file("bad.parquet.gz", b"x"), r"is a compressed parquet file"),
    "unknown column": (_parquet(body=["a"]), r"no column 'text'[^$]*columns body"),
    "number column": (_parquet(text=[1, 2]), r"'text' does not hold text[^$]*int64"),
    "only empty": (_file("bad.txt", b""), "the inputs hold no text"),
    "missing file": (lambda folder: folder / "none.txt", r"none\.txt' does not exist"),
    "empty folder": (_empty_folder, "holds no input file"),
}


class TestErrors:
    @pytest.mark.parametrize("case", BAD_INPUTS)
    def test_bad_input_leaves_nothing(self, tmp_path: Path, case: str) -> None:
        make, message = BAD_INPUTS[case]
        path = make(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DataError, match=message):
            tokenize([path], tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before

    def test_invalid_utf8_in_parquet(self, tmp_path: Path) -> None:
        offsets = pyarrow.py_buffer(np.array([0, 1], dtype=np.int32))
        text = pyarrow.StringArray.from_buffers(1, offsets, pyarrow.py_buffer(b"\xff"))
        pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "bad.parquet")
        with pytest.raises(DataError, match=r"bad\.parquet, rows 1 to 1: text is not valid UTF-8"):
            tokenize([tmp_path / "bad.parquet"], tmp_path / "out")

    def test_document_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qwen35_mcore.data.readers.MAX_DOCUMENT_BYTES", 100)
        for path in (
            write_jsonl(tmp_path / "a.jsonl", ["x" * 101]),
            _file("a.txt", b"x" * 101)(tmp_path),
            write_parquet(tmp_path / "a.parquet", ["x" * 101]),
        ):
            with pytest.raises(DataError, match="single document above 1 GiB"):
                tokenize([path], tmp_path / "out")

    def test_arguments(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["a"])
        with pytest.raises(DataError, match="workers are processes"):
            tokenize([path], tmp_path / "out", workers=0)
        with pytest.raises(DataError, match="no input to tokenize"):
            tokenize([], tmp_path / "out")
        with pytest.raises(DataError, match="named twice"):
            tokenize([path, tmp_path], tmp_path / "out")

    @pytest.mark.parametrize("prefix", ["o.bin", "o.idx", "folder/", ".", ".."])
    def test_an_output_prefix_that_is_none(self, tmp_path: Path, prefix: str) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["a"])
        with pytest.raises(DataError, match="the output prefix ") as caught:
            tokenize([path], f"{tmp_path}/{prefix}")
        assert "fix: " in str(caught.value)
        assert "--output-prefix " in str(caught.value)
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("answers", [True, False])
    def test_a_hub_out_of_reach_is_asked_once(
        self, monkeypatch: pytest.MonkeyPatch, answers: bool
    ) -> None:
        """Transformers would ask a dozen times, and each time five times again."""
        import huggingface_hub
        import transformers

        local_only = []

        def head(url: str) -> None:
            if not answers:
                raise ConnectionError("no network")

        def load(name: str, *, local_files_only: bool) -> None:
            local_only.append(local_files_only)
            raise OSError(f"no {name}")

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", head)
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
        with pytest.raises(DataError, match="tokenizer 'no/name' could not be loaded"):
            load_tokenizer("no/name")
        assert local_only == [not answers]

    def test_target_that_cannot_be_written(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["a"])
        with pytest.raises(DataError, match="cannot be written"):
            tokenize([path], path / "out")

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        path = write_jsonl(tmp_path / "a.jsonl", ["a"])
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(DataError, match=r"cannot be written[^$]*No space left"):
            tokenize([path], tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == [path]
