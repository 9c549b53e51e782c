"""The benchmark of the vision tower runs where no GPU is, and says what it has measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive
def test_a_rehearsal_on_a_cpu(tmp_path: Path) -> None:
    words = ("--cpu", "--repeats", "1", "--images", "2", "--patches", "32", "--freeze", "language")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_vision", *words, "--json", tmp_path / "rows"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    tower, text, images = rows
    assert [row["what"] for row in rows] == ["tower", "text", "images"]
    assert all(row["ms"] > 0 and row["images"] == 2 and row["patches"] == 32 for row in rows)
    assert (text["frozen"], images["frozen"]) == ("", "language")
    assert images["tower_share"] == pytest.approx(2 * tower["ms"] / images["ms"])
    assert images["tokens_per_s"] == pytest.approx(2 * 128 / images["ms"] * 1e3)
    assert "peak_gib" not in images  # nobody measures it here
