"""Draws a plan: which rank computes what when, and what it holds, in the numbers of the tables.

Needs matplotlib (the extra `demo`), imported only when something is drawn.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.folders import why_not_writable
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.pipeline import Event, Simulation
from qwen35_mcore.planner.prediction import Prediction, StageMemory

FORMATS = (".png", ".svg")
_INK, _MUTED, _IDLE = "#1f2430", "#6b7280", "#eef0f3"
_STATIC, _SAVED, _BESIDE, _LIMIT = "#8d99ae", "#7fb685", "#c9b7d6", "#c1121f"
_AFTER = "#6d597a"
# a hue per direction, darker with every chunk
_FORWARD = ("#a6cee8", "#6aaed6", "#3d8cc4", "#1f6aa5", "#154f80", "#0d3a61", "#082a48", "#051d33")
_BACKWARD = ("#fdd0a2", "#fdae6b", "#f58b3c", "#de6a17", "#b95008", "#933d05", "#702d04", "#502002")
_DARK_FROM = 2
"""From this chunk on, numbers are white."""

_WIDTH, _MEMORY_WIDTH, _ROW, _LABELS = 17.0, 3.4, 0.46, 1.5
"""Inches: the figure, its memory panel, the row of a rank, the rank labels."""
_POINTS = 72
_SMALLEST_TEXT, _LARGEST_TEXT = 4.5, 8.0
_ALL_PASSES = 96
"""Passes per rank that are drawn in full; longer schedules are cut."""


@dataclass(frozen=True)
class Window:
    """A part of the step that is drawn."""

    begin_s: float
    end_s: float
    name: str

    @property
    def length_s(self) -> float:
        return self.end_s - self.begin_s


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
    partial = target.with_name(f"{target.name}.partial")
    with rc_context(settings):
        figure = _figure(figure_class, prediction)
        metadata = {"Date": None} if suffix == ".svg" else {}
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
    if os.path.isdir(target):  # false for a name that is too long, where Path.is_dir raises
        raise _cannot_write(target, "it is a folder")
    refusal = why_not_writable(target.parent)
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
            "drawing needs matplotlib, which is not installed",
            fix="pip install matplotlib",
        ) from error
    return Figure, rc_context


def windows(simulation: Simulation) -> list[Window]:
    """What is drawn: the whole step, or warm-up, some steady state and cool-down of a long one."""
    shape, step = simulation.shape, simulation.step_s
    if 2 * shape.microbatches * shape.vpp <= _ALL_PASSES:
        return [Window(0.0, step, "the whole step")]
    first_rank = [event for event in simulation.events if event.rank == 0]
    pair = 2 * step / len(first_rank)
    warm = next(event.end_s for event in first_rank if event.kind == "B") + pair
    cool = [event.start_s for event in first_rank if event.kind == "F"][-1] - pair
    steady = min(6 * pair, (cool - warm) / 2)
    if steady < 2 * pair:
        return [Window(0.0, step, "the whole step")]
    middle = min(
        (event.start_s for event in first_rank),
        key=lambda start: abs(start - (warm + cool - steady) / 2),
    )
    return [
        Window(0.0, warm, "warm-up"),
        Window(middle, middle + steady, "steady state"),
        Window(cool, step, "cool-down"),
    ]


def _figure(figure_class: Any, prediction: Prediction) -> Any:
    plan = prediction.stages
    shape = plan.simulation.shape
    layout = wrap(plan.layout, 190, break_on_hyphens=False)
    top, bottom = 1.25 + 0.17 * len(layout), 0.9
    height = top + bottom + _ROW * shape.pp
    figure = figure_class(figsize=(_WIDTH, height), facecolor="white")
    parts, gap = windows(plan.simulation), 0.42
    # after the pipeline comes what the step takes beside it
    parts[-1] = replace(parts[-1], end_s=prediction.step_s)
    room = _WIDTH - _LABELS - _MEMORY_WIDTH - 0.9 - gap * (len(parts) - 1)
    scale = room / sum(part.length_s for part in parts)
    left = _LABELS
    for index, part in enumerate(parts):
        width = part.length_s * scale
        box = (left / _WIDTH, bottom / height, width / _WIDTH, _ROW * shape.pp / height)
        axes = figure.add_axes(box)
        _rows(axes, shape.pp)
        _schedule(axes, plan.simulation, part, inches_per_s=scale)
        axes.set_title(part.name, loc="left", fontsize=9, color=_MUTED, pad=5)
        if index == 0:
            _rank_labels(axes, prediction)
        left += width + gap
    for before, after in pairwise(parts):
        _mark_cut(figure, figure.axes[parts.index(after)], after.begin_s - before.end_s, gap)
    box = (left + 0.2) / _WIDTH, bottom / height, _MEMORY_WIDTH / _WIDTH, _ROW * shape.pp / height
    memory = figure.add_axes(box)
    _rows(memory, shape.pp)
    _memory(memory, prediction)
    _headline(figure, prediction, layout, height)
    _legend(figure, prediction, height)
    return figure


def _rows(axes: Any, ranks: int) -> None:
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(colors=_MUTED, labelsize=8, length=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)


def _schedule(axes: Any, simulation: Simulation, part: Window, *, inches_per_s: float) -> None:
    shape, pipeline_s = simulation.shape, simulation.step_s
    for rank in range(shape.pp):
        axes.barh(rank, part.length_s, 0.82, part.begin_s, color=_IDLE, linewidth=0)
        if part.end_s > pipeline_s:
            axes.barh(rank, part.end_s - pipeline_s, 0.82, pipeline_s, color=_AFTER, linewidth=0)
    bars: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for event in simulation.events:
        if event.end_s <= part.begin_s or event.start_s >= part.end_s:
            continue
        chunk = event.stage // shape.pp
        palette = _FORWARD if event.kind == "F" else _BACKWARD
        colour = palette[_shade(chunk, shape.vpp)]
        bars[event.rank, colour].append((event.start_s, event.end_s - event.start_s))
        _number(axes, event, part, inches_per_s, _shade(chunk, shape.vpp) >= _DARK_FROM)
    for (rank, colour), spans in bars.items():
        axes.broken_barh(
            spans, (rank - 0.41, 0.82), facecolor=colour, edgecolor="white", linewidth=0.4
        )
    axes.set_xlim(part.begin_s, part.end_s)
    unit, name = (1.0, "s") if simulation.step_s >= 2 else (1e-3, "ms")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:g} {name}")
    axes.locator_params(axis="x", nbins=max(2, int(part.length_s * inches_per_s / 0.9)))


def _shade(chunk: int, vpp: int) -> int:
    # one or two chunks take shades that can be told apart at a glance
    shade = {1: 1, 2: 3 * chunk}.get(vpp, chunk)
    return min(shade, len(_FORWARD) - 1)


def _number(axes: Any, event: Event, part: Window, inches_per_s: float, light: bool) -> None:
    """The microbatch of a pass, where it can be read."""
    text = str(event.microbatch)
    points = (event.end_s - event.start_s) * inches_per_s * _POINTS
    size = min(_LARGEST_TEXT, points / (0.75 * len(text)))
    whole = part.begin_s <= event.start_s and event.end_s <= part.end_s
    if size < _SMALLEST_TEXT or not whole:
        return
    axes.text(
        (event.start_s + event.end_s) / 2,
        event.rank,
        text,
        ha="center",
        va="center_baseline",
        fontsize=size,
        color="white" if light else _INK,
    )


def _rank_labels(axes: Any, prediction: Prediction) -> None:
    plan = prediction.stages
    simulation = plan.simulation
    shape = simulation.shape
    for rank in range(shape.pp):
        busy = (simulation.busy_s[rank] + prediction.after_s) / prediction.step_s
        chunks = " ".join(_short(stage) for stage in plan.stages[rank :: shape.pp])
        for text, rise, size, colour in (
            (f"rank {rank} · {busy:.0%} busy", -0.2, 8.5, _INK),
            (chunks, 0.24, 7, _MUTED),
        ):
            axes.annotate(
                text,
                (0, rank + rise),
                xycoords=("axes fraction", "data"),
                xytext=(-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=size,
                color=colour,
            )


def _short(stage: str) -> str:
    """``Etttm`` as E3tm."""
    count = stage.count("t")
    return stage.replace("t" * count, f"{count}t" if count > 1 else "t") if count else stage


def _mark_cut(figure: Any, axes: Any, seconds: float, gap: float) -> None:
    """Between two windows: how much of the step is not drawn."""
    box = axes.get_position()
    figure.text(
        box.x0 - gap / 2 / _WIDTH,
        (box.y0 + box.y1) / 2,
        f"{_seconds(seconds)} of steady state not drawn",
        rotation=90,
        ha="center",
        va="center",
        fontsize=8,
        style="italic",
        color=_MUTED,
    )


_MEMORY_PARTS: tuple[tuple[str, str, Callable[[StageMemory], float]], ...] = (
    (
        "weights, gradients, optimizer",
        _STATIC,
        lambda memory: memory.weights + memory.gradients + memory.optimizer,
    ),
    ("activations in flight", _SAVED, lambda memory: memory.activations),
    ("workspace, CUDA, NCCL", _BESIDE, lambda memory: memory.workspace + memory.overhead),
)


def _memory(axes: Any, prediction: Prediction) -> None:
    memories = prediction.memory()
    limit = prediction.job.usable_bytes / GIB
    right = max(limit, *(memory.total / GIB for memory in memories)) * 1.04
    for rank, memory in enumerate(memories):
        axes.barh(rank, right, 0.82, color=_IDLE, linewidth=0)
        left = 0.0
        for _, colour, size_of in _MEMORY_PARTS:
            size = size_of(memory) / GIB
            axes.barh(rank, size, 0.82, left, color=colour, linewidth=0)
            left += size
        static = _MEMORY_PARTS[0][2](memory) / GIB
        if static > 0.16 * right:
            text = {"ha": "center", "va": "center", "color": "white", "size": 8}
            axes.text(static / 2, rank, f"{static:.1f}", **text)
        outside = left < 0.75 * right
        axes.text(
            left + (0.015 if outside else -0.015) * right,
            rank,
            f"{memory.total / GIB:.1f}",
            ha="left" if outside else "right",
            va="center",
            size=8,
            weight="bold",
            color=_INK,
        )
    axes.axvline(limit, color=_LIMIT, linewidth=1.6)
    axes.set_xlim(0, right)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} GiB")
    axes.locator_params(axis="x", nbins=4)
    axes.set_title("memory at its fullest", loc="left", fontsize=9, color=_MUTED, pad=5)


def _headline(figure: Any, prediction: Prediction, layout: list[str], height: float) -> None:
    job, shape = prediction.job, prediction.stages.simulation.shape
    facts = [
        f"step {prediction.step_s:.2f} s",
        f"bubble {prediction.bubble:.2f}",
        f"{shape.pp} ranks",
        f"{shape.vpp} chunks each, interleaved" if shape.vpp > 1 else "1F1B",
        f"{shape.microbatches} microbatches",
    ]
    facts += _against_even(prediction)
    title = f"{job.model_name} on {job.gpus} {job.gpu.name} (predicted)"
    left, va = 0.25 / _WIDTH, "center"
    figure.text(left, 1 - 0.3 / height, title, size=15, weight="bold", color=_INK, va=va)
    figure.text(left, 1 - 0.6 / height, "   ·   ".join(facts), size=10.5, color=_INK, va=va)
    for line, text in enumerate(layout):
        down = 0.9 + 0.17 * line
        figure.text(
            left, 1 - down / height, text, size=8, color=_MUTED, va=va, family="DejaVu Sans Mono"
        )


def _against_even(prediction: Prediction) -> list[str]:
    if prediction.stages.even is None or prediction.candidate.pp == 1:
        return []
    even = prediction.even_step_s()
    return ["the even split does not fit" if even is None else f"split evenly {even:.2f} s"]


def _legend(figure: Any, prediction: Prediction, height: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    job, vpp = prediction.job, prediction.stages.simulation.shape.vpp
    entries: list[Any] = [
        Patch(color=palette[_shade(chunk, vpp)], label=_pass_name(name, chunk, vpp))
        for name, palette in (("forward", _FORWARD), ("backward", _BACKWARD))
        for chunk in range(vpp)
    ]
    entries.append(Patch(color=_IDLE, label="idle"))
    entries.append(Patch(color=_AFTER, label="after the pipeline: dp, optimizer"))
    entries += [Patch(color=colour, label=name) for name, colour, _ in _MEMORY_PARTS]
    limit = f"limit {job.usable_bytes / GIB:.1f} GiB"
    if job.headroom_bytes:
        limit += f", {job.headroom_bytes / GIB:.1f} below the card's"
    entries.append(Line2D([], [], color=_LIMIT, linewidth=1.6, label=limit))
    columns = len(entries) if len(entries) <= 6 else -(-len(entries) // 2)
    figure.legend(
        handles=entries,
        loc="lower left",
        bbox_to_anchor=(0.15 / _WIDTH, 0.08 / height),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=_INK,
        handlelength=1.3,
        columnspacing=1.6,
    )
    figure.text(
        1 - 0.25 / _WIDTH,
        0.2 / height,
        "E embedding   t decoder layer   m MTP   L output and loss   number: microbatch",
        ha="right",
        size=8,
        color=_MUTED,
    )


def _pass_name(direction: str, chunk: int, vpp: int) -> str:
    return f"{direction}, chunk {chunk}" if vpp > 1 else direction


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 2 else f"{value * 1e3:.0f} ms"
