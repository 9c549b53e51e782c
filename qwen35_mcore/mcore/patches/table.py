"""Every patch of megatron-core."""

from __future__ import annotations

from qwen35_mcore.mcore.patches import (
    accumulating_products,
    atomic_checkpoint,
    bucket_padding,
    dataset_helpers,
    first_log_interval,
    float32_main_params,
    float32_order,
    flop_count,
    fsdp_checkpoint,
    gpt_checkpoint,
    graphed_step,
    load_despite_no_save,
    loader_position,
    loader_seed,
    mtp_loss_log,
    muon_matrices,
    optimizer_groups,
    padded_balancing_loss,
    precision_aware,
    receive_overflow,
    resume_position,
    sgd_state,
)
from qwen35_mcore.mcore.patches.patch import Patch

PATCHES: tuple[Patch, ...] = (
    accumulating_products.PATCH,
    *atomic_checkpoint.PATCHES,
    bucket_padding.PATCH,
    dataset_helpers.PATCH,
    first_log_interval.PATCH,
    flop_count.PATCH,
    *fsdp_checkpoint.PATCHES,
    float32_main_params.PATCH,
    float32_order.PATCH,
    gpt_checkpoint.PATCH,
    graphed_step.PATCH,
    load_despite_no_save.PATCH,
    loader_position.PATCH,
    loader_seed.PATCH,
    *mtp_loss_log.PATCHES,
    *muon_matrices.PATCHES,
    *optimizer_groups.PATCHES,
    padded_balancing_loss.PATCH,
    *precision_aware.PATCHES,
    receive_overflow.PATCH,
    *resume_position.PATCHES,
    sgd_state.PATCH,
)
