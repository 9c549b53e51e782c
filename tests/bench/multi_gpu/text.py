"""Real text: source files of Python's standard library, tokenized by `qwen35 data tokenize`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.bench.multi_gpu.machine import Machine

SOME_FILES = 30


def tokenize(machine: Machine) -> Path:
    """Prefix of the dataset; made once for each folder. On a CPU some of the files will do."""
    prefix = machine.folder / "data" / "stdlib"
    if prefix.with_suffix(".json").exists():
        return prefix
    prefix.parent.mkdir(parents=True, exist_ok=True)
    inputs = ["stdlib"] if machine.on_gpus else [str(path) for path in _small_modules()]
    workers = str(min(8, os.cpu_count() or 1) if machine.on_gpus else 1)
    command = [sys.executable, "-m", "qwen35_mcore.cli", "data", "tokenize", *inputs]
    subprocess.run(
        [*command, "--output-prefix", str(prefix), "--workers", workers, "--quiet"], check=True
    )
    return prefix


def _small_modules() -> list[Path]:
    modules = sorted(Path(os.__file__).parent.glob("*.py"), key=lambda f: (f.stat().st_size, f))
    return [module for module in modules if module.stat().st_size > 4000][:SOME_FILES]
