"""Files that run a plan: ``layout.args``, ``run.sh`` and ``plan.json`` in a folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.candidate import recompute_modules
from qwen35_mcore.planner.folders import why_not_writable
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.prediction import Prediction
from qwen35_mcore.planner.report import job_data, prediction_data

_CUDNN_TRAINS_HEAD_256 = ("h100-80g", "h200-141g", "b200-180g")
"""Elsewhere Transformer Engine chooses."""

Group = tuple[str, list[tuple[str, ...]]]
"""A comment, and flags with their values."""


def flag_groups(prediction: Prediction) -> Iterator[Group]:
    """Megatron's flags of a plan by what they are for, each with the reason.

    Data, checkpoints, learning rate and length of the run are not among them.
    """
    job, candidate = prediction.job, prediction.candidate
    yield "the model; it fills every architecture flag", [job.model_flags]
    yield from _sizes(prediction)
    yield (
        f"{prediction.microbatches} microbatches per step on each of {candidate.dp(job)} data "
        "parallel ranks",
        [
            ("--seq-length", str(job.seq_length)),
            ("--micro-batch-size", str(candidate.micro_batch_size)),
            ("--global-batch-size", str(job.global_batch_size)),
        ],
    )
    yield from _recompute(prediction)
    if candidate.fp8:
        recipe = candidate.precision.removeprefix("fp8-")
        yield (
            "matrix products in FP8, everything else in bfloat16",
            [("--bf16",), ("--fp8-format", "hybrid"), ("--fp8-recipe", recipe)],
        )
    else:
        yield "bfloat16 weights, float32 optimizer", [("--bf16",)]
    yield (
        "optimizer state is shared by data parallel ranks; gradients are reduced under the last "
        "backward pass and weights gathered under the first forward pass",
        [("--use-distributed-optimizer",), ("--overlap-grad-reduce",), ("--overlap-param-gather",)],
    )
    if job.model_config.is_moe:
        yield (
            "tokens travel to their experts with one all-to-all",
            [("--moe-token-dispatcher-type", "alltoall")],
        )
    if job.gpu.name in _CUDNN_TRAINS_HEAD_256:
        yield (
            "cuDNN's attention: the fast one at head size 256 on this GPU",
            [("--attention-backend", "fused")],
        )
    if job.gpus > 1:
        yield (
            "Python collects garbage on all ranks at the same step instead of one after another",
            [("--manual-gc",), ("--manual-gc-interval", "100")],
        )


def flags(prediction: Prediction) -> list[str]:
    """The words of `flag_groups` without comments."""
    return [word for _, lines in flag_groups(prediction) for line in lines for word in line]


def _sizes(prediction: Prediction) -> Iterator[Group]:
    job, candidate = prediction.job, prediction.candidate
    why = f"{job.gpus} GPUs, data parallel {candidate.dp(job)}"
    sizes: list[tuple[str, ...]] = [("--tensor-model-parallel-size", str(candidate.tp))]
    sizes += [("--sequence-parallel",)] if candidate.sequence_parallel else []
    sizes.append(("--pipeline-model-parallel-size", str(candidate.pp)))
    sizes.append(("--context-parallel-size", str(candidate.cp)))
    if job.model_config.is_moe:
        experts = job.model_config.num_experts // candidate.ep
        why += f", {experts} experts of each layer on a GPU"
        sizes.append(("--expert-model-parallel-size", str(candidate.ep)))
        sizes.append(("--expert-tensor-parallel-size", str(candidate.etp)))
    yield why, sizes
    if candidate.pp == 1:
        return
    why, even = f"{candidate.pp} pipeline ranks", prediction.even_step_s()
    if candidate.vpp > 1:
        why += f" with {candidate.vpp} stages each, interleaved"
    why += ": E embedding, t layer, m MTP, L loss, | next stage"
    if even is not None:
        why += f"; predicted step {prediction.step_s:.2f} s, {even:.2f} s when split evenly"
    yield why, [("--pipeline-model-parallel-layout", prediction.pipeline_layout)]


def _recompute(prediction: Prediction) -> Iterator[Group]:
    recompute, config = prediction.candidate.recompute, prediction.job.model_config
    if recompute == "selective":
        what = "the experts' activations" if config.is_moe else "feed-forward layers"
        yield (
            f"{what} and the norm behind the delta rule are computed again",
            [
                ("--recompute-granularity", "selective"),
                ("--recompute-modules", *recompute_modules(config)),
            ],
        )
    elif recompute == "full":
        yield (
            "every layer is computed again from its input: the fastest way to fit in memory",
            [
                ("--recompute-granularity", "full"),
                ("--recompute-method", "uniform"),
                ("--recompute-num-layers", "1"),
            ],
        )


def layout_args(prediction: Prediction) -> str:
    """The text of ``layout.args``: one flag with its values a line, comments with reasons."""
    job = prediction.job
    fullest = max(memory.total for memory in prediction.memory())
    lines = [
        f"# {job.model_name} on {job.gpus} {job.gpu.name}, written by `qwen35 plan`.",
        f"# Predicted: {prediction.step_s:.2f} s a step, {prediction.tokens_per_gpu_s:,.0f} "
        f"tokens/s/GPU, {fullest / GIB:.1f} GiB on the fullest GPU.",
    ]
    for reason, group in flag_groups(prediction):
        lines += ["", f"# {reason}", *(shlex.join(line) for line in group)]
    return "\n".join(lines) + "\n"


_RUN_SH = """\
#!/usr/bin/env bash
# {what}. Run it from anywhere, with the paths of
# launch/README.md set:
#
#   {folder}/run.sh [OPTIONS OF sbatch --] [FLAGS OF pretrain_qwen35.py]
#
# Flags win over those of layout.args.
set -euo pipefail
preset=$(dirname "$(readlink -f "${{BASH_SOURCE[0]}}")")
repo=${{REPO:-{repository}}}
[[ -n ${{REPO:-}} || -r $repo/launch/train.sh ]] || repo=$PWD  # moved since this was written
if [[ ! -r $repo/launch/train.sh ]]; then
    printf 'error: the repository of qwen35_mcore is not there\\n  got: %s\\n' "$repo" >&2
    printf '  fix: set REPO to its folder\\n' >&2
    exit 2
fi
REPO=$(cd "$repo" && pwd)
export REPO
{unset}options=()
for ((i = 1; i <= $#; i++)); do
    if [[ ${{!i}} == -- ]]; then
{mark}        options=("${{@:1:i-1}}")
        shift "$i"
        break
    fi
done
{local}if ! command -v sbatch >/dev/null; then
    echo 'error: {needs}, and there is no sbatch here' >&2
    echo '  fix: submit it on a machine of a SLURM cluster' >&2
    exit 2
fi
exec sbatch --nodes={nodes} --gpus-per-node={each} "${{options[@]}}" \\
    "$REPO/launch/slurm.sbatch" "$preset" "$@"
"""
_LOCAL = """\
if [[ -z $submit ]]; then
    NPROC=${{NPROC:-{each}}} exec bash "$REPO/launch/train.sh" "$preset" "$@"
fi
"""


def run_sh(prediction: Prediction, folder: Path) -> str:
    """The text of ``run.sh`` in a folder: the complete command.

    A plan of one node runs there, and is submitted where options for sbatch are given.
    """
    job = prediction.job
    nodes, each = job.nodes, job.gpus_of_a_node
    alone = nodes == 1
    where = f"{job.gpus} {job.gpu.name}" + ("" if alone else f", {nodes} nodes of {each}")
    return _RUN_SH.format(
        what=f"{job.model_name} on {where}",
        folder=folder.name,
        repository=_repository(folder),
        local=_LOCAL.format(each=each) if alone else "",
        unset="submit='' " if alone else "",
        mark="        submit=yes\n" if alone else "",
        needs="options before -- are for sbatch" if alone else f"this plan runs on {nodes} nodes",
        nodes=nodes,
        each=each,
    )


def _repository(folder: Path) -> str:
    """Where run.sh finds the launch scripts: relative to its folder inside the repository, so that
    both can move; "$PWD" where this package was installed without them."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "launch" / "train.sh").is_file():
        return "$PWD"
    folder = folder.resolve()
    if folder.is_relative_to(root):
        return os.path.join("$preset", os.path.relpath(root, folder))
    return shlex.quote(str(root))


def plan_json(prediction: Prediction) -> str:
    """The text of ``plan.json``: what was asked, and everything predicted of the plan."""
    candidate = prediction.candidate
    asked = {**job_data(prediction.job, candidate), "layout": str(candidate)}
    content = asked | {"plan": prediction_data(prediction)}
    return json.dumps(_rounded(content), indent=2) + "\n"


def files(prediction: Prediction, folder: Path) -> dict[str, str]:
    """Names and texts of the files of a plan in a folder."""
    return {
        "layout.args": layout_args(prediction),
        "plan.json": plan_json(prediction),
        "run.sh": run_sh(prediction, folder),
    }


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Whether a plan may be written there, which costs nothing to know before a search.

    Raises:
        PlanError: the folder exists and must not be overwritten, is a file, or cannot be written.
    """
    there = os.path.lexists(folder)
    refusal = why_not_writable(folder if there else folder.parent)
    if there and not folder.is_dir():
        what, got, fix = "the plan needs a folder", f"{folder} is a file", "choose another name"
        raise PlanError(what, got=got, fix=fix)
    if there and not overwrite:
        what, fix = (
            "the folder for the plan exists already",
            "choose another one, or pass --overwrite",
        )
        raise PlanError(what, got=str(folder), fix=fix)
    if refusal:
        raise _cannot_write(folder, refusal)


def _cannot_write(folder: Path, reason: object) -> PlanError:
    return PlanError(
        "cannot write the plan",
        got=f"{folder}: {reason}",
        fix="choose a folder where you may write",
    )


def emit(prediction: Prediction, folder: Path, *, overwrite: bool = False) -> None:
    """Write the files of a plan into a new folder, which appears complete or not at all.

    Args:
        overwrite: replace these files in a folder that exists; others in it stay.

    Raises:
        PlanError: the folder exists, or cannot be written.
    """
    check_folder(folder, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            partial.chmod(0o755)
            for name, text in files(prediction, folder).items():
                (partial / name).write_text(text, encoding="utf-8")
            (partial / "run.sh").chmod(0o755)
            if not folder.exists():
                os.rename(partial, folder)
                return
            for file in partial.iterdir():
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(folder, error.strerror) from error


def _rounded(value: object) -> object:
    """Six significant digits: the same text on every machine."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
