"""`qwen35 flavors` as a user runs it: a process, its output, its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35_mcore.config.counts import count_parameters
from qwen35_mcore.config.flavors import FLAVORS
from tests.helpers.ckpt_cli import ok, qwen35, refused

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "megatron", "transformers", "numpy", "pyarrow")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwen35_mcore.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_table_has_a_row_for_every_flavor() -> None:
    done = run("flavors")
    assert done.returncode == 0
    assert done.stderr == ""
    rows = {
        cells[0]: cells[1:]
        for line in done.stdout.splitlines()
        if line.startswith("│")
        for cells in [[cell.strip() for cell in line.strip("│").split("│")]]
    }
    assert list(rows) == list(FLAVORS)
    assert rows["35b-a3b"] == ["40", "2048", "16/2", "256/8", "35.51 B", "3.45 B"]
    assert rows["80b-a3b"] == ["48", "2048", "16/2", "512/10", "81.32 B", "3.87 B"]
    assert rows["0.8b"] == ["24", "1024", "8/2", "-", "0.77 B", "0.75 B"]
    assert "397b-a19b: YaRN factor 3, 1,000,000 positions" in done.stdout


def test_json_holds_exact_counts() -> None:
    done = run("flavors", "--json")
    assert done.returncode == 0
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(rows) == list(FLAVORS)
    for name, config in FLAVORS.items():
        counts = count_parameters(config)
        assert rows[name]["total"] == counts.total
        assert rows[name]["active"] == counts.active
        assert sum(part["total"] for part in rows[name]["components"].values()) == counts.total
        assert rows[name]["experts"] == config.num_experts


def test_one_flavor_by_another_spelling() -> None:
    done = run("flavors", "Qwen/Qwen3.5-35B-A3B", "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == ["35b-a3b"]


def test_an_unknown_flavor_is_one_message_on_stderr_and_exit_2() -> None:
    done = run("flavors", "35b-a3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no such flavor")
    assert "did you mean 35b-a3b" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("flavors", "--nope"), "No such option"),
        (("nope",), "No such command"),
        (("data", "tokenize", "--output-prefix", "x"), "give at least one file or folder"),
        (("data", "tokenize", "README.md"), "Missing option '--output-prefix'"),
        (("data", "tokenize", "a", "--output-prefix", "x", "--workers", "0"), "--workers"),
    ],
)
def test_usage_errors_exit_2(arguments: tuple[str, ...], complaint: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["data", "tokenize", "--help"], ["flavors"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from qwen35_mcore.cli import main\n"
        f"sys.argv = ['qwen35', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_tokenize_reaches_the_data_pipeline(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello")
    prefix = tmp_path / "out" / "set"
    arguments = ("data", "tokenize", str(text), "--output-prefix", str(prefix), "--quiet")
    ok(qwen35(*arguments, "--no-append-eod"))
    without_eod = prefix.with_suffix(".bin").stat().st_size
    refused(qwen35(*arguments), "overwrite")
    ok(qwen35(*arguments, "--overwrite"))
    assert prefix.with_suffix(".bin").stat().st_size == without_eod * 6 // 5
