"""`--version` of both commands: one version, said without torch."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qwen35_mcore

ROOT = Path(__file__).parents[2]
SHOW = """
import sys
from {module} import app
try:
    app(["--version"], prog_name="{name}")
except SystemExit as end:
    assert not end.code
print([name for name in ("torch", "numpy", "megatron", "transformers") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("name", "module"), [("qwen35", "qwen35_mcore.cli"), ("qwen35-ckpt", "checkpoint_tools.cli")]
)
def test_the_version_is_said_without_torch(name: str, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOW.format(name=name, module=module)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} {qwen35_mcore.__version__}", "[]"]


def test_the_package_has_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    version = project["tool"]["setuptools"]["dynamic"]["version"]
    assert version == {"attr": "qwen35_mcore.__version__"}
