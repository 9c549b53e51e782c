"""Tokenizing: what goes in comes out, for any number of workers, or nothing is left behind."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qwen35_mcore import data
from qwen35_mcore.data import sources as data_sources
from qwen35_mcore.errors import DataError
from tests.helpers.kinds import examples
from tests.helpers.text_data import (
    EOD,
    TEXTS,
    make_bpe,
    read,
    texts_of,
    tokenize,
    write_jsonl,
    write_parquet,
)


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE tokenizer as a Hugging Face folder."""
    return make_bpe(tmp_path_factory.mktemp("bpe"), eos_token="<|endoftext|>")


class TestByteTokenizer:
    @given(st.text())
    def test_round_trip(self, text: str) -> None:
        tokenizer = data.ByteTokenizer()
        ids = tokenizer.encode(text)
        assert bytes(ids.tolist()) == text.encode()
        assert tokenizer.decode([*ids.tolist(), tokenizer.eod]) == text

    @examples(20)
    @given(st.lists(st.text(min_size=1), min_size=1, max_size=20))
    def test_round_trip_through_files(
        self, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
    ) -> None:
        assume(not any(text.startswith("\ufeff") for text in texts))  # a byte order mark is no text
        folder = tmp_path_factory.mktemp("round")
        tokenize([write_jsonl(folder / "in.jsonl", texts)], folder / "out")
        assert texts_of(folder / "out") == texts

    def test_decode_never_fails(self) -> None:
        assert data.ByteTokenizer().decode([0xFF, 65, EOD]) == "\ufffdA"


class TestForms:
    def test_text_jsonl_and_parquet_hold_the_same(self, tmp_path: Path) -> None:
        folder = tmp_path / "texts"
        folder.mkdir()
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.py").write_bytes(text.encode())
        inputs = {
            "text": folder,
            "jsonl": write_jsonl(tmp_path / "a.jsonl", TEXTS),
            "parquet": write_parquet(tmp_path / "a.parquet", list(TEXTS)),
        }
        for form, source in inputs.items():
            report = tokenize([source], tmp_path / "out" / form)
            assert texts_of(tmp_path / "out" / form) == TEXTS
            assert report.documents == len(TEXTS)
            assert report.bytes == sum(len(text.encode()) for text in TEXTS)
            assert report.tokens == report.bytes + report.documents

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    @pytest.mark.parametrize("inner", [".jsonl", ".txt"])
    def test_packed(self, tmp_path: Path, suffix: str, inner: str) -> None:
        plain = write_jsonl(tmp_path / f"a{inner}", TEXTS)
        packed = tmp_path / f"a{inner}{suffix}"
        raw = plain.read_bytes()
        if suffix == ".gz":
            packed.write_bytes(gzip.compress(raw[:99]) + gzip.compress(raw[99:]))
        else:
            pack = pyarrow.Codec("zstd").compress
            packed.write_bytes(pack(raw[:99], asbytes=True) + pack(raw[99:], asbytes=True))
        tokenize([plain], tmp_path / "plain")
        tokenize([packed], tmp_path / "packed")
        assert read(tmp_path / "plain") == read(tmp_path / "packed")
        packed.write_bytes(packed.read_bytes()[:-9])
        with pytest.raises(DataError, match=f"a{inner}{suffix} cannot be read"):
            tokenize([packed], tmp_path / "cut")

    def test_mixed_inputs_keep_their_order(self, tmp_path: Path) -> None:
        note = tmp_path / "note.txt"
        note.write_text("note")
        inputs: list[Path | str] = [
            write_parquet(tmp_path / "z.parquet", ["p1", "p2"]),
            note,
            str(write_jsonl(tmp_path / "a.json", ["j1"])),
        ]
        tokenize(inputs, tmp_path / "out")
        assert texts_of(tmp_path / "out") == ["p1", "p2", "note", "j1"]

    def test_empty_documents_are_counted(self, tmp_path: Path) -> None:
        lines = tmp_path / "a.jsonl"
        lines.write_text('\ufeff{"text": "a"}\n\n{"text": ""}\n{"text": null}\n{"text": "b"}')
        (tmp_path / "empty.txt").touch()
        rows = write_parquet(tmp_path / "a.parquet", [None, "c", ""])
        report = tokenize([lines, tmp_path / "empty.txt", rows], tmp_path / "out")
        assert texts_of(tmp_path / "out") == ["a", "b", "c"]
        assert (report.documents, report.empty_documents, report.files) == (3, 5, 3)
        assert report.blank_lines == 1

    def test_dictionary_and_large_columns(self, tmp_path: Path) -> None:
        for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
            path = tmp_path / "a.parquet"
            table = pyarrow.table({"body": pyarrow.array(["a", "b", "a"]).cast(kind)})
            pyarrow.parquet.write_table(table, path)
            tokenize([path], tmp_path / "out", text_key="body", overwrite=True)
            assert texts_of(tmp_path / "out") == ["a", "b", "a"]

    def test_no_eod(self, tmp_path: Path) -> None:
        tokenize([write_jsonl(tmp_path / "a.jsonl", ["ab"])], tmp_path / "out", append_eod=False)
        assert read(tmp_path / "out") == [[97, 98]]


class TestFolders:
    def test_order_and_what_is_left_out(self, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        for name in (
            "b.txt",
            "a/z.txt",
            "a.txt",
            "a/b/c.txt",
            ".git/x",
            ".hidden",
            "__pycache__/x",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        (folder / "a" / "loop").symlink_to(folder)
        tokenize([folder], folder / "out")
        expected = ["a/b/c.txt", "a/z.txt", "a.txt", "b.txt"]
        assert texts_of(folder / "out") == expected
        # Its own output, and the index Megatron caches under the prefix, are no input.
        (folder / "out" / "cache").mkdir(parents=True)
        (folder / "out" / "cache" / "x.npy").write_bytes(b"\xff")
        tokenize([folder], folder / "out", overwrite=True)
        assert texts_of(folder / "out") == expected

    def test_stdlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = data_sources.expand_inputs([data.STDLIB], output_prefix=tmp_path / "out")
        names = [source.name for source in found.sources]
        assert "stdlib/os.py" in names
        assert "stdlib/json/decoder.py" in names
        assert len(names) > 300
        assert not {"test", "tests", "site-packages"} & {p for n in names for p in n.split("/")}

        library = tmp_path / "lib"
        for name in ("os.py", "test/bad.py", "site-packages/x.py", "data.bin"):
            (library / name).parent.mkdir(parents=True, exist_ok=True)
            (library / name).write_text(name)
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
        tokenize([data.STDLIB], tmp_path / "out")
        assert texts_of(tmp_path / "out") == ["os.py"]


class TestWorkers:
    def test_same_bytes_for_any_number(self, tmp_path: Path, bpe_folder: Path) -> None:
        rng = np.random.default_rng(0)
        texts = ["".join(map(chr, rng.integers(32, 0x2FF, n))) for n in rng.integers(0, 6000, 900)]
        inputs: list[Path | str] = [
            write_jsonl(tmp_path / "a.jsonl", texts[:500]),
            write_parquet(tmp_path / "a.parquet", list(texts[500:])),
            Path(os.__file__),
        ]
        for tokenizer in ("byte", str(bpe_folder)):
            reports = {}
            for workers in (1, 3):
                prefix = tmp_path / f"w{workers}"
                reports[workers] = tokenize(
                    inputs, prefix, workers=workers, tokenizer=tokenizer, overwrite=True
                )
            assert reports[1].documents == reports[3].documents
            for suffix in (".bin", ".idx", ".json"):
                one, three = (Path(f"{tmp_path}/w{workers}{suffix}") for workers in (1, 3))
                assert one.read_bytes() == three.read_bytes()

    def test_error_in_a_worker_is_the_same_error(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["x" * 2**20] * 6)
        with path.open("a") as stream:
            stream.write("{broken\n")
        messages = []
        for workers in (1, 2):
            with pytest.raises(DataError, match=r"a\.jsonl:7 is not valid JSON") as caught:
                tokenize([path], tmp_path / "out", workers=workers)
            messages.append(str(caught.value))
            assert sorted(tmp_path.iterdir()) == [path]
        assert messages[0] == messages[1]


class TestHuggingFace:
    def test_ids_are_those_of_transformers(self, tmp_path: Path, bpe_folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenize(
            [write_jsonl(tmp_path / "a.jsonl", TEXTS)],
            tmp_path / "out",
            tokenizer=str(bpe_folder),
        )
        reference = AutoTokenizer.from_pretrained(bpe_folder)
        expected = [
            [*reference(text, add_special_tokens=False).input_ids, reference.eos_token_id]
            for text in TEXTS
        ]
        assert read(tmp_path / "out") == expected
        loaded = data.load_tokenizer(str(bpe_folder))
        assert [loaded.decode(ids) for ids in read(tmp_path / "out")] == TEXTS

    def test_without_eos_token(self, tmp_path: Path) -> None:
        folder = make_bpe(tmp_path / "bpe")
        source = write_jsonl(tmp_path / "a.jsonl", ["a"])
        with pytest.raises(DataError, match="no end-of-sequence token"):
            tokenize([source], tmp_path / "out", tokenizer=str(folder))
        tokenize([source], tmp_path / "out", tokenizer=str(folder), append_eod=False)
        sidecar = data.read_sidecar(tmp_path / "out")
        assert sidecar is not None
        assert sidecar.eod_id is None

    def test_not_a_tokenizer(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", ["a"])
        for name, message in {
            str(tmp_path): "could not be loaded",
            str(tmp_path / "none"): "is not a folder",
            str(source): "is not a folder",
        }.items():
            with pytest.raises(DataError, match=message):
                tokenize([source], tmp_path / "out", tokenizer=name)

    def test_large_vocabulary_needs_four_bytes(self, tmp_path: Path) -> None:
        from qwen35_mcore.data.writer import index_dtype

        assert index_dtype(248_320) == np.int32
        assert index_dtype(257) == np.uint16


class TestOverwrite:
    def test_refused_without_the_option(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["a"])
        tokenize([path], tmp_path / "out")
        kept = {p: p.read_bytes() for p in tmp_path.glob("out.*")}
        with pytest.raises(DataError, match=r"out\.bin exists already[^$]*--overwrite"):
            tokenize([write_jsonl(tmp_path / "b.jsonl", ["b"])], tmp_path / "out")
        assert {p: p.read_bytes() for p in tmp_path.glob("out.*")} == kept
        tokenize([tmp_path / "b.jsonl"], tmp_path / "out", overwrite=True)
        assert texts_of(tmp_path / "out") == ["b"]

    def test_failed_overwrite_keeps_the_old_dataset(self, tmp_path: Path) -> None:
        tokenize([write_jsonl(tmp_path / "a.jsonl", ["a"])], tmp_path / "out")
        bad = tmp_path / "bad.jsonl"
        bad.write_bytes(b"{broken")
        with pytest.raises(DataError, match="not valid JSON"):
            tokenize([bad], tmp_path / "out", overwrite=True)
        assert texts_of(tmp_path / "out") == ["a"]

    def test_files_of_a_killed_run(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", ["a"])
        (tmp_path / "out.bin.partial").write_bytes(b"left behind")
        with pytest.raises(DataError, match=r"out\.bin\.partial belongs to a run"):
            tokenize([path], tmp_path / "out")
        tokenize([path], tmp_path / "out", overwrite=True)
        assert texts_of(tmp_path / "out") == ["a"]
        assert not list(tmp_path.glob("*.partial"))


class TestSidecar:
    @pytest.fixture
    def prefix(self, tmp_path: Path) -> Path:
        tokenize([write_jsonl(tmp_path / "a.jsonl", ["ab", "c"])], tmp_path / "v1.5")
        return tmp_path / "v1.5"

    def test_content(self, prefix: Path) -> None:
        sidecar = data.check_dataset(prefix, vocab_size=257, eod_id=EOD)
        assert sidecar is not None
        assert (sidecar.tokenizer, sidecar.vocab_size, sidecar.eod_id) == ("byte", 257, EOD)
        assert (sidecar.documents, sidecar.tokens, sidecar.text_bytes) == (2, 5, 3)
        assert (sidecar.dtype, sidecar.append_eod, sidecar.files) == ("uint16", True, 1)

    def test_mismatches(self, prefix: Path) -> None:
        with pytest.raises(DataError, match="larger than the model's vocabulary"):
            data.check_dataset(prefix, vocab_size=256)
        with pytest.raises(DataError, match="256 in the data, 0 in training"):
            data.check_dataset(prefix, vocab_size=257, eod_id=0)
        with pytest.raises(DataError, match=r"no dataset at prefix[^$]*v1\.5"):
            data.check_dataset(prefix.with_name("v2"), vocab_size=257)
        whole = Path(f"{prefix}.bin").read_bytes()
        Path(f"{prefix}.bin").write_bytes(b"cut")
        with pytest.raises(DataError, match=r"v1\.5\.bin is not the file"):
            data.check_dataset(prefix, vocab_size=257)
        Path(f"{prefix}.json").write_text("{}")
        with pytest.raises(DataError, match="does not describe a dataset"):
            data.check_dataset(prefix, vocab_size=257)
        Path(f"{prefix}.json").unlink()
        with pytest.raises(DataError, match=r"v1\.5\.bin is not the file that .*v1\.5\.idx"):
            data.check_dataset(prefix, vocab_size=1)
        Path(f"{prefix}.bin").write_bytes(whole)
        assert data.check_dataset(prefix, vocab_size=1) is None

    @pytest.mark.parametrize(
        "change",
        [
            *({"vocab_size": "257"}, {"vocab_size": None}, {"tokens": {}}, {"eod_id": "256"}),
            *({"dtype": "uint99"}, {"append_eod": 1}, {"tokenizer": ["byte"]}, {"documents": True}),
        ],
    )
    def test_values_of_other_types(self, prefix: Path, change: dict[str, object]) -> None:
        path = Path(f"{prefix}.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(DataError, match="does not describe a dataset"):
            data.check_dataset(prefix, vocab_size=257, eod_id=EOD)


def test_import_is_light() -> None:
    code = (
        "import sys, qwen35_mcore.data; "
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder_with_links_to_its_own_files_holds_each_once(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "b.txt").write_text("text")
    (folder / "a.txt").symlink_to("b.txt")
    report = data.tokenize(
        inputs=[folder], output_prefix=tmp_path / "out", tokenizer="byte", workers=1, quiet=True
    )
    assert report.files == 1
    assert report.left_out == {"a second link to a file": 1}
