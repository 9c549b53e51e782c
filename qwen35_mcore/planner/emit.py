"""Files that run a plan: ``layout.args``, ``run.sh`` and ``plan.json`` in a folder."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.candidate import CAPACITY_FACTOR, recompute_modules
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.prediction import Prediction
from qwen35_mcore.planner.report import job_data, prediction_data

_CUDNN_TRAINS_HEAD_256 = ("h100-80g", "h200-141g", "b200-180g")
"""Elsewhere Transformer Engine chooses."""
_OPTIMIZERS = {
    "adam": ("bfloat16 weights, float32 optimizer", ""),
    "precision-aware": (
        "bfloat16 weights, gradients and moments",
        "--use-precision-aware-optimizer\n--main-grads-dtype bf16\n"
        "--exp-avg-dtype bf16\n--exp-avg-sq-dtype bf16",
    ),
    "muon": ("bfloat16 weights; Muon for matrices, Adam for the rest", "--optimizer muon"),
}
_NCCL_EP = f"""--moe-token-dispatcher-type flex
--moe-flex-dispatcher-backend ncclep
--moe-expert-rank-capacity-factor {CAPACITY_FACTOR}"""


def flag_groups(prediction: Prediction) -> Iterator[tuple[str, list[str]]]:
    """Megatron's flags of a plan by what they are for: the reason, and flags with their values.
    Data, checkpoints, learning rate and length of the run are not among them."""
    job, candidate = prediction.job, prediction.candidate
    yield "the model; it fills every architecture flag", [shlex.join(job.model_flags)]
    yield from _sizes(prediction)
    batch = [f"--seq-length {job.seq_length}", f"--micro-batch-size {candidate.micro_batch_size}"]
    yield (
        f"{prediction.microbatches} microbatches per step on each of {candidate.dp(job)} data "
        "parallel ranks",
        [*batch, f"--global-batch-size {job.global_batch_size}"],
    )
    if candidate.recompute == "selective":
        what = "the experts' activations" if job.model_config.is_moe else "feed-forward layers"
        modules = " ".join(recompute_modules(job.model_config))
        selective = ["--recompute-granularity selective", f"--recompute-modules {modules}"]
        yield f"{what} and the norm behind the delta rule are computed again", selective
    elif candidate.recompute == "full":
        why = "every layer is computed again from its input: the fastest way to fit in memory"
        each = ["--recompute-method uniform", "--recompute-num-layers 1"]
        yield why, ["--recompute-granularity full", *each]
    if candidate.fp8:
        fp8 = ["--fp8-format hybrid", f"--fp8-recipe {candidate.precision.removeprefix('fp8-')}"]
        yield "matrix products in FP8, everything else in bfloat16", fp8
    why, more = _OPTIMIZERS[job.optimizer]
    yield why, ["--bf16", *more.splitlines()]
    yield (
        "optimizer state is shared by data parallel ranks; gradients are reduced under the last "
        "backward pass and weights gathered under the first forward pass",
        ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    )
    if job.model_config.is_moe:
        how, more = "one all-to-all", "--moe-token-dispatcher-type alltoall"
        if candidate.dispatcher == "ncclep":
            how, more = "NCCL EP, into a buffer of fixed size", _NCCL_EP
        yield f"tokens travel to their experts with {how}", more.splitlines()
    if candidate.graphs == "full":
        yield "one CUDA graph of all passes of a step", ["--cuda-graph-impl full_iteration"]
    elif candidate.graphs == "parts":
        modules = "attn moe_router moe_preprocess" if job.model_config.is_moe else "attn mlp"
        graphs = ["--cuda-graph-impl transformer_engine", f"--cuda-graph-modules {modules}"]
        yield "CUDA graphs of what waits for no other rank", graphs
    else:
        yield "no CUDA graphs", ["--cuda-graph-impl none"]
    if job.gpu.name in _CUDNN_TRAINS_HEAD_256:
        fused = ["--attention-backend fused"]
        yield "cuDNN's attention: the fast one at head size 256 on this GPU", fused
    if job.gpus > 1:
        yield (
            "Python collects garbage on all ranks at the same step instead of one after another",
            ["--manual-gc", "--manual-gc-interval 100"],
        )


def _sizes(prediction: Prediction) -> Iterator[tuple[str, list[str]]]:
    job, candidate = prediction.job, prediction.candidate
    why = f"{job.gpus} GPUs, data parallel {candidate.dp(job)}"
    sizes = [
        f"--tensor-model-parallel-size {candidate.tp}",
        *(["--sequence-parallel"] if candidate.sequence_parallel else []),
        f"--pipeline-model-parallel-size {candidate.pp}",
        f"--context-parallel-size {candidate.cp}",
    ]
    if job.model_config.is_moe:
        experts = job.model_config.num_experts // candidate.ep
        why += f", {experts} experts of each layer on a GPU"
        sizes.append(f"--expert-model-parallel-size {candidate.ep}")
        sizes.append(f"--expert-tensor-parallel-size {candidate.etp}")
    yield why, sizes
    if candidate.pp == 1:
        return
    why, even = f"{candidate.pp} pipeline ranks", prediction.even_split_step_s
    if candidate.vpp > 1:
        why += f" with {candidate.vpp} stages each, interleaved"
    why += ": E embedding, t layer, m MTP, L loss, | next stage"
    if even is not None:
        why += f"; predicted step {prediction.step_s:.2f} s, {even:.2f} s when split evenly"
    stages = shlex.quote(prediction.pipeline_layout)
    yield why, [f"--pipeline-model-parallel-layout {stages}"]


def flags(prediction: Prediction) -> list[str]:
    """The words of `flag_groups` without reasons."""
    return shlex.split(" ".join(line for _, group in flag_groups(prediction) for line in group))


def layout_args(prediction: Prediction) -> str:
    """The text of ``layout.args``: one flag with its values a line, comments with reasons."""
    job, fullest = prediction.job, prediction.fullest_bytes
    text = (
        f"# {job.model_name} on {job.gpus} {job.gpu.name}, written by `qwen35 plan`.\n"
        f"# Predicted: {prediction.step_s:.2f} s a step, {prediction.tokens_per_gpu_s:,.0f} "
        f"tokens/s/GPU, {fullest / GIB:.1f} GiB on the fullest GPU.\n"
    )
    for reason, group in flag_groups(prediction):
        text += "\n".join(["", f"# {reason}", *group, ""])
    return text


def run_sh(prediction: Prediction, folder: Path) -> str:
    """The text of ``run.sh`` in a folder: the complete command. A plan of one node runs there, and
    is submitted where options for sbatch are given."""
    job = prediction.job
    nodes, each = job.nodes, job.gpus_of_a_node
    values = {"folder": folder.name, "repository": _repository(folder)}
    values |= {"nodes": str(nodes), "each": str(each)}
    values["what"] = f"{job.model_name} on {job.gpus} {job.gpu.name}"
    if nodes > 1:
        values["what"] += f", {nodes} nodes of {each}"
        values["needs"] = f"this plan runs on {nodes} nodes"
    else:
        here = f'NPROC=${{NPROC:-{each}}} exec bash "$REPO/launch/train.sh" "$preset" "$@"'
        values["needs"] = "options before -- are for sbatch"
        values["unset"], values["mark"] = "submit='' ", "        submit=yes\n"
        values["local"] = f"if [[ -z $submit ]]; then\n    {here}\nfi\n"
    template = Path(__file__).with_name("run.sh.template").read_text(encoding="utf-8")
    return re.sub("@([a-z]+)@", lambda match: values.get(match[1], ""), template)


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
    text = json.dumps(asked | {"plan": prediction_data(prediction)})
    # six significant digits: the same text on every machine
    rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))
    return json.dumps(rounded, indent=2) + "\n"


def files(prediction: Prediction, folder: Path) -> dict[str, str]:
    """Names and texts of the files of a plan in a folder."""
    return {
        "layout.args": layout_args(prediction),
        "plan.json": plan_json(prediction),
        "run.sh": run_sh(prediction, folder),
    }


def check_writable(what: str, target: Path) -> None:
    """Refuse, as a PlanError, a target that cannot be written in its folder, which is made where it
    is missing."""
    nearest = next(folder for folder in target.parents if os.path.lexists(folder))
    if not os.path.isdir(nearest):
        raise cannot_write(what, target, f"{nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise cannot_write(what, target, f"you may not write in {nearest}")


def cannot_write(what: str, target: Path, reason: object) -> PlanError:
    fix = "choose a folder where you may write"
    return PlanError(f"cannot write the {what}", got=f"{target}: {reason}", fix=fix)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Whether a plan may be written there, which costs nothing to know before a search. Raises
    PlanError where the folder must not be overwritten, is a file, or cannot be written."""
    if os.path.lexists(folder) and not (overwrite and folder.is_dir()):
        is_folder = folder.is_dir()
        problem = f"the folder for the plan {'exists already' if is_folder else 'is a file'}"
        fix = "choose another one" + (", or pass --overwrite" if is_folder else "")
        raise PlanError(problem, got=str(folder), fix=fix)
    check_writable("plan", folder / "run.sh")


def emit(prediction: Prediction, folder: Path, *, overwrite: bool = False) -> None:
    """Write the files of a plan into a new folder, which appears complete or not at all, or replace
    them in one that exists. Raises PlanError as `check_folder`, or where a file cannot be written.
    """
    check_folder(folder, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            written = Path(scratch, folder.name)
            written.mkdir()
            for name, text in files(prediction, folder).items():
                (written / name).write_text(text, encoding="utf-8")
            (written / "run.sh").chmod(0o755)
            if not folder.exists():
                written.rename(folder)
                return
            for file in written.iterdir():
                file.replace(folder / file.name)
    except OSError as error:
        raise cannot_write("plan", folder, error.strerror) from error
