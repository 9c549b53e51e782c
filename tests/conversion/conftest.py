"""Toy Hugging Face folders, written once and copied where a test changes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.hf_toy import KINDS, pack_experts, rewrite, write_toy


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read-only toys: one per model type as transformers saves it, and MoE with packed experts."""
    root = tmp_path_factory.mktemp("toys")
    folders = {}
    for kind in KINDS:
        folders[kind] = root / kind
        write_toy(folders[kind], kind)
        if "moe" in kind:
            packed = folders[f"{kind}-packed"] = root / f"{kind}-packed"
            shutil.copytree(folders[kind], packed)
            rewrite(packed, pack_experts)
    return folders


@pytest.fixture
def copy_of(toys: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A toy of one's own, to damage."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(toys[kind], tmp_path / "hf"))

    return copy
