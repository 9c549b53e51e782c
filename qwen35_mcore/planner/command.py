"""``qwen35 plan``: from the command line's words to a search, an explanation, files, a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from qwen35_mcore.config import Qwen35Config
from qwen35_mcore.errors import PlanError
from qwen35_mcore.flavors import flavor_name, get_flavor
from qwen35_mcore.planner.calibration import default_calibration, read_calibration
from qwen35_mcore.planner.candidate import PRECISIONS, RECOMPUTE, Job
from qwen35_mcore.planner.emit import check_folder, emit, files
from qwen35_mcore.planner.explain import explain, parse_layout
from qwen35_mcore.planner.hardware import get_gpu
from qwen35_mcore.planner.picture import check_target, draw
from qwen35_mcore.planner.prediction import Prediction
from qwen35_mcore.planner.report import (
    explanation_data,
    found_data,
    print_explanation,
    print_found,
)
from qwen35_mcore.planner.search import Space, search


@dataclass(frozen=True, kw_only=True)
class Output:
    """What to do with the result."""

    as_json: bool = False
    emit: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    picture: Path | None = None

    def check(self) -> None:
        """Refuse now what could not be written after a search.

        Raises:
            PlanError: a folder that exists, a picture of an unknown format or in no folder, or
                --dry-run or --overwrite without anything to write.
        """
        if self.dry_run and self.emit is None:
            raise PlanError(
                "--dry-run prints the files of --emit, which is missing",
                fix="add --emit DIR, or leave out --dry-run: without --emit nothing is written",
            )
        if self.overwrite and self.emit is None:
            raise PlanError(
                "--overwrite is for the folder of --emit, which is missing",
                fix="add --emit DIR, or leave out --overwrite: a picture is replaced without it",
            )
        if self.emit is not None and not self.dry_run:
            check_folder(self.emit, overwrite=self.overwrite)
        if self.picture is not None:
            check_target(self.picture)


def refuse_pins(pins: Mapping[str, object]) -> None:
    """With --explain the layout has every size itself.

    Raises:
        PlanError: an option that chooses what a search tries.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in pins.items() if value]
    if given:
        raise PlanError(
            "--explain searches nothing, so that sizes to try mean nothing",
            got=" ".join(given),
            fix="name them in the layout: --explain tp=8,pp=4,mbs=1,recompute=full",
        )


def make_job(
    *,
    flavor: str | None,
    hf_config: str | None,
    gpus: int,
    gpu: str,
    seq_length: int,
    global_batch_size: int,
    calibration: Path | None,
) -> Job:
    """The job that the command line describes.

    Raises:
        PlanError: not exactly one model, an unknown GPU, or a number that is not positive.
        ConfigError: an unknown flavor or a config that cannot be read.
    """
    if (flavor is None) == (hf_config is None):
        raise PlanError(
            "a plan needs exactly one model",
            got=f"--flavor {flavor} --hf-config {hf_config}",
            allowed="--flavor NAME, or --hf-config PATH of a config.json",
            fix="see `qwen35 flavors` for the names",
        )
    sizes = {"gpus": gpus, "seq-length": seq_length, "global-batch-size": global_batch_size}
    for name, value in sizes.items():
        if value < 1:
            raise PlanError(f"--{name} must be at least 1", got=value)
    if flavor:
        name = flavor_name(flavor)
        config, model_flags = get_flavor(name), ("--flavor", name)
    else:
        name = str(hf_config)
        config, model_flags = Qwen35Config.from_hf(name), ("--hf-config", name)
    kind = get_gpu(gpu)
    return Job(
        config=config,
        gpu=kind,
        gpus=gpus,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        calibration=read_calibration(calibration)
        if calibration
        else default_calibration(kind.name),
        model_name=name,
        model_flags=model_flags,
    )


def precisions(text: str | None) -> tuple[str, ...]:
    """``all``, or one precision, bfloat16 for None.

    Raises:
        PlanError: another word.
    """
    if text == "all":
        return PRECISIONS
    return (_one_of("precision", text or PRECISIONS[0], PRECISIONS, "all"),)


def recomputations(text: str | None) -> tuple[str, ...]:
    """One way to recompute, or all for None."""
    return () if text is None else (_one_of("recompute", text, RECOMPUTE),)


def _one_of(name: str, text: str, words: tuple[str, ...], *also: str) -> str:
    if text not in words:
        raise PlanError(f"--{name} is unknown", got=text, allowed=", ".join((*words, *also)))
    return text


def run_search(job: Job, space: Space, *, top: int, output: Output) -> None:
    """Search, print, and write what was asked for.

    Raises:
        PlanError: nothing fits, or a file cannot be written.
    """
    found = search(job, space, top=top)
    if output.as_json:
        print(json.dumps(found_data(job, found), indent=2))
    else:
        print_found(job, found)
    _write(found.best[0], output)


def run_explain(job: Job, text: str, *, output: Output) -> int:
    """Explain one layout; 0 when it runs, 1 when it does not.

    Raises:
        PlanError: the layout cannot be read, or a file cannot be written.
    """
    candidate, pipeline_layout = parse_layout(text)
    explanation = explain(job, candidate, pipeline_layout)
    if output.as_json:
        print(json.dumps(explanation_data(job, explanation), indent=2))
    else:
        print_explanation(job, explanation)
    if explanation.prediction is None:
        return 1
    _write(explanation.prediction, output)
    return 0


def _write(prediction: Prediction, output: Output) -> None:
    if output.emit is not None and output.dry_run:
        for name, text in files(prediction).items():
            print(f"\n{output.emit / name}:\n{text}", file=_messages(output))
    elif output.emit is not None:
        emit(prediction, output.emit, overwrite=output.overwrite)
        print(f"wrote {output.emit}; run it with {output.emit}/run.sh", file=_messages(output))
    if output.picture is not None and not output.dry_run:
        title = f"{prediction.job.model_name} on {prediction.job.gpus} {prediction.job.gpu.name}"
        draw(prediction.stages, output.picture, title=title)
        print(f"wrote {output.picture}", file=_messages(output))


def _messages(output: Output) -> TextIO:
    """Under --json, standard output holds JSON alone."""
    return sys.stderr if output.as_json else sys.stdout
