"""Which precision, exchange of the experts' rows, and CUDA graphs a layout can run with.

The same as what training refuses or does not choose by itself (`training.checks.run`,
`training.choices`, `training.cuda_graphs`), from sizes alone.
"""

from __future__ import annotations

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.parallel.layout import ParallelLayout
from qwen35_mcore.parallel.violation import Violation


def broken_switches(
    model_config: Qwen35Config,
    layout: ParallelLayout,
    *,
    recompute: str,
    precision: str,
    dispatcher: str,
    graphs: str,
    gpu: str,
    precisions: tuple[str, ...],
    gpus_of_a_node: int,
    vision: bool = False,
) -> list[Violation]:
    """Everything against them; empty when nothing is.

    Args:
        recompute: none, selective or full.
        precision: bf16, fp8-blockwise or fp8-tensorwise.
        dispatcher: alltoall or ncclep.
        graphs: none, parts (of layers) or full (the step).
        gpu: its name.
        precisions: that it has.
        gpus_of_a_node: that the job uses.
        vision: whether the run trains a vision tower.
    """
    ranks = layout.ep * layout.expert_tp if model_config.is_moe else 1
    apart = layout.tp * layout.cp * layout.pp
    smaller = "graphs=none" if recompute == "full" else "graphs=parts"
    rows = (
        (
            precision not in precisions,
            "precision is one of the GPU's",
            f"{gpu} has no FP8 tensor cores",
            f"precision={precision}",
            f"precision={precisions[0]}",
            "leave precision out of the layout, or pass --gpu h100-80g",
        ),
        (
            dispatcher == "ncclep" and not 1 < ranks <= gpus_of_a_node,
            "dispatcher=ncclep spreads experts in a node",
            "NCCL EP exchanges rows between ranks of one node",
            f"{ranks} ranks share the experts of a layer",
            f"ep * etp from 2 to {gpus_of_a_node}",
            "change ep, or take dispatcher=alltoall",
        ),
        (
            graphs == "full" and dispatcher == "ncclep" and apart > 1,
            "graphs=full with NCCL EP needs tp, cp and pp of 1",
            "no graph of a step with both was compared with a run without",
            f"tp {layout.tp}, cp {layout.cp}, pp {layout.pp}, dispatcher={dispatcher}",
            "tp, cp and pp of 1, or ep and etp of 1",
            f"take {smaller}",
        ),
        (
            graphs == "full" and ranks > 1 and dispatcher != "ncclep",
            "graphs=full has no all-to-all",
            "each MoE layer waits for the host to learn how many tokens an expert has",
            f"dispatcher={dispatcher}, {ranks} ranks share the experts of a layer",
            "dispatcher=ncclep, or ep and etp of 1",
            f"take dispatcher=ncclep, or {smaller}" if apart == 1 else f"take {smaller}",
        ),
        (
            graphs != "none" and vision,
            "the vision tower trains without graphs",
            "positions and patches differ from step to step, and a graph repeats the first",
            f"graphs={graphs}",
            "graphs=none",
            "take graphs=none",
        ),
        (
            graphs == "parts" and recompute == "full",
            "graphs=parts goes without recompute=full",
            "megatron captures no part of a layer that is computed again as a whole",
            f"recompute={recompute}",
            "recompute=none or selective",
            "take one of these",
        ),
    )
    names = ("rule", "reason", "value", "allowed", "fix")
    return [Violation(**dict(zip(names, row, strict=True))) for broken, *row in rows if broken]
