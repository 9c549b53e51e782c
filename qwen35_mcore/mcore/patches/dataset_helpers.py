"""Do not compile megatron's dataset helpers: its wheel contains them compiled, and no Makefile."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from megatron.core.datasets import utils

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows

HELPERS = "megatron.core.datasets.helpers_cpp"


def _only_where_missing(original: Any) -> Any:
    def compile_helpers() -> None:
        if importlib.util.find_spec(HELPERS) is None:
            original()

    return compile_helpers


def _probe() -> Verdict:
    has_makefile = (Path(utils.__file__).parent / "Makefile").exists()
    return shows(importlib.util.find_spec(HELPERS) is not None and not has_makefile)


PATCH = Patch(
    name="dataset helpers",
    target="megatron.core.datasets.utils:compile_helpers",
    why="the wheel has the compiled helpers but not the Makefile that a start runs",
    replace=_only_where_missing,
    probe=_probe,
)
