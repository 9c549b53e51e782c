"""Which files are read, how their bytes become documents, and what is left out and counted."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35_mcore import data
from qwen35_mcore.data import readers
from qwen35_mcore.data.sources import expand_inputs
from qwen35_mcore.data.text_split import parse_text_split
from qwen35_mcore.errors import DataError
from tests.helpers.kinds import examples
from tests.helpers.text_data import make_bpe, texts_of, tokenize, write_jsonl, write_parquet


class TestFolders:
    def test_only_known_types(self, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        (folder / "nested").mkdir(parents=True)
        write_jsonl(folder / "A.JSONL", ["upper case"])
        write_parquet(folder / "nested" / "b.parquet", ["nested"])
        (folder / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
        others = ("README.md", "LICENSE", "SHA256SUMS", "a.jsonl.sha256", "t.tar.gz", "x.csv")
        for name in (*others, ".DS_Store", ".git", "__pycache__"):
            (folder / name).write_text("no document")
        (folder / "gone.txt").symlink_to("nowhere")
        report = tokenize([folder], tmp_path / "out")
        assert texts_of(tmp_path / "out") == ["upper case", "packed", "nested"]
        assert report.files == 3
        kinds = {".md": 1, "no suffix": 2, ".sha256": 1, ".tar.gz": 1, ".csv": 1}
        assert report.left_out == {**kinds, "hidden": 3, "no regular file": 1}

    def test_other_datasets_are_no_input(self, tmp_path: Path) -> None:
        """Their sidecars are JSON, and Megatron describes its cached indices in .txt files."""
        source = write_jsonl(tmp_path / "a.jsonl", ["a"])
        tokenize([source], tmp_path / "first")
        cache = tmp_path / "first" / "cache" / "GPTDataset_indices"
        cache.mkdir(parents=True)
        (cache / "x-description.txt").write_text("an index")
        report = tokenize([tmp_path], tmp_path / "second")
        assert texts_of(tmp_path / "second") == ["a"]
        assert report.left_out == {"files of datasets": 3}

    def test_format_says_what_all_files_are(self, tmp_path: Path) -> None:
        for name in ("a.md", "b.c"):
            (tmp_path / name).write_text(name)
        with pytest.raises(DataError, match=r"holds no input file\n  got: 1 \.c, 1 \.md") as caught:
            tokenize([tmp_path], tmp_path / "out")
        assert "--format text" in str(caught.value)
        tokenize([tmp_path], tmp_path / "out", form="text")
        assert texts_of(tmp_path / "out") == ["a.md", "b.c"]

    def test_a_folder_that_cannot_be_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("os.scandir", refuse)
        with pytest.raises(DataError, match="cannot be read"):
            expand_inputs([tmp_path], output_prefix=tmp_path / "out")


@pytest.mark.parametrize("suffix", ["", ".md", ".csv", ".gz", ".sha256", ".arrow"])
def test_a_named_file_of_another_type_is_asked_about(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    packed = suffix == ".gz"
    path.write_bytes(gzip.compress(b"some text") if packed else b"some text")
    with pytest.raises(DataError, match="does not tell how documents lie in it") as caught:
        tokenize([path], tmp_path / "out")
    assert "--format text" in str(caught.value)
    tokenize([path], tmp_path / "out", form="text")
    assert texts_of(tmp_path / "out") == ["some text"]


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        *[("a.jsonl.bz2", "bunzip2"), ("a.txt.xz", "unxz"), ("a.jsonl.lz4", "unlz4")],
        *[("a.zip", "unzip"), ("a.tar", "tar xf"), ("a.tar.gz", "tar xf"), ("a.TGZ", "tar xf")],
        *[("a.tar.zst", "tar xf"), ("a.7z", "7z x")],
    ],
)
def test_packed_in_a_way_that_is_not_read(tmp_path: Path, name: str, tool: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"packed")
    for form in (None, "text"):
        with pytest.raises(DataError, match="packed in a way that is not read") as caught:
            tokenize([path], tmp_path / "out", form=form)
        assert tool in str(caught.value)
    with pytest.raises(DataError, match="holds no input file") as caught:
        tokenize([tmp_path], tmp_path / "out")
    assert tool in str(caught.value)


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches this pattern"):
        tokenize([tmp_path / "*.jsonl"], tmp_path / "out")


class TestByteOrderMarks:
    def test_none_is_text(self, tmp_path: Path) -> None:
        bom = "\ufeff"
        (tmp_path / "a.txt").write_text(f"{bom}text")
        lines = f'{bom}{{"text": "line"}}\n{bom}{{"text": "{bom}joined"}}\n'
        (tmp_path / "b.jsonl").write_text(lines)
        (tmp_path / "c.txt.gz").write_bytes(gzip.compress(f"{bom}packed".encode()))
        write_parquet(tmp_path / "d.parquet", [f"{bom}row"])
        tokenize([tmp_path], tmp_path / "out")
        assert texts_of(tmp_path / "out") == ["text", "line", "joined", "packed", "row"]

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_other_encodings_are_named(self, tmp_path: Path, encoding: str, name: str) -> None:
        mark = "\ufeff" if encoding.endswith("-be") else ""
        (tmp_path / name).write_bytes(f'{mark}{{"text": "a"}}\n'.encode(encoding))
        named = encoding.upper().removesuffix("-BE")
        with pytest.raises(DataError, match=f"is {named}, not UTF-8[^$]*iconv -f {named}"):
            tokenize([tmp_path / name], tmp_path / "out")

    def test_nul_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("one\ntwo".encode("utf-16-le"))
        with pytest.raises(DataError, match=r"a\.txt:1 holds a NUL byte"):
            tokenize([tmp_path / "a.txt"], tmp_path / "out")


class TestTextSplit:
    def test_blank_lines(self, tmp_path: Path) -> None:
        text = "\n\none\ntwo\n\n \t\r\nthree\r\n\r\nfour"
        (tmp_path / "a.txt").write_bytes(text.encode())
        report = tokenize([tmp_path / "a.txt"], tmp_path / "out", split_text="blank-lines")
        assert texts_of(tmp_path / "out") == ["one\ntwo", "three", "four"]
        assert report.documents == 3

    @examples(30)
    @given(st.text(alphabet="ab\né☃🎈", max_size=200), st.integers(16, 40))
    def test_bytes(self, tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
        """The pieces are the text, none is longer, and only a longer line is cut within."""
        path = tmp_path_factory.mktemp("split") / "a.txt"
        path.write_bytes(text.encode())
        found = expand_inputs([path], output_prefix=path.with_name("out"))
        split = parse_text_split(f"bytes:{size}")
        records = list(readers.read_records(found.sources[0], text_key="", text_split=split))
        pieces = [readers.document_text(record, text_key="") for record in records]
        assert "".join(pieces) == text
        assert all(0 < len(piece.encode()) <= size for piece in pieces)
        assert [r.number for r in records] == [
            1 + "".join(pieces[:i]).count("\n") for i in range(len(pieces))
        ]
        for piece in pieces[:-1]:
            assert piece.endswith("\n") or len(piece.encode()) > size - 4

    def test_pieces_larger_than_memory(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\ntwo")
        tokenize([tmp_path / "a.txt"], tmp_path / "out", split_text="bytes:" + "9" * 15)
        assert texts_of(tmp_path / "out") == ["one\ntwo"]

    def test_any_number_of_workers(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("line of text\n" * 300_000)
        for workers in (1, 2):
            prefix = tmp_path / f"w{workers}"
            tokenize([path], prefix, split_text="bytes:1000", workers=workers)
        for suffix in (".bin", ".idx", ".json"):
            one, two = (Path(f"{tmp_path}/w{workers}{suffix}") for workers in (1, 2))
            assert one.read_bytes() == two.read_bytes()

    def test_errors_name_the_line_in_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\n\xff\n")
        with pytest.raises(DataError, match=r"a\.txt:4 is not valid UTF-8"):
            tokenize([tmp_path / "a.txt"], tmp_path / "out", split_text="blank-lines")

    @pytest.mark.parametrize("text", ["lines", "bytes", "bytes:", "bytes:0", "bytes:-5", "bytes:x"])
    def test_what_is_no_way_to_split(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(DataError, match="cannot tell how to split text"):
            tokenize([tmp_path / "a.txt"], tmp_path / "out", split_text=text)

    def test_nothing_to_split(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", ["a"])
        with pytest.raises(DataError, match="cuts text files, and there are none"):
            tokenize([source], tmp_path / "out", split_text="blank-lines")


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    (source,) = expand_inputs([path], output_prefix=tmp_path / "out").sources
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match="changed while it was read"):
        list(readers.read_records(source, text_key="text"))
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(readers.read_records(source, text_key="text"))


def test_parquet_without_rows(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "none.parquet")
    write_parquet(tmp_path / "one.parquet", ["a"])
    report = tokenize([tmp_path], tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["a"]
    assert report.files == 2


class TestTokenizerOfASidecar:
    def test_moves_with_the_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_bpe(tmp_path / "data" / "tok", eos_token="<|endoftext|>")
        source = write_jsonl(tmp_path / "a.jsonl", ["a"])
        monkeypatch.chdir(tmp_path)
        tokenize([source], Path("data/out"), tokenizer="data/tok")
        assert '"tokenizer": "./tok"' in (tmp_path / "data" / "out.json").read_text()
        moved = (tmp_path / "data").rename(tmp_path / "moved")
        monkeypatch.chdir("/")
        sidecar = data.read_sidecar(moved / "out")
        assert sidecar is not None
        assert sidecar.tokenizer == str(moved / "tok")
        assert sidecar.megatron_flags()[-1] == str(moved / "tok")

    def test_elsewhere_is_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_bpe(tmp_path / "tok", eos_token="<|endoftext|>")
        source = write_jsonl(tmp_path / "a.jsonl", ["a"])
        monkeypatch.chdir(tmp_path)
        tokenize([source], tmp_path / "data" / "out", tokenizer="tok")
        monkeypatch.chdir("/")
        sidecar = data.read_sidecar(tmp_path / "data" / "out")
        assert sidecar is not None
        assert sidecar.tokenizer == str(tmp_path / "tok")

    def test_of_older_sidecars(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They name a folder as it was given, from the directory where the command ran."""
        source = write_jsonl(tmp_path / "a.jsonl", ["a"])
        tokenize([source], tmp_path / "data" / "out")
        file = tmp_path / "data" / "out.json"
        (tmp_path / "tok").mkdir()
        monkeypatch.chdir(tmp_path)
        written = file.read_text()
        for named, read in {
            "tok": str(tmp_path / "tok"),
            "./tok": str(tmp_path / "tok"),
            "Qwen/Qwen3.5-35B-A3B": "Qwen/Qwen3.5-35B-A3B",
            "byte": "byte",
            "./gone": str(tmp_path / "data" / "gone"),
            os.sep + "gone": os.sep + "gone",
        }.items():
            file.write_text(written.replace('"byte"', f'"{named}"'))
            sidecar = data.read_sidecar(tmp_path / "data" / "out")
            assert sidecar is not None
            assert sidecar.tokenizer == read


def test_a_text_file_in_the_sidecars_place_is_never_replaced(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.json"
    corpus.write_text('{"text": "the only copy"}\n')
    for overwrite in (False, True):
        with pytest.raises(DataError, match="describes no dataset"):
            tokenize([corpus], tmp_path / "corpus", overwrite=overwrite)
    assert "the only copy" in corpus.read_text()
    tokenize([corpus], tmp_path / "out")
    tokenize([corpus], tmp_path / "out", overwrite=True)


def test_numbers_and_names_that_no_system_takes(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("text")
    with pytest.raises(DataError, match="cannot tell how to split"):
        tokenize([text], tmp_path / "out", split_text="bytes:" + "9" * 20)
    with pytest.raises(DataError, match="too long for names"):
        tokenize([text], tmp_path / ("x" * 243))
    tokenize([text], tmp_path / ("x" * 242))
