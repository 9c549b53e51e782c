"""``qwen35 plan``: from the command line's words to a search, an explanation, files, a picture."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35_mcore.config.flavors import flavor_name, get_flavor
from qwen35_mcore.config.images import Images
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner import report
from qwen35_mcore.planner.calibration.rows import default_calibration, read_calibration
from qwen35_mcore.planner.candidate import OPTIMIZERS, SWITCHES, Job
from qwen35_mcore.planner.emit import check_folder, emit, files
from qwen35_mcore.planner.explain import explain, parse_layout
from qwen35_mcore.planner.hardware import GIB, Gpu, get_gpu
from qwen35_mcore.planner.picture import check_target, draw
from qwen35_mcore.planner.prediction import Prediction
from qwen35_mcore.planner.search import Space, search

DEFAULT_HEADROOM_GIB = 2.0
"""Measured peaks were up to 0.6 GiB above their prediction; uneven routing takes more."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What to do with the result."""

    as_json: bool = False
    emit: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    picture: Path | None = None

    def check(self) -> None:
        """Refuse, as a PlanError, what could not be written after a search."""
        if self.emit is None and (self.dry_run or self.overwrite):
            flag = "--dry-run" if self.dry_run else "--overwrite"
            fix = f"add --emit DIR, or leave out {flag}"
            raise PlanError(f"{flag} is for the files of --emit, which is missing", fix=fix)
        if self.emit is not None and not self.dry_run:
            check_folder(self.emit, overwrite=self.overwrite)
        if self.picture is not None:
            check_target(self.picture)


def refuse_pins(pins: Mapping[str, object]) -> None:
    """Refuse, as a PlanError, what chooses the sizes that a search tries."""
    given = " ".join(f"--{name.replace('_', '-')}" for name, value in pins.items() if value)
    if given:
        fix = "name them in the layout: --explain tp=8,pp=4,mbs=1,recompute=full"
        raise PlanError("--explain looks at one layout, not at sizes to try", got=given, fix=fix)


def make_job(
    *,
    flavor: str | None,
    hf_config: str | None,
    gpus: int,
    gpu: str,
    seq_length: int,
    global_batch_size: int,
    calibration: Path | None,
    gpus_per_node: int | None = None,
    headroom_gib: float = DEFAULT_HEADROOM_GIB,
    vision: Mapping[str, Any] | None = None,
    optimizer: str = OPTIMIZERS[0],
) -> Job:
    """The job that the command line describes, its sizes positive; ``vision``: further arguments of
    `Images.of`. Raises PlanError for not exactly one model, an unknown GPU, nodes that the GPUs do
    not fill, or more headroom than memory, and ConfigError for an unknown flavor, a config that
    cannot be read, or images that the model cannot train on."""
    if (flavor is None) == (hf_config is None):
        got, fix = f"--flavor {flavor} --hf-config {hf_config}", "`qwen35 flavors` lists the names"
        allowed = "--flavor NAME, or --hf-config PATH of a config.json"
        raise PlanError("a plan needs exactly one model", got=got, allowed=allowed, fix=fix)
    if flavor:
        name = flavor_name(flavor)
        model_config, model_flags = get_flavor(name), ["--flavor", name]
    else:
        name = str(hf_config)
        model_config = Qwen35Config.from_hf(name)
        model_flags = ["--hf-config", os.path.abspath(name)]  # the plan is run from anywhere
    images = Images.of(model_config, seq_length=seq_length, **vision) if vision else None
    if images is not None:
        if optimizer == "muon":
            fix = "pass --optimizer adam"
            raise PlanError("Muon does not train a vision tower", got="--optimizer muon", fix=fix)
        model_flags += [
            "--vision",
            *(["--freeze", *sorted(images.frozen)] if images.frozen else []),
        ]
    kind = _in_nodes(get_gpu(gpu), gpus, gpus_per_node)
    memory = kind.memory_bytes / GIB
    if not 0 <= headroom_gib < memory:
        got = f"{headroom_gib:g} GiB of the {memory:.1f} of {kind.name}"
        allowed = f"0 to {memory:.1f}, less what a plan needs"
        fix = f"leave it out for {DEFAULT_HEADROOM_GIB:g} GiB"
        raise PlanError("--headroom leaves no memory", got=got, allowed=allowed, fix=fix)
    rows = read_calibration(calibration) if calibration else default_calibration(kind.name)
    return Job(
        model_config=model_config,
        gpu=kind,
        gpus=gpus,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        calibration=rows,
        images=images,
        headroom_bytes=int(headroom_gib * GIB),
        optimizer=_one_of(OPTIMIZERS, optimizer, "--optimizer"),
        model_name=name,
        model_flags=tuple(model_flags),
    )


def _in_nodes(gpu: Gpu, gpus: int, per_node: int | None) -> Gpu:
    """The GPU in nodes of so many; None: of as many as it comes in, or the next smaller number that
    the job fills."""
    most = per_node or gpu.gpus_per_node
    fills = [n for n in range(1, most + 1) if gpus % n == 0]
    if per_node is None:
        return gpu if gpus <= most else gpu.in_nodes_of(fills[-1])
    if gpus > per_node and gpus % per_node:
        less = gpus // per_node * per_node
        got = f"--gpus {gpus} --gpus-per-node {per_node}"
        allowed = f"--gpus-per-node {', '.join(map(str, fills))}"
        fix = f"pass --gpus {less} or {less + per_node}, or another --gpus-per-node"
        raise PlanError("the GPUs do not fill whole nodes", got=got, allowed=allowed, fix=fix)
    return gpu.in_nodes_of(per_node)


def switches(gpu: Gpu, given: Mapping[str, str | None]) -> dict[str, tuple[str, ...]]:
    """Words of `Space` from those that were given for them: one, or ``all``; None: the default.
    Raises PlanError for a word that is not one of its words, or no precision of the GPU."""
    found, known = {}, SWITCHES | {"precision": gpu.precisions}
    for name, text in given.items():
        if text is not None:
            what = f"--{name} of {gpu.name}" if name == "precision" else f"--{name}"
            word = _one_of((*known[name], "all"), text, what)
            found[name] = known[name] if word == "all" else (word,)
    return found


def _one_of(words: tuple[str, ...], text: str, what: str) -> str:
    if text not in words:
        allowed, fix = ", ".join(words), "name one of these, or leave it out"
        raise PlanError(f"there is no such {what}", got=text, allowed=allowed, fix=fix)
    return text


def run_search(job: Job, space: Space, *, top: int, output: Output) -> None:
    """Search, print, and write what was asked for. Raises PlanError where nothing fits."""
    found = search(job, space, top=top)
    if output.as_json:
        print(json.dumps(report.found_data(job, found), indent=2))
    else:
        report.print_found(job, found)
    _write(found.best[0], output)


def run_explain(job: Job, text: str, *, output: Output) -> int:
    """Explain one layout; 0 when it runs, 1 when it does not."""
    explanation = explain(job, *parse_layout(text))
    if output.as_json:
        print(json.dumps(report.explanation_data(job, explanation), indent=2))
    else:
        report.print_explanation(job, explanation)
    if explanation.prediction is None:
        return 1
    _write(explanation.prediction, output)
    return 0


def _write(prediction: Prediction, output: Output) -> None:
    # under --json, standard output holds JSON alone
    messages = sys.stderr if output.as_json else sys.stdout
    folder, picture = output.emit, output.picture
    if folder is not None and output.dry_run:
        for name, text in files(prediction, folder).items():
            print(f"\n{folder / name}:\n{text}", file=messages)
    elif folder is not None:
        emit(prediction, folder, overwrite=output.overwrite)
        command = shlex.quote(os.path.join(folder, "run.sh"))
        print(f"wrote {folder}; run it with DATA=PREFIX SAVE=FOLDER {command}", file=messages)
    if picture is not None and output.dry_run:
        print(f"\n{picture}: the picture, not drawn", file=messages)
    elif picture is not None:
        draw(prediction, picture)
        print(f"wrote {picture}", file=messages)
