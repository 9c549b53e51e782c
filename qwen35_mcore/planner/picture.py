"""Draws a plan: which rank computes what when, and what it holds, in the numbers of the tables.

Needs matplotlib (the extra `demo`), imported only when something is drawn.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from textwrap import wrap
from typing import Any

from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.folders import why_not_writable
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.prediction import Prediction, StageMemory
from qwen35_mcore.planner.report import short_stage

FORMATS = (".png", ".svg")
_INK, _MUTED, _IDLE, _AFTER, _LIMIT = "#1f2430", "#6b7280", "#eef0f3", "#6d597a", "#c1121f"
_PASSES = {
    "F": ("#6aaed6", "#154f80", "#a6cee8", "#3d8cc4"),
    "B": ("#fdae6b", "#b95008", "#fdd0a2", "#f58b3c"),
}
"""By direction, a shade for every chunk."""
_DARK = ("#154f80", "#b95008")
"""Shades on which numbers are white."""
_MEMORY = {
    "weights, gradients, optimizer": ("#8d99ae", ("weights", "gradients", "optimizer")),
    "activations in flight": ("#7fb685", ("activations",)),
    "workspace, CUDA, NCCL": ("#c9b7d6", ("workspace", "overhead")),
}
"""Colours of the memory panel, and the fields of `StageMemory` that they stand for."""
_WIDTH, _LABELS, _TIMES, _GAP, _BYTES = 17.0, 1.5, 11.5, 0.3, 3.4
"""Inches: the figure; rank labels, time panel, gap and memory panel from the left."""
_ROW, _ABOVE, _LINE, _BELOW = 0.46, 1.25, 0.17, 0.9
"""Inches: the row of a rank; headline, a line of the layout, and legend."""
_POINTS = 72
_SMALLEST_TEXT, _LARGEST_TEXT = 4.5, 8.0
_BAR = 0.82
"""Height of a bar, of a row's."""


def draw(prediction: Prediction, path: str | os.PathLike[str]) -> None:
    """Draw the schedule of a plan and, beside it, the memory of its ranks.

    Args:
        path: file to write; its suffix, .png or .svg, is the format. Its folder is made where it
            is missing.

    Raises:
        PlanError: another suffix, the file cannot be written, or matplotlib is not installed.
    """
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
            raise _cannot_write(target, error.strerror) from error


def check_target(target: Path) -> str:
    """The suffix of a picture, in lower case; what costs nothing to know before a search.

    Raises:
        PlanError: it is none of `FORMATS`, matplotlib is not installed, or the file cannot be
            written there.
    """
    suffix = target.suffix.lower()
    if suffix not in FORMATS:
        raise PlanError(
            "the picture has no known format",
            got=str(target),
            allowed="*.png, *.svg",
            fix=f"name it {target.with_suffix('.svg')}" if target.name else "name a file",
        )
    _matplotlib()
    # false for a name that is too long, where Path.is_dir raises
    is_folder = os.path.isdir(target)
    refusal = "it is a folder" if is_folder else why_not_writable(target.parent)
    if refusal:
        raise _cannot_write(target, refusal)
    return suffix


def _cannot_write(target: Path, reason: str | None) -> PlanError:
    return PlanError(
        "the picture cannot be written",
        got=f"{target}: {reason}",
        fix="name a file in a folder that you may write to",
    )


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError(
            "drawing needs matplotlib, which is not installed", fix="pip install matplotlib"
        ) from error
    return Figure, rc_context


def _figure(figure_class: Any, prediction: Prediction) -> Any:
    layout = wrap(prediction.pipeline_layout, 190, break_on_hyphens=False)
    rows = _ROW * prediction.candidate.pp
    height = _ABOVE + _LINE * len(layout) + rows + _BELOW
    figure = figure_class(figsize=(_WIDTH, height), facecolor="white")

    def panel(left: float, width: float, title: str) -> Any:
        axes = figure.add_axes((left / _WIDTH, _BELOW / height, width / _WIDTH, rows / height))
        axes.set_ylim(prediction.candidate.pp - 0.5, -0.5)
        axes.set_yticks([])
        axes.tick_params(colors=_MUTED, labelsize=8, length=3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_MUTED)
        axes.set_title(title, loc="left", fontsize=9, color=_MUTED, pad=5)
        return axes

    _schedule(panel(_LABELS, _TIMES, "the whole step"), prediction)
    _memory(panel(_LABELS + _TIMES + _GAP, _BYTES, "memory at its fullest"), prediction)
    _headline(figure, prediction, layout, height)
    _legend(figure, prediction, height)
    return figure


def _schedule(axes: Any, prediction: Prediction) -> None:
    simulation, step_s = prediction.simulation, prediction.step_s
    pp, pipeline_s = prediction.candidate.pp, prediction.simulation.step_s
    points_per_s = _TIMES * _POINTS / step_s
    for rank in range(pp):
        axes.barh(rank, pipeline_s, _BAR, color=_IDLE, linewidth=0)
        axes.barh(rank, step_s - pipeline_s, _BAR, pipeline_s, color=_AFTER, linewidth=0)
        busy = (simulation.busy_s[rank] + prediction.after_s) / step_s
        stages = " ".join(map(short_stage, prediction.stages[rank::pp]))
        right = {"ha": "right", "va": "center"}
        left = -0.006 * step_s
        axes.text(left, rank - 0.2, f"rank {rank} · {busy:.0%} busy", size=8.5, color=_INK, **right)
        axes.text(left, rank + 0.24, stages, size=7, color=_MUTED, **right)
    bars: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for (kind, stage, microbatch), begin_s, end_s in simulation.events:
        colour = _PASSES[kind][stage // pp % len(_PASSES[kind])]
        seconds, rank, text = end_s - begin_s, stage % pp, str(microbatch)
        bars[rank, colour].append((begin_s, seconds))
        size = min(_LARGEST_TEXT, seconds * points_per_s / (0.75 * len(text)))
        if size >= _SMALLEST_TEXT:
            ink = "white" if colour in _DARK else _INK
            middle = (begin_s + end_s) / 2
            axes.text(middle, rank, text, ha="center", va="center", size=size, color=ink)
    for (rank, colour), spans in bars.items():
        row = (rank - _BAR / 2, _BAR)
        axes.broken_barh(spans, row, facecolor=colour, edgecolor="white", linewidth=0.4)
    axes.set_xlim(0, step_s)
    unit, name = (1.0, "s") if step_s >= 2 else (1e-3, "ms")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:g} {name}")


def _memory(axes: Any, prediction: Prediction) -> None:
    def gib(memory: StageMemory, names: tuple[str, ...]) -> float:
        return sum(getattr(memory, name) for name in names) / GIB

    memories = prediction.memory()
    limit = prediction.job.usable_bytes / GIB
    right = max(limit, *(memory.total / GIB for memory in memories)) * 1.2
    for rank, memory in enumerate(memories):
        left = 0.0
        for colour, names in _MEMORY.values():
            size = gib(memory, names)
            axes.barh(rank, size, _BAR, left, color=colour, linewidth=0)
            left += size
        text = {"va": "center", "size": 8, "weight": "bold", "color": _INK}
        axes.text(left + 0.015 * right, rank, f"{memory.total / GIB:.1f}", **text)
    axes.axvline(limit, color=_LIMIT, linewidth=1.6)
    axes.set_xlim(0, right)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} GiB")
    axes.locator_params(axis="x", nbins=4)


def _headline(figure: Any, prediction: Prediction, layout: list[str], height: float) -> None:
    job, candidate = prediction.job, prediction.candidate
    interleaved = f"{candidate.vpp} chunks each, interleaved" if candidate.vpp > 1 else "1F1B"
    facts = [f"step {prediction.step_s:.2f} s", f"bubble {prediction.bubble:.2f}"]
    facts += [f"{candidate.pp} ranks", interleaved, f"{prediction.microbatches} microbatches"]
    if prediction.even is not None and candidate.pp > 1:
        even = prediction.even_step_s()
        facts.append(
            "the even split does not fit" if even is None else f"split evenly {even:.2f} s"
        )
    title = f"{job.model_name} on {job.gpus} {job.gpu.name} (predicted)"
    lines = [(0.3, title, {"size": 15, "weight": "bold"}), (0.6, "   ·   ".join(facts), {})]
    mono = {"size": 8, "color": _MUTED, "family": "DejaVu Sans Mono"}
    lines += [(0.9 + _LINE * number, text, mono) for number, text in enumerate(layout)]
    for down, text, style in lines:
        style = {"size": 10.5, "color": _INK, "va": "center", **style}
        figure.text(0.25 / _WIDTH, 1 - down / height, text, **style)


def _legend(figure: Any, prediction: Prediction, height: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    job, vpp = prediction.job, prediction.candidate.vpp
    names = {"F": "forward", "B": "backward"}
    colours = {
        f"{names[kind]}, chunk {chunk}" if vpp > 1 else names[kind]: shades[chunk % len(shades)]
        for kind, shades in _PASSES.items()
        for chunk in range(vpp)
    }
    colours |= {"idle": _IDLE, "after the pipeline: dp, optimizer": _AFTER}
    colours |= {name: colour for name, (colour, _) in _MEMORY.items()}
    limit = f"limit {job.usable_bytes / GIB:.1f} GiB"
    if job.headroom_bytes:
        limit += f", {job.headroom_bytes / GIB:.1f} below the card's"
    entries: list[Any] = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(
        handles=[*entries, Line2D([], [], color=_LIMIT, linewidth=1.6, label=limit)],
        loc="lower left",
        bbox_to_anchor=(0.15 / _WIDTH, 0.08 / height),
        ncols=-(-(len(entries) + 1) // 2),
        frameon=False,
        fontsize=8.5,
        labelcolor=_INK,
    )
    key = "E embedding   t decoder layer   m MTP   L output and loss   number: microbatch"
    figure.text(1 - 0.25 / _WIDTH, 0.2 / height, key, ha="right", size=8, color=_MUTED)
