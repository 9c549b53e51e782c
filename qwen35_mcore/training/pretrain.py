"""Pretrain Qwen3.5 with megatron.training, on GPUs or (over gloo) on CPUs.

    torchrun --nproc-per-node 8 -m qwen35_mcore.training.pretrain --flavor 35b-a3b ...

--flavor or --hf-config choose the model; every other flag is Megatron's own. The names below are
what a training script of one's own is made of: see examples/pretrain_qwen35.py. Importing this
module on a machine without a GPU switches the process to CPU mode, before megatron is imported.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.process.interrupts import quiet_imports
from qwen35_mcore.process.kernel_cache import use_shared_folder

try:
    use_shared_folder()
except ConfigError:
    with quiet_imports():
        from qwen35_mcore.training.job_errors import reported_once
    with reported_once():
        raise
with quiet_imports():
    from qwen35_mcore.mcore import cpu_mode

    if cpu_mode.is_needed():
        cpu_mode.enable_training()

    from qwen35_mcore.config.flops import training_flops
    from qwen35_mcore.config.matrices import describe
    from qwen35_mcore.config.model_config import Qwen35Config
    from qwen35_mcore.mcore.imports import ModelType, pretrain, pretrain_cfg_container_from_args
    from qwen35_mcore.mcore.patches.install import install
    from qwen35_mcore.model.build import make_model_provider
    from qwen35_mcore.training.arguments import parse_arguments
    from qwen35_mcore.training.checks.data import check_batch
    from qwen35_mcore.training.cuda_graphs import free_graphs
    from qwen35_mcore.training.datasets import datasets
    from qwen35_mcore.training.forward_step import forward_step
    from qwen35_mcore.training.image_data import close_loaders
    from qwen35_mcore.training.job_errors import reported_once
    from qwen35_mcore.training.loss import loss_function

__all__ = [
    "datasets",
    "forward_step",
    "loss_function",
    "main",
    "make_model_provider",
    "parse_arguments",
    "reported_once",
    "train",
]


def train(
    args: Namespace,
    model_config: Qwen35Config,
    model_provider: Callable[..., Any],
    datasets: Callable[..., Any],
    forward_step: Callable[..., Any],
) -> None:
    """Megatron's ``pretrain``, with the patches that this model needs.

    Args:
        args, model_config: as `parse_arguments` returns them.
        model_provider: builds a model chunk; `make_model_provider` makes one.
        datasets: builds train, validation and test datasets; see `datasets`.
        forward_step: takes a microbatch through a chunk; see `forward_step`.

    Raises:
        ConfigError: a patch that cannot tell whether an untested megatron-core needs it.
        NonFiniteError: NaN or infinity in a loss, a gradient or a weight that would be saved.
    """
    install(
        partial(training_flops, model_config),
        partial(check_batch, vocab_size=args.padded_vocab_size),
        accept_untested=args.accept_untested_megatron,
    )
    if args.optimizer == "muon" and args.rank == 0:
        print(f"> {describe(model_config, args.muon_scalar_optimizer)}", flush=True)
    try:
        pretrain(
            pretrain_cfg_container_from_args(args),
            datasets,
            ModelType.encoder_or_decoder,
            forward_step,
            model_provider=model_provider,
        )
    finally:
        free_graphs()
        close_loaders()


def main() -> None:
    """Train by the flags of the command line, with this package's model, datasets and loss."""
    args, model_config = parse_arguments()
    model_provider = make_model_provider(model_config, args)
    train(args, model_config, model_provider, datasets, forward_step)


if __name__ == "__main__":
    with reported_once():
        main()
