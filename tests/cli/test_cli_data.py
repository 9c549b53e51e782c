"""`qwen35 data tokenize` as a user runs it: one message and status 2 when something is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35_mcore import data
from tests.helpers.ckpt_cli import Outcome, qwen35

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, status: int = 0) -> Outcome:
    """The command in this process: its own imports megatron-core for many seconds."""
    done = qwen35("data", "tokenize", *arguments)
    assert done.code == status, done.err
    assert "Traceback" not in done.err
    return done


def run_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwen35_mcore.cli", "data", "tokenize", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "note.txt").write_text("a note")
    (folder / "lines.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    return folder


def test_files_and_folders_with_workers(tmp_path: Path, corpus: Path) -> None:
    prefix = tmp_path / "new" / "out"
    done = run_process(corpus, "--output-prefix", prefix, "--json-key", "body", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == f"wrote {prefix}.bin: 3 documents, 15 tokens\n"
    sidecar = data.check_dataset(prefix, vocab_size=257, eod_id=256)
    assert sidecar is not None
    assert (sidecar.documents, sidecar.tokens, sidecar.files) == (3, 15, 2)


def test_what_is_read_and_left_out_is_said(tmp_path: Path, corpus: Path) -> None:
    for name in ("README.md", "LICENSE", "lines.jsonl.sha256", "more.jsonl.xz", ".DS_Store"):
        (corpus / name).write_text("no document")
    (corpus / "lines.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n')
    done = run(corpus, "--output-prefix", tmp_path / "out")
    assert done.out.endswith(
        ": 2 documents, 11 tokens; left out: 1 empty documents, 1 blank lines\n"
    )
    assert (
        "reading 2 files: 1 .jsonl, 1 .txt; left out: 1 .jsonl.xz, 1 .md, 1 .sha256, 1 hidden, "
        "1 no suffix\n" in done.err
    )
    assert "unpack what is packed otherwise than .gz and .zst: .jsonl.xz with unxz" in done.err
    asked = run(corpus / "README.md", "--output-prefix", tmp_path / "md", status=2)
    assert "fix: pass --format text" in asked.err
    run(corpus / "README.md", "--output-prefix", tmp_path / "md", "--format", "text")
    split = ("--split-text", "bytes:16", "--quiet")
    (corpus / "note.txt").write_text("a note\n" * 4)
    run(corpus / "note.txt", "--output-prefix", tmp_path / "cut", *split)
    assert json.loads((tmp_path / "cut.json").read_text())["documents"] == 2


def test_stdlib_and_no_eod(tmp_path: Path) -> None:
    run("stdlib", "--output-prefix", tmp_path / "out", "--workers", 2, "--no-append-eod")
    sidecar = data.check_dataset(tmp_path / "out", vocab_size=257)
    assert sidecar is not None
    assert sidecar.tokens == sidecar.text_bytes > 5_000_000
    assert sidecar.documents > 300


def test_errors_are_one_message(tmp_path: Path, corpus: Path) -> None:
    target = ("--output-prefix", tmp_path / "out")
    for arguments, message in (
        ((corpus, *target), r"^error: .*lines\.jsonl:1 has no key 'text'\n.*keys body"),
        ((corpus / "none", *target), r"^error: input '.*none' does not exist"),
        ((corpus / "note.txt", *target, "--tokenizer", "./none"), r"^error: tokenizer path"),
        (
            (corpus / "note.txt", "--output-prefix", f"{corpus}/"),
            r"^error: the output prefix is a folder\n.*\n.*\n  fix: .*/corpus/NAME$",
        ),
    ):
        assert re.search(message, run(*arguments, status=2).err, re.MULTILINE)
        assert sorted(tmp_path.iterdir()) == [corpus]


def test_a_real_process_says_the_same(corpus: Path) -> None:
    done = run_process(corpus / "none", "--output-prefix", corpus / "out")
    assert done.returncode == 2
    assert re.match(r"error: input '.*none' does not exist", done.stderr)


def test_overwrite_is_asked_for(tmp_path: Path, corpus: Path) -> None:
    arguments = (corpus / "note.txt", "--output-prefix", tmp_path / "out")
    run(*arguments)
    assert "out.bin exists already" in run(*arguments, status=2).err
    (corpus / "note.txt").write_text("another note")
    assert run(*arguments, "--overwrite", "--quiet").out == ""
    assert json.loads((tmp_path / "out.json").read_text())["text_bytes"] == 12


def test_options_that_errors_advise_exist() -> None:
    code = "".join(path.read_text() for path in (ROOT / "qwen35_mcore" / "data").glob("*.py"))
    advised = set(
        re.findall(
            r"--(?:json-key|output-prefix|overwrite|workers|no-append-eod|format|split-text)", code
        )
    )
    assert len(advised) == 7
    usage = run("--help").out
    assert not {option for option in advised if option not in usage}


INTERRUPTED = """
import os, signal, sys
from qwen35_mcore import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.argv[1] == "imports":
    sys.meta_path.insert(0, type("", (), {"find_spec": lambda name, *rest: (
        os.kill(os.getpid(), signal.SIGINT) if name == "qwen35_mcore.data.pipeline" else None)}))
else:
    with cli.quiet_imports():
        from qwen35_mcore.data import pipeline
    hash_sources = pipeline.hash_sources
    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return hash_sources(*args)
    pipeline.hash_sources = interrupt
sys.argv = ["qwen35", "data", "tokenize", "stdlib", "--output-prefix", sys.argv[2]]
cli.main()
"""


@pytest.mark.parametrize("moment", ["imports", "work"])
def test_ctrl_c_is_one_line(tmp_path: Path, moment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, moment, tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr.splitlines()
    if moment == "work":
        assert said.pop(0).startswith("reading ")
    assert (done.returncode, said) == (130, ["interrupted"])
    assert not list(tmp_path.iterdir())
