"""Pretrain Qwen3.5: the script to copy for datasets, a loss or a model of your own.

    torchrun --nproc-per-node 8 examples/pretrain_qwen35.py --flavor 35b-a3b ...

Unchanged it trains as `torchrun -m qwen35_mcore.training.pretrain` does, which needs no checkout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from qwen35_mcore.training import pretrain


def datasets(sample_counts: list[int], vp_stage: int | None = None) -> Any:
    """Train, validation and test datasets of so many samples. Yours go here."""
    return pretrain.datasets(sample_counts, vp_stage)


datasets.is_distributed = True  # type: ignore[attr-defined]  # megatron calls it on every rank


def loss_function(loss_mask: Any, token_losses: Any) -> tuple[Any, ...]:
    """Summed loss, number of tokens, and what is logged. Yours goes here."""
    return pretrain.loss_function(loss_mask, token_losses)


def main() -> None:
    args, model_config = pretrain.parse_arguments()
    model_provider = pretrain.make_model_provider(model_config, args)  # or a function that wraps it
    forward_step = partial(pretrain.forward_step, loss_function=loss_function)
    pretrain.train(args, model_config, model_provider, datasets, forward_step)


if __name__ == "__main__":
    with pretrain.reported_once():
        main()
