"""Where a run looks for NaN and infinity: inside the step, or behind it."""

from __future__ import annotations

from argparse import Namespace

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore import cpu_mode


def place_nan_checks(args: Namespace) -> None:
    """Decide it, once the CUDA graphs of the run are chosen.

    On a GPU the norm of all gradients is looked at behind the step (`mcore.patches.checked_step`),
    unless ``--no-check-for-nan-in-loss-and-grad`` is given: megatron's checks inside the step wait
    for the device at each loss and each bucket of gradients, and one graph allows none.
    ``--rerun-mode`` needs megatron's, and so do MTP heads that are detached, because the norm
    leaves them out. The losses of an evaluation are looked at unless it is a graph.

    Raises:
        ConfigError: detached MTP heads in one graph of the step, where nothing would see them.
    """
    checked, whole = args.check_for_nan_in_loss_and_grad, args.cuda_graph_impl == "full_iteration"
    if checked and whole and args.mtp_detach_heads:
        raise ConfigError(
            "a step in one CUDA graph is checked for NaN by the norm of all gradients, which "
            "leaves out MTP heads that are detached",
            got="--cuda-graph-impl full_iteration --mtp-detach-heads",
            fix="drop one of them, or pass --no-check-for-nan-in-loss-and-grad",
        )
    waits = cpu_mode.is_needed() or args.rerun_mode != "disabled" or args.mtp_detach_heads
    behind = whole or not waits
    args.check_behind_step = checked and behind
    args.check_evaluation = checked and not whole
    args.check_for_nan_in_loss_and_grad = checked and not behind
