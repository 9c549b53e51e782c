"""`qwen35 data images` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ckpt_cli import qwen35
from tests.helpers.conversations import (
    ask,
    make_processor,
    save_digit,
    write_conversations,
    write_digits,
)

ROOT = Path(__file__).parents[2]


def run_process(
    *arguments: object, before: str = "", module: str = "qwen35_mcore.cli"
) -> subprocess.CompletedProcess[str]:
    code = f"import sys; {before or 'pass'}; from {module} import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_shards_that_energon_knows(tmp_path: Path) -> None:
    processor = make_processor(tmp_path / "processor")
    save_digit(tmp_path / "data/large.png", 1, (64, 64))
    corpus = write_digits(tmp_path / "data", 20)
    with corpus.open("a") as file:
        file.write(
            write_conversations(tmp_path / "one.jsonl", [ask(1, *["large.png"] * 4)]).read_text()
        )
    out = tmp_path / "new/out"
    options = ("--processor", processor, "--split", "90,10,0", "--workers", 2)
    limits = ("--max-length", 250, "--bad-samples", "skip")
    done = run_process("data", "images", corpus, "--output-dir", out, *options, *limits)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {out}: 20 samples (18 train, 2 val), ")
    assert done.stdout.endswith("; left out: 1 bad samples\n")
    assert done.stderr.startswith(f"warning: a sample is left out: {corpus}:21: a conversation has")
    assert done.stderr.count("\n") == 4
    info = run_process("info", out, module="megatron.energon.cli.main")
    assert info.returncode == 0, info.stderr
    assert "(20 samples" in info.stdout
    assert "`val`: 10%, 2 samples in 1 shards" in info.stdout


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path) -> None:
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(1)])
    done = run_process(
        *("data", "images", corpus, "--output-dir", tmp_path / "out", "--processor", tmp_path),
        before="sys.modules['megatron.energon'] = None",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: conversations with images need Megatron-Energon")
    assert ".[vision]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "CORPUS"),
        (("c.jsonl", "--processor", "p"), "--output-dir"),
        (("c.jsonl", "--output-dir", "o"), "--processor"),
        (("c.jsonl", "--output-dir", "o", "--processor", "p", "--max-length", "0"), "--max-length"),
        (("c.jsonl", "--output-dir", "o", "--processor", "p", "--bad-samples", "x"), "'error', "),
        (("c.jsonl", "--output-dir", "o", "--processor", "p", "--workers", "0"), "--workers"),
    ],
)
def test_bad_flags(arguments: tuple[str, ...], said: str) -> None:
    done = qwen35("data", "images", *arguments)
    assert done.code == 2
    assert said in done.err


def test_names_that_are_not_there(tmp_path: Path) -> None:
    target = ("--output-dir", tmp_path / "out", "--processor", tmp_path / "none")
    done = qwen35("data", "images", tmp_path / "c.jsonl", *target)
    assert (done.code, "does not exist" in done.err) == (2, True)
    corpus = write_conversations(tmp_path / "c.jsonl", [ask(1)])
    done = qwen35("data", "images", corpus, *target)
    assert (done.code, "is not a folder" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()
