"""Tokenizing: what goes in comes out, for any number of workers, or nothing is left behind."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_mcore import data
from qwen35_mcore.data import sources as data_sources
from qwen35_mcore.errors import DataError

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


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE tokenizer as a Hugging Face folder."""
    return make_bpe(tmp_path_factory.mktemp("bpe"), eos_token="<|endoftext|>")


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


class TestByteTokenizer:
    @given(st.text())
    def test_round_trip(self, text: str) -> None:
        tokenizer = data.ByteTokenizer()
        ids = tokenizer.encode(text)
        assert bytes(ids.tolist()) == text.encode()
        assert tokenizer.decode([*ids.tolist(), tokenizer.eod]) == text

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.text(min_size=1), min_size=1, max_size=20))
    def test_round_trip_through_files(
        self, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
    ) -> None:
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
        note = tmp_path / "note.md"
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
        names = [source.name for source in found]
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
        with pytest.raises(DataError, match="workers must be at least 1"):
            tokenize([path], tmp_path / "out", workers=0)
        with pytest.raises(DataError, match="no input to tokenize"):
            tokenize([], tmp_path / "out")
        with pytest.raises(DataError, match="named twice"):
            tokenize([path, tmp_path], tmp_path / "out")

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
        bad = _jsonl(b"{broken")(tmp_path)
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


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
    def test_no_dataset_and_no_process_is_left(self, tmp_path: Path, number: int) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", ["x" * 5000] * 16_000)
        script = tmp_path / "run.py"
        script.write_text(
            "import signal\n"
            "from qwen35_mcore import data\n"
            "if __name__ == '__main__':\n"
            # a shell's background job, and so a test run in one, starts with SIGINT ignored
            "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"    data.tokenize(inputs=[{str(source)!r}], tokenizer='byte', workers=2,\n"
            f"                  output_prefix={str(tmp_path / 'out')!r})\n"
        )
        process = subprocess.Popen(
            [sys.executable, script],
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        partial = tmp_path / "out.bin.partial"
        wait_for(lambda: partial.exists() and partial.stat().st_size > 20_000_000, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        if number == signal.SIGINT:  # a terminal sends it to the whole group
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert not (tmp_path / "out.idx").exists()
        if number == signal.SIGINT:
            assert errors.count("\nKeyboardInterrupt") == 1, errors
            assert sorted(tmp_path.iterdir()) == [source, script]
        assert len(workers) >= 2
        assert not psutil.wait_procs(workers, timeout=30)[1]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)


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
        Path(f"{prefix}.bin").write_bytes(b"cut")
        with pytest.raises(DataError, match=r"v1\.5\.bin is not the file"):
            data.check_dataset(prefix, vocab_size=257)
        Path(f"{prefix}.json").write_text("{}")
        with pytest.raises(DataError, match="does not describe a dataset"):
            data.check_dataset(prefix, vocab_size=257)
        Path(f"{prefix}.json").unlink()
        assert data.check_dataset(prefix, vocab_size=1) is None


class TestMegatron:
    """Megatron's own tokenizers, from its own flags, and its own dataset read the output."""

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
