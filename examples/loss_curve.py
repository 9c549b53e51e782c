"""Draw the losses of a training run, resumed or not, from its TensorBoard files.

python examples/loss_curve.py runs/demo/tensorboard loss.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

INK, GREY = "#1f2933", "#7b8794"
SERIES = {
    # tag in the event files: (label, colour)
    "mtp_1 loss": ("MTP, 2 ahead", "#d9822b"),
    "lm loss": ("training", "#2f6fde"),
    "lm loss validation": ("validation", "#0b8a5f"),
}
VALIDATION = "lm loss validation"


@dataclass
class History:
    """Losses by iteration, and the iterations after which the run was continued."""

    losses: dict[str, dict[int, float]] = field(default_factory=lambda: {tag: {} for tag in SERIES})
    resumed_after: list[int] = field(default_factory=list)

    def last(self, tag: str) -> tuple[int, float]:
        """Iteration and value of a series' last point."""
        step = max(self.losses[tag])
        return step, self.losses[tag][step]


def read_history(folder: Path) -> History:
    """Join the event files of a run; a later one replaces what is beyond its first iteration.

    Raises:
        FileNotFoundError: no event file in the folder has a training loss.
    """
    history = History()
    # events.out.tfevents.SECONDS.HOST.PID.NUMBER
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda f: f.name.split(".")[3]):
        events = EventAccumulator(str(file), size_guidance={SCALARS: 0})
        events.Reload()
        present = [tag for tag in SERIES if tag in events.Tags()[SCALARS]]
        if "lm loss" not in present:
            continue
        start = events.Scalars("lm loss")[0].step
        for tag, values in history.losses.items():
            history.losses[tag] = {step: v for step, v in values.items() if step < start}
        history.resumed_after = [step for step in history.resumed_after if step < start - 1]
        if start > 1:
            history.resumed_after.append(start - 1)
        for tag in present:
            for event in events.Scalars(tag):
                # megatron logs the test set under the validation set's tag, after it
                history.losses[tag].setdefault(event.step, event.value)
    if not history.losses["lm loss"]:
        raise FileNotFoundError(f"no training loss in {folder}; was the run given this folder?")
    return history


def draw(history: History, output: Path, title: str, subtitle: str) -> None:
    """Write the picture; its format follows from the name of ``output``."""
    plt.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK})
    figure, axes = plt.subplots(figsize=(10, 5.6), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    ends = []
    for tag in SERIES:
        if not history.losses[tag]:
            continue
        label, colour = SERIES[tag]
        steps, values = zip(*sorted(history.losses[tag].items()), strict=True)
        if tag == VALIDATION:
            axes.plot(
                *(steps, values, "o-"),
                color=colour,
                linewidth=1.2,
                markersize=7.5,
                markeredgecolor="white",
                zorder=4,
            )
        else:
            axes.plot(steps, values, color=colour, linewidth=1, alpha=0.28)
            values = _smooth(values)
            axes.plot(steps, values, color=colour, linewidth=2.2, solid_capstyle="round")
        ends.append((values[-1], label, colour))
    axes.set_xlim(0, max(history.losses["lm loss"]) * 1.01)
    for step in history.resumed_after:
        _mark_resume(axes, step)
    _label_ends(axes, ends)
    axes.set_xlabel("iteration", labelpad=8)
    axes.set_ylabel("loss, nats per token", labelpad=8)
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", pad=30)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, color=GREY)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")
    figure.savefig(output)
    plt.close(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over at most nine points, fewer near both ends."""
    smooth = []
    for i in range(len(values)):
        reach = min(4, i, len(values) - 1 - i)
        smooth.append(fmean(values[i - reach : i + reach + 1]))
    return smooth


def _mark_resume(axes: Axes, step: int) -> None:
    axes.axvline(step, color=GREY, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"stopped and resumed\nat iteration {step}",
        xy=(step, 0.62),
        xycoords=("data", "axes fraction"),
        xytext=(7, 0),
        textcoords="offset points",
        color=GREY,
        va="center",
    )


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Last value and name of every series, right of the axes; close ones are moved apart."""
    low, high = axes.get_ylim()
    gap, floor = 0.055 * (high - low), low
    for value, label, colour in sorted(ends):
        y = max(value, floor)
        floor = y + gap
        axes.annotate(
            f"{value:.2f}  {label}",
            xy=(1, y),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the run's --tensorboard-dir")
    parser.add_argument("output", type=Path, help="picture to write, e.g. loss.png")
    parser.add_argument("--title", default="Training loss")
    args = parser.parse_args()
    try:
        history = read_history(args.folder)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    step, loss = history.last("lm loss")
    draw(history, args.output, args.title, f"{step:,} iterations")
    print(f"{args.output}: {step:,} iterations, last training loss {loss:.4f}")


if __name__ == "__main__":
    main()
