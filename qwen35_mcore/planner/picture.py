"""Draws a plan: which rank computes what when, and what it holds, in the numbers of the tables.

Needs matplotlib (the extra `demo`), imported only when something is drawn.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from pathlib import Path
from textwrap import wrap
from typing import Any

from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.emit import cannot_write, check_writable
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.prediction import Prediction
from qwen35_mcore.planner.report import even_split, short_stage

FORMATS = (".png", ".svg")
_INK, _MUTED, _IDLE, _AFTER, _LIMIT = "#1f2430", "#6b7280", "#eef0f3", "#6d597a", "#c1121f"
_PASSES = {
    "F": ("forward", "#6aaed6", "#154f80", "#a6cee8", "#3d8cc4"),
    "B": ("backward", "#fdae6b", "#b95008", "#fdd0a2", "#f58b3c"),
}
"""By direction its name and a shade for every chunk."""
_DARK = ("#154f80", "#b95008")
"""Shades on which numbers are white."""
_MEMORY = {
    "weights, gradients, optimizer": ("#8d99ae", "weights", "gradients", "optimizer"),
    "activations in flight": ("#7fb685", "activations"),
    "workspace, CUDA, NCCL": ("#c9b7d6", "workspace", "overhead"),
}
"""Colours of the memory panel, and the fields of `StageMemory` that they stand for."""
_WIDTH, _ROW, _AROUND = 17.0, 0.46, 2.6
"""Inches: the figure, the row of a rank, headline and legend."""
_POINTS = 72 * 0.68 * _WIDTH
"""Of the time panel, nearly."""
_BAR = 0.82
"""Height of a bar, of a row's."""


def draw(prediction: Prediction, path: str | os.PathLike[str]) -> None:
    """Draw the schedule of a plan and, beside it, the memory of its ranks, into a .png or .svg file
    whose folder is made if missing. Raises PlanError as `check_target`, or where the file cannot be
    written."""
    target = Path(path)
    suffix = check_target(target)
    figure_class, rc_context = _matplotlib()
    # text stays text in an SVG, and nothing in it depends on the day or the run
    settings = {"svg.fonttype": "none", "svg.hashsalt": "plan", "font.family": "DejaVu Sans"}
    metadata = {"Date": None} if suffix == ".svg" else {}
    partial = target.with_name(f"{target.name}.partial")
    with rc_context(settings):
        figure = _figure(figure_class, prediction)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(partial, format=suffix[1:], dpi=150, metadata=metadata)
            partial.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()  # on a full disk, what of it was written
            raise cannot_write("picture", target, error.strerror) from error


def check_target(target: Path) -> str:
    """The suffix of a picture, in lower case. Raises PlanError where it is none of `FORMATS`,
    matplotlib is not installed, or the folder cannot be written."""
    suffix = target.suffix.lower()
    if suffix not in FORMATS:
        problem, allowed = "the picture has no known format", "*.png, *.svg"
        fix = f"name it {target.with_suffix('.svg')}" if target.name else "name a file"
        raise PlanError(problem, got=str(target), allowed=allowed, fix=fix)
    _matplotlib()
    if os.path.isdir(target):  # false for a name that is too long, where Path.is_dir raises
        raise cannot_write("picture", target, "it is a folder")
    check_writable("picture", target)
    return suffix


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        problem = "drawing needs matplotlib, which is not installed"
        raise PlanError(problem, fix="pip install matplotlib") from error
    return Figure, rc_context


def _figure(figure_class: Any, prediction: Prediction) -> Any:
    job, candidate = prediction.job, prediction.candidate
    height = _AROUND + _ROW * candidate.pp
    figure = figure_class(figsize=(_WIDTH, height), facecolor="white", layout="constrained")
    times, memory = figure.subplots(1, 2, width_ratios=(3.6, 1))
    for axes in (times, memory):
        axes.set_ylim(candidate.pp - 0.5, -0.5)
        axes.set_yticks([])
        axes.tick_params(colors=_MUTED, labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    _schedule(times, prediction)
    _memory(memory, prediction)
    interleaved = f"{candidate.vpp} chunks each, interleaved" if candidate.vpp > 1 else "1F1B"
    facts = [f"step {prediction.step_s:.2f} s", f"bubble {prediction.bubble:.2f}"]
    facts += [f"{candidate.pp} ranks", interleaved, f"{prediction.microbatches} microbatches"]
    facts += even_split(prediction)
    title = f"{job.model_name} on {job.gpus} {job.gpu.name} (predicted)"
    lines = [title, "   ·   ".join(facts), *wrap(prediction.pipeline_layout, 150)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", size=11, color=_INK)
    key = "E embedding, t decoder layer, m MTP, L output and loss; numbers: microbatches"
    times.set_xlabel(key, size=8, color=_MUTED, loc="left")
    figure.legend(loc="outside lower left", ncols=5, frameon=False, fontsize=8.5)
    return figure


def _schedule(axes: Any, prediction: Prediction) -> None:
    simulation, step_s, pp = prediction.simulation, prediction.step_s, prediction.candidate.pp
    pipeline_s = simulation.step_s
    axes.barh(range(pp), pipeline_s, _BAR, color=_IDLE, label="idle")
    after = {"color": _AFTER, "label": "after the pipeline: dp, optimizer"}
    axes.barh(range(pp), step_s - pipeline_s, _BAR, pipeline_s, **after)
    for rank in range(pp):
        busy = (simulation.busy_s[rank] + prediction.after_s) / step_s
        stages = " ".join(map(short_stage, prediction.stages[rank::pp]))
        for text, rise, size in ((f"rank {rank} · {busy:.0%} busy", -0.2, 8.5), (stages, 0.24, 7)):
            axes.text(-0.006 * step_s, rank + rise, text, size=size, ha="right", va="center")
    bars: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for (kind, stage, microbatch), begin_s, end_s in simulation.events:
        direction, *shades = _PASSES[kind]
        chunk, rank = divmod(stage, pp)
        colour = shades[chunk % len(shades)]
        name = f"{direction}, chunk {chunk}" if prediction.candidate.vpp > 1 else direction
        bars[name, colour].append((rank, end_s - begin_s, begin_s))
        text = str(microbatch)
        size = min(8.0, (end_s - begin_s) / step_s * _POINTS / (0.75 * len(text)))
        if size >= 4.5:  # smaller ones cannot be read
            style = {"ha": "center", "va": "center", "size": size}
            ink = "white" if colour in _DARK else _INK
            axes.text((begin_s + end_s) / 2, rank, text, color=ink, **style)
    for (name, colour), spans in bars.items():
        ranks, seconds, begins = zip(*spans, strict=True)
        axes.barh(
            ranks, seconds, _BAR, begins, color=colour, label=name, edgecolor="white", linewidth=0.4
        )
    axes.set_xlim(0, step_s)
    unit, name = (1.0, "s") if step_s >= 2 else (1e-3, "ms")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:g} {name}")


def _memory(axes: Any, prediction: Prediction) -> None:
    job, memories = prediction.job, prediction.memory()
    limit, ranks = job.usable_bytes / GIB, range(prediction.candidate.pp)
    left = [0.0 for _ in ranks]
    for name, (colour, *fields) in _MEMORY.items():
        sizes = [sum(getattr(one, field) for field in fields) / GIB for one in memories]
        axes.barh(ranks, sizes, _BAR, left, color=colour, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for rank, total in enumerate(left):
        axes.text(total + 0.015 * limit, rank, f"{total:.1f}", va="center", size=8, weight="bold")
    less = f", {job.headroom_bytes / GIB:.1f} below the card's" if job.headroom_bytes else ""
    axes.axvline(limit, color=_LIMIT, linewidth=1.6, label=f"limit {limit:.1f} GiB{less}")
    axes.set_xlim(0, 1.2 * max(limit, *left))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} GiB")
