"""Fill the shared folder of compiled kernels on one machine, before many compile the same.

Kernels depend on what one rank computes: widths, heads, tokens of a microbatch, local experts, and
precision. A few steps of a cut run have all of them: four layers (one of each kind), no pipeline,
as many experts as keep a rank's number, and random tokens.
"""

from __future__ import annotations

import itertools
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.process.interrupts import quiet_imports
from qwen35_mcore.process.kernel_cache import VARIABLE, use_shared_folder
from qwen35_mcore.training.flags.table import GROUPS, destination

STEPS = 6
"""Megatron captures CUDA graphs after the third."""
LAYERS = 4
_GROUPS = ("schedule", "validation", "tokenizer", "checkpoints", "logs", "profiles", "failures")
LEFT_OUT = {flag for group in _GROUPS for row in GROUPS[group] for flag in row.flags} | {
    *("pipeline_model_parallel_layout", "num_layers_per_virtual_pipeline_stage"),
    *("num_virtual_stages_per_pipeline_rank", "microbatch_group_size_per_vp_stage"),
    *("hybrid_layer_pattern", "num_distributed_optimizer_instances", "perform_initialization"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("data_path", "split", "train_data_path", "valid_data_path", "test_data_path"),
    *("data_args_path", "per_split_data_args_path", "data_cache_path"),
    *("train_samples", "exit_interval", "exit_duration_in_mins", "iterations_to_skip"),
    *("skip_train", "step_batch_size_schedule", "decrease_batch_size_if_needed"),
}
"""Flags of the run that are about more than one rank's kernels, with all of their values."""
OF_IMAGES = {
    *("--vision", "--freeze", "--image-data", "--image-valid-data", "--pack-samples"),
    "--bad-samples",
}
"""The vision tower compiles and tunes nothing."""
EXCHANGE = {
    *("moe_token_dispatcher_type", "moe_flex_dispatcher_backend", "moe_flex_dispatcher_num_sms"),
    "moe_expert_rank_capacity_factor",
}
"""How ranks exchange rows of experts, which a rank by itself does not."""


def read_words(plan: Path, more: list[str]) -> list[str]:
    """The flags of a plan's folder, and those given beside it.

    Raises:
        ConfigError: the folder has no layout.args.
    """
    file = plan / "layout.args"
    if not file.is_file():
        raise ConfigError(
            "the plan has no layout.args",
            got=str(plan),
            allowed="a folder that `qwen35 plan --emit` wrote",
            fix=f"write one with `qwen35 plan ... --emit {shlex.quote(str(plan))}`",
        )
    return [*shlex.split(file.read_text(encoding="utf-8-sig"), comments=True), *more]


def cut_run(words: list[str], model_config: Qwen35Config, gpus: int) -> tuple[int, list[str]]:
    """A run on at most so many GPUs whose ranks start the kernels of a rank of the given one.

    Args:
        words: flags of the whole run.
        model_config: its model.

    Returns:
        The number of ranks, and the flags.

    Raises:
        ConfigError: fewer GPUs than tensor and context parallel ranks.
    """
    together = _size(words, "tensor") * _size(words, "context")
    spread, tensor = _size(words, "expert"), _size(words, "expert-tensor")
    if together > gpus:
        raise ConfigError(
            "tensor and context parallel ranks compute one layer together, so all of them are "
            "needed to compile its kernels",
            got=f"{gpus} GPUs",
            allowed=f"{together} or more",
            fix="run it on a machine that has them",
        )
    ep = max(
        n for n in range(1, spread + 1) if spread % n == 0 and _fits(n, tensor, together, gpus)
    )
    ranks = math.lcm(together, ep * tensor)
    batch = int(_value(words, "--micro-batch-size") or 1) * (ranks // together)
    layers = min(LAYERS, model_config.num_hidden_layers)
    left_out = LEFT_OUT | EXCHANGE if ep * tensor == 1 else LEFT_OUT
    cut = [*_without(words, left_out), "--override", f"num_hidden_layers={layers}"]
    if model_config.is_moe:
        local = model_config.num_experts // spread
        fewest = -(-model_config.num_experts_per_tok // ep)
        cut += ["--override", f"num_experts={max(local, fewest) * ep}"]
        cut += ["--expert-model-parallel-size", str(ep)]
    flags = {
        "--pipeline-model-parallel-size": 1,
        "--global-batch-size": batch,
        "--train-iters": STEPS,
        "--lr": 1e-5,
        "--lr-decay-style": "constant",
        "--eval-iters": 0,
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": model_config.vocab_size - 1,
    }
    cut += [str(word) for pair in flags.items() for word in pair]
    return ranks, [*cut, "--mock-data"]


def _fits(ep: int, tensor: int, together: int, gpus: int) -> bool:
    return math.lcm(together, ep * tensor) <= gpus


def _size(words: list[str], name: str) -> int:
    return int(_value(words, f"--{name}-model-parallel-size") or _value(
        words, f"--{name}-parallel-size") or 1)  # fmt: skip


def _value(words: list[str], flag: str) -> str | None:
    """Of the last time that a flag is given."""
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else following
    return found


def _without(words: list[str], flags: set[str]) -> list[str]:
    kept, leaving = [], False
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            leaving = name in OF_IMAGES or destination(name) in flags
        if not leaving:
            kept.append(word)
    return kept


def warm(plan: Path, more: list[str]) -> int:
    """Start the cut run on the GPUs of this machine.

    Returns:
        Its exit status.

    Raises:
        ConfigError: no plan, no GPU, no folder to fill, or too few GPUs.
    """
    if not os.environ.get(VARIABLE):
        raise ConfigError(
            "no folder to fill",
            got=f"{VARIABLE} is not set",
            allowed="a folder that every node of the run sees",
            fix=f"{VARIABLE}=FOLDER qwen35 warm {shlex.quote(str(plan))}, and the same variable "
            "for the run",
        )
    words = read_words(plan, more)
    use_shared_folder()
    with quiet_imports():
        import torch

        from qwen35_mcore.training.arguments import choose_model

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        raise ConfigError(
            "kernels are compiled and tuned on the card that runs them, and this machine has none",
            fix="run it on one node of the kind that the plan is for",
        )
    overrides = [following for word, following in itertools.pairwise(words) if word == "--override"]
    model_config = choose_model(_value(words, "--flavor"), _value(words, "--hf-config"), overrides)
    ranks, flags = cut_run(words, model_config, gpus)
    command = [sys.executable, "-m", "qwen35_mcore.training.launch", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "qwen35_mcore.training.pretrain", *flags]
    print(f"{ranks} ranks, {STEPS} steps: {shlex.join(flags)}", flush=True)
    return subprocess.run(command, check=False).returncode
