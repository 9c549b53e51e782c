"""What is logged of a step that a CUDA graph replays: its kernels run, its Python does not."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from qwen35_mcore.mcore.patches.mtp_loss_log import PATCHES
from tests.helpers.distributed import WorkerPool
from tests.helpers.training import Layout, initialize


def logged_mtp_losses() -> list[float]:
    """Of two steps, with a loss of 1 for two tokens on rank 0 and of 2 for six on rank 1."""
    initialize(Layout())
    for patch in PATCHES:
        patch.apply()
    helper, rank = MTPLossLoggingHelper, torch.distributed.get_rank()
    helper.tracker.clear()
    loss, tokens = torch.tensor(1.0 + rank), torch.tensor(2.0 + 4 * rank)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    helper.save_metrics_to_tracker(loss, tokens, tokens, 0, 1, avg_group=group)
    logs: list[dict[str, torch.Tensor]] = [{}, {}]
    helper.track_mtp_metrics(1.0, 1, None, None, logs[0])
    helper.tracker["loss_values"][0] += loss * tokens  # the kernels of the replay
    helper.tracker["total_values"][0] += tokens
    helper.track_mtp_metrics(1.0, 2, None, None, logs[1])
    return [float(log["mtp_1 loss"]) for log in logs]


def test_the_mtp_loss_of_a_replay_is_that_of_all_ranks(pool: WorkerPool) -> None:
    assert pool.run(logged_mtp_losses, 2) == [[1.75, 1.75]] * 2
