"""Stop before the update of a step in which a rank was sent more rows than its buffer holds.

Depends on megatron-core 0.19: where ``--moe-expert-rank-capacity-factor`` is set it asks its
dispatchers behind each step's backward pass whether rows were dropped. Its answer knows HybridEP
alone, and repeats the step without a limit, which NCCL EP cannot.
"""

from __future__ import annotations

import logging
from typing import Any

from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher, _NCCLEPManager
from megatron.training import get_args

from qwen35_mcore.errors import Qwen35Error
from qwen35_mcore.mcore.nccl_ep import FILL
from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows

logger = logging.getLogger(__name__)


class ReceiveOverflowError(Qwen35Error):
    """A rank was sent more rows than its receive buffer holds."""

    exit_status = 1


def _stopping(original: Any) -> Any:
    fullest = 0

    def check_moe_overflow(self: Any) -> tuple[int, int, int]:
        nonlocal fullest
        if self.config.moe_flex_dispatcher_backend != "ncclep":
            return original(self)
        rows, capacity = FILL.take()
        if rows > capacity:
            raise _error(rows, capacity)
        args, fullest = get_args(), max(fullest, rows)
        if capacity and (args.curr_iteration + 1) % args.log_interval == 0:
            if args.rank == 0:
                logger.info(
                    "fullest receive buffer of the experts: %s of %s rows (%.0f %%)",
                    f"{fullest:,}", f"{capacity:,}", 100 * fullest / capacity,
                )  # fmt: skip
            fullest = 0
        return 0, 0, 0

    return check_moe_overflow


def _error(rows: int, capacity: int) -> ReceiveOverflowError:
    args = get_args()
    factor = args.moe_expert_rank_capacity_factor
    return ReceiveOverflowError(
        f"training stopped in iteration {args.curr_iteration + 1}, before its update: a rank was "
        "sent more rows than its experts' receive buffer holds",
        got=f"{rows:,} rows, {rows / capacity:.2f} times the buffer's {capacity:,} "
        f"(--moe-expert-rank-capacity-factor {factor:g})",
        fix=f"pass --moe-expert-rank-capacity-factor {1.1 * factor * rows / capacity:.2f} and go "
        "on from the last checkpoint, or --moe-token-dispatcher-type alltoall, which has no limit",
    )


def _probe() -> Verdict:
    """Does the flex dispatcher know nothing of what NCCL EP dropped?"""
    dispatcher = object.__new__(MoEFlexTokenDispatcher)
    dispatcher._comm_manager = object.__new__(_NCCLEPManager)
    return shows(dispatcher.check_over_budget() is None)


PATCH = Patch(
    name="full receive buffers of NCCL EP",
    target="megatron.core.transformer.moe.paged_stash:PagedStashRunner.check_moe_overflow",
    why="rows that NCCL EP drops are not noticed, and the step trains without them",
    replace=_stopping,
    probe=_probe,
)
