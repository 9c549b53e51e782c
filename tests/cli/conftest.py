"""What tests of launch/ share: a preset, and a SLURM to play."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.slurm import LAYOUT, Slurm


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    folder = tmp_path / "a preset"
    folder.mkdir()
    (folder / "layout.args").write_text(LAYOUT)
    return folder


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path / "slurm")
