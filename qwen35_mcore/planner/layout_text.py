"""Writes Megatron's ``pipeline_model_parallel_layout`` strings; `parallel.stages` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def write_pipeline_layout(stages: Sequence[str]) -> str:
    """The shortest text this finds for stages given as their layer characters:
    ``("Ett", "ttt", "ttt", "tmL")`` is ``Ett|(t*3|)*2tmL``.

    Runs of one layer become ``t*3`` and equal neighbouring stages a group, where that is shorter.
    """
    parts = []
    bars = [*("|" for _ in stages[:-1]), ""]
    for text, equal in groupby(map("".join, zip(map(_write_stage, stages), bars, strict=True))):
        plain = text * (times := len(list(equal)))
        grouped = f"({text})*{times}"
        parts.append(min(plain, grouped, key=len))
    return "".join(parts)


def _write_stage(stage: str) -> str:
    runs = ((layer, len(list(run))) for layer, run in groupby(stage))
    return "".join(layer * times if times < 3 else f"{layer}*{times}" for layer, times in runs)
