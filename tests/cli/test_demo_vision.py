"""The demo with images as a user runs it, with few iterations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_demo import ROOT, environment  # noqa: F401 (a fixture)


@pytest.mark.exhaustive
def test_trains_resumes_exports_and_asks_both_models(
    tmp_path: Path,
    environment: dict[str, str],  # noqa: F811
) -> None:
    few = ("--iters", "4", "--stop-at", "2", "--wanted", "-1", "--output", tmp_path / "demo")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo_vision.py", *map(str, few)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("[3/4]", "in the same words by both", "Which digit is this?"):
        assert expected in done.stdout
    assert (tmp_path / "demo/exported/preprocessor_config.json").is_file()
